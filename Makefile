# make demo: the whole job on data it makes itself. make test: all tests. See README.md.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
LOCK := $(wildcard lock/*.txt)

.PHONY: setup demo test fast nightly check soak mutants bench gpu lock audit format clean

setup: $(READY)

# Made anew when what is to be installed changes.
$(READY): setup.cfg pyproject.toml constraints.txt lock/install.py $(LOCK)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python lock/install.py test
	touch $@

demo: setup
	$(BIN)/python launch/demo.py

test: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not nightly"

# The benchmarks, each at its smallest: they measure more than they test.
nightly: setup
	$(BIN)/python -m pytest -n 2 --dist load -m nightly

fast: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow"

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_layering.py

# A run is killed 200 times and goes on; half an hour. Another meets 100 hazards: disks that fail, torn
# lines, dead logs, ranks that stand still. Their first lines say how to repeat a failure.
soak: setup
	PHI3V_KILLS=200 PHI3V_HAZARDS=100 $(BIN)/python -m pytest -s \
	    tests/distributed/test_kills.py tests/distributed/test_soak.py

# Known faults, one at a time in a copy of the code: the fast tests must notice each; ten minutes.
mutants: setup
	$(BIN)/python -m tests.mutants.mutate

# Tables of this machine, quiet for half an hour; benchmarks/README.md says what each is.
bench: setup
	for name in packing step loader cost collectives checkpoint; do \
	    $(BIN)/python benchmarks/$$name.py || exit 1; done

# What only GPUs can show, on all that are there: eight minutes at most, one table in runs/gpu.
gpu: setup
	$(BIN)/python benchmarks/gpu.py

# The lock files, made again of what setup.cfg and constraints.txt ask for; needs PyPI.
lock: setup
	$(BIN)/python lock/install.py tools
	$(BIN)/python lock/make.py

# Known vulnerabilities of the locked versions; needs PyPI, and says so and fails without it.
audit: setup
	$(BIN)/python lock/install.py tools
	$(BIN)/python lock/audit.py

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build

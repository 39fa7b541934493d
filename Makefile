# make demo: the whole job on data it makes itself. make test: all tests. See README.md.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: setup demo test fast check soak mutants bench gpu format clean

setup: $(READY)

# Made anew when what is to be installed changes.
$(READY): setup.cfg pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@

demo: setup
	$(BIN)/python launch/demo.py

test: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

fast: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow"

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_layering.py

# A run is killed 200 times and goes on; half an hour. Its first line says how to repeat a failure.
soak: setup
	PHI3V_KILLS=200 $(BIN)/python -m pytest -s tests/distributed/test_kills.py

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

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build

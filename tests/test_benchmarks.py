"""Every benchmark runs, small, and prints its sides beside each other; none is timed here."""

import json
import re
import runpy
import subprocess
import sys
import tempfile
import time
import warnings
from argparse import Namespace
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from scipy.optimize import nnls

from phi3v.config.schema import CostSection

ROOT = Path(__file__).resolve().parents[1]
SMALL = {
    "cost.py": ["--packs=8", "--repeats=1", "--tokens=128", "--num_crops=4", "--freeze", "vision"],
    "prepare.py": ["--images=1", "--repeats=1", "--width=640"],
    "workers.py": ["--rows=20", "--repeats=1", "--num_crops=4"],
    "reading.py": ["--samples=3", "--repeats=1"],
    "index.py": ["--samples=1000", "--repeats=1"],
    "codecs.py": ["--repeats=1"],
    "packing.py": ["--samples=2000", "--repeats=1"],
    "loader.py": ["--samples=4", "--repeats=1", "--steps=3", "--seconds=0.01"],
    "checkpoint.py": ["--gib=0.001", "--repeats=1", "--products=1"],
    "step.py": ["--models", "tiny", "--samples=8", "--repeats=1"],
    "collectives.py": ["--width=192"],
    "intervals.py": ["--samples=20"],
    "spikes.py": ["--steps=160"],
    "gpu.py": ["--toy", "--steps=1"],
}
PIECES = {"timing.py", "mixture.py", "padded.py", "fullsize.py"} | {
    f"gpu_{name}.py" for name in ("table", "ranks", "checks", "training", "memory", "speed")
}

SECTIONS = set(
    "start kernels data waits inputs train jsons memory save attention steps padded longest".split()
)
# A section that is a program of its own, and imports nothing that takes a second.
FINDS = """
import json, time
def find(check, verdict):
    row = dict(section={name!r}, check=check, expected="", seen="", verdict=verdict)
    open({path!r}, "a").write(json.dumps(row) + chr(10))
{program}
"""

pytestmark = [pytest.mark.slow, pytest.mark.nightly]


@cache
def lines_of(script: str) -> list[str]:
    """What a benchmark prints; each is run once."""
    command = [sys.executable, str(ROOT / "benchmarks" / script), *SMALL[script]]
    with tempfile.TemporaryDirectory() as folder:
        run = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


def test_no_benchmark_is_left_out() -> None:
    assert {path.name for path in (ROOT / "benchmarks").glob("*.py")} == SMALL.keys() | PIECES


@pytest.mark.parametrize("script", SMALL)
def test_a_benchmark_says_what_it_ran_on(script: str) -> None:
    line = lines_of(script)[0].removeprefix("machine: ")
    assert "cores; Python" in line and "commit" in line


def test_preparing_is_compared_with_the_published_work() -> None:
    """It asserts by itself that the published side gives the processor's numbers."""
    lines = lines_of("prepare.py")[2:]
    sides = ["published", "ours", "split", "ours", "split"]
    assert [line.split()[0] for line in lines[1:6]] == sides
    assert [line.removesuffix(" crops") for line in lines[::6]] == ["640x480, 4", "640x480, 16"]


def test_workers_are_compared_with_one() -> None:
    assert [line.split()[0] for line in lines_of("workers.py")[2:]] == ["1", "2", "ratio"]


def test_waits_and_rates_of_the_loader_stand_beside_reading_in_turn() -> None:
    sides = [line.split()[:4] for line in lines_of("loader.py")[1:]]
    assert [side[:2] for side in sides[:2]] == [["wait", "loader"], ["wait", "in"]]
    timed = [["raw", "loader"], ["raw", "in"], ["raw", "sampled"], ["raw", "digest"]]
    assert [side[:2] for side in sides[3:7]] == timed
    assert sides[7:9] == [["raw", "ratio", "of", "in"], ["raw", "ratio", "of", "sampled"]]


def test_saving_behind_training_is_compared_with_torchs_own() -> None:
    lines = [line.split() for line in lines_of("checkpoint.py")[1:-1]]
    assert [line[0] for line in lines[:2]] == ["first", "prepared"]
    others = ["async_save", "kept", "staged", "torch.save"]
    stalls = [line[0] for line in lines if line[1] == "stall"][2:]
    assert stalls == ["ours", "alone", *others]
    assert [line[0] for line in lines if line[1:3] == ["over", "ours"]] == others


def test_costs_are_predicted_beside_flops_and_printed_for_a_recipe() -> None:
    lines = lines_of("cost.py")[2:]
    assert [line[:16].strip() for line in lines[1:4]] == ["FLOPs", "FLOPs and pack", "fitted"]
    ((section, values),) = yaml.safe_load(lines[-1]).items()
    assert section == "data" and CostSection(**{k: float(v) for k, v in values["cost"].items()})


def test_fitted_costs_are_the_best_without_a_negative_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    fit = runpy.run_path(str(ROOT / "benchmarks/cost.py"))["fit"]
    random = np.random.default_rng(0)
    for _ in range(20):
        columns = random.random((30, 4)) * 10.0 ** random.integers(-3, 9, 4)
        exact = random.random(4) / columns.max(axis=0)
        assert fit(columns, columns @ exact) == pytest.approx(exact, rel=1e-6)
        seconds = np.abs(columns @ (exact * random.choice([-1, 1], 4))) + 0.05 + random.random(30)
        relative = columns / seconds[:, None]
        _, least = nnls(relative / relative.max(axis=0), np.ones(30))
        found = fit(columns, seconds)
        assert (found >= 0).all()
        assert np.linalg.norm(relative @ found - 1) == pytest.approx(least, rel=1e-9)


def test_a_step_is_compared_with_padded_ones_of_the_same_loss() -> None:
    """It asserts by itself that all sides have the same loss."""
    lines = lines_of("step.py")[1:]
    sides = ["padded", "joined", "again", "packed", "fused", "padded", "joined", "again"]
    for case in (lines[:11], lines[11:]):
        assert case[0].startswith("tiny, ")
        assert [line.split()[0] for line in case[3:]] == sides


def test_collectives_are_counted_on_both_sides() -> None:
    """At the published widths ours are 0.29 of stock's; a model this small is gathered at once."""
    *kinds, every = lines_of("collectives.py")[2:]
    assert {line.split()[0] for line in kinds} >= {"allgather_base", "reduce_scatter_base"}
    assert every.split()[0] == "all" and float(every.split()[-1]) <= 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="make gpu does it, and more")
def test_a_gpus_sections_all_run_at_toy_size_and_find_nothing_false() -> None:
    lines = lines_of("gpu.py")
    rows = [line.split(maxsplit=4) for line in lines if re.search(r" \d+\.\d s  ", line)]
    ran = {name for name, verdict, *_ in rows if verdict in ("true", "measured")}
    skipped = {name for name, *_, rest in rows if rest.startswith("the section: skipped")}
    assert ran == SECTIONS - {"waits", "memory"} and skipped == {"waits", "memory"}
    assert re.fullmatch(
        r"\d+ true, 0 FALSE, .* 0 not run; \d+ s; see runs/gpu/table.txt", lines[-1]
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line_says_so() -> None:
    script = ROOT / "benchmarks/gpu.py"
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)
    assert run.returncode == 2 and run.stderr.count("\n") == 1
    assert "sees no CUDA device" in run.stderr and "--toy" in run.stderr


def test_a_falsehood_ends_the_run_of_sections_and_a_budget_is_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Sections that are programs of a line, in real processes."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    gpu, table = import_module("gpu"), import_module("gpu_table")

    def run(programs: dict[str, str], budget: float = 60, keeps_going: bool = False) -> Any:
        sections = [gpu.Section(name, "", "", 5.0) for name in programs]
        monkeypatch.setattr(gpu, "SECTIONS", sections)
        monkeypatch.setattr(gpu, "BY_NAME", {section.name: section for section in sections})

        def child(section: Any, order: Path, arguments: Any) -> list[str]:
            name, path = section.name, json.loads(order.read_text())["found"]
            program = FINDS.format(name=name, path=path, program=programs[name])
            return [sys.executable, "-c", program]

        monkeypatch.setattr(gpu, "child_command", child)
        folder = tmp_path / str(time.monotonic_ns())
        folder.mkdir()
        arguments = Namespace(
            sections=[], budget=budget, keep_going=keeps_going, out=folder, toy=False
        )
        result = table.Table(folder, {})
        gpu.run_sections(result, arguments, folder)
        assert len(json.loads((folder / "table.json").read_text())["rows"]) == len(result.rows)
        return [(row.section, row.check, row.verdict) for row in result.rows]

    right, wrong, hangs = "find('one', 'true')", "find('two', 'FALSE')", "; time.sleep(100)"
    assert run({"a": right, "b": wrong + hangs, "c": right}) == [
        ("a", "one", "true"),
        ("b", "two", "FALSE"),
    ]
    assert run({"b": wrong, "c": right}, keeps_going=True)[-1] == ("c", "one", "true")
    ends_badly = run({"a": right + "; 1 / 0", "c": right})
    assert ends_badly == [("a", "one", "true"), ("a", "the section", "FALSE")]
    late = run({"a": right + hangs})
    assert late == [("a", "one", "true"), ("a", "the section", "FALSE")]
    over = run({"a": right + hangs, "c": right}, budget=3)
    assert over[1:] == [
        ("a", "the rest of the section", "not run"),
        ("c", "the section", "not run"),
    ]


def test_an_operation_that_waits_is_named_with_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.cuda's debug mode is stood in for: an error where it is asked for, a warning else."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    checks = import_module("gpu_checks")
    mode = "default"

    def set_mode(name: str) -> None:
        nonlocal mode
        mode = name

    def wait() -> None:
        if mode == "error":
            raise RuntimeError(checks.WAITS)
        if mode == "warn":
            warnings.warn(checks.WAITS, stacklevel=1)

    class Waiting(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            wait()  # below the dispatcher
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            return torch.ops.phi3v_test.waiting(gradient)

    library = torch.library.Library("phi3v_test", "DEF")
    library.define("waiting(Tensor x) -> Tensor")

    def waiting(x: torch.Tensor) -> torch.Tensor:
        wait()
        return x.clone()

    library.impl("waiting", waiting, "CPU")
    x = torch.ones(3, requires_grad=True)
    found = checks.waits_of(lambda: Waiting.apply(x).sum().backward(), set_mode)
    assert [word.split(" at ")[0] for word in found] == [
        "phi3v_test.waiting.default",
        "below the dispatcher",
    ]
    assert x.grad is not None and mode == "default"


def test_the_intervals_of_rates_hold_what_they_say() -> None:
    rates = lines_of("intervals.py")[1]
    held = [float(share) for share in re.findall(r"([\d.]+)%", rates)]
    assert rates.startswith("rates, least: n=6 ") and min(held) >= 95


def test_the_limit_of_spikes_stands_beside_that_of_before() -> None:
    """Without heavy tails 8 deviations skip no healthy step, and find more than before."""
    lines = [line.split() for line in lines_of("spikes.py")[3:]]
    cases = [line[: -3 * 4] for line in lines]
    assert len(cases) == 32 and [case[-1] for case in cases[:2]] == ["before", "now"]
    for before, now in zip(lines[:16:2], lines[1:16:2], strict=True):
        assert before[:-13] == now[:-13] and float(now[-6]) == 0
    found = [sum(float(line[-4].rstrip("%")) for line in lines[k:16:2]) for k in (0, 1)]
    assert found[0] < found[1]


def test_packing_is_compared_with_padding_and_with_chance() -> None:
    """Of each mixture: its packing, its balance on three numbers of ranks, its bias."""
    lines = lines_of("packing.py")[2:]
    mixtures = ["any, 4", "any, 16", "photos, 4", "photos, 16"]
    names = [line[:16].strip() for line in lines]
    assert [names.count(mixture) for mixture in mixtures] == [5] * 4
    packed = [line[16:40].split() for line in lines[lines.index("") + 3 :][:4]]
    assert all(float(padded) < float(ours) <= 1 for padded, ours in packed)

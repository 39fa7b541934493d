"""Every benchmark runs, small, and prints its sides beside each other; none is timed here."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SMALL = {
    "prepare.py": ["--images=1", "--repeats=1", "--width=640"],
    "workers.py": ["--rows=20", "--repeats=1", "--num_crops=4"],
    "reading.py": ["--samples=3", "--repeats=1"],
    "index.py": ["--samples=1000", "--repeats=1"],
    "codecs.py": ["--repeats=1"],
}

pytestmark = pytest.mark.slow


def lines_of(script: str) -> list[str]:
    command = [sys.executable, f"benchmarks/{script}", *SMALL[script]]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


def test_no_benchmark_is_left_out() -> None:
    assert {path.name for path in (ROOT / "benchmarks").glob("*.py")} == {*SMALL, "timing.py"}


@pytest.mark.parametrize("script", SMALL)
def test_a_benchmark_says_what_it_ran_on(script: str) -> None:
    line = lines_of(script)[0]
    assert "cores; Python" in line and "commit" in line


def test_preparing_is_compared_with_the_published_work() -> None:
    """It asserts by itself that the published side gives the processor's numbers."""
    lines = lines_of("prepare.py")[2:]
    sides = ["published", "ours", "split", "ours", "split"]
    assert [line.split()[0] for line in lines[1:6]] == sides
    assert [line.removesuffix(" crops") for line in lines[::6]] == ["640x480, 4", "640x480, 16"]


def test_workers_are_compared_with_one() -> None:
    assert [line.split()[0] for line in lines_of("workers.py")[2:]] == ["1", "2", "ratio"]

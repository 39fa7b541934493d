"""The benchmark of preparation runs, and its published side is the published processor's work."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_benchmark_prints_both_sides_and_their_ratio_for_every_size() -> None:
    """It asserts by itself that the published side gives the processor's numbers."""
    command = [sys.executable, "benchmarks/prepare.py", "--images", "1", "--repeats", "1"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    machine, _, *lines = run.stdout.splitlines()
    assert "cores; Python" in machine and "commit" in machine
    assert [line.split()[0] for line in lines[1:4]] == ["published", "ours", "ratio"]
    names = [line.removesuffix(" crops") for line in lines[::4]]
    sizes = ("640x480", "1344x1008", "2016x1512")
    assert names == [f"{size}, {crops}" for size in sizes for crops in (4, 16)]

"""Several sides of a question timed in one run, in turn, and what they ran on.

Sides take turns, so that whatever slows the machine for a while slows them all.
"""

import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL
import torch

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Times:
    """Seconds of every repeat of one side: by the clock, and of the processor."""

    wall: np.ndarray
    processor: np.ndarray

    def __truediv__(self, parts: int) -> "Times":
        """The times of one of so many equal parts."""
        return Times(self.wall / parts, self.processor / parts)

    def __str__(self) -> str:
        return f"{_spread(self.wall)}, processor {_spread(self.processor)}"


def _spread(seconds: np.ndarray) -> str:
    low, median, high = np.percentile(seconds, [25, 50, 75]) * 1e3
    return f"{median:.2f} ms ({low:.2f} to {high:.2f})"


def ratios(slow: Times, fast: Times) -> str:
    """How many times faster one side is, by the medians of both clocks."""
    wall, processor = (
        np.median(getattr(slow, clock)) / np.median(getattr(fast, clock))
        for clock in ("wall", "processor")
    )
    return f"{wall:.2f}x, processor {processor:.2f}x"


def measure(sides: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, Times]:
    """Time each side `repeats` times, in turn, after one call each that is not counted."""
    seconds = np.zeros((repeats + 1, len(sides), 2))
    for repeat in seconds:
        for side, call in zip(repeat, sides.values(), strict=True):
            start = time.perf_counter(), time.process_time()
            call()
            side[:] = np.subtract((time.perf_counter(), time.process_time()), start)
    return {name: Times(*seconds[1:, position].T) for position, name in enumerate(sides)}


def describe_machine() -> str:
    """Processor, versions and commit, in one line."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return (
        f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores; Python "
        f"{platform.python_version()}, torch {torch.__version__}, Pillow {PIL.__version__}; "
        f"commit {_commit()}"
    )


def _commit() -> str:
    """Of this checkout; a copy of it, on a machine without git, has none."""
    describe = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(describe, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()

"""Steps that would spoil the weights: skipped on all ranks alike, written down, left out.

A step is skipped if its loss or its gradient is not finite, or if its loss lies far above those
before it (`faults.spike`). DeepSpeed skips a step whose gradient is not finite; a spike is made
such a step. After `faults.rollback_after` of them in a row the run goes back to the last
checkpoint before them, and their packs are left out for good.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from phi3v.data.packing import Position
from phi3v.files import append_json, read_lines, write_text

HISTORY = 64  # steps whose losses tell what is usual
NEEDED = 16  # of them at least, before anything is a spike
TO_DEVIATION = 1.4826  # a normal distribution's standard deviation over its median deviation
FLOOR = 0.01  # of the median: equal losses would make any other a spike

MAX_ROLLBACKS = 3  # to one checkpoint; then the weights themselves are at fault


def spike_limit(losses: Sequence[float], deviations: float | None) -> float:
    """The loss above which a step is skipped; infinity if nothing is a spike yet.

    losses      of the steps before that were not skipped
    deviations  `faults.spike`

    Source: median + k * MAD, the median absolute deviation scaled to a standard deviation
    (Rousseeuw and Croux 1993, Alternatives to the Median Absolute Deviation).
    """
    recent = np.asarray(losses[-HISTORY:])
    if deviations is None or len(recent) < NEEDED:
        return float("inf")
    median = float(np.median(recent))
    spread = TO_DEVIATION * float(np.median(np.abs(recent - median)))
    return median + deviations * max(spread, FLOOR * abs(median))


def reason_to_skip(loss: float, norm: float, limit: float) -> str | None:
    """Why a step was skipped, None if it was not."""
    if not np.isfinite(loss):
        return "the loss is not finite"
    if loss > limit:
        return f"the loss is above {limit:.6g}"
    return None if np.isfinite(norm) else "the gradient is not finite"


@dataclass(frozen=True)
class FaultLog:
    """faults.jsonl of a run: a line for each skipped step, and one for each time it went back."""

    path: Path

    def read(self) -> list[dict[str, Any]]:
        return read_lines(self.path)

    def keep(self, last_step: int) -> None:
        """Drop the lines of steps that are about to be repeated, which those left out are not."""
        if not self.path.is_file():
            return
        left_out = self.left_out()
        kept = [
            line
            for line in self.read()
            if "left_out" in line or line["step"] <= last_step or Position(**line["at"]) in left_out
        ]
        write_text(self.path, "".join(json.dumps(line, allow_nan=False) + "\n" for line in kept))

    def add(self, line: Mapping[str, Any]) -> None:
        append_json(self.path, line)

    def left_out(self) -> list[Position]:
        """The positions whose packs are no longer trained on, of all times the run went back."""
        return [Position(**at) for line in self.read() for at in line.get("left_out", ())]

    def rollbacks_to(self, step: int) -> int:
        """How often the run went back to a step's checkpoint."""
        return sum(line.get("back_to") == step for line in self.read())

    def add_rollback(self, back_to: int, skipped: Sequence[Position]) -> None:
        self.add({"back_to": back_to, "left_out": [asdict(at) for at in skipped]})

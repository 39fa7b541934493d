"""Steps that would spoil the weights: skipped on all ranks alike, written down, left out.

A step is skipped if its loss or its gradient is not finite, or if its loss lies far above where
those before it lead (`faults.spike`). DeepSpeed skips a step whose gradient is not finite; a spike
is made such a step. After `faults.rollback_after` of them in a row the run goes back to the last
checkpoint before them, and their packs are left out for good.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from phi3v.data.packing import Position
from phi3v.lines import append_line, read_lines, write_lines
from phi3v.shapes import COUNT, NUMBER

HISTORY = 32  # steps whose losses tell what is usual; over 64 a fast fall is no line any more
NEEDED = 16  # of them at least, before anything is a spike
TO_DEVIATION = 1.4826  # a normal distribution's standard deviation over its median deviation
FLOOR = 0.01  # of the expected loss: equal losses would make any other a spike
LEAST = 0.001  # nats, for a loss that has fallen to rounding

PLACE = {"epoch?": COUNT, "window?": COUNT, "step?": COUNT, "*": ()}  # a Position
SKIPPED = {"step": COUNT, "at": PLACE, "reason": str, "loss?": (NUMBER, None), "left_out?": ()}
FAULT = (SKIPPED, {"back_to": COUNT, "left_out": [PLACE]})

MAX_ROLLBACKS = 3  # to one checkpoint; then the weights themselves are at fault


def spike_limit(losses: Sequence[float], deviations: float | None) -> float:
    """The loss above which a step is skipped; infinity if nothing is a spike yet.

    losses      of the steps before that were not skipped: those that moved the weights
    deviations  `faults.spike`

    A line through the logarithms of the last losses says where the next one is expected, so that
    a curve that falls is followed and not taken for a wide one. It is the median of the slopes
    between all pairs, which a quarter of wild losses hardly moves. What lies above it is measured
    in nats, by the median deviation scaled to a standard deviation; not as a share of the loss,
    by which noise that does not fall with the loss would be a spike (benchmarks/spikes.py).
    Takes 0.1 ms.

    Source: Theil 1950 and Sen 1968, Estimates of the Regression Coefficient Based on Kendall's
    Tau; Rousseeuw and Croux 1993, Alternatives to the Median Absolute Deviation.
    """
    recent = np.asarray(losses[-HISTORY:])
    if deviations is None or len(recent) < NEEDED:
        return float("inf")
    *fitted, expected = _trend(recent)
    spread = TO_DEVIATION * float(np.median(np.abs(recent - fitted)))
    return float(expected + deviations * max(spread, FLOOR * expected, LEAST))


def _trend(losses: np.ndarray) -> np.ndarray:
    """The exponential through n losses, at each of them and at the next: (n + 1,)."""
    places = np.arange(len(losses) + 1)
    logs = np.log(np.maximum(losses, np.finfo(np.float64).tiny))  # a loss may round to 0
    first, second = np.triu_indices(len(losses), 1)
    slope = np.median((logs[second] - logs[first]) / (second - first))
    return np.exp(np.median(logs - slope * places[:-1]) + slope * places)


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
        return read_lines(self.path, kind=FAULT)

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
        write_lines(self.path, kept)

    def add(self, line: Mapping[str, Any]) -> None:
        append_line(self.path, line)

    def left_out(self) -> list[Position]:
        """The positions whose packs are no longer trained on, of all times the run went back."""
        return [Position(**at) for line in self.read() for at in line.get("left_out", ())]

    def rollbacks_to(self, step: int) -> int:
        """How often the run went back to a step's checkpoint."""
        return sum(line.get("back_to") == step for line in self.read())

    def add_rollback(self, back_to: int, skipped: Sequence[Position]) -> None:
        self.add({"back_to": back_to, "left_out": [asdict(at) for at in skipped]})

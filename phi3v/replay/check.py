"""Whether the steps up to one give the numbers that their run wrote down.

They are the same to the bit where nothing differs that sums may be rounded by: as many ranks, the
same machine and versions, and a CPU or `debug.deterministic`. Elsewhere a relative difference of up
to `TOLERANCE` agrees.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from phi3v.replay.again import Again, Line
from phi3v.replay.listing import number_text
from phi3v.training.loop import StepResult
from phi3v.training.run_folder import METRICS, describe_environment

# By precision; docs/operations.md has what was measured.
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}
LEAST = 0.01  # smaller numbers are compared as if they were as large: their rounding is not smaller
MACHINE = ("host", "device", "python", "versions", "commit")  # of environment.json


@dataclass(frozen=True)
class Pair:
    """A number that a run wrote down, and what it is now; None: no finite number."""

    name: str
    written: float | None
    found: float | None

    @property
    def difference(self) -> float:
        """Relative; 0 for the same bits, infinity where one alone is finite."""
        if self.written == self.found:
            return 0.0
        if self.written is None or self.found is None:
            return math.inf
        return abs(self.written - self.found) / max(abs(self.written), abs(self.found), LEAST)

    def __str__(self) -> str:
        now, then = number_text(self.found), number_text(self.written)
        return f"{self.name} {now}, in {METRICS} {then} ({self._verdict()})"

    def _verdict(self) -> str:
        if self.written == self.found:
            return "the same" if self.written is None else "the same bits"
        return "differs" if math.isinf(self.difference) else f"{self.difference:.1e} off"


@dataclass
class Check:
    """What was compared so far; on all ranks the same.

    has_single  a step's loss of its samples one by one is among it
    """

    again: Again
    worst: float = 0.0
    compared: set[int] = field(default_factory=set)
    wrong: set[int] = field(default_factory=set)
    ranks: set[Any] = field(default_factory=set)
    has_single: bool = False

    @property
    def tolerance(self) -> float:
        return TOLERANCE["bfloat16" if self.again.run.ds.bf16 else "float32"]

    def take(self, last: int) -> Iterator[str]:
        """Take the steps up to `last`, and say of each what it gives beside what was written."""
        for line, result in self.again.steps(last):
            self.ranks.add(line.get("ranks", "an unknown number of"))
            yield self.compare(line["step"], pairs_of(line, result))

    def compare_single(self, step: int, loss: Pair) -> str:
        """The same of the loss that a step's samples give one by one, in another order of sums."""
        self.has_single = True
        return self.compare(step, (loss,))

    def compare(self, step: int, pairs: tuple[Pair, ...]) -> str:
        """Note how far the numbers of a step are off, and say it."""
        off = max(pair.difference for pair in pairs)
        self.worst = max(self.worst, off)
        self.compared.add(step)
        if off > self.tolerance:
            self.wrong.add(step)
        return f"step {step}: {'; '.join(map(str, pairs))}"

    def fault(self) -> str | None:
        """Why the run's numbers are not those found, None if they are."""
        if not self.wrong:
            return None
        path = self.again.run.folder.path
        return (
            f"{len(self.wrong)} of {len(self.compared)} steps of {path}, from "
            f"step {min(self.wrong)} on, give other numbers than its {METRICS}, beyond "
            f"{self.tolerance:g}; see whether "
            "the shards are whole (launch/prepare.py RECIPE --verify) and what was changed since"
        )

    def verdict(self) -> str:
        """That they agree, and how far."""
        what = f"{len(self.compared)} steps of {self.again.run.folder.path}"
        if self.worst == 0:
            return f"{what}: the same bits as in {METRICS}"
        other = ", ".join(self._differing()) or "nothing that is known to differ"
        return f"{what}: {self.worst:.1e} off at most, {self.tolerance:g} agree; with {other}"

    def _differing(self) -> list[str]:
        """What differs from the newest start of the run, by which sums may be rounded otherwise."""
        run, written = self.again.run, self.again.taken.environment
        own = run.ranks.world_size
        others = sorted(str(ranks) for ranks in self.ranks - {own})
        num = f"{own} rank{'s' * (own > 1)}"
        reasons = [f"{num} instead of {' and '.join(others)}"] if others else []
        reasons += ["a step's samples one by one"] * self.has_single
        now: Mapping[str, Any] = describe_environment(own)
        reasons += [f"another {name}" for name in MACHINE if written.get(name) != now[name]]
        if run.device.type != "cpu" and not run.cfg.debug.deterministic:
            reasons.append("debug.deterministic off")
        return reasons


def pairs_of(line: Line, result: StepResult) -> tuple[Pair, ...]:
    """Loss and gradient norm of a step."""
    return (
        Pair("loss", line["loss"], finite(result.loss)),
        Pair("gradient norm", line["grad_norm"], finite(result.norm)),
    )


def finite(value: float) -> float | None:
    """None for what metrics.jsonl cannot say."""
    return value if math.isfinite(value) else None

"""The interface of all sinks, and what they are given."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

MAX_BINS = 64
PICTURE = "image"  # the column of a table's pictures, its first
TRAIN, EVALUATION, EXAMPLES = "train", "eval", "eval/examples"  # records

Cell = str | float | bool | None


@dataclass(frozen=True)
class Histogram:
    """How often values fall between edges: counts (n,), edges (n + 1,)."""

    counts: np.ndarray
    edges: np.ndarray

    @classmethod
    def of(cls, values: np.ndarray) -> "Histogram":
        """Count whole numbers, each in a bin of its own if they are few."""
        low, high = int(values.min()), int(values.max())
        bins = min(MAX_BINS, high - low + 1)
        edges = np.linspace(low - 0.5, high + 0.5, bins + 1)
        return cls(*np.histogram(values, edges))


@dataclass(frozen=True)
class Table:
    """Rows of the columns, and a picture (H, W, 3) uint8 or None for each row."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    pictures: Sequence[np.ndarray | None]


@dataclass(frozen=True)
class Artifact:
    """Something large that a run made: where it lies, and the small files that describe it."""

    name: str
    folder: Path
    files: Sequence[Path]
    aliases: Sequence[str]
    facts: Mapping[str, Any]


class Sink(Protocol):
    """Somewhere that records go. Every method may raise what it likes: the tracker sees to that.

    last  by a record's name, the step up to which it is known to be there; -1 where it is not
    """

    last: defaultdict[str, int]

    def config(self, step: int, values: Mapping[str, Any]) -> None:
        """What the run is made of, as a tree; told at each start."""

    def scalars(self, step: int, name: str, values: Mapping[str, float]) -> None:
        """Numbers of one step; a value's full name is `name/key`."""

    def histogram(self, step: int, name: str, histogram: Histogram) -> None:
        """A distribution."""

    def table(self, step: int, name: str, table: Table) -> None:
        """A table with pictures."""

    def artifact(self, step: int, artifact: Artifact) -> None:
        """A checkpoint that stays where it is."""

    def forget_after(self, step: int) -> None:
        """Drop the records of later steps, which are about to be repeated."""

    def finish(self) -> None:
        """Write down what is left."""

    def abandon(self) -> None:
        """Let go of what might keep the process from ending; called after a failure."""

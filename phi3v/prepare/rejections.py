"""Rows that became no sample: every one with its reason, and the stop when there are too many."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from phi3v.config import DatasetConfig
from phi3v.data.format import REJECTED
from phi3v.errors import ConfigError
from phi3v.lines import write_lines
from phi3v.prepare.plan import START_ANEW, Chunk, Plan, Shard, WorkFolder, read_table
from phi3v.stored import read_object

SHOWN_REASONS = 3
NAMED = ("id", "reason", "line")  # columns of a scan; one begun before there were lines has none


@dataclass(frozen=True, order=True)
class Rejection:
    """A row (its number among those of all sources) that cannot be used; its id is JSON.

    line  of a text file, from 1
    """

    number: int
    id: str | None
    reason: str
    line: int | None = None


def in_scan(plan: Plan, work: WorkFolder, chunks: Sequence[Chunk]) -> Iterator[Rejection]:
    """What the scan has rejected of these chunks."""
    for chunk in chunks:
        table = read_table(work.scan(chunk))
        table = table.select([name for name in NAMED if name in table.column_names])
        if table["reason"].null_count == len(table):
            continue
        first = plan.first_rows[chunk.source] + chunk.start
        for row, record in enumerate(table.to_pylist()):
            if record["reason"] is not None:
                yield Rejection(first + row, **record)


def in_write(work: WorkFolder, shards: Sequence[Shard]) -> Iterator[Rejection]:
    """What was rejected when these shards were written."""
    for shard in shards:
        yield from (Rejection(**rejected) for rejected in work.read_entry(shard)["rejected"])


def by_reason(rejections: Sequence[Rejection]) -> dict[str, int]:
    """How many rows were rejected for each reason, the most frequent first."""
    counts = Counter(rejection.reason.partition(":")[0] for rejection in sorted(rejections))
    return dict(counts.most_common())


def write_rejected(
    cfg: DatasetConfig, plan: Plan, work: WorkFolder, rejections: Sequence[Rejection]
) -> None:
    """Write rejected.jsonl, in the order of the rows."""
    first_rows = plan.first_rows

    def entry(rejection: Rejection) -> dict[str, Any]:
        source = _source_of(rejection, first_rows)
        return {
            "source": cfg.sources[source].paths[0],
            "row": rejection.number - first_rows[source],
            "line": rejection.line,
            "id": json.loads(rejection.id) if rejection.id else None,
            "reason": rejection.reason,
        }

    write_lines(work.path / REJECTED, map(entry, sorted(rejections)))


def is_too_many(count: int, cfg: DatasetConfig, plan: Plan) -> bool:
    """Whether so many rejected rows are more than the recipe allows."""
    return count / plan.rows > cfg.max_rejected


def check_share(
    cfg: DatasetConfig, plan: Plan, work: WorkFolder, rejections: Sequence[Rejection]
) -> None:
    """Stop if more rows are rejected than the recipe allows.

    What was found of the rejected rows is forgotten, so that the next start looks at them again.
    Raises: ConfigError with the most frequent reasons and the first row.
    """
    if not is_too_many(len(rejections), cfg, plan):
        return
    write_rejected(cfg, plan, work, rejections)
    _forget(plan, work, rejections)
    counts = list(by_reason(rejections).items())[:SHOWN_REASONS]
    reasons = "; ".join(f"{count} x {reason}" for reason, count in counts)
    paths = ", ".join(section.paths[0] for section in cfg.sources)
    first = min(rejections)
    raise ConfigError(
        f"{len(rejections)} of {plan.rows} rows of {paths} cannot be used, max_rejected allows a "
        f"share of {cfg.max_rejected}: {reasons}; first: {_place(cfg, plan, first)}, {first.reason}"
        f"; mend the rows that {work.path / REJECTED} lists, or raise max_rejected"
    )


def _source_of(rejection: Rejection, first_rows: Sequence[int]) -> int:
    return int(np.searchsorted(first_rows, rejection.number, side="right")) - 1


def _place(cfg: DatasetConfig, plan: Plan, rejection: Rejection) -> str:
    """Where a row stands, counted from 1 as editors do: "row 7, line 8 of shop.csv"."""
    source = _source_of(rejection, plan.first_rows)
    row = rejection.number - plan.first_rows[source] + 1
    line = f", line {rejection.line:,}" if rejection.line else ""
    return f"row {row:,}{line} of {cfg.sources[source].paths[0]}"


def _forget(plan: Plan, work: WorkFolder, rejections: Sequence[Rejection]) -> None:
    """Remove the tables of chunks, and the entries of shards, in which rows were rejected."""
    numbers = np.array([rejection.number for rejection in sorted(rejections)])
    for chunk in plan.chunks:
        first = plan.first_rows[chunk.source]
        start, stop = np.searchsorted(numbers, [first + chunk.start, first + chunk.stop])
        if start < stop:
            work.scan(chunk).unlink(missing_ok=True)
    for path in work.written.glob("*.json"):
        if read_object(path, ConfigError, {"rejected": list}, START_ANEW)["rejected"]:
            path.unlink()

"""What there is to do, and the work folder where unfinished work lies.

    .NAME.partial/                beside the dataset folder NAME, which it becomes
      lock  plan.lock             held while somebody is at work, and while the plan is made
      recipe.json  digests.json   what the work was begun for
      plan.json                   each source's rows and where they start in its file
      scan/0-00000012.arrow       pass 1: what is known of 256 rows of source 0
      rows.npy  shards.json       the split: every row's side; every shard's range of rows
      shared.npy                  numbers of the rows whose id another row has, too
      report.json                 what the manifest will say of the split
      train-00000.arrow           pass 2: a shard, and beside it in written/
      written/train-00000.json    its entry for the manifest, its rejected rows, its label audit
      written/train-00000.arrow   its part of the index

Every file has its name only once it is whole, so a start after a kill does what is missing. Rows of
all sources are numbered through: source 0 has 0 ... n-1, source 1 goes on with n.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa

from phi3v.errors import ConfigError
from phi3v.files import replacing, write_json
from phi3v.stored import read_list, read_object

CHUNK = 256  # rows of one unit of the scan
START_ANEW = "remove the folder that it is in, and start again"
ROW = np.dtype([("take", np.int16), ("tokens", np.int32)])
"""Of every row: how often training takes it (-1: held out, 0: neither), and its tokens."""

Split = Literal["train", "validation"]


@dataclass(frozen=True)
class Chunk:
    """Rows `start` to `stop` of a source: a unit of the scan."""

    source: int
    start: int
    stop: int

    @property
    def name(self) -> str:
        return f"{self.source}-{self.start:08d}"


@dataclass(frozen=True)
class Shard:
    """Rows `start` to `stop`, numbered through all sources, of one split: a unit of the write."""

    split: Split
    number: int
    start: int
    stop: int

    @property
    def name(self) -> str:
        return f"{self.split}-{self.number:05d}"


@dataclass(frozen=True)
class Plan:
    """The recipe that is being followed, and what its sources hold."""

    recipe: dict[str, Any]
    """As the manifest will show it, digests of the inputs included."""

    states: tuple[dict[str, Any], ...]
    """Of each source: what `open_source` needs to open it without reading all of it."""

    num_rows: tuple[int, ...]
    """Rows of each source."""

    @property
    def rows(self) -> int:
        return sum(self.num_rows)

    @property
    def first_rows(self) -> list[int]:
        """The number of each source's first row among all rows."""
        return [sum(self.num_rows[:source]) for source in range(len(self.num_rows))]

    @property
    def chunks(self) -> list[Chunk]:
        return [
            Chunk(source, start, min(start + CHUNK, count))
            for source, count in enumerate(self.num_rows)
            for start in range(0, count, CHUNK)
        ]

    def parts(self, start: int, stop: int) -> Iterator[Chunk]:
        """Cut rows that are numbered through all sources into rows of single sources."""
        for source, (first, count) in enumerate(zip(self.first_rows, self.num_rows, strict=True)):
            begin, end = max(start - first, 0), min(stop - first, count)
            if begin < end:
                yield Chunk(source, begin, end)


@dataclass(frozen=True)
class WorkFolder:
    """Names and reads the files of unfinished work."""

    path: Path

    @property
    def lock(self) -> Path:
        return self.path / "lock"

    @property
    def recipe(self) -> Path:
        """What the work was begun for."""
        return self.path / "recipe.json"

    @property
    def digests(self) -> Path:
        """Of the sources' files, as `resolved_recipe` remembers them."""
        return self.path / "digests.json"

    @property
    def plan(self) -> Path:
        return self.path / "plan.json"

    @property
    def plan_lock(self) -> Path:
        """Held while the plan is made, which only one part does."""
        return self.path / "plan.lock"

    @property
    def scans(self) -> Path:
        return self.path / "scan"

    @property
    def spools(self) -> Path:
        return self.path / "spool"

    def spool(self, source: int) -> Path:
        """Rows of a source that can only be read in sequence."""
        return self.spools / str(source)

    @property
    def rows(self) -> Path:
        return self.path / "rows.npy"

    @property
    def shared(self) -> Path:
        """Numbers of the rows whose id another row has, in order: their samples are called ID#N."""
        return self.path / "shared.npy"

    @property
    def shards(self) -> Path:
        return self.path / "shards.json"

    @property
    def report(self) -> Path:
        """What the manifest will say of the split."""
        return self.path / "report.json"

    @property
    def written(self) -> Path:
        return self.path / "written"

    def scan(self, chunk: Chunk) -> Path:
        return self.scans / f"{chunk.name}.arrow"

    def entry(self, shard: Shard) -> Path:
        return self.written / f"{shard.name}.json"

    def read_entry(self, shard: Shard) -> dict[str, Any]:
        """What was noted when a shard was written."""
        needs = {"rejected": list}
        return read_object(self.entry(shard), ConfigError, needs, START_ANEW)

    def index(self, shard: Shard) -> Path:
        return self.written / f"{shard.name}.arrow"

    def read_recipe(self) -> dict[str, Any] | None:
        """The recipe that the work was begun for, if it was."""
        if not self.recipe.is_file():
            return None
        return read_object(self.recipe, ConfigError, advice=START_ANEW)

    def read_plan(self, recipe: dict[str, Any]) -> Plan | None:
        """The plan that was made here, if one was; it is the recipe's."""
        if not self.plan.is_file():
            return None
        needs = {"states": list, "num_rows": list}
        plan = read_object(self.plan, ConfigError, needs, START_ANEW)
        return Plan(recipe, tuple(plan["states"]), tuple(plan["num_rows"]))

    def write_plan(self, plan: Plan) -> None:
        for folder in (self.scans, self.written):
            folder.mkdir(exist_ok=True)
        states, num_rows = list(plan.states), list(plan.num_rows)
        write_json(self.plan, {"states": states, "num_rows": num_rows})

    def read_shards(self) -> list[Shard] | None:
        """The shards that were planned here, if the scan is over."""
        if not (self.shards.is_file() and self.shared.is_file()):  # or work of an older version
            return None
        return [Shard(**shard) for shard in read_list(self.shards, ConfigError, START_ANEW)]

    def write_shards(self, shards: Sequence[Shard]) -> None:
        write_json(self.shards, [vars(shard) for shard in shards])


def times_in(split: Split, take: np.ndarray) -> np.ndarray:
    """How often a split lists each row; `take` as in ROW, and not above 0 where it does not."""
    return take if split == "train" else -take


def read_table(path: Path) -> pa.Table:
    """Read an Arrow stream of the work folder."""
    with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as stream:
        return stream.read_all()


def write_table(path: Path, table: pa.Table) -> None:
    """Write an Arrow stream atomically."""
    with replacing(path) as temporary, pa.OSFile(str(temporary), "wb") as file:
        with pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table)


def plan_shards(take: np.ndarray, sizes: np.ndarray, shard_bytes: int) -> list[Shard]:
    """Cut the rows of each split into shards of about `shard_bytes`.

    take   (rows,) as in ROW
    sizes  (rows,) bytes that each row will take in its shard, before any codec

    A shard is closed by the row with which it reaches its size.
    """
    shards: list[Shard] = []
    for split in get_args(Split):
        rows = np.flatnonzero(times_in(split, take) > 0)
        ends = np.cumsum(sizes[rows])
        start = number = 0
        while start < len(rows):
            before = int(ends[start - 1]) if start else 0
            stop = int(np.searchsorted(ends, before + shard_bytes)) + 1
            last = int(rows[min(stop, len(rows)) - 1])
            shards.append(Shard(split, number, int(rows[start]), last + 1))
            start, number = stop, number + 1
    return shards

"""Rows of tables: Parquet and Arrow files, and what `datasets` keeps as Arrow files.

A table is a row of parts (row groups, record batches, files), any of which can be opened for its
batches from the first on. A batch that was read is kept until another is needed: whoever reads
range after range decodes each batch once, though a part may hold many ranges.

Values come as what their column says they are (typed.py): a class by its name, 19.99 of a float32
as 19.99.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from phi3v.errors import ConfigError
from phi3v.prepare.rows import Row
from phi3v.prepare.typed import Typed
from phi3v.reading import is_of_machine

FEW = 64  # rows of a table in memory at once; they may hold images

PARQUET, ARROW = "parquet", "arrow"

OpenPart = Callable[[int], Iterator[pa.RecordBatch]]
"""Opens part k: its batches, from the first on."""


@dataclass
class _Open:
    """A part that is being read: the batch at hand, and the row of the source it starts with."""

    part: int
    first: int
    batch: pa.RecordBatch | None  # None: the part is over
    others: Iterator[pa.RecordBatch]


class TableRows:
    """Rows of the parts of a table that lies in `files` of one kind."""

    def __init__(
        self,
        name: str,
        kind: str,
        files: Sequence[Path],
        sizes: Iterable[int],
        open_part: OpenPart,
    ) -> None:
        self.name, self.kind, self.files, self.open_part = name, kind, files, open_part
        self.sizes = list(sizes)
        self.starts = [0, *accumulate(self.sizes)]
        self._open: _Open | None = None
        self._types: Typed | None = None

    @property
    def num_rows(self) -> int:
        return self.starts[-1]

    def state(self) -> dict[str, Any]:
        """The files, and the rows of each part."""
        return {"files": [str(file) for file in self.files], "sizes": self.sizes}

    def read(self, start: int, stop: int) -> Iterator[Row]:
        """Read a range of rows as plain values: an image of `datasets` stays its bytes and path.

        Raises: ConfigError if a file is damaged, or holds fewer rows than it did.
        """
        while start < stop:
            with refusing(self.name, self.kind):
                held, self._open = self._open, None  # after an error all is opened anew
                first, batch = self._batch_of(start, held)
                typed = self._typed(batch.schema)
            few = batch.slice(start - first, min(FEW, stop - start))
            yield from _plain_rows(start, few, typed)
            start += few.num_rows

    def _typed(self, schema: pa.Schema) -> Typed:
        if self._types is None or self._types.schema is not schema:
            self._types = Typed(schema)
        return self._types

    def _batch_of(self, row: int, held: _Open | None) -> tuple[int, pa.RecordBatch]:
        """The batch that holds a row, and the number of that batch's first row."""
        part = bisect_right(self.starts, row) - 1
        if held is None or held.part != part or held.first > row:
            batches = self.open_part(part)
            held = _Open(part, self.starts[part], next(batches, None), batches)
        while held.batch is not None and held.first + held.batch.num_rows <= row:
            held.first += held.batch.num_rows
            held.batch = next(held.others, None)
        self._open = held
        if held.batch is None:
            raise pa.ArrowInvalid(f"it ends before row {row}, it had {self.num_rows:,} rows")
        return held.first, held.batch


@contextmanager
def refusing(name: str, kind: str) -> Iterator[None]:
    """Say of which source it is that a file cannot be read."""
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # the last: a column's name
        if is_of_machine(error):
            raise
        raise ConfigError(
            f"source.path {name} cannot be read as {kind}: {error}; half a download, "
            "perhaps: bring or write it again"
        ) from error


def _plain_rows(start: int, batch: pa.RecordBatch, typed: Typed) -> list[Row]:
    try:
        return [Row(start + k, values) for k, values in enumerate(typed.to_pylist(batch))]
    except (ValueError, OverflowError) as error:  # text that is not UTF-8, a time out of range
        if batch.num_rows == 1:
            return [Row(start, fault=f"holds a value that cannot be read: {error}")]
        parts = (_plain_rows(start + k, batch.slice(k, 1), typed) for k in range(batch.num_rows))
        return [row for part in parts for row in part]


def open_table(path: Path, state: dict[str, Any] | None = None) -> TableRows:
    """Open a Parquet file, or an Arrow file in either IPC format.

    Raises: ConfigError if it is damaged.
    """
    if path.suffix.lower() == ".parquet":
        return _open_parquet(path)
    with refusing(str(path), ARROW):
        with pa.memory_map(str(path)) as file:
            is_stream = file.read(6) != b"ARROW1"
        return open_streams(str(path), [path], state) if is_stream else _open_file(path, state)


def _open_parquet(path: Path) -> TableRows:
    """Row groups are decoded from a memory map, few rows of one at once."""
    with refusing(str(path), PARQUET):
        file = pq.ParquetFile(path, memory_map=True)
        groups = range(file.metadata.num_row_groups)
        sizes = [file.metadata.row_group(group).num_rows for group in groups]

    def open_part(group: int) -> Iterator[pa.RecordBatch]:
        return file.iter_batches(FEW, row_groups=[group])

    return TableRows(str(path), PARQUET, [path], sizes, open_part)


def _open_file(path: Path, state: dict[str, Any] | None) -> TableRows:
    reader = pa.ipc.open_file(pa.memory_map(str(path)))
    count = reader.num_record_batches
    sizes = (
        state["sizes"] if state else [_sound(reader.get_batch(k)).num_rows for k in range(count)]
    )
    return TableRows(str(path), ARROW, [path], sizes, lambda k: iter([_sound(reader.get_batch(k))]))


def open_streams(
    name: str, files: Sequence[Path], state: dict[str, Any] | None = None
) -> TableRows:
    """Open files in the Arrow stream format as one table, of the source of this name.

    Raises: ConfigError if one is damaged.
    """
    with refusing(name, ARROW):
        sizes = state["sizes"] if state else [sum(b.num_rows for b in _stream(f)) for f in files]
        return TableRows(name, ARROW, files, sizes, lambda k: _stream(files[k]))


def _stream(path: Path) -> Iterator[pa.RecordBatch]:
    with pa.memory_map(str(path)) as file:
        yield from map(_sound, pa.ipc.open_stream(file))


def _sound(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Refuse what `to_pylist` would follow out of memory, and die of: lengths and offsets of a file
    are not checked when it is read. 0.1 ms for 1,000 rows.
    """
    batch.validate(full=True)
    return batch

"""Rows of tables: Parquet and Arrow files, and what `datasets` keeps as Arrow files.

A table is a row of parts (row groups, record batches, files), any of which can be opened for its
batches from the first on. A batch that was read is kept until another is needed: whoever reads
range after range decodes each batch once, though a part may hold many ranges.

Values come as what their column says they are (typed.py): a class by its name, 19.99 of a float32
as 19.99. Only columns that the recipe needs are decoded (projection.py), and of them so many rows
at once as make about BATCH_BYTES: a file of 3 kB can hold gigabytes, for a value that is there
once stands in as many cells as it likes.
"""

import resource
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from phi3v.config.dataset import SourceSection
from phi3v.errors import ConfigError
from phi3v.lines import ROW_BYTES
from phi3v.prepare.projection import Needs, Use, is_list, is_text, needs_of, projected, used
from phi3v.prepare.rows import Row
from phi3v.prepare.typed import Typed
from phi3v.reading import is_of_machine

UNPACKED_BYTES = 1 << 30  # a page or batch once decompressed
FEW = 64  # rows of a table in memory at once, at most
BATCH_BYTES = 1 << 26
MOST_COLUMNS = 10_000  # with those in structures; each takes about 15 kB while it is read

TEXTS = ("BYTE_ARRAY", "FIXED_LEN_BYTE_ARRAY")  # of Parquet, of any length
LIST_BYTES = 8  # of an item, at least, when it is plain
OBJECT_BYTES = 64  # what a pair or struct takes at least as a Python object

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
            few = _few(batch.slice(start - first, min(FEW, stop - start)))
            yield from _plain_rows(start, few, typed)
            start += few.num_rows

    def _typed(self, schema: pa.Schema) -> Typed:
        if self._types is None or not self._types.schema.equals(schema, check_metadata=True):
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
    """Say of which source it is that a file cannot be read, or takes more than UNPACKED_BYTES."""
    try:
        with _limited(UNPACKED_BYTES):
            yield
    except MemoryError as error:
        raise ConfigError(
            f"source.path {name} cannot be read as {kind}: some page or batch of it unpacks to "
            f"more than {UNPACKED_BYTES // 2**20:,} MiB, or than this machine has left; write it "
            "again with fewer rows in each"
        ) from error
    except (pa.ArrowException, OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        # The last four: names of columns, and what a type of `datasets` makes of its metadata.
        if is_of_machine(error):
            raise
        raise ConfigError(
            f"source.path {name} cannot be read as {kind}: {error}; half a download, "
            "perhaps: bring or write it again"
        ) from error


@contextmanager
def _limited(size: int) -> Iterator[None]:
    """Have the system give this process so many bytes more, at most; a mapped file is none of them.

    A page of 2 GB of one letter has 200 kB in its file, whose own word for its size may be any.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    most = _data_bytes() + size
    if any(limit != resource.RLIM_INFINITY and limit <= most for limit in (soft, hard)):
        yield  # who started this allows less
        return
    pool = pa.default_memory_pool()
    pa.set_memory_pool(pa.system_memory_pool())  # Arrow's own has a gigabyte at hand already
    resource.setrlimit(resource.RLIMIT_DATA, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
        pa.set_memory_pool(pool)


def _data_bytes() -> int:
    """Bytes of memory of its own that this process has."""
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[5]) * resource.getpagesize()


def _few(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The first rows of a batch, as many as surely have BATCH_BYTES, and one at least."""
    count = batch.num_rows
    while count > 1 and _most_bytes(batch, count) > BATCH_BYTES:
        count //= 2
    return batch.slice(0, count)


def _most_bytes(batch: pa.RecordBatch, count: int) -> int:
    """Bytes that the first rows of a batch may have as plain values; of one row what it has."""
    return sum(_array_bytes(column.slice(0, count)) for column in batch.columns)


def _array_bytes(array: pa.Array) -> int:
    kind = array.type
    if isinstance(kind, pa.BaseExtensionType):
        return _array_bytes(array.storage)
    if pa.types.is_dictionary(kind):
        is_one = len(array) == 1
        return array.dictionary_decode().nbytes if is_one else len(array) * array.dictionary.nbytes
    if pa.types.is_run_end_encoded(kind):
        return len(array) * array.values.nbytes
    if pa.types.is_struct(kind):
        return OBJECT_BYTES * len(array) + sum(map(_array_bytes, array.flatten()))
    if pa.types.is_map(kind):
        pairs = array.offsets[len(array)].as_py() - array.offsets[0].as_py()
        parts = (part.slice(array.offsets[0].as_py(), pairs) for part in (array.keys, array.items))
        return OBJECT_BYTES * (len(array) + pairs) + sum(map(_array_bytes, parts))
    if is_list(kind):
        items = array.flatten()  # small ones are shared: a list holds only a pointer to each
        return LIST_BYTES * (len(array) + len(items)) + _array_bytes(items)
    if pa.types.is_string_view(kind) or pa.types.is_binary_view(kind):
        return (
            array.cast(pa.large_binary()).nbytes if len(array) == 1 else len(array) * array.nbytes
        )
    return array.nbytes


def _plain_rows(start: int, batch: pa.RecordBatch, typed: Typed) -> list[Row]:
    if batch.num_rows == 1 and (size := _most_bytes(batch, 1)) > ROW_BYTES:
        return [Row(start, fault=f"is too large: {size:,} bytes of values, {ROW_BYTES:,} at most")]
    try:
        return [Row(start + k, values) for k, values in enumerate(typed.to_pylist(batch))]
    except (ValueError, OverflowError) as error:  # text that is not UTF-8, a time out of range
        if batch.num_rows == 1:
            return [Row(start, fault=f"holds a value that cannot be read: {error}")]
        parts = (_plain_rows(start + k, batch.slice(k, 1), typed) for k in range(batch.num_rows))
        return [row for part in parts for row in part]


def open_table(
    path: Path,
    state: dict[str, Any] | None = None,
    section: SourceSection | None = None,
    also: Collection[str | None] = (),
) -> TableRows:
    """Open a Parquet file, or an Arrow file in either IPC format.

    section, also  what is needed of its columns (projection.py); no section: all

    Raises: ConfigError if it is damaged.
    """
    if path.suffix.lower() == ".parquet":
        return _open_parquet(path, section, also)
    with refusing(str(path), ARROW):
        with pa.memory_map(str(path)) as file:
            is_stream = file.read(6) != b"ARROW1"
        if is_stream:
            return open_streams(str(path), [path], state, section, also)
        return _open_file(path, state, section, also)


def _open_parquet(
    path: Path, section: SourceSection | None, also: Collection[str | None]
) -> TableRows:
    """Row groups are decoded from a memory map, few rows of one at once.

    Texts that are only looked at stay as the file has them, each once.
    """
    with refusing(str(path), PARQUET):
        schema = pq.read_schema(path, memory_map=True)
        _refuse_wide(schema, str(path))
        needs = needs_of(section, schema.names, also) if section else None
        texts = [f.name for f in used(schema, needs, Use.LOOKED_AT) if is_text(f.type)]
        file = pq.ParquetFile(path, memory_map=True, read_dictionary=texts)
        groups = [file.metadata.row_group(k) for k in range(file.metadata.num_row_groups)]
        columns = [f.name for f in used(schema, needs, Use.READ, Use.LOOKED_AT)]
        read = frozenset(columns) - frozenset(texts)

    def open_part(number: int) -> Iterator[pa.RecordBatch]:
        count = _rows_at_once(groups[number], read)
        batches = file.iter_batches(count, row_groups=[number], columns=columns)
        return (projected(batch, schema, needs) for batch in batches)

    return TableRows(str(path), PARQUET, [path], [group.num_rows for group in groups], open_part)


def _rows_at_once(group: pq.RowGroupMetaData, columns: Collection[str]) -> int:
    """So few rows of a row group that its columns give BATCH_BYTES at most, if in every row stood
    all that they hold.
    """
    every = (group.column(k) for k in range(group.num_columns))
    found = [c for c in every if c.path_in_schema.partition(".")[0] in columns]
    texts = [c.total_uncompressed_size for c in found if c.physical_type in TEXTS]
    items = [LIST_BYTES * (c.num_values - group.num_rows) for c in found]
    return max(1, min(FEW, BATCH_BYTES // max(1, sum(texts) + sum(items))))


def _open_file(
    path: Path,
    state: dict[str, Any] | None,
    section: SourceSection | None,
    also: Collection[str | None],
) -> TableRows:
    schema = pa.ipc.open_file(pa.memory_map(str(path))).schema
    _refuse_wide(schema, str(path))
    needs = needs_of(section, schema.names, also) if section else None
    reader = pa.ipc.open_file(pa.memory_map(str(path)), options=_options(schema, needs))

    def open_part(number: int) -> Iterator[pa.RecordBatch]:
        yield projected(_sound(reader.get_batch(number)), schema, needs)

    count = reader.num_record_batches
    sizes = (
        state["sizes"] if state else [_sound(reader.get_batch(k)).num_rows for k in range(count)]
    )
    return TableRows(str(path), ARROW, [path], sizes, open_part)


def open_streams(
    name: str,
    files: Sequence[Path],
    state: dict[str, Any] | None = None,
    section: SourceSection | None = None,
    also: Collection[str | None] = (),
) -> TableRows:
    """Open files in the Arrow stream format as one table, of the source of this name.

    Raises: ConfigError if one is damaged.
    """

    def stream(path: Path) -> Iterator[pa.RecordBatch]:
        with pa.memory_map(str(path)) as file:
            schema = pa.ipc.open_stream(file).schema
        _refuse_wide(schema, name)
        needs = needs_of(section, schema.names, also) if section else None
        with pa.memory_map(str(path)) as file:
            batches = pa.ipc.open_stream(file, options=_options(schema, needs))
            yield from (projected(_sound(batch), schema, needs) for batch in batches)

    with refusing(name, ARROW):
        sizes = state["sizes"] if state else [sum(b.num_rows for b in stream(f)) for f in files]
        return TableRows(name, ARROW, files, sizes, lambda k: stream(files[k]))


def _refuse_wide(schema: pa.Schema, name: str) -> None:
    """Refuse a table of more columns than can be read: where memory runs out between them, Arrow
    ends the process.
    """
    count, kinds = 0, [field.type for field in schema]
    while kinds:
        kind = kinds.pop()
        kinds += [kind.field(k).type for k in range(kind.num_fields)]
        count += not kind.num_fields
        if count > MOST_COLUMNS:
            raise ConfigError(
                f"source.path {name} has more than {MOST_COLUMNS:,} columns, the fields of "
                "structures counted; write it again with those that are needed"
            )


def _options(schema: pa.Schema, needs: Needs | None) -> pa.ipc.IpcReadOptions:
    """Have what is passed not even decompressed."""
    if needs is None:
        return pa.ipc.IpcReadOptions()
    wanted = [k for k, field in enumerate(schema) if needs.use_of(field) is not Use.PASSED]
    return pa.ipc.IpcReadOptions(included_fields=wanted or [0])


def _sound(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Refuse what `to_pylist` would follow out of memory, and die of: lengths and offsets of a file
    are not checked when it is read. 0.1 ms for 1,000 rows.
    """
    batch.validate(full=True)
    return batch

"""Raw rows of a source, one after the other, whatever file they lie in.

CSV and TSV values stay the text that stands in the file: nothing guesses that a product code is a
number. A line that is no row (broken JSON, a field too few) is handed on as a fault, to be rejected
and counted; a file that cannot be cut into rows is refused.
"""

import csv
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from phi3v.errors import ConfigError

SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet", ".arrow")
FEW = 64  # rows of a table in memory at once; they may hold images


@dataclass(frozen=True)
class Row:
    """One row of a source: its number from 0, its values by column, or why it cannot be read."""

    number: int
    values: dict[str, Any] = field(default_factory=dict)
    fault: str | None = None


def check_source(path: Path) -> None:
    """Refuse a source that cannot be one, before any work.

    Raises: ConfigError if there is no such file, or it is of no known kind.
    """
    if not path.exists():
        raise ConfigError(f"source.path {path} does not exist; check the path in the recipe")
    if not path.is_dir() and path.suffix not in SUFFIXES:
        raise ConfigError(
            f"source.path {path} ends in '{path.suffix}'; use one of {', '.join(SUFFIXES)} or a "
            "folder saved by datasets"
        )


def read_rows(path: Path) -> Iterator[Row]:
    """Read the rows of a file or of a folder saved by `datasets`.

    Raises: ConfigError if there is no such file, it is of no known kind, or it is damaged.
    """
    check_source(path)
    if path.is_dir():
        return _read_saved(path)
    readers = {".csv": _read_csv, ".tsv": _read_csv, ".jsonl": _read_jsonl, ".json": _read_json}
    return readers.get(path.suffix, _read_table)(path)


def _read_csv(path: Path) -> Iterator[Row]:
    records = _csv_records(path)
    _, header, broken = next(records, (1, [], None))
    twice = [name for name in header if header.count(name) > 1]
    if broken or twice:
        problem = f"has two columns named '{twice[0]}'" if twice else f"'s header {broken}"
        raise ConfigError(f"source.path {path} {problem}; mend its first line")
    for number, (line, fields, fault) in enumerate(records):
        if not fault and len(fields) != len(header):
            many = "more" if len(fields) > len(header) else "fewer"
            counts = f"line {line}, {len(fields)} for {len(header)}"
            fault = f"has {many} fields than the header: {counts}"
        values = {} if fault else dict(zip(header, fields, strict=True))
        yield Row(number, values, fault)


def _csv_records(path: Path) -> Iterator[tuple[int, list[str], str | None]]:
    """The line a record starts on, its fields, or what is wrong with it; empty lines are none.

    Raises: ConfigError if misplaced quotes made one record of several lines, for who knows how many
    rows they are.
    """
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
        while True:
            line, fields, fault = reader.line_num + 1, [], None
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                fault = f"cannot be read as CSV: line {line}, {error}"
                if reader.line_num > line:
                    raise ConfigError(
                        f"source.path {path} cannot be cut into rows from line {line} to "
                        f"{reader.line_num}: {error}; mend the quotes there"
                    ) from error
            except UnicodeDecodeError as error:
                raise ConfigError(
                    f"source.path {path} is not UTF-8 ({error}); save it as UTF-8"
                ) from error
            if fields or fault:
                yield line, fields, fault


def _read_jsonl(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        lines = (line for line in file if line.strip())
        for number, line in enumerate(lines):
            try:
                values = json.loads(line)
            except ValueError as error:  # JSONDecodeError, UnicodeDecodeError
                yield Row(number, fault=f"is not valid JSON: {error}")
                continue
            yield _object_row(number, values)


def _read_json(path: Path) -> Iterator[Row]:
    try:
        rows = json.loads(path.read_bytes())
    except ValueError as error:
        raise ConfigError(
            f"source.path {path} is not valid JSON: {error}; mend the file"
        ) from error
    if not isinstance(rows, list):
        raise ConfigError(
            f"source.path {path} holds a {type(rows).__name__}, not a list of rows; "
            "write [row, row, ...] or one row per line as .jsonl"
        )
    return (_object_row(number, values) for number, values in enumerate(rows))


def _object_row(number: int, values: Any) -> Row:
    if isinstance(values, dict):
        return Row(number, values)
    return Row(number, fault=f"is a {type(values).__name__}, not an object with named fields")


def _read_table(path: Path) -> Iterator[Row]:
    """The rows of a Parquet file, or of an Arrow file in either IPC format."""
    try:
        if path.suffix == ".parquet":
            yield from _table_rows(pq.ParquetFile(path).iter_batches(FEW))
        else:
            with pa.memory_map(str(path)) as file:
                yield from _table_rows(_record_batches(file))
    except (pa.ArrowException, OSError) as error:
        raise ConfigError(
            f"source.path {path} cannot be read as {path.suffix[1:]}: {error}; write it again"
        ) from error


def _record_batches(file: pa.NativeFile) -> Iterator[pa.RecordBatch]:
    is_stream = file.read(6) != b"ARROW1"
    file.seek(0)
    if is_stream:
        yield from pa.ipc.open_stream(file)
    else:
        reader = pa.ipc.open_file(file)
        yield from (reader.get_batch(k) for k in range(reader.num_record_batches))


def _table_rows(tables: Iterable[pa.RecordBatch | pa.Table]) -> Iterator[Row]:
    """Rows as plain values: an image of `datasets` stays its bytes and path, undecoded."""
    parts = (table.slice(k, FEW) for table in tables for k in range(0, table.num_rows, FEW))
    rows = (row for part in parts for row in part.to_pylist())
    return (Row(number, values) for number, values in enumerate(rows))


def _read_saved(path: Path) -> Iterator[Row]:
    try:
        saved = datasets.load_from_disk(str(path))
    except FileNotFoundError as error:
        raise ConfigError(
            f"source.path {path} is a folder that `datasets` did not save; name a file in it"
        ) from error
    if isinstance(saved, datasets.DatasetDict):
        raise ConfigError(
            f"source.path {path} holds several datasets ({', '.join(saved)}); name one of them, "
            f"such as {path / next(iter(saved))}"
        )
    return _table_rows(saved.with_format("arrow").iter(FEW))

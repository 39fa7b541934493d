"""Raw rows of a source, one after the other, whatever file they lie in.

CSV and TSV values stay the text that stands in the file: nothing guesses that a product code is a
number. A line that is no row (broken JSON) is handed on as a fault, to be rejected and counted.
"""

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets

from phi3v.errors import ConfigError

SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet", ".arrow")


@dataclass(frozen=True)
class Row:
    """One row of a source: its number from 0, its values by column, or why it cannot be read."""

    number: int
    values: dict[str, Any] = field(default_factory=dict)
    fault: str | None = None


def read_rows(path: Path) -> Iterator[Row]:
    """Read the rows of a file or of a folder saved by `datasets`.

    Raises: ConfigError if there is no such file, or it is of no known kind.
    """
    if not path.exists():
        raise ConfigError(f"source.path {path} does not exist; check the path in the recipe")
    if path.is_dir():
        return _read_saved(path)
    readers = {".csv": _read_csv, ".tsv": _read_csv, ".jsonl": _read_jsonl, ".json": _read_json}
    if path.suffix in readers:
        return readers[path.suffix](path)
    if path.suffix in SUFFIXES:
        return _read_arrow(path)
    raise ConfigError(
        f"source.path {path} ends in '{path.suffix}'; use one of {', '.join(SUFFIXES)} or a folder "
        "saved by datasets"
    )


def _read_csv(path: Path) -> Iterator[Row]:
    delimiter = "\t" if path.suffix == ".tsv" else ","
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter=delimiter, restkey="")
        for number, values in enumerate(reader):
            width, named = len(values), len(reader.fieldnames or ())
            if "" in values or None in values.values():
                fault = f"has {'more' if width > named else 'fewer'} fields than the header"
                yield Row(number, fault=fault)
            else:
                yield Row(number, values)


def _read_jsonl(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as file:
        lines = (line for line in file if line.strip())
        for number, line in enumerate(lines):
            try:
                values = json.loads(line)
            except json.JSONDecodeError as error:
                yield Row(number, fault=f"is not valid JSON: {error}")
                continue
            yield _object_row(number, values)


def _read_json(path: Path) -> Iterator[Row]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
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


def _read_arrow(path: Path) -> Iterator[Row]:
    kind = "parquet" if path.suffix == ".parquet" else "arrow"
    rows = datasets.load_dataset(kind, data_files=str(path), split="train", streaming=True)
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
    undecoded = saved
    for name, feature in saved.features.items():
        if isinstance(feature, datasets.Image):
            undecoded = undecoded.cast_column(name, datasets.Image(decode=False))
    return (Row(number, values) for number, values in enumerate(undecoded))

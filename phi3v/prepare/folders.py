"""Folders of text files, and folders of pictures that a metadata file describes, read as files are.

`datasets` finds which files make a split; their rows are then read by `text.py`. It would guess the
types of their values itself: 007 of a CSV became 7, NA nothing, "2024-05-01" of JSON a time.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from phi3v.errors import ConfigError
from phi3v.prepare.rows import Row
from phi3v.prepare.text import KINDS, TextRows, open_text

METADATA = ("metadata.csv", "metadata.jsonl")
"""What describes the pictures of the folder it lies in."""


@dataclass(frozen=True)
class FolderRows:
    """The rows of several text files, one after another."""

    files: Sequence[TextRows]

    @property
    def num_rows(self) -> int:
        return sum(file.num_rows for file in self.files)

    def read(self, start: int, stop: int) -> Iterator[Row]:
        """Read a range of rows.

        Raises: ConfigError as `TextRows.read`.
        """
        ends = list(accumulate(file.num_rows for file in self.files))
        for file, end in zip(self.files, ends, strict=True):
            first = end - file.num_rows
            for row in file.read(max(start - first, 0), min(stop, end) - first):
                yield _placed(replace(row, number=row.number + first), file.path)

    def state(self) -> dict[str, Any]:
        """What is known of each file, by its path."""
        return {"texts": [[str(file.path), file.state()] for file in self.files]}


def open_texts(
    files: Sequence[Path], max_rows: int | None, delimiter: str | None = None
) -> FolderRows:
    """Pass over text files, the first `max_rows` rows of all.

    Raises: ConfigError if one cannot be cut into rows.
    """
    opened = []
    left = max_rows
    for file in files:
        if left == 0:
            break
        own = delimiter if file.suffix.lower() in (".csv", ".tsv") else None
        opened.append(open_text(file, left, delimiter=own))
        left = None if left is None else left - opened[-1].num_rows
    return FolderRows(opened)


def reopened(state: Mapping[str, Any]) -> FolderRows:
    """The rows of `FolderRows.state`."""
    return FolderRows([TextRows(Path(path), **told) for path, told in state["texts"]])


def texts_among(builder: str, files: Sequence[str], folder: Path) -> list[Path] | None:
    """The text files that a split is read from; None if it is read by `datasets`.

    builder  the module of `datasets` that it would be: csv, json, imagefolder
    files    of the split

    Raises: ConfigError if a folder of pictures has metadata files of several kinds, of which
    `datasets` reads none.
    """
    paths = [Path(file) for file in files]
    if not paths or not all(path.is_file() and path.is_relative_to(folder) for path in paths):
        return None
    if builder in ("csv", "json"):
        return paths if all(path.suffix.lower() in KINDS for path in paths) else None
    if builder != "imagefolder":
        return None
    told = [path for path in paths if path.name in METADATA]
    if len({path.suffix for path in told}) > 1:
        raise ConfigError(
            f"source.path {folder} has metadata of two kinds: {told[0]} and {told[-1]}; leave one"
        )
    return told or None


def _placed(row: Row, file: Path) -> Row:
    """A row of a metadata file, with its pictures where their names were, as `datasets` has them:
    `file_name` is `image`, `left_file_name` is `left`, `file_names` is `images`.
    """
    if file.name not in METADATA or row.fault:
        return row
    values = dict(_pictured(key, value, file.parent) for key, value in row.values.items())
    return replace(row, values=values)


def _pictured(key: str, value: Any, folder: Path) -> tuple[str, Any]:
    for end, name in (("file_names", "images"), ("file_name", "image")):
        if key == end or key.endswith(f"_{end}"):
            return key.removesuffix(end).removesuffix("_") or name, _within(folder, value)
    return key, value


def _within(folder: Path, value: Any) -> Any:
    if isinstance(value, list):
        return [_within(folder, item) for item in value]
    return str(folder / value) if isinstance(value, str) and value.strip() else value

"""Sources of raw rows: files, folders and hub datasets, any range of whose rows can be read.

    source = open_source(section, work)
    for row in source.read(1000, 1256): ...
    open_source(section, work, source.state())    # in another process, without another pass

CSV and TSV values stay the text that stands in the file: nothing guesses that a product code is a
number. A row that cannot be read (broken JSON, a field too few) is handed on as a fault, to be
rejected and counted; a file that cannot be cut into rows is refused.
"""

import hashlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any

from phi3v.config.dataset import SourceSection
from phi3v.content import disguise
from phi3v.errors import ConfigError
from phi3v.files import sha256
from phi3v.places import local_path, nearby
from phi3v.prepare.convert import converted
from phi3v.prepare.folders import FolderRows
from phi3v.prepare.hub import Listing, hub_digest, is_hub_name, list_folder, open_dataset
from phi3v.prepare.rows import Row, Rows
from phi3v.prepare.tables import open_table
from phi3v.prepare.text import KINDS, MARK, TextRows, open_text, usual_delimiter
from phi3v.reading import FOLDER, HIDDEN, PLAIN, kind_at

SUFFIXES = (*KINDS, ".parquet", ".arrow")


@dataclass(frozen=True)
class Source:
    """The rows of one section of a recipe."""

    section: SourceSection
    rows: Rows

    @property
    def path(self) -> str:
        """The file, folder or name, as the recipe has it."""
        return self.section.paths[0]

    @property
    def remarks(self) -> list[str]:
        """What was guessed of the source, or is not read of it, to be said."""
        return [remark for remark in (self._delimiter, self._unread) if remark]

    @cached_property
    def listing(self) -> Listing:
        """What its folder holds; `datasets` is asked once."""
        return list_folder(self.section)

    @property
    def _unread(self) -> str | None:
        files = self.listing.unread
        if not files:
            return None
        return (
            f"source.path {self.path}: {len(files):,} of its files are in no split and not read, "
            f"such as {files[0]}"
        )

    @property
    def _delimiter(self) -> str | None:
        if self.section.delimiter is not None:
            return None
        texts = self.rows.files if isinstance(self.rows, FolderRows) else [self.rows]
        guessed = (
            file
            for file in texts
            if isinstance(file, TextRows) and file.delimiter != usual_delimiter(file.path)
        )
        if (first := next(guessed, None)) is None:
            return None
        path = first.path if isinstance(self.rows, FolderRows) else self.path
        return (
            f"source.path {path}: its first line is read as {len(first.header)} columns "
            f"separated by {first.delimiter!r}; source.delimiter says otherwise"
        )

    @property
    def num_rows(self) -> int:
        """Rows there are, `max_rows` at most."""
        limit = self.section.max_rows
        return self.rows.num_rows if limit is None else min(self.rows.num_rows, limit)

    @property
    def columns(self) -> tuple[str, ...] | None:
        """Names in the first rows that can be read, None if there is no such row.

        Of a table and of a CSV all rows have those of the first; objects of JSON need not.
        """
        rows = self.read(0, self.num_rows)
        usable = (row for row in rows if not row.fault and not row.is_left_out)
        names = dict.fromkeys(chain.from_iterable(row.values for row in islice(usable, self._few)))
        return tuple(names) or None

    @property
    def _few(self) -> int:
        """Rows that tell the columns."""
        has_objects = isinstance(self.rows, TextRows | FolderRows) or self.section.convert
        return MARK if has_objects else 1

    def read(self, start: int, stop: int) -> Iterator[Row]:
        """Read the rows from `start` to before `stop`, or to the last.

        Raises: ConfigError if the file was changed or damaged since it was opened.
        """
        rows = self.rows.read(start, min(stop, self.num_rows))
        return rows if self.section.convert is None else converted(rows, self.section.convert)

    def state(self) -> dict[str, Any]:
        """What `open_source` needs, as JSON, to open the source again at once."""
        return self.rows.state()


def open_source(
    section: SourceSection,
    work: Path,
    state: dict[str, Any] | None = None,
    also: Collection[str | None] | None = None,
) -> Source:
    """Open a section that has one path; `work` is a folder for rows that can only be streamed.

    also  columns that are needed beside those that the section names; None: all are, of a table too

    Raises: ConfigError if there is no such source, it is of no known kind, or it is damaged.
    """
    path = check_source(section.paths[0])
    if path is None or path.is_dir():
        return Source(section, open_dataset(section, work, state, also))
    _refuse_unread(section, path)
    if path.suffix.lower() in KINDS:
        return Source(section, open_text(path, section.max_rows, state, section.delimiter))
    needed = (None, ()) if also is None else (section, also)
    return Source(section, open_table(path, state, *needed))


def _refuse_unread(section: SourceSection, path: Path) -> None:
    """Refuse what a recipe says of a file that files do not have."""
    said: dict[str, Any] = {
        "config": section.config,
        "revision": section.revision,
        "split": section.split,
    }
    said |= {"streaming": section.streaming or None, "delimiter": section.delimiter}
    if section.split == "train":
        del said["split"]
    if path.suffix.lower() in (".csv", ".tsv"):
        del said["delimiter"]
    for key, value in said.items():
        if value is not None:
            raise ConfigError(
                f"source.{key} {value!r} has no meaning for {section.paths[0]}, a "
                f"'{path.suffix}' file, all of whose rows are read; remove it, or name the file or "
                "dataset that has it"
            )


def check_source(path: str | Path) -> Path | None:
    """Refuse a source that cannot be one, before any work; None stands for a hub dataset.

    Raises: ConfigError if there is no such file, it is a pipe or a device, of no known kind, or not
    what its name says: a pointer of git-lfs, a web page.
    """
    file = local_path(str(path))
    kind = kind_at(file)
    if kind is None:
        if is_hub_name(str(path)):
            return None
        raise ConfigError(
            f"source.path {path} does not exist{_near(file)}; check the path in the recipe"
        )
    if kind == HIDDEN:
        raise ConfigError(f"source.path {path} may not be looked at; give the right to read it")
    if kind not in (PLAIN, FOLDER):
        raise ConfigError(f"source.path {path} is {kind}; write its rows into a file, and name it")
    if kind == PLAIN and file.suffix.lower() not in SUFFIXES:
        raise ConfigError(
            f"source.path {path} ends in '{file.suffix}'; use one of {', '.join(SUFFIXES)}, a "
            "folder, or the name of a hub dataset"
        )
    if kind == PLAIN and (cause := disguise(file)):
        raise ConfigError(f"source.path {path} is {cause}")
    return file


def _near(file: Path) -> str:
    close = nearby(file)
    return f", there is {close}" if close else ""


def source_digest(section: SourceSection, digest: Callable[[Path], str] = sha256) -> str:
    """What a source's rows are now, in hexadecimal; `digest` gives that of a file.

    SHA-256 of a file; of a folder, over the names and digests of its files; of a hub dataset, over
    its name, configuration, split and commit.
    Raises: ConfigError if there is no such source.
    """
    path = check_source(section.paths[0])
    if path is None:
        return hub_digest(section)
    if path.is_file():
        return digest(path)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    lines = [f"{file.relative_to(path).as_posix()} {digest(file)}" for file in files]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def read_rows(path: Path) -> Iterator[Row]:
    """Read every row of a file or folder.

    Raises: as `open_source`.
    """
    source = open_source(SourceSection(path=str(path)), Path())
    return source.read(0, source.num_rows)

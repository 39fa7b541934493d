"""Rows that `datasets` reads: folders it saved, folders of data files, datasets of the hub.

`datasets` keeps what it has read as Arrow files, which are then read like any. What has no such
files, a streamed dataset or a slice of one, is spooled into some first.
"""

import hashlib
import json
import re
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES

from phi3v.config.dataset import SourceSection
from phi3v.content import disguise
from phi3v.errors import ConfigError
from phi3v.files import replacing, write_json
from phi3v.places import local_path
from phi3v.prepare.folders import FolderRows, open_texts, reopened, texts_among
from phi3v.prepare.plan import START_ANEW
from phi3v.prepare.reach import check_files, check_folder
from phi3v.prepare.tables import FEW, TableRows, open_streams
from phi3v.reading import is_of_machine, machine_error
from phi3v.stored import read_object

NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
FILE_SUFFIX = re.compile(r"\.(?:[ct]sv|jsonl?|ndjson|parquet|arrow|feather|xlsx?|txt|zip|t?gz|tar)")
PART_BYTES = 1 << 26  # of a spooled file, gathered in memory
PROGRESS = "progress.json"
PAGES = ("", ".md")  # of folders, that are about the data
SAVED = ("dataset_dict.json", "state.json")  # of folders that `datasets` saved
LONG = 300  # characters of a message of `datasets` that are shown


def is_hub_name(path: str) -> bool:
    """Whether a text that is no path may be a dataset's name: owner/name, or name.

    Not one of the loaders of `datasets` (imagefolder, json), which would read the current folder.
    """
    is_file = FILE_SUFFIX.fullmatch(Path(path).suffix.lower())
    is_loader = path in _PACKAGED_DATASETS_MODULES
    return NAME.fullmatch(path) is not None and not is_file and not is_loader


def _named(path: str) -> str:
    """What `datasets` is to load: a folder that exists by its full path, which it cannot take for
    the name of one of its loaders, or of a hub dataset.
    """
    place = local_path(path)
    return str(place.absolute()) if place.exists() else path


def hub_digest(section: SourceSection) -> str:
    """What a hub dataset holds now: SHA-256 over its name, configuration, split and commit.

    Raises: ConfigError if it cannot be reached.
    """
    builder = _builder(section)
    return _sha256([section.paths[0], builder.config.name, section.split, builder.hash])


def open_dataset(
    section: SourceSection,
    work: Path,
    state: dict[str, Any] | None = None,
    also: Collection[str | None] | None = None,
) -> TableRows | FolderRows:
    """Open a folder or a hub dataset; `work` is where rows that are streamed are spooled.

    also  as of `open_source`

    Raises: ConfigError if it cannot be read or reached, or has no such split.
    """
    path = section.paths[0]
    needed = (None, ()) if also is None else (section, also)
    if state is not None and "texts" in state:
        return reopened(state)
    if state is not None:
        return open_streams(path, [Path(file) for file in state["files"]], state, *needed)
    if (folder := local_path(path)).is_dir():
        with _told(path):
            check_folder(section, folder)
    if texts := _texts(section):
        return open_texts(texts, section.max_rows, section.delimiter)
    dataset = _load(section)
    if isinstance(dataset, datasets.Dataset):
        files = [Path(entry["filename"]) for entry in dataset.cache_files]
        rows = open_streams(path, files, None, *needed)
        if rows.num_rows == dataset.num_rows:
            return rows
        dataset = dataset.to_iterable_dataset()
    identity = [path, section.config, section.split, section.revision, section.max_rows]
    files = spool(dataset, work / _sha256(identity)[:16], section)
    return open_streams(path, files, None, *needed)


def _is_saved(folder: Path) -> bool:
    """Whether `datasets` saved a folder as its own."""
    return any(folder.joinpath(name).is_file() for name in SAVED)


def _texts(section: SourceSection) -> list[Path] | None:
    """The text files that a split of a folder is read from; None if `datasets` reads it."""
    path = section.paths[0]
    folder = local_path(path)
    if not folder.is_dir() or _is_saved(folder):
        return None
    builder = _builder(section)
    files = _files(builder)
    base = section.split.partition("[")[0]
    texts = texts_among(builder.name, files.get(base, []), folder.absolute())
    if texts and base != section.split:
        raise ConfigError(
            f"source.split {section.split!r} is a part of text files in {path}, which are read "
            "whole; write source.max_rows, or name the files in source.path"
        )
    return texts


def _builder(section: SourceSection) -> datasets.DatasetBuilder:
    """What `datasets` makes of a folder or hub dataset, all of whose files are its own.

    Raises: ConfigError if they are not, or it cannot be read or reached.
    """
    path = section.paths[0]
    with _told(path):
        builder = datasets.load_dataset_builder(
            _named(path), section.config, revision=section.revision
        )
    base = None if local_path(path).exists() else builder.base_path
    check_files(section, chain.from_iterable(_files(builder).values()), base)
    return builder


def _files(builder: datasets.DatasetBuilder) -> dict[str, list[str]]:
    """The files of each split."""
    found = builder.config.data_files or {}
    return {str(name): list(map(str, of)) for name, of in found.items()}


@dataclass(frozen=True)
class Listing:
    """What a folder holds: the names of its splits, and files that belong to none."""

    splits: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()


def list_folder(section: SourceSection) -> Listing:
    """The splits of a folder as `datasets` sees it; none of a file, or of what is on the hub."""
    folder = local_path(section.paths[0]).absolute()
    if not folder.is_dir():
        return Listing()
    if _is_saved(folder):
        names = folder / SAVED[0]
        if not names.is_file():
            return Listing()
        return Listing(tuple(read_object(names, ConfigError, needs={"splits": list})["splits"]))
    splits = _files(_builder(section))
    known = set(chain.from_iterable(splits.values()))
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    others = [
        str(file.relative_to(folder))
        for file in files
        if file.suffix.lower() not in PAGES
        and _is_plain(file.relative_to(folder))
        and str(file) not in known
    ]
    return Listing(tuple(splits), tuple(others) if known else ())


def _is_plain(path: Path) -> bool:
    """Whether no part of a path is hidden, as `.cache` is and `__MACOSX`."""
    return not any(part.startswith((".", "__")) for part in path.parts)


def _load(section: SourceSection) -> datasets.Dataset | datasets.IterableDataset:
    path = section.paths[0]
    if not local_path(path).exists():
        _builder(section)  # of a folder it was looked at before
    with _told(path):
        if not _is_saved(local_path(path)):
            return datasets.load_dataset(
                _named(path),
                section.config,
                split=section.split,
                revision=section.revision,
                streaming=section.streaming,
            )
        saved = datasets.load_from_disk(_named(path))
    if isinstance(saved, datasets.DatasetDict):
        if section.split not in saved:
            raise ConfigError(
                f"source.path {path} has no split '{section.split}', it has: {', '.join(saved)}; "
                "name one in source.split"
            )
        return saved[section.split]
    if section.split not in ("train", str(saved.split)):
        raise ConfigError(
            f"source.path {path} was saved as one split, so it has no '{section.split}'; write "
            "split: train for its rows"
        )
    return saved


@contextmanager
def _told(path: str) -> Iterator[None]:
    """Tell a failure of `datasets` in one sentence."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # OSError, ValueError, and those of datasets, httpx and readers
        if is_of_machine(error):
            raise machine_error(error, f"source.path {path}") from error
        if found := _disguised(local_path(path)):
            raise ConfigError(f"source.path {path}: {found}") from error
        reason = " ".join(str(error).split())[:LONG] or type(error).__name__
        if local_path(path).exists():
            problem = f"cannot be read by datasets: {reason}; check source.split, or name a file"
        else:
            problem = (
                f"is no file or folder, and cannot be read from the hub: {reason}; check the path, "
                "or the dataset's name, config, split and revision"
            )
        raise ConfigError(f"source.path {path} {problem}") from error


def _disguised(folder: Path) -> str | None:
    """A file of a folder that is not what its name says, and what it is."""
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    return next((f"{file} is {cause}" for file in files if (cause := disguise(file))), None)


def spool(dataset: datasets.IterableDataset, folder: Path, section: SourceSection) -> list[Path]:
    """Write rows up to `max_rows` into Arrow files, after those that are in the folder already.

    Raises: ConfigError if they cannot be read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    kept = _Kept()
    if (folder / PROGRESS).is_file():
        kept = _Kept(**read_object(folder / PROGRESS, ConfigError, advice=START_ANEW))
    if not kept.is_all:
        kept = _spool_on(dataset.with_format("arrow"), folder, section, kept)
    return [_part(folder, number) for number in range(kept.parts)]


@dataclass(frozen=True)
class _Kept:
    """What a spool holds so far, and where `datasets` goes on."""

    rows: int = 0
    parts: int = 0
    state: dict[str, Any] | None = None
    is_all: bool = False


def _spool_on(
    dataset: datasets.IterableDataset, folder: Path, section: SourceSection, kept: _Kept
) -> _Kept:
    features = dataset.features
    metadata = features.arrow_schema.metadata if features else None  # the names of classes
    if kept.state:
        dataset.load_state_dict(kept.state)
    left = sys.maxsize if section.max_rows is None else section.max_rows - kept.rows
    held: list[pa.Table] = []
    state, size = kept.state, 0
    for table in _tables(dataset, section.paths[0], left):
        if size >= PART_BYTES:
            kept = _keep(folder, kept, held, state)
            held, size = [], 0
        held.append(table.replace_schema_metadata(metadata or table.schema.metadata))
        size += table.nbytes
        state = dataset.state_dict()
    return _keep(folder, kept, held, None)


def _tables(dataset: datasets.IterableDataset, path: str, left: int) -> Iterator[pa.Table]:
    """The first `left` rows, few at once."""
    tables = dataset.iter(FEW)
    while left > 0:
        with _told(path):
            table = next(tables, None)
        if table is None:
            return
        yield table.slice(0, left)
        left -= table.num_rows


def _keep(folder: Path, kept: _Kept, tables: list[pa.Table], state: dict[str, Any] | None) -> _Kept:
    """Write one more part; no state: there are no rows behind it."""
    if tables:
        with replacing(_part(folder, kept.parts)) as temporary:
            schema = tables[0].schema
            with pa.OSFile(str(temporary), "wb") as file, pa.ipc.new_stream(file, schema) as stream:
                for table in tables:
                    stream.write_table(table)
    rows = kept.rows + sum(table.num_rows for table in tables)
    kept = _Kept(rows, kept.parts + bool(tables), state, is_all=state is None)
    write_json(folder / PROGRESS, asdict(kept))
    return kept


def _part(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.arrow"


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()

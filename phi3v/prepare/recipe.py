"""The recipe as it is followed: every default, and digests of what it only names."""

import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any

from phi3v.config import DatasetConfig, differing_keys, to_dict
from phi3v.config.dataset import SourceSection
from phi3v.errors import ConfigError
from phi3v.files import sha256, write_json
from phi3v.locks import locked
from phi3v.pictures import PUBLISHED
from phi3v.prepare.conversations import check_columns, check_hits
from phi3v.prepare.convert import convert_digest
from phi3v.prepare.inputs import open_processor
from phi3v.prepare.plan import START_ANEW, Plan, WorkFolder
from phi3v.prepare.reach import check_named
from phi3v.prepare.sources import Source, open_source, source_digest
from phi3v.printing import print
from phi3v.processing.processor import model_file
from phi3v.reading import retried
from phi3v.stored import read_object

MODEL_FILES = ("tokenizer.json", "preprocessor_config.json")
LATER = ("id", "ignore", "convert", "delimiter", "image_folders")
HOW = ("out", "workers", "fetch")
"""Keys that say how the work is done, not what comes of it."""
LIMITS = ("max_images", "max_row_bytes", "max_characters")
"""Keys of the recipe that came when datasets had been made without them; each is left out where it
is as by default, so that those keep their fingerprint."""
TOLD = ("license",)
"""Keys of a source that say something about the rows and change nothing in them."""


def resolved_recipe(cfg: DatasetConfig, known: Path | None = None) -> dict[str, Any]:
    """What the dataset will be made of, to tell it from any other.

    known  a file that remembers the digests of files between starts: a folder of 500 GB is read
           once, not by every part of a job array

    Raises: ConfigError if a source or a file of the model is missing.
    """
    default = {field.name: field.default for field in fields(cfg) if field.name in LIMITS}
    told = to_dict(cfg).items()
    recipe = {k: v for k, v in told if k not in HOW and not (k in LIMITS and v == default[k])}
    recipe["source"] = _without_told(recipe["source"])
    processor = open_processor(cfg, cfg.sources[0])
    for section in cfg.sources:
        check_named(section)
    files = _Digests(known)
    digests = [
        retried(partial(source_digest, section, files.digest), f"source.path {section.path}")
        for section in cfg.sources
    ]
    files.save()
    _refuse_same_rows(cfg, digests)
    recipe["inputs"] = {
        "source": digests[0] if len(digests) == 1 else digests,
        **{name: sha256(model_file(cfg.model, name)) for name in MODEL_FILES},
        "crop_size": processor.crop_size,
        "image_side": processor.side,
    }
    if functions := [convert_digest(s.convert) for s in cfg.sources if s.convert]:
        recipe["inputs"]["convert"] = functions[0] if len(functions) == 1 else functions
    return recipe


def _refuse_same_rows(cfg: DatasetConfig, digests: list[str]) -> None:
    """Refuse rows held out that are the rows trained on: the same file, a copy, the same split."""
    rows = [(digest, s.split) for digest, s in zip(digests, cfg.sources, strict=True)]
    divided, held_out = rows[: cfg.first_held_out], rows[cfg.first_held_out :]
    for row, section in zip(held_out, cfg.sources[cfg.first_held_out :], strict=True):
        if row in divided:
            raise ConfigError(
                f"split.validation names {section.path}, which holds the very rows of source.path "
                f"{cfg.sources[divided.index(row)].path}; name others, or hold out a share of "
                "these, as 0.1"
            )


def _without_told(source: Any) -> Any:
    """Leave out what makes no difference, and keys that say nothing and came when datasets had been
    made without them: these keep their fingerprint, which decides the order of training.
    """
    if isinstance(source, list):
        return [_without_told(section) for section in source]
    left_out = {*TOLD, *(key for key in LATER if source.get(key) is None)}
    return {key: value for key, value in source.items() if key not in left_out}


class _Digests:
    """Digests of files, by path, size and time of change."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        is_there = path is not None and path.is_file()
        self.known: dict[str, str] = (
            read_object(path, ConfigError, advice=START_ANEW) if path and is_there else {}
        )

    def digest(self, file: Path) -> str:
        """The SHA-256 of a file, read only if it is not known."""
        found = file.stat()
        key = f"{file.absolute()}:{found.st_size}:{found.st_mtime_ns}"
        if key not in self.known:
            self.known[key] = sha256(file)
        return self.known[key]

    def save(self) -> None:
        if self.path is not None:
            write_json(self.path, self.known)


def begin(cfg: DatasetConfig, work: WorkFolder) -> tuple[dict[str, Any], list[str]]:
    """Resolve the recipe and compare it with what the work folder was begun for.

    returns  the recipe, and the keys that differ; none if the folder is new or of this recipe
    """
    with locked(work.plan_lock, is_shared=False, waits=True):
        recipe = resolved_recipe(cfg, work.digests)
        before = work.read_recipe()
        different = _differing(before, recipe) if before else []
        if before is None:
            start_afresh(recipe, work)  # whatever lies there is of nobody knows what
        elif not different:
            write_json(work.recipe, recipe)
        return recipe, different


def start_afresh(recipe: dict[str, Any], work: WorkFolder) -> None:
    """Remove work on another recipe, and begin with this one."""
    kept = (work.lock, work.plan_lock, work.digests)
    for path in work.path.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path not in kept:
            path.unlink()
    write_json(work.recipe, recipe)


def make_plan(
    cfg: DatasetConfig,
    recipe: dict[str, Any],
    work: WorkFolder,
    say: Callable[[str], None] = print,
) -> Plan:
    """The plan of the work folder, made now if there is none; `say` is told what was guessed.

    Raises: ConfigError if the recipe does not fit its sources.
    """
    with locked(work.plan_lock, is_shared=False, waits=True):
        if plan := work.read_plan(recipe):
            return plan
        sources = [_open(cfg, number, work) for number in range(len(cfg.sources))]
        remarks = [remark for source in sources for remark in source.remarks]
        for remark in dict.fromkeys([*remarks, *_unread_splits(cfg, sources)]):
            say(remark)
        states = tuple(source.state() for source in sources)
        plan = Plan(recipe, states, tuple(source.num_rows for source in sources))
        work.write_plan(plan)
        return plan


def _unread_splits(cfg: DatasetConfig, sources: Sequence[Source]) -> list[str]:
    """Remarks on splits that a source has and the recipe reads nothing of."""
    remarks = []
    for source in sources:
        same = [other.split for other in cfg.sources if other.paths == source.section.paths]
        read = {word for split in same for word in re.findall(r"\w+", split)}
        others = [name for name in source.listing.splits if name not in read]
        if others and "all" not in read:
            remarks.append(
                f"source.path {source.path} has splits of which nothing is read: "
                f"{', '.join(others)}; source.split {source.section.split!r} says which is"
            )
    return remarks


def differing(made: dict[str, Any], recipe: dict[str, Any]) -> list[str]:
    """The keys in which a recipe differs from what a dataset was made by.

    The model may lie elsewhere: what matters of it has digests. A recipe of before there was a
    choice of `images` means the published pixels.
    """
    before = {"images": asdict(PUBLISHED), **made, "model": recipe["model"]}
    return differing_keys(before, recipe)


def _differing(before: dict[str, Any], recipe: dict[str, Any]) -> list[str]:
    """max_rejected only judges what was found: after a stop it may be raised, and work goes on."""
    return [key for key in differing(before, recipe) if key != "max_rejected"]


def _open(cfg: DatasetConfig, number: int, work: WorkFolder) -> Source:
    path = f"source.path {cfg.sources[number].path}"
    return retried(partial(_opened, cfg.sources[number], cfg, number, work), path)


def _opened(section: SourceSection, cfg: DatasetConfig, number: int, work: WorkFolder) -> Source:
    also = cfg.split.by, cfg.split.stratify
    source = open_source(section, work.spool(number), also=also)
    if not source.num_rows:
        raise ConfigError(f"source.path {source.path} holds no rows; check the file")
    columns = source.columns
    if columns is not None:
        for column in (cfg.split.by, cfg.split.stratify):
            if column and number >= cfg.first_held_out:
                continue  # all of its rows are held out, whatever they are split by
            check_columns(section, column, columns)
        rows = source.read(0, source.num_rows)
        check_hits(section, columns, (row for row in rows if not row.fault and not row.is_left_out))
    return source

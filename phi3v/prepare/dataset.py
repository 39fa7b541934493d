"""The whole of prepare: rows to a published dataset folder.

    prepare(cfg)                      scan, split, write, publish
    prepare_part(cfg, Part(2, 8))     an eighth of the pass that is due, scan or write
    merge(cfg)                        joins the parts: after the scan the split, after the write all

Every row ends as a sample or as a line of rejected.jsonl with its reason; their numbers are in the
manifest. The folder gets its name only when everything in it is on the disk; until then the work
lies beside it (plan.py) and whoever starts next goes on with it. The bytes of the dataset depend
on the recipe and its inputs alone: not on workers, parts, or kills.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from phi3v.config import DatasetConfig
from phi3v.data import Dataset
from phi3v.data.format import MANIFEST, read_manifest
from phi3v.data.verification import check_files, listed_files
from phi3v.errors import ConfigError
from phi3v.files import publish
from phi3v.locks import Lock, locked
from phi3v.prepare import rejections
from phi3v.prepare.inputs import open_inputs
from phi3v.prepare.joining import join_scans
from phi3v.prepare.manifest import clear, note_licenses, write_manifest
from phi3v.prepare.plan import Chunk, Plan, Shard, WorkFolder, times_in
from phi3v.prepare.recipe import begin, differing, make_plan, resolved_recipe, start_afresh
from phi3v.prepare.scan import scan_chunk
from phi3v.prepare.sources import check_source
from phi3v.prepare.workers import Tally, work_off
from phi3v.prepare.write import write_shard
from phi3v.printing import print
from phi3v.progress import progress

Say = Callable[[str], None]


@dataclass(frozen=True)
class Part:
    """Part `number` of `count` of the work, from 1."""

    number: int = 1
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> "Part":
        """Read "2/8".

        Raises: ConfigError if that is no part.
        """
        number, _, count = text.partition("/")
        if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
            raise ConfigError(f"--part must be i/n with i from 1 to n, got {text!r}; such as 1/8")
        return cls(int(number), int(count))

    def of(self, tasks: Sequence[Any]) -> Sequence[Any]:
        """This part's share of the tasks."""
        return tasks[self.number - 1 :: self.count]


def prepare(cfg: DatasetConfig, say: Say = print) -> dict[str, Any]:
    """Make the dataset folder `cfg.out` and return its manifest; do nothing if it is up to date.

    say  is told what happens beside the progress bar, in single lines

    Raises: ConfigError if the folder holds a dataset of another recipe, if the recipe does not fit
    its source, if more than `max_rejected` of the rows had to be rejected, or if another process
    prepares the same folder. ShardError if the folder's files are not those of its manifest.
    """
    if manifest := _existing(cfg, say):
        return manifest
    with _work_folder(cfg, is_shared=False) as (work, lock):
        if manifest := _unnamed(cfg, work):
            return _give_name(cfg, work, manifest)
        recipe, different = begin(cfg, work)
        if different:
            start_afresh(recipe, work)
            say(f"{work.path} held work on another recipe ({', '.join(different)}): started afresh")
        plan = make_plan(cfg, recipe, work, say)
        if _scan_is_due(plan, work):
            _scan(cfg, plan, work, Part(), lock)
            join_scans(cfg, plan, work)
        _write(cfg, plan, work, Part(), lock)
        return _publish(cfg, plan, work)


def prepare_part(cfg: DatasetConfig, part: Part, say: Say = print) -> None:
    """Do a part of the pass that is due; any number of parts may be at work at once.

    Raises: as `prepare`, and ConfigError if there is unfinished work on another recipe.
    """
    if _existing(cfg, say):
        say(f"{cfg.out} is up to date")
        return
    with _work_folder(cfg, is_shared=True) as (work, lock):
        plan = make_plan(cfg, _same_recipe(cfg, work), work, say)
        name, do = ("scan", _scan) if _scan_is_due(plan, work) else ("write", _write)
        do(cfg, plan, work, part, lock)
        say(f"{name}: part {part.number} of {part.count} is done; after the last part: --merge")


def merge(cfg: DatasetConfig, say: Say = print) -> dict[str, Any] | None:
    """Join the parts of a pass; return the manifest after the second pass, None after the first.

    Raises: ConfigError naming what is missing, and as `prepare`.
    """
    if manifest := _existing(cfg, say):
        return manifest
    with _work_folder(cfg, is_shared=False) as (work, lock):
        if manifest := _unnamed(cfg, work):
            return _give_name(cfg, work, manifest)
        recipe = _same_recipe(cfg, work)
        plan = work.read_plan(recipe)
        if plan is None:
            raise ConfigError(f"{cfg.out} has no parts to merge; run --part 1/n to n/n first")
        if _scan_is_due(plan, work):
            _refuse_missing("scan", _unscanned(plan, work), plan.chunks)
            found = list(rejections.in_scan(plan, work, plan.chunks))
            rejections.check_share(cfg, plan, work, found)
            shards = join_scans(cfg, plan, work)
            say(f"the split is made, {len(shards):,} shards are to be written: run the parts again")
            return None
        shards = _planned(work)
        _refuse_missing("write", _unwritten(shards, work), shards)
        return _publish(cfg, plan, work)


def verify(folder: Path) -> None:
    """Compare every file of a dataset folder with its digest; a bar moves as they are read.

    Raises: ShardError naming the first damaged file.
    """
    files = listed_files(folder)
    total = sum(file.bytes for file in files)
    with progress(None, f"check {folder}", "B", total, unit_scale=True, leave=False) as bar:
        check_files(files, bar.update)
    for split in read_manifest(folder)["splits"]:
        Dataset(folder, split)  # whether the index is that of the shards


def _existing(cfg: DatasetConfig, say: Say) -> dict[str, Any] | None:
    """The manifest of the dataset that is there and up to date, but for the licenses it names."""
    for section in cfg.sources:
        check_source(section.paths[0])
    out = Path(cfg.out).absolute()
    if out.is_symlink() and not (out / MANIFEST).is_file():
        raise ConfigError(
            f"out {cfg.out} is a link, which the dataset would take the place of; name the folder "
            "that it leads to, or remove the link"
        )
    if not (out / MANIFEST).is_file():
        if out.is_file() or (out.exists() and any(out.iterdir())):
            raise ConfigError(
                f"out {cfg.out} exists and is no dataset; name another, or remove this"
            )
        return None
    manifest = read_manifest(out)
    if different := differing(manifest["recipe"], resolved_recipe(cfg)):
        is_old = "images" not in manifest["recipe"] and "images.alpha" in different
        old = ", or write images: {alpha: published, exif: published}, as it was made"
        raise ConfigError(
            f"{cfg.out} was made by another recipe: {', '.join(different)} differ; "
            f"name another folder in 'out', or remove this one{old if is_old else ''}"
        )
    for split in manifest["splits"]:
        Dataset(out, split)
    if note_licenses(cfg, out, manifest):
        say(f"{cfg.out}: the licenses that the recipe names are in {MANIFEST} now")
    return manifest


@contextmanager
def _work_folder(cfg: DatasetConfig, is_shared: bool) -> Iterator[tuple[WorkFolder, Lock]]:
    """The folder of unfinished work, and the lock on it, which a purge of old files may remove."""
    out = Path(cfg.out).absolute()
    work = WorkFolder(out.with_name(f".{out.name}.partial"))
    if work.path.is_symlink() or (work.path.exists() and not work.path.is_dir()):
        what = "a link" if work.path.is_symlink() else "no folder"
        raise ConfigError(
            f"{work.path}, where the unfinished work on {cfg.out} lies, is {what}; it is cleared "
            "and becomes the dataset, so move that away, or name another out"
        )
    work.path.mkdir(parents=True, exist_ok=True)
    with locked(work.lock, is_shared) as lock:
        yield work, lock


def _same_recipe(cfg: DatasetConfig, work: WorkFolder) -> dict[str, Any]:
    """The recipe, which must be the one that other parts follow."""
    recipe, different = begin(cfg, work)
    if different:
        raise ConfigError(
            f"{work.path} holds unfinished work on another recipe: {', '.join(different)} differ; "
            "remove that folder"
        )
    return recipe


def _scan_is_due(plan: Plan, work: WorkFolder) -> bool:
    return work.read_shards() is None or bool(_unscanned(plan, work))


def _unscanned(plan: Plan, work: WorkFolder) -> list[Chunk]:
    return [chunk for chunk in plan.chunks if not work.scan(chunk).is_file()]


def _unwritten(shards: Sequence[Shard], work: WorkFolder) -> list[Shard]:
    return [shard for shard in shards if not work.entry(shard).is_file()]


def _planned(work: WorkFolder) -> list[Shard]:
    shards = work.read_shards()
    assert shards is not None
    return shards


def _scan(cfg: DatasetConfig, plan: Plan, work: WorkFolder, part: Part, lock: Lock) -> None:
    mine = part.of(plan.chunks)
    left = set(_unscanned(plan, work))
    finished = [chunk for chunk in mine if chunk not in left]
    known = list(rejections.in_scan(plan, work, finished))
    tally = Tally(
        f"scan {cfg.out}",
        total=sum(chunk.stop - chunk.start for chunk in mine),
        finished=sum(chunk.stop - chunk.start for chunk in finished),
        rejected=len(known),
    )
    todo = [chunk for chunk in mine if chunk in left]
    with tally:
        for done in work_off(open_inputs, (cfg, plan, work), scan_chunk, todo, cfg.workers):
            tally.add(done)
            lock.check()
            if rejections.is_too_many(tally.rejected, cfg, plan):
                break
    seen = [chunk for chunk in mine if work.scan(chunk).is_file()]
    rejections.check_share(cfg, plan, work, list(rejections.in_scan(plan, work, seen)))


def _write(cfg: DatasetConfig, plan: Plan, work: WorkFolder, part: Part, lock: Lock) -> None:
    todo = _unwritten(part.of(_planned(work)), work)
    with Tally(f"write {cfg.out}", total=_samples(work, todo), finished=0) as tally:
        for done in work_off(open_inputs, (cfg, plan, work), write_shard, todo, cfg.workers):
            tally.add(done)
            lock.check()


def _samples(work: WorkFolder, shards: Sequence[Shard]) -> int:
    """Rows that these shards will take."""
    take = np.load(work.rows, mmap_mode="r")["take"]
    return sum(int((times_in(s.split, take[s.start : s.stop]) > 0).sum()) for s in shards)


def _publish(cfg: DatasetConfig, plan: Plan, work: WorkFolder) -> dict[str, Any]:
    return _give_name(cfg, work, write_manifest(cfg, plan, work, _planned(work)))


def _unnamed(cfg: DatasetConfig, work: WorkFolder) -> dict[str, Any] | None:
    """The manifest of this recipe's dataset, where a kill came between it and its name."""
    if work.recipe.is_file() or not (work.path / MANIFEST).is_file():
        return None
    manifest = read_manifest(work.path)
    if differing(manifest["recipe"], resolved_recipe(cfg)):
        return None
    note_licenses(cfg, work.path, manifest)
    return manifest


def _give_name(cfg: DatasetConfig, work: WorkFolder, manifest: dict[str, Any]) -> dict[str, Any]:
    clear(work, manifest)
    out = Path(cfg.out).absolute()
    publish(work.path, out)
    (out / work.lock.name).unlink(missing_ok=True)  # a purge of old files may have been there
    return manifest


def _refuse_missing(name: str, missing: Sequence[Any], all_units: Sequence[Any]) -> None:
    if missing:
        raise ConfigError(
            f"the {name} is not complete: {len(missing)} of {len(all_units)} units are missing, "
            f"the first {missing[0].name}; run the --part that stopped again"
        )

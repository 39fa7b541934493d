"""Checkpoints on the disk: complete or invisible, with sizes and digests, kept or removed.

    RUN/checkpoints/
      step-00000050/           a checkpoint: DeepSpeed's own files and manifest.json
      latest                   name of the newest whole one, written last
      best                     name of the one with the best score, where scores are compared
      .step-00000100.partial/  one being written
      .step-00000050.old/      one set aside while another of its step takes its name
      .step-00000010.removed/  one being removed
      .step-00000050.universal/  its form for any number of ranks (convert.py), with a manifest of
                                 its own that says what it was made from; goes with it

The owner of the run folder alone writes here. A crash between any two operations leaves hidden
folders, which the next owner settles (`remove_leftovers`). Anything else in the folder belongs to
somebody else and is left alone: symlinks, `step-5`, `step-00000050.bak`.

Surprising: `latest` and `best` are for people and other programs; here the folders' names and
manifests decide. Whole "by sizes" costs a look at each file, whole by digests reads every byte.
"""

import hashlib
import json
import math
import re
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

from phi3v.errors import CheckpointError, naming
from phi3v.files import sha256, sync, sync_tree, write_json, write_text
from phi3v.output import say
from phi3v.reading import is_of_machine, machine_error, retried
from phi3v.stored import parse_file

LATEST, BEST, MANIFEST = "latest", "best", "manifest.json"
FORMAT = 1  # of the manifest
MOST_POINTED = 256  # bytes of a name
SEAL = "manifest_sha256"  # key of the manifest's digest over all its other keys
# Key of a universal form's manifest: the digest of its checkpoint's, which has that of each file.
MADE_FROM = "made_from"
STEP = re.compile(r"step-([0-9]{8})")
KINDS = ("partial", "old", "removed", "universal", "universal.partial")
HIDDEN = re.compile(rf"\.step-([0-9]{{8}})\.({'|'.join(KINDS)})")


@dataclass(frozen=True)
class SavedFile:
    """What a file of a checkpoint must be: its size in bytes and its digest in hexadecimal."""

    bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> "SavedFile":
        """What a file is now; reads every byte."""
        return cls(path.stat().st_size, sha256(path))


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def partial_name(step: int) -> str:
    """The name while it is written."""
    return _hidden_name(step, "partial")


def universal_name(step: int) -> str:
    """The name of its form for any number of ranks."""
    return _hidden_name(step, "universal")


def _hidden_name(step: int, kind: str) -> str:
    return f".{step_name(step)}.{kind}"


def steps_saved(folder: Path) -> list[int]:
    """Steps of the checkpoints in a folder, oldest first, whole or damaged."""
    if not folder.is_dir():
        return []
    found = ((path, STEP.fullmatch(path.name)) for path in folder.iterdir())
    return sorted(int(name[1]) for path, name in found if name and _is_folder(path))


def select_steps(folder: Path, step: int | None) -> list[int]:
    """Steps of all checkpoints in a folder, oldest first, or the one asked for.

    Raises: CheckpointError if there is none.
    """
    saved = steps_saved(folder)
    if not saved:
        raise CheckpointError(f"{folder} holds no checkpoint; train the run first")
    if step is None:
        return saved
    if step not in saved:
        raise CheckpointError(
            f"{folder} has no checkpoint of step {step}, it has: {', '.join(map(str, saved))}"
        )
    return [step]


def find_step(folder: Path, step: int | None) -> str:
    """The name of a checkpoint that is whole by sizes: that of a step, or the newest.

    Damaged ones that are newer are named on stderr.

    Raises: CheckpointError if there is none.
    """
    damages: list[str] = []
    for candidate in reversed(select_steps(folder, step)):
        name = step_name(candidate)
        damage = find_damage(folder / name, ())
        if damage is None:
            for passed in damages:
                say(f"{folder}: passed over {passed}")
            return name
        damages.append(f"{name}, damaged: {damage}")
    raise CheckpointError(
        f"{folder} holds no whole checkpoint{'' if step is None else f' of step {step}'} "
        f"({'; '.join(damages)}); bring the files back from a copy, or name another step or run"
    )


def named_step(folder: Path, name: str | None) -> int | None:
    """The step that --step names: a number, or `best`; None for the newest.

    Raises: CheckpointError if it is neither, or no checkpoint is the best.
    """
    if name is None or name.isdecimal():
        return None if name is None else int(name)
    if name != BEST:
        raise CheckpointError(f"--step must be a number or {BEST}, got {name!r}")
    pointed = STEP.fullmatch(read_pointer(folder, BEST) or "")
    if pointed is None:
        raise CheckpointError(
            f"{folder} has no best checkpoint, for checkpoint.best of the run's recipe names no "
            f"score, or nothing was evaluated; name a step: "
            f"{', '.join(map(str, steps_saved(folder))) or 'there is none yet'}"
        )
    return int(pointed[1])


def read_pointer(folder: Path, pointer: str) -> str | None:
    """The name that `latest` or `best` holds, None where there is no such file."""
    path = folder / pointer
    if not path.is_file():
        return None
    with naming(path), path.open("rb") as file:
        return file.read(MOST_POINTED).decode(errors="replace").strip()


def write_manifest(
    checkpoint: Path, facts: Mapping[str, Any], files: Mapping[str, SavedFile]
) -> None:
    """Write down what a checkpoint is, when all its files are there.

    facts  what can be said as JSON, its `step` at least
    files  by path relative to the checkpoint, with `/`
    """
    assert files and "step" in facts
    saved = {name: asdict(file) for name, file in sorted(files.items())}
    manifest = {"format": FORMAT, **facts, "files": saved}
    write_json(checkpoint / MANIFEST, manifest | {SEAL: _digest(manifest)})


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The facts given to `write_manifest`, `format`, and `files` (name to bytes and sha256).

    Raises: CheckpointError if the manifest is missing, damaged, or that of something else.
    """
    manifest, damage = _load_manifest(checkpoint)
    if damage:
        raise CheckpointError(
            f"{checkpoint} is damaged: {damage}; bring it back from a copy, or take another step"
        )
    return manifest


def find_damage(checkpoint: Path, files: Iterable[str] | None = None) -> str | None:
    """What is wrong with a checkpoint first, as "FILE is missing"; None if it is whole.

    Looks at the manifest, at the sizes of all files, and then reads `files` (all by default) to
    compare their digests; `()` reads none. A universal form is damaged, too, where it is not that
    of the checkpoint beside it. Files that the manifest does not list are no damage:
    nobody reads them. A file that the disk cannot give back is.
    """
    manifest, damage = _load_manifest(checkpoint)
    if damage:
        return damage
    listed = manifest["files"]
    for name, saved in listed.items():
        if damage := _size_damage(checkpoint / name, saved["bytes"]):
            return f"{name} {damage}"
    for name in listed if files is None else files:
        if name not in listed:
            return f"{name} is not listed in {MANIFEST}"
        if damage := _digest_damage(checkpoint / name, listed[name]["sha256"]):
            return f"{name} {damage}"
    return None


def _load_manifest(checkpoint: Path) -> tuple[dict[str, Any], str | None]:
    """The manifest and what is wrong with it."""
    try:
        manifest = parse_file(checkpoint / MANIFEST)
    except OSError as error:
        return {}, f"{MANIFEST} {_why_unreadable(error)}"
    except ValueError as error:
        return {}, f"{MANIFEST} {error}"
    version = manifest.get("format")
    if version != FORMAT:
        return {}, f"{MANIFEST} has format {version!r}, this program reads {FORMAT}"
    # Without it a flipped digit of the position would send the run elsewhere in the data.
    if manifest.pop(SEAL, None) != _digest(manifest):
        return {}, f"{MANIFEST} is not what was written (its own SHA-256 differs)"
    if fault := _fault(manifest):
        return {}, f"{MANIFEST} {fault}"
    named = STEP.search(checkpoint.name)
    if named and int(named[1]) != manifest["step"]:
        return {}, f"{MANIFEST} is that of step {manifest['step']}"
    original = checkpoint.with_name(step_name(manifest["step"]))
    if MADE_FROM in manifest and _digest_damage(original / MANIFEST, manifest[MADE_FROM]):
        return {}, f"it was made from another {original.name} than this one"
    return manifest, None


def _fault(manifest: Mapping[str, Any]) -> str | None:
    """What in a manifest is not of our making: its seal has no key, anybody can write another.

    A file that it names is read to its end, so it must lie in the checkpoint.
    """
    if type(manifest.get("step")) is not int or not isinstance(manifest.get("files"), dict):
        return "does not say its step and files"
    for name, saved in manifest["files"].items():
        kinds = {key: type(value) for key, value in saved.items()} if type(saved) is dict else None
        if kinds != {"bytes": int, "sha256": str}:
            return f"does not say the size and digest of {name!r}"
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            return f"names {name!r}, which is not in the checkpoint's folder"
    return None


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _size_damage(path: Path, size: int) -> str | None:
    try:
        status = path.stat()
    except OSError as error:
        return _why_unreadable(error)
    if not stat.S_ISREG(status.st_mode):
        return "is not a file"  # a device has no end
    found = status.st_size
    return None if found == size else f"has {found:,} bytes, {MANIFEST} says {size:,}"


def _digest_damage(path: Path, digest: str) -> str | None:
    try:
        found = retried(lambda: sha256(path), str(path))
    except OSError as error:
        return _why_unreadable(error)
    return None if found == digest else f"has SHA-256 {found[:8]}, {MANIFEST} says {digest[:8]}"


def _why_unreadable(error: OSError) -> str:
    """What is said of a file that is damaged or missing.

    Raises: MachineError where neither is so: an older checkpoint would be taken for no reason.
    """
    if is_of_machine(error):
        raise machine_error(error, str(error.filename or "a file of a checkpoint")) from error
    missing = isinstance(error, FileNotFoundError)
    return "is missing" if missing else f"cannot be read ({error.strerror})"


def publish(folder: Path, step: int) -> None:
    """Give the partial checkpoint of a step its name, then let `latest` name the newest.

    One of that step that was there before stays until the other has its name.

    Raises: CheckpointError, and leaves everything as it was, if it is not whole by sizes.
    """
    partial, final = folder / partial_name(step), folder / step_name(step)
    aside = folder / _hidden_name(step, "old")
    if damage := find_damage(partial, ()):
        raise CheckpointError(
            f"{partial} cannot be published: {damage}; check the disk, then start the run again"
        )
    sync_tree(partial)
    remove_universal(folder, step)  # made from the one before
    if _is_folder(final):
        _delete(aside)
        final.rename(aside)
    partial.rename(final)
    sync(folder)
    _delete(aside)
    _point_latest(folder)


def retain(folder: Path, keep: int, keep_every: int, scores: Mapping[int, float]) -> None:
    """Remove checkpoints, and let `best` name the one with the best score.

    keep        how many of the newest stay, at least 1
    keep_every  steps; those divisible by it stay, 0: none
    scores      by step, the higher the better; the best stays, of equals the later one

    Damaged ones (by sizes) never count as one of the newest or as the best: a run must be able to
    go on from what stays. Yet they go only when a whole one in their place would: when `keep`
    newer ones are whole, and not if divisible by keep_every. Until then one with a lost file may
    be mended from a copy, and nobody wants it taken away in the hour of need.
    """
    assert keep >= 1
    saved = steps_saved(folder)
    newest = list(islice(_whole(folder, reversed(saved)), keep))
    scored = [step for step in saved if step in scores and not math.isnan(scores[step])]
    ranked = sorted(scored, key=lambda step: (scores[step], step), reverse=True)
    best = next(_whole(folder, ranked), None)
    _point(folder / BEST, best)
    if len(newest) < keep:
        return
    for step in saved:
        is_kept = step >= newest[-1] or step == best or (keep_every and step % keep_every == 0)
        if not is_kept:
            remove(folder, step)


def remove(folder: Path, step: int) -> None:
    """Remove the checkpoint of a step; at no moment is half of it visible."""
    remove_universal(folder, step)  # first: it must not be there without its checkpoint
    _discard(folder, step, step_name(step))
    _point_latest(folder)


def remove_universal(folder: Path, step: int) -> None:
    """Remove a step's form for any number of ranks, if there is one."""
    _discard(folder, step, universal_name(step))


def remove_leftovers(folder: Path) -> None:
    """Settle what a crash has left; for the owner of the run folder, at its start.

    A step whose own folder is missing or damaged gets another whole state of it, if there is one:
    the partial one before the one set aside. Their digests decide, for bytes may not have reached
    the disk; only where a step has several such states are they read. Then hidden folders and
    temporary files go (not the universal form of what stays), and `latest` is set right.
    """
    if not folder.is_dir():
        return
    hidden = [HIDDEN.fullmatch(path.name) for path in folder.iterdir() if _is_folder(path)]
    for step in sorted({int(name[1]) for name in hidden if name}):
        _settle(folder, step)
    for temporary in folder.glob(".*.tmp"):
        if temporary.is_file() and not temporary.is_symlink():
            temporary.unlink()
    _point_latest(folder)


def _settle(folder: Path, step: int) -> None:
    hidden = {kind: folder / _hidden_name(step, kind) for kind in KINDS}
    final, universal = folder / step_name(step), hidden.pop("universal")
    others = [path for path in (hidden["partial"], hidden["old"]) if _is_whole(path)]
    chosen = final if final.exists() else hidden["old"]
    if others:
        whole = (path for path in (final, *others) if _is_whole(path, by_digests=True))
        chosen = next(whole, chosen)
    if chosen != final:
        _delete(universal)  # before its step has another state
    if chosen != final and _is_folder(chosen):
        if _is_folder(final):
            _delete(hidden["removed"])
            final.rename(hidden["removed"])
        chosen.rename(final)
        sync(folder)
    for path in hidden.values():
        _delete(path)


def _discard(folder: Path, step: int, name: str) -> None:
    """Remove a folder that counts while it has its name: a crash must not leave half of it."""
    removed = folder / _hidden_name(step, "removed")
    if _is_folder(folder / name):
        _delete(removed)
        (folder / name).rename(removed)
        sync(folder)
        _delete(removed)


def _whole(folder: Path, steps: Iterable[int]) -> Iterator[int]:
    """Those of some steps whose checkpoints are whole by sizes."""
    return (step for step in steps if _is_whole(folder / step_name(step)))


def _is_whole(checkpoint: Path, by_digests: bool = False) -> bool:
    return _is_folder(checkpoint) and find_damage(checkpoint, None if by_digests else ()) is None


def _point_latest(folder: Path) -> None:
    _point(folder / LATEST, next(_whole(folder, reversed(steps_saved(folder))), None))


def _point(pointer: Path, step: int | None) -> None:
    if _is_folder(pointer):
        say(f"{pointer} is a folder, where a file names a checkpoint; move it away to have that")
    elif step is None:
        pointer.unlink(missing_ok=True)
    elif read_pointer(pointer.parent, pointer.name) != step_name(step):
        write_text(pointer, step_name(step))


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _delete(path: Path) -> None:
    if _is_folder(path):
        shutil.rmtree(path)

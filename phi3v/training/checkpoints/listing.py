"""What a run's checkpoints are, for people: launch/checkpoints.py prints these lines."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from phi3v.errors import CheckpointError
from phi3v.printing import print
from phi3v.progress import progress
from phi3v.training.checkpoints.store import (
    BEST,
    LATEST,
    find_damage,
    read_manifest,
    read_pointer,
    select_steps,
    step_name,
    universal_name,
)
from phi3v.training.run_folder import RunFolder

COLUMNS = "{:>10}  {:<19}  {:>5}  {:>4}  {:>10}  {}"


def list_checkpoints(run: Path, step: int | None = None) -> Iterator[str]:
    """A table: one line per checkpoint, whole or not by the sizes of its files.

    Its form for any number of ranks has a line of its own.

    Raises: CheckpointError without a run folder or checkpoints.
    """
    folders = _folders(run, step)
    yield COLUMNS.format("step", "saved at", "ranks", "ZeRO", "GB", "state")
    for saved, checkpoint in folders:
        yield _row(saved, checkpoint)


def inspect_checkpoint(run: Path, step: int | None = None) -> Iterator[str]:
    """All facts and files of one checkpoint, the newest by default, whole or not.

    Raises: CheckpointError if it is not there or its manifest cannot be read.
    """
    folder = checkpoints_of(run)
    checkpoint = folder / step_name(select_steps(folder, step)[-1])
    manifest = read_manifest(checkpoint)
    files = manifest.pop("files")
    yield f"{checkpoint}: {_state(checkpoint)}"
    for key, value in _flat(manifest):
        yield f"{key}: {value}"
    yield f"files: {len(files)}, {_gigabytes(files)} GB"
    for name, saved in files.items():
        yield f"{saved['bytes']:>18,}  {saved['sha256']}  {name}"


def verify_checkpoints(run: Path, step: int | None = None) -> None:
    """Read every byte of all checkpoints or of one, and print what each is.

    So are their forms for any number of ranks. One that the run's retention removes meanwhile is no
    damage.

    Raises: CheckpointError if any is damaged.
    """
    folders = _folders(run, step)
    num_damaged = 0
    for _, checkpoint in folders:
        damage = _read_all(checkpoint)
        state = f"damaged: {damage}" if damage else "whole"
        if not checkpoint.is_dir():
            damage, state = None, "removed by its run meanwhile"
        num_damaged += damage is not None
        print(f"{checkpoint.name}: {state}", flush=True)
    if num_damaged:
        raise CheckpointError(
            f"{num_damaged} of {len(folders)} checkpoints in {checkpoints_of(run)} are damaged; a "
            "run passes over them (a .universal one it makes again), bring the files back from a "
            "copy or remove the folders"
        )


def checkpoints_of(run: Path) -> Path:
    """The folder of a run's checkpoints.

    Raises: CheckpointError if there is no run folder.
    """
    if not run.is_dir():
        raise CheckpointError(f"there is no run folder {run}; name the run.out of a recipe")
    return RunFolder(run).checkpoints


def _folders(run: Path, step: int | None) -> list[tuple[int, Path]]:
    """Steps and folders of a run's checkpoints, each before its form for any number of ranks."""
    folder = checkpoints_of(run)
    return [
        (saved, checkpoint)
        for saved in select_steps(folder, step)
        for checkpoint in (folder / step_name(saved), folder / universal_name(saved))
        if checkpoint.is_dir()
    ]


def _read_all(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint by digests; a bar moves on as each file has been read."""
    files = _readable(checkpoint).get("files", {})
    settings = {"total": _bytes(files), "unit_scale": True, "leave": False}

    with progress(None, checkpoint.name, "B", **settings) as bar:

        def names() -> Iterator[str]:
            for name, saved in files.items():
                yield name
                bar.update(saved["bytes"])

        return find_damage(checkpoint, names())


def _row(step: int, checkpoint: Path) -> str:
    facts = _readable(checkpoint)
    when = str(facts.get("saved_at", "-"))[:19]  # UTC, to the second
    about = [str(facts.get(key, "-")) for key in ("world_size", "zero_stage")]
    size = _gigabytes(facts["files"]) if facts else "-"
    return COLUMNS.format(step, when, *about, size, _state(checkpoint))


def _state(checkpoint: Path) -> str:
    damage = find_damage(checkpoint, ())
    pointers = (LATEST, BEST)
    marks = [name for name in pointers if read_pointer(checkpoint.parent, name) == checkpoint.name]
    return ", ".join([f"damaged: {damage}" if damage else "whole by sizes", *marks])


def _readable(checkpoint: Path) -> dict[str, Any]:
    """The manifest, empty where it cannot be read: what is wrong with it is in the state."""
    try:
        return read_manifest(checkpoint)
    except CheckpointError:
        return {}


def _bytes(files: Mapping[str, Any]) -> int:
    return sum(saved["bytes"] for saved in files.values())


def _gigabytes(files: Mapping[str, Any]) -> str:
    return f"{_bytes(files) / 1e9:,.3f}"


def _flat(facts: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested facts by dotted keys."""
    for key, value in facts.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value

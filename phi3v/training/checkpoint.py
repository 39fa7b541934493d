"""Saving a run and taking it up again: DeepSpeed's state, and where the sequence of packs stands.

A checkpoint is written beside the others under a hidden name and renamed when it is whole; `latest`
is written last. What must survive is data: the engine's state, the step, the position.
"""

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed

from phi3v.data.packing import Position
from phi3v.errors import CheckpointError
from phi3v.files import sync_tree, write_text

LATEST = "latest"
STEP_DIGITS = 8


@dataclass(frozen=True)
class Progress:
    """How far a run is: optimizer steps done, and the next pack."""

    step: int = 0
    position: Position = Position()


def save(engine: Any, folder: Path, progress: Progress, keep: int, is_first: bool) -> None:
    """Write a checkpoint and remove all but the newest `keep`; all ranks call."""
    name = step_name(progress.step)
    partial = f".{name}.partial"
    if is_first:
        shutil.rmtree(folder / partial, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
    torch.distributed.barrier()
    state = {"step": progress.step, "position": asdict(progress.position)}
    state["world_size"] = torch.distributed.get_world_size()
    engine.save_checkpoint(str(folder), tag=partial, client_state=state, save_latest=False)
    torch.distributed.barrier()
    if is_first:
        _publish(folder, partial, name, keep)
    torch.distributed.barrier()


def _publish(folder: Path, partial: str, name: str, keep: int) -> None:
    sync_tree(folder / partial)
    shutil.rmtree(folder / name, ignore_errors=True)
    (folder / partial).replace(folder / name)
    write_text(folder / LATEST, name)
    for old in steps_saved(folder)[:-keep]:
        shutil.rmtree(folder / step_name(old))


def restore(engine: Any, folder: Path) -> Progress:
    """Load the newest checkpoint into the engine; a fresh start where there is none.

    Raises: CheckpointError if it was saved by another number of ranks.
    """
    name = newest(folder)
    if name is None:
        return Progress()
    _check_ranks(folder / name)
    _, state = engine.load_checkpoint(str(folder), tag=name)
    return Progress(state["step"], Position(**state["position"]))


def _check_ranks(checkpoint: Path) -> None:
    saved = len(list(checkpoint.glob("*_optim_states.pt")))
    ranks = torch.distributed.get_world_size()
    if saved != ranks:
        raise CheckpointError(
            f"{checkpoint} was saved by {saved} ranks, this run has {ranks}; "
            f"start it with {saved} ranks"
        )


def find_step(folder: Path, step: int | None) -> str:
    """The name of a checkpoint: that of a step, or the newest.

    Raises: CheckpointError if there is none.
    """
    saved = steps_saved(folder)
    if not saved:
        raise CheckpointError(f"{folder} holds no checkpoint; train the run first")
    if step is None:
        return newest(folder) or step_name(saved[-1])
    if step not in saved:
        raise CheckpointError(
            f"{folder} has no checkpoint of step {step}, it has: {', '.join(map(str, saved))}"
        )
    return step_name(step)


def newest(folder: Path) -> str | None:
    """The name of the checkpoint to go on from: what `latest` says, else the last; None if none.

    Raises: CheckpointError if `latest` names one that is not there.
    """
    saved = [step_name(step) for step in steps_saved(folder)]
    if not (folder / LATEST).is_file():
        return saved[-1] if saved else None
    name = (folder / LATEST).read_text(encoding="utf-8").strip()
    if name not in saved:
        raise CheckpointError(
            f"{folder / LATEST} names {name}, which is not there; write the name of another "
            f"checkpoint into it ({', '.join(saved) or 'none left'})"
        )
    return name


def steps_saved(folder: Path) -> list[int]:
    """Steps of the checkpoints in a folder, oldest first."""
    names = folder.glob(f"step-{'[0-9]' * STEP_DIGITS}")
    return sorted(int(path.name.removeprefix("step-")) for path in names)


def step_name(step: int) -> str:
    return f"step-{step:0{STEP_DIGITS}d}"

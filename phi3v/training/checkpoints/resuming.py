"""Taking a run up again: the newest whole checkpoint, for any number of ranks.

choice = choose(folder, ranks, beat)      # before the engine is built
done = restore(engine, choice, ranks)
"""

import random
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from phi3v.data.packing import Position
from phi3v.devices import has_cuda
from phi3v.errors import CheckpointError
from phi3v.printing import print
from phi3v.training import zero
from phi3v.training.checkpoints.convert import convert, load
from phi3v.training.checkpoints.loading import load_data
from phi3v.training.checkpoints.saving import Progress, random_name
from phi3v.training.checkpoints.store import (
    find_damage,
    read_manifest,
    remove_leftovers,
    step_name,
    steps_saved,
    universal_name,
)
from phi3v.training.ranks import Ranks


@dataclass(frozen=True)
class Choice:
    """A whole checkpoint to go on from; `tag` differs from its name if it had to be converted."""

    folder: Path
    manifest: Mapping[str, Any]
    tag: str
    is_converted: bool

    @property
    def step(self) -> int:
        return int(self.manifest["step"])


def choose(
    folder: Path, ranks: Ranks, beat: Callable[[], None], before: int | None = None
) -> Choice | None:
    """Find the newest whole checkpoint, with every byte of it read; None if there never was one.

    A damaged one is named and passed over. One of another number of ranks is converted, unless its
    converted form is there and as whole. All ranks call, and share the reading.

    Raises: CheckpointError if there are checkpoints and all are damaged.
    """
    zero.first_rank_does(lambda: remove_leftovers(folder), ranks.is_first)
    steps = zero.from_first_rank(steps_saved(folder))
    steps = [step for step in steps if before is None or step < before]
    for step in reversed(steps):
        checkpoint = folder / step_name(step)
        damage = _find_damage(checkpoint, ranks)
        if damage is None:
            return _fit(checkpoint, step, ranks, beat)
        if ranks.is_first:
            print(f"{checkpoint} is damaged, an older one is taken: {damage}", file=sys.stderr)
    if steps:
        names = ", ".join(step_name(step) for step in steps)
        raise CheckpointError(
            f"no checkpoint in {folder} is whole ({names}); put an intact copy there, or name "
            "another run.out to start anew"
        )
    return None


def _find_damage(checkpoint: Path, ranks: Ranks) -> str | None:
    damage = find_damage(checkpoint, files=[])
    if damage is None:
        files = sorted(read_manifest(checkpoint)["files"])
        damage = find_damage(checkpoint, files=files[ranks.rank :: ranks.world_size])
    return next((found for found in zero.gather_objects(damage) if found), None)


def _fit(checkpoint: Path, step: int, ranks: Ranks, beat: Callable[[], None]) -> Choice:
    """Have a checkpoint in the form that so many ranks can load."""
    beat()  # all have read the checkpoint
    manifest = read_manifest(checkpoint)
    if manifest["world_size"] == ranks.world_size:
        return Choice(checkpoint.parent, manifest, checkpoint.name, is_converted=False)
    target = checkpoint.with_name(universal_name(step))
    if damage := _find_damage(target, ranks):
        if ranks.is_first and target.is_dir():
            print(f"{target} is damaged and is made again: {damage}", file=sys.stderr)
        name = f"conversion of {checkpoint.name}"
        zero.first_rank_does_slowly(name, lambda: convert(checkpoint, target), ranks, beat)
    beat()
    return Choice(checkpoint.parent, manifest, target.name, is_converted=True)


def restore(engine: Any, choice: Choice | None, ranks: Ranks) -> Progress:
    """Load a checkpoint into the engine; a fresh start without one.

    Raises: CheckpointError if its files are data, but not what a run saves.
    """
    if choice is None:
        return Progress()
    try:
        return _restore(engine, choice, ranks)
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(
            f"{choice.folder / choice.tag} does not hold what a run saves ({type(error).__name__}: "
            f"{error}); bring it back from a copy, or remove it for an older one to be taken"
        ) from error


def _restore(engine: Any, choice: Choice, ranks: Ranks) -> Progress:
    if choice.is_converted:
        load(engine, choice.folder / choice.tag)
    else:
        zero.load_checkpoint(engine, choice.folder, choice.tag)
        states = choice.folder / choice.tag / random_name(ranks.rank)
        set_random_states(load_data(states))
    return Progress(choice.step, Position(**choice.manifest["position"]))


def set_random_states(states: Mapping[str, Any]) -> None:
    random.setstate(states["python"])
    np.random.set_state(_numpy_state(states["numpy"]))
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and has_cuda():
        torch.cuda.set_rng_state(states["cuda"])


def _numpy_state(saved: Sequence[Any]) -> tuple[Any, ...]:
    """What numpy takes; a run of before saved an array of its own, of which the bytes are here."""
    kind, keys, *rest = saved
    if isinstance(keys, Tensor):
        return kind, keys.numpy().astype(np.uint32), *rest
    *_, data = keys.state
    return kind, np.frombuffer(data, "<u4"), *rest

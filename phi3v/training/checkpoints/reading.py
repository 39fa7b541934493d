"""The weights of a checkpoint, of any number of ranks and ZeRO stage, one at a time.

    weights = open_weights(RunFolder(run).checkpoints, step)
    weights.read("lm_head.weight")      # float32, whole, on the CPU

The ranks' files are mapped, not read: a weight is known by the stretches of them that it is made
of, and takes memory when it is read. Files that are removed meanwhile stay readable.

Every byte of the checkpoint is compared with its digest before any is used, which takes about a
minute for the 50 GB of the published size.

Surprising: the weights are the float32 masters of what was trained, not what the model computes
with, and of what was frozen the model's own precision.

Source of the forms: DeepSpeed 0.19.8 utils/zero_to_fp32.py, runtime/zero/stage3.py, and
`param_slice_mappings` of runtime/zero/stage_1_and_2.py. DeepSpeed's own reader takes the memory of
the whole model, refuses stage 1 in bfloat16, which does not write its stage down, and leaves frozen
parameters out under the stages 1 and 2 in float32.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from phi3v.errors import CheckpointError
from phi3v.progress import progress
from phi3v.training.checkpoints.loading import load_data
from phi3v.training.checkpoints.store import find_damage, find_step, read_manifest

WHOLE = "mp_rank_00_model_states.pt"  # stages 1 and 2: every rank has the model
SHARE = "zero_pp_rank_{}_mp_rank_00_model_states.pt"
OPTIMIZER = "*zero_pp_rank_{}_mp_rank_00_optim_states.pt"  # "bf16_" may stand before it


@dataclass(frozen=True)
class Weight:
    """A weight as the mapped stretches (flat) that make it; padding may follow."""

    shape: torch.Size
    stretches: Sequence[Tensor]

    def read(self) -> Tensor:
        """Its values in float32, in memory of their own."""
        flat, filled = torch.empty(self.shape.numel()), 0
        for stretch in self.stretches:
            part = flat[filled : filled + len(stretch)]
            part.copy_(stretch[: len(part)])
            filled += len(part)
        assert filled == len(flat), (self.shape, filled)
        return flat.view(self.shape)


@dataclass(frozen=True)
class CheckpointWeights:
    """The weights of a checkpoint by their published names; used as `model.weights.WeightFiles`."""

    folder: Path
    manifest: Mapping[str, Any]
    weights: Mapping[str, Weight]

    @property
    def path(self) -> str:
        return str(self.folder)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every weight."""
        return {name: tuple(weight.shape) for name, weight in self.weights.items()}

    def read(self, name: str) -> Tensor:
        """Read one weight into memory: float32, on the CPU."""
        return self.weights[name].read()


def open_weights(checkpoints: Path, step: int | None = None) -> CheckpointWeights:
    """Open the checkpoint of a step, or the newest, after reading every byte of it.

    Raises: CheckpointError if there is none, or it is damaged.
    """
    folder = checkpoints / find_step(checkpoints, step)
    manifest = read_manifest(folder)
    if damage := _find_damage(folder, manifest["files"]):
        if not folder.is_dir():
            raise CheckpointError(f"{folder} was removed by its run meanwhile; start again")
        raise CheckpointError(
            f"{folder} is damaged: {damage}; bring the file back from a copy, or name another step"
        )
    return CheckpointWeights(folder, manifest, map_weights(folder))


def _find_damage(folder: Path, files: Mapping[str, Any]) -> str | None:
    total = sum(file["bytes"] for file in files.values())
    with progress(None, f"check {folder.name}", "B", total, unit_scale=True, leave=False) as bar:

        def names() -> Iterator[str]:
            for name, file in files.items():
                yield name
                bar.update(file["bytes"])

        return find_damage(folder, names())


def map_weights(folder: Path) -> dict[str, Weight]:
    """Find the stretches of every weight in a checkpoint's files.

    Raises: CheckpointError if they hold something else than DeepSpeed's optimizers save: they may
    be of anybody's making.
    """
    try:
        is_whole = (folder / WHOLE).is_file()
        weights = _whole_weights(folder) if is_whole else _shared_weights(folder)
        if strange := [name for name in weights if not isinstance(name, str)]:
            raise ValueError(f"it names a weight {strange[0]!r}")
        return weights
    except (LookupError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{folder} does not hold what a run saves ({type(error).__name__}: {error}); bring it "
            "back from a copy, or name another step"
        ) from error


def _map(path: Path) -> Any:
    return load_data(path, mmap=True)


def _map_optimizers(folder: Path) -> Iterator[dict[str, Any]]:
    """The optimizer's share of each rank."""
    for rank in range(len(list(folder.glob(OPTIMIZER.format("*"))))):
        (path,) = folder.glob(OPTIMIZER.format(rank))
        yield _map(path)["optimizer_state_dict"]


def _whole_weights(folder: Path) -> dict[str, Weight]:
    """Stages 1 and 2: the model's own weights, and masters in place of those that are trained.

    A rank has a stretch of each parameter group, so a weight may lie with several.
    """
    module = _map(folder / WHOLE)["module"]
    masters: defaultdict[str, list[Tensor]] = defaultdict(list)
    for state in _map_optimizers(folder):
        groups = state["single_partition_of_fp32_groups"]
        for group, places in zip(groups, state["param_slice_mappings"], strict=True):
            for name, place in places.items():
                masters[name].append(group[place.state["start"] :][: place.state["numel"]])
    return {
        name: Weight(own.shape, masters.get(name) or [own.reshape(-1)])
        for name, own in module.items()
    }


def _shared_weights(folder: Path) -> dict[str, Weight]:
    """Stage 3: every rank has an equal share of every weight, the last one's padded."""
    states = [_map(folder / SHARE.format(n)) for n in range(_num_shares(folder))]
    first = states[0]
    weights = {
        name: Weight(shape, [state["frozen_param_fragments"][name] for state in states])
        for name, shape in (first["frozen_param_shapes"] or {}).items()
    }
    masters = [state["fp32_flat_groups"] for state in _map_optimizers(folder)]
    start = 0
    for name, shape in ((n, s) for group in first["param_shapes"] for n, s in group.items()):
        length = ceil(shape.numel() / len(states))
        parts = [part for groups in masters for part in _stretches(groups, start, length)]
        weights[name] = Weight(shape, parts)
        start += length
    held = sum(len(group) for group in masters[0])
    if start != held:
        raise ValueError(f"its weights have {start:,} values, its masters {held:,}")
    return weights


def _num_shares(folder: Path) -> int:
    return len(list(folder.glob(SHARE.format("*"))))


def _stretches(groups: Sequence[Tensor], start: int, length: int) -> Iterator[Tensor]:
    """A stretch of what tensors would be end to end, without joining them."""
    for group in groups:
        if length and start < len(group):
            part = group[start : start + length]
            yield part
            start, length = 0, length - len(part)
        else:
            start -= len(group)

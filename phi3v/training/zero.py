"""DeepSpeed: the engine, gathering weights from its partitions, reading them from checkpoints."""

import os
from collections import Counter
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import deepspeed
import torch
from deepspeed.utils import set_z3_leaf_modules
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from torch import Tensor, nn

from phi3v.config import DeepSpeedConfig, Module
from phi3v.errors import Phi3VError
from phi3v.model import LAYERS
from phi3v.model.weights import WeightFiles, check_shapes, parameter_places

Result = TypeVar("Result")
MARGIN_SECONDS = 60.0  # a hang is the watchdog's, which shows where; then the collective gives up


def start_process_group(hang_seconds: float = 1800.0) -> None:
    """Join the other ranks (nccl on CUDA, gloo elsewhere)."""
    timeout = timedelta(seconds=hang_seconds + MARGIN_SECONDS)
    deepspeed.init_distributed(timeout=timeout, verbose=False)
    torch.distributed.barrier()  # all ranks of this host have mapped each other's buffers
    _unlink_shared_memory()


def _unlink_shared_memory() -> None:
    """Remove the names of the buffers through which ranks of one host reduce on CPU.

    DeepSpeed leaves 69 MB per rank in /dev/shm, by whatever way a rank ends. What is mapped stays
    until the rank is gone.
    """
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    rank = torch.distributed.get_rank()
    name = f"deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_{rank}"
    Path("/dev/shm", name).unlink(missing_ok=True)


def leave_together() -> None:
    """Wait for the others: a rank that ends first closes the sockets they still use."""
    torch.distributed.barrier()


def build_engine(
    model: nn.Module, groups: list[dict[str, Any]], ds: DeepSpeedConfig
) -> deepspeed.DeepSpeedEngine:
    """Hand the model to DeepSpeed, which partitions it and builds the JSON's optimizer.

    Under ZeRO-3 a decoder or tower layer is gathered as a whole, not matrix by matrix.
    """
    if ds.zero_stage == 3:
        set_z3_leaf_modules(model, list(LAYERS))
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=groups, config=ds.for_engine(), dist_init_required=False
    )
    return engine


def load_partitioned(
    model: nn.Module, files: WeightFiles, dtype: torch.dtype, ds: DeepSpeedConfig
) -> None:
    """Give a model on the meta device its weights, each parameter straight into its partition.

    The first rank reads a tensor and sends it to the others, every rank keeps its share; at no
    time does any hold more than its share and one tensor. All tensors pass through one buffer:
    allocated and freed one by one they would leave holes among the shares (twice the memory, with
    4 ranks). All ranks call.
    Raises: CheckpointError if names or shapes do not fit.
    """
    check_shapes(files.path, files.shapes(), model)
    is_reader = torch.distributed.get_rank() == 0
    buffer = torch.empty(max(p.numel() for p in model.parameters()), dtype=dtype)
    first: nn.Parameter | None = None
    for name, module, own in list(parameter_places(model)):
        empty = getattr(module, own)
        tensor = buffer[: empty.numel()].view(empty.shape)
        if is_reader:
            tensor.copy_(files.read(name))
        parameter = nn.Parameter(tensor, requires_grad=empty.requires_grad)
        setattr(module, own, parameter)
        if first is None:
            holder = nn.ParameterList([parameter])
            deepspeed.zero.Init(module=holder, config_dict_or_path=ds.for_engine(), dtype=dtype)
            first = parameter
        else:
            first.convert_to_zero_parameters(param_list=[parameter])  # type: ignore[attr-defined]


@torch.no_grad()
def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Copy a partitioned model's weights to a whole one, a parameter at a time; all ranks call."""
    copies = dict(target.named_parameters())
    for name, parameter in source.named_parameters():
        is_partitioned = hasattr(parameter, "ds_id")
        with deepspeed.zero.GatheredParameters([parameter], enabled=is_partitioned):
            copies[name].copy_(parameter)


def sum_over_ranks(value: Tensor) -> Tensor:
    """Add a tensor over all ranks, in place."""
    torch.distributed.all_reduce(value)
    return value


def gather_objects(value: Any) -> list[Any]:
    """Collect one picklable object of every rank on each."""
    shares: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(shares, value)
    return shares


def from_first_rank(value: Result) -> Result:
    """The first rank's value, a picklable one, on all ranks."""
    values = [value]
    torch.distributed.broadcast_object_list(values)
    return values[0]


def first_rank_does(task: Callable[[], Result], is_first: bool) -> Result | None:
    """Let the first rank do something; if it fails for a user's mistake, all ranks raise that.

    Returns what the task returned on the first rank, None on the others.
    """
    result: Result | None = None
    failure: list[Phi3VError | None] = [None]
    if is_first:
        try:
            result = task()
        except Phi3VError as error:
            failure = [error]
    torch.distributed.broadcast_object_list(failure)
    if failure[0] is not None:
        raise failure[0]
    return result


def load_checkpoint(engine: deepspeed.DeepSpeedEngine, folder: Path, tag: str) -> None:
    """Load a checkpoint of this number of ranks; all ranks call."""
    engine._config.load_universal_checkpoint = False
    engine.load_checkpoint(str(folder), tag=tag)


def read_weights(checkpoints: Path, tag: str) -> dict[str, Tensor]:
    """Put the float32 weights of a checkpoint together on the CPU: masters, and what is frozen.

    Needs the memory of the whole model in float32 (16.6 GB at full size), under the stages 1 and 2
    with that of the model's own precision on top.
    """
    whole = checkpoints / tag / "mp_rank_00_model_states.pt"
    if not whole.is_file():  # stage 3: every rank has a share of every weight
        shared = get_fp32_state_dict_from_zero_checkpoint(str(checkpoints), tag=tag)
        return {name: weight.float() for name, weight in shared.items()}
    module = torch.load(whole, map_location="cpu", weights_only=False)["module"]
    weights = {name: weight.float().contiguous() for name, weight in module.items()}
    _fill_in_masters(weights, checkpoints / tag)
    return weights


def _fill_in_masters(weights: dict[str, Tensor], checkpoint: Path) -> None:
    """Replace the trained weights by their float32 masters, under the stages 1 and 2.

    A rank has a stretch of each parameter group, so a weight may lie with several. DeepSpeed's own
    reader refuses stage 1 in bfloat16, which does not write its stage down, and leaves frozen
    parameters out in float32.
    """
    filled: Counter[str] = Counter()
    ranks = len(list(checkpoint.glob("*_optim_states.pt")))
    for rank in range(ranks):
        (path,) = checkpoint.glob(f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
        saved = torch.load(path, map_location="cpu", mmap=True, weights_only=False)
        state = saved["optimizer_state_dict"]
        groups = state["single_partition_of_fp32_groups"]
        for group, places in zip(groups, state["param_slice_mappings"], strict=True):
            for name, place in places.items():
                stretch = weights[name].view(-1)[filled[name] :][: place.numel]
                stretch.copy_(group[place.start :][: place.numel])
                filled[name] += place.numel
    assert all(filled[name] == weights[name].numel() for name in filled), checkpoint


def total_norm(engine: deepspeed.DeepSpeedEngine) -> float:
    """Norm of the last step's gradient before clipping."""
    return float(engine.get_global_grad_norm())


def set_learning_rates(engine: deepspeed.DeepSpeedEngine, rates: Mapping[Module, float]) -> None:
    """Give each parameter group its share of its module's learning rate for the coming step."""
    for group in engine.optimizer.param_groups:
        group["lr"] = rates[group["name"]] * group["lr_scale"]

"""DeepSpeed: the engine, its weights into partitions and out of them, and what it measures."""

import importlib
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import set_z3_leaf_modules
from torch import Tensor, nn
from torch.distributed import distributed_c10d

from phi3v.config import DeepSpeedConfig, Module
from phi3v.devices import check_shared_memory, take_device
from phi3v.errors import Phi3VError
from phi3v.model import LAYERS
from phi3v.model.weights import WeightFiles, check_shapes, parameter_places
from phi3v.training.checkpoints.loading import data_only
from phi3v.training.extensions import load_extensions
from phi3v.training.meeting import Turn, meet
from phi3v.training.norms import module_norms, record_norms
from phi3v.training.ranks import Ranks, own_ranks, share_mistakes

Result = TypeVar("Result")
MARGIN_SECONDS = 60.0  # a hang is the watchdog's, which shows where; then the collective gives up


def start_process_group(seconds: float = 1800.0) -> torch.device:
    """Take this rank's device, and only then join the other ranks (nccl on CUDA, gloo elsewhere).

    seconds  how long the others may take to come, and a collective until `set_timeouts`
    Raises: ConfigError on all ranks if they cannot meet, or have not a device each.
    """
    ranks = own_ranks()
    device = take_device(ranks.local_rank, ranks.local_size)
    check_shared_memory(ranks.local_size)
    store = meet(ranks, device, seconds)
    timeout = timedelta(seconds=seconds + MARGIN_SECONDS)
    store.set_timeout(timeout)
    is_bound = device.type == "cuda" and ranks.world_size > 1  # as DeepSpeed would do it
    torch.distributed.init_process_group(
        get_accelerator().communication_backend_name(),
        timeout=timeout,
        store=store,
        rank=ranks.rank,
        world_size=ranks.world_size,
        device_id=device if is_bound else None,
    )
    # On CPU DeepSpeed would compile an operator here, for inference alone: half a minute, a lock
    # that a killed start leaves, and 69 MB of shared memory a rank.
    deepspeed.ops.__compatible_ops__ = {}
    deepspeed.init_distributed(timeout=timeout, verbose=False)  # it takes the group that is there
    share_mistakes()
    return device


def set_timeouts(seconds: float) -> None:
    """Let collectives of every group begin to fail after so many seconds and a margin.

    Those that DeepSpeed made for itself as well, which have NCCL's 10 minutes or gloo's 30 whatever
    the group had that they were made from. All ranks call, between two collectives.
    """
    timeout = timedelta(seconds=seconds + MARGIN_SECONDS)
    for group in distributed_c10d._world.pg_map:
        distributed_c10d._set_pg_timeout(timeout, group)


def leave_together() -> None:
    """Wait for the others: a rank that ends first closes the sockets they still use."""
    torch.distributed.barrier()


def build_engine(
    model: nn.Module, groups: list[dict[str, Any]], ds: DeepSpeedConfig
) -> deepspeed.DeepSpeedEngine:
    """Hand the model to DeepSpeed, which partitions it and builds the JSON's optimizer.

    Under ZeRO-3 a decoder or tower layer is gathered as a whole, not matrix by matrix.
    """
    _import_muon()
    load_extensions(ds)
    if ds.zero_stage == 3:
        set_z3_leaf_modules(model, list(LAYERS))
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=groups, config=ds.for_engine(), dist_init_required=False
    )
    record_norms(engine.optimizer)
    return engine


def _import_muon() -> None:
    """Import an optimizer that DeepSpeed compares ours with, and never compile it.

    Its functions are decorated with torch.compile, which loads the compiler's backend: 1.4 s of
    each rank's start, and config/keys.py refuses Muon.
    """
    compiled = torch.compile
    torch.compile = lambda function: function  # type: ignore[assignment]
    try:
        with suppress(ImportError):  # as DeepSpeed has it
            importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
    finally:
        torch.compile = compiled


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
    """Collect one value of every rank on each: what JSON can say, of which tuples become lists.

    What comes from another process is data. torch's own collectives of objects send pickles, which
    would run what a stranger on the network puts in their place.
    """
    own = _as_bytes(value)
    sizes = [torch.zeros_like(_size(own)) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(sizes, _size(own))
    longest = max(int(size) for size in sizes)
    shares = [own.new_empty(longest) for _ in sizes]
    torch.distributed.all_gather(shares, nn.functional.pad(own, (0, longest - len(own))))
    return [_as_value(share[: int(size)]) for share, size in zip(shares, sizes, strict=True)]


def from_first_rank(value: Result) -> Result:
    """The first rank's value on all ranks: what JSON can say, of which tuples become lists."""
    own = _as_bytes(value)
    size = _size(own)
    torch.distributed.broadcast(size, src=0)
    if torch.distributed.get_rank() != 0:
        own = own.new_empty(int(size))
    torch.distributed.broadcast(own, src=0)
    received: Result = _as_value(own)
    return received


def _as_bytes(value: Any) -> Tensor:
    """A value as JSON, on the device that collectives take."""
    text = bytearray(json.dumps(value).encode())
    return torch.frombuffer(text, dtype=torch.uint8).to(get_accelerator().current_device_name())


def _size(own: Tensor) -> Tensor:
    return torch.tensor([len(own)], device=own.device)


def _as_value(own: Tensor) -> Any:
    return json.loads(bytes(own.cpu().numpy()))


def first_rank_does(task: Callable[[], Result], is_first: bool) -> Result | None:
    """Let the first rank do something; if it fails for a user's mistake, all ranks raise that.

    Returns what the task returned on the first rank, None on the others.
    """
    result: Result | None = None
    failure: Phi3VError | None = None
    if is_first:
        try:
            result = task()
        except Phi3VError as error:
            failure = error
    told = from_first_rank([type(failure).__name__, str(failure)] if failure else None)
    if failure is not None:
        raise failure
    if told is not None:
        kinds = {kind.__name__: kind for kind in Phi3VError.__subclasses__()}
        raise kinds.get(told[0], Phi3VError)(told[1])
    return result


def first_rank_does_slowly(
    name: str, task: Callable[[], Result], ranks: Ranks, beat: Callable[[], None]
) -> Result | None:
    """The same for what may take minutes: the others wait outside of any collective."""
    turn = Turn(name, ranks.world_size)

    def do() -> Result:
        try:
            return task()
        finally:
            turn.wait(beat)

    if not ranks.is_first:
        turn.wait(beat)
    return first_rank_does(do, ranks.is_first)


def load_checkpoint(engine: deepspeed.DeepSpeedEngine, folder: Path, tag: str) -> None:
    """Load a checkpoint of this number of ranks; all ranks call.

    Raises: CheckpointError if one of its files holds anything else than data.
    """
    engine._config.load_universal_checkpoint = False
    with data_only(folder / tag):
        engine.load_checkpoint(str(folder), tag=tag)


def total_norm(engine: deepspeed.DeepSpeedEngine) -> float:
    """Norm of the last step's gradient before clipping."""
    return float(engine.get_global_grad_norm())


def gradient_norms(engine: deepspeed.DeepSpeedEngine) -> tuple[float, dict[str, float]]:
    """Norm of the last step's gradient before clipping: the total, and that of each module."""
    total = total_norm(engine)
    return total, module_norms(engine.optimizer, total)


def set_learning_rates(engine: deepspeed.DeepSpeedEngine, rates: Mapping[Module, float]) -> None:
    """Give each parameter group its share of its module's learning rate for the coming step."""
    for group in engine.optimizer.param_groups:
        group["lr"] = rates[group["name"]] * group["lr_scale"]

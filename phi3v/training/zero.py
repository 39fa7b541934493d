"""DeepSpeed: the engine, gathering weights from its partitions, reading them from checkpoints."""

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from torch import Tensor, nn

from phi3v.config import DeepSpeedConfig, Module

COLLECTIVE_TIMEOUT = timedelta(minutes=30)


def start_process_group(timeout: timedelta = COLLECTIVE_TIMEOUT) -> None:
    """Join the other ranks (nccl on CUDA, gloo elsewhere)."""
    deepspeed.init_distributed(timeout=timeout, verbose=False)


def build_engine(
    model: nn.Module, groups: list[dict[str, Any]], ds: DeepSpeedConfig
) -> deepspeed.DeepSpeedEngine:
    """Hand the model to DeepSpeed, which partitions it and builds the JSON's optimizer."""
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=groups, config=ds.for_engine(), dist_init_required=False
    )
    return engine


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


def read_weights(checkpoints: Path, tag: str) -> dict[str, Tensor]:
    """Put the float32 weights of a checkpoint together on the CPU.

    Needs the memory of the whole model in float32 (16.6 GB at full size).
    """
    return get_fp32_state_dict_from_zero_checkpoint(str(checkpoints), tag=tag)


def total_norm(engine: deepspeed.DeepSpeedEngine) -> float:
    """Norm of the last step's gradient before clipping."""
    return float(engine.get_global_grad_norm())


def set_learning_rates(engine: deepspeed.DeepSpeedEngine, rates: Mapping[Module, float]) -> None:
    """Give each parameter group the learning rate of its module for the coming step."""
    for group in engine.optimizer.param_groups:
        group["lr"] = rates[group["name"]]

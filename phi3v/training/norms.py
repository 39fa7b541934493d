"""The norm of each module's gradient, kept where DeepSpeed computes it on the way to the total.

    record_norms(engine.optimizer)           # once
    module_norms(engine.optimizer, total)    # after a step: {"vision": 0.3, ..., "head": 1.2}

Every ZeRO stage takes the norm of one parameter group after another, over all ranks, and combines
them. No group belongs to two modules, so the modules' norms are there already: nothing is reduced
a second time, and reading them waits for nothing that reading the total has not waited for.
DeepSpeed's optimizer for stage 1 in bfloat16 alone takes the norm of everything at once; there
each rank has the whole averaged gradient, and takes the norms of the groups itself, which reads
the gradient once more.

Source: DeepSpeed 0.19.8, `_get_norm_groups` in zero/stage3.py, `scaled_global_norm` in
zero/stage_1_and_2.py, `get_grads_for_norm` in bf16_optimizer.py.
"""

import math
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

NORM_METHODS = ("get_grad_norm_direct", "complete_grad_norm_calculation_for_cpu_offload")


def record_norms(optimizer: Any) -> None:
    """Have a DeepSpeed optimizer keep the norms of its groups, those of the last step."""
    kept: deque[Tensor] = deque(maxlen=len(_group_names(optimizer)))
    optimizer.kept_norms = kept
    for name in NORM_METHODS:
        if hasattr(optimizer, name):
            setattr(optimizer, name, _keeping(getattr(optimizer, name), kept))
    if hasattr(optimizer, "get_grads_for_norm"):
        optimizer.get_grads_for_norm = _measuring(optimizer, kept)


def module_norms(optimizer: Any, total: float) -> dict[str, float]:
    """The norm of each trained module's gradient in the last step, before clipping.

    total  norm of the whole gradient; where it is not finite, the step was skipped before it had
           norms, and those of the modules are NaN. So they are where DeepSpeed took the total in
           another way: no figure is a reason to end a run
    """
    names, kept = _group_names(optimizer), list(optimizer.kept_norms)
    optimizer.kept_norms.clear()
    if not math.isfinite(total) or len(kept) != len(names):
        return dict.fromkeys(names, math.nan)
    squares = torch.stack(kept).double().square().tolist()
    sums = dict.fromkeys(names, 0.0)
    for name, square in zip(names, squares, strict=True):
        sums[name] += square
    return {name: math.sqrt(value) for name, value in sums.items()}


def _group_names(optimizer: Any) -> list[str]:
    """The module of each group whose norm is taken, in that order; stage 3 divides large groups."""
    names = [group["name"] for group in optimizer.param_groups]
    parts = getattr(optimizer, "sub_group_to_group_id", None)
    return names if parts is None else [names[parts[part]] for part in sorted(parts)]


def _keeping(take_norm: Callable[..., Tensor], kept: deque[Tensor]) -> Callable[..., Tensor]:
    def take_and_keep(*args: Any, **kwargs: Any) -> Tensor:
        norm = take_norm(*args, **kwargs)
        kept.append(norm.detach())
        return norm

    return take_and_keep


def _measuring(optimizer: Any, kept: deque[Tensor]) -> Callable[..., Any]:
    get_gradients = optimizer.get_grads_for_norm

    def measure_and_get(for_clipping: bool = False) -> Any:
        if not for_clipping:
            pairs = zip(
                optimizer.fp32_groups_gradients, optimizer.fp32_groups_has_gradients, strict=True
            )
            for gradients, are_there in pairs:
                there = [g for g, is_there in zip(gradients, are_there, strict=True) if is_there]
                kept.append(torch.nn.utils.get_total_norm(there))
        return get_gradients(for_clipping)

    return measure_and_get

"""flash-attn 2 where the package is not: its operators by name and signature, in shapes alone.

The package needs CUDA to be imported. What matters here of it is what it keeps for the backward
pass, and by what operators a selective checkpoint knows it.

Source: flash-attn 2.8 flash_attn_interface.py.
"""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.library import custom_op

Forward = tuple[Tensor, Tensor, Tensor, Tensor]


def _no_kernel(*args: Any) -> Any:
    raise NotImplementedError("there are no kernels here, only shapes")


@custom_op("flash_attn::_flash_attn_forward", mutates_args=(), device_types="cuda")
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    return_softmax: bool,
) -> Forward:
    return _no_kernel()


@custom_op("flash_attn::_flash_attn_varlen_forward", mutates_args=(), device_types="cuda")
def _varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_softmax: bool = False,
    block_table: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    zero_tensors: bool = False,
) -> Forward:
    return _no_kernel()


def _results(q: Tensor, sums: tuple[int, ...]) -> Forward:
    """The output, the logarithms of its sums, no probabilities, the state of dropout."""
    return (
        torch.empty_like(q),
        q.new_empty(sums, dtype=torch.float32),
        q.new_empty(0),
        q.new_empty(2, dtype=torch.int64),
    )


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Forward:
    return _results(q, (q.shape[0], q.shape[2], q.shape[1]))


@_varlen_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Forward:
    return _results(q, (q.shape[1], q.shape[0]))


class _Dense(Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        out, sums, _, state = _forward(q, k, v, 0.0, scale, False, -1, -1, 0.0, None, False)
        ctx.save_for_backward(q, k, v, out, sums, state)
        return out

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *_ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), None


class _Varlen(Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, boundaries: Tensor, longest: int, scale: float
    ) -> Tensor:
        ends = (boundaries, boundaries, longest, longest)
        out, sums, _, state = _varlen_forward(q, k, v, *ends, 0.0, scale, True, -1, 0)
        ctx.save_for_backward(q, k, v, out, sums, boundaries, state)
        return out

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *_ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), None, None, None


def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float, **_: Any) -> Tensor:
    return _Dense.apply(q, k, v, softmax_scale)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool,
    window_size: tuple[int, int],
    deterministic: bool,
) -> Tensor:
    return _Varlen.apply(q, k, v, cu_seqlens_q, max_seqlen_q, softmax_scale)


PACKAGE = SimpleNamespace(
    flash_attn_func=flash_attn_func, flash_attn_varlen_func=flash_attn_varlen_func
)

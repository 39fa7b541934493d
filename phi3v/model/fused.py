"""The parts of a layer between its matrix products, each keeping little for the backward pass.

One operation after another, autograd keeps every intermediate result: that is half of what a layer
keeps. Each function here keeps its inputs and computes the rest again, which costs no matrix
product. In eager mode they round where transformers' modules round. With `compiled` an element-wise
body runs as a kernel fused by torch.compile, which keeps float32 inside; it is compiled at its
first call, once for all numbers of tokens.

Letters: M tokens of all sequences (B * T), D width, F width inside the MLP, H heads, G heads of
keys and of values, K head width.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.functional import silu

Pair = tuple[Tensor, Tensor]
Triple = tuple[Tensor, Tensor, Tensor]

QUICK = 1.702  # of QuickGELU


def rms_norm(x: Tensor, weight: Tensor, eps: float, compiled: bool = False) -> Tensor:
    """Divide each token by its root mean square; keeps x and 4 bytes per token.

    x        (..., D)
    weight   (D,)
    returns  (..., D)
    """
    return _RMSNorm.apply(x, weight, eps, compiled)


def rotate(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, compiled: bool = False) -> Triple:
    """Turn queries and keys by their positions; all three come back in one new tensor.

    qkv      (B, T, (H + 2G) * K), the projection's output, which nothing keeps
    cos, sin (B or 1, T, K), the second half of K a copy of the first
    heads    H
    returns  views (B, H, T, K), (B, G, T, K), (B, G, T, K) of one (B, T, H + 2G, K)

    Not in place, though this copies the values (4 * G * K bytes of traffic per token in bf16):
    selective checkpointing keeps the projection's output and would turn it a second time, and
    torch.compile writes an exchange in place to a second tensor and copies that back.
    """
    return _Rotation.apply(qkv, cos, sin, heads, compiled)


def swiglu_linear(gate_up: Tensor, weight: Tensor, compiled: bool = False) -> Tensor:
    """Project silu(gate) * up; keeps gate_up only.

    gate_up  (..., 2F), the gate before the other half
    weight   (D, F)
    returns  (..., D)
    """
    return _ActivatedLinear.apply(gate_up, weight, None, _swiglu, _swiglu_gradients, compiled)


def quick_gelu_linear(x: Tensor, weight: Tensor, bias: Tensor, compiled: bool = False) -> Tensor:
    """Project x * sigmoid(1.702 x); keeps x only.

    x        (..., F)
    weight   (D, F); bias (D,)
    returns  (..., D)
    """
    return _ActivatedLinear.apply(x, weight, bias, _quick_gelu, _quick_gelu_gradients, compiled)


class _RMSNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, compiled: bool) -> Tensor:
        normed, scale = _run(compiled, _norm, _flat(x), weight.detach(), eps)
        ctx.save_for_backward(x, weight, scale)
        ctx.compiled = compiled
        return normed.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        of_input = of_weight = None
        flat = _flat(gradient)
        if ctx.needs_input_grad[0]:
            of_input = _run(
                ctx.compiled, _norm_input_gradient, flat, _flat(x), weight.detach(), scale
            ).view_as(x)
        if ctx.needs_input_grad[1]:
            of_weight = _run(ctx.compiled, _norm_weight_gradient, flat, _flat(x), scale)
        return of_input, of_weight, None, None


class _Rotation(Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, compiled: bool
    ) -> Triple:
        batch, tokens, head_width = *qkv.shape[:2], cos.shape[-1]
        ctx.save_for_backward(cos, sin)
        ctx.compiled = compiled
        packed = qkv.view(batch, tokens, -1, head_width)  # (B, T, H + 2G, K)
        groups = (packed.shape[2] - heads) // 2
        angles = (_per_token(angle, batch) for angle in (cos, sin))
        parts = packed.flatten(0, 1).split([heads, groups, groups], dim=1)
        turned = _run(compiled, _turn, *parts, *angles).view_as(packed)
        q, k, v = turned.transpose(1, 2).split([heads, groups, groups], dim=1)
        return q, k, v

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        batch, _, tokens, _ = gradients[0].shape
        cos, sin = (_per_token(angle, batch) for angle in ctx.saved_tensors)
        parts = (gradient.transpose(1, 2).flatten(0, 1) for gradient in gradients)
        turned = _run(ctx.compiled, _turn_back, *parts, cos, sin)  # (M, H + 2G, K)
        return turned.view(batch, tokens, -1), None, None, None, None


class _ActivatedLinear(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        activate: Callable[[Tensor], Tensor],
        differentiate: Callable[[Tensor, Tensor], Pair],
        compiled: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bodies, ctx.compiled = (activate, differentiate), compiled
        inner = _run(compiled, activate, _flat(x))  # (M, F)
        if bias is None:
            projected = inner.mm(weight.t())
        else:
            projected = torch.addmm(bias, inner, weight.t())
        return projected.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        activate, differentiate = ctx.bodies
        flat = _flat(gradient)
        of_input = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            inner, of_input = _run(ctx.compiled, differentiate, flat.mm(weight), _flat(x))
            of_input = of_input.view_as(x)
        elif ctx.needs_input_grad[1]:
            inner = _run(ctx.compiled, activate, _flat(x))
        if ctx.needs_input_grad[1]:
            of_weight = flat.t().mm(inner)
        if ctx.needs_input_grad[2]:
            of_bias = flat.sum(0)
        return of_input, of_weight, of_bias, None, None, None


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])  # (M, D)


def _per_token(angle: Tensor, batch: int) -> Tensor:
    return angle.expand(batch, -1, -1).flatten(0, 1)  # (M, K)


def _run(compiled: bool, body: Callable[..., Any], *inputs: Any) -> Any:
    """Call a body, fused if asked for; the first dimension of its matrices is that of tokens."""
    if not compiled:
        return body(*inputs)
    for value in inputs:
        if isinstance(value, Tensor) and value.dim() > 1:
            torch._dynamo.maybe_mark_dynamic(value, 0)
    return _fuse(body)(*inputs)


@cache
def _fuse(body: Callable[..., Any]) -> Callable[..., Any]:
    # Widths stay constants in the kernels, as dynamic=True would not have them.
    return torch.compile(body)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _norm(x: Tensor, weight: Tensor, eps: float) -> Pair:
    """The normalised tokens (M, D), and what each was multiplied by: (M, 1), float32."""
    wide = _wide(x)
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * (wide * scale).to(x.dtype), scale


def _norm_input_gradient(gradient: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    normed, inner = _wide(x) * scale, _wide(gradient * weight)
    along = (inner * normed).mean(-1, keepdim=True)  # growing along itself changes nothing
    return (scale * (inner - normed * along)).to(x.dtype)


def _norm_weight_gradient(gradient: Tensor, x: Tensor, scale: Tensor) -> Tensor:
    return (gradient * (_wide(x) * scale).to(x.dtype)).sum(0)


def _turn(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn (M, H, K) and (M, G, K) by angles (M, K); returns (M, H + 2G, K)."""
    width = cos.shape[-1]
    is_first = torch.arange(width, device=cos.device) < width // 2
    cos, sin = cos[:, None], torch.where(is_first, -sin, sin)[:, None]  # (M, 1, K)
    turned = (heads * cos + _swap_halves(heads) * sin for heads in (q, k))
    return torch.cat([*turned, v], dim=1)


def _swap_halves(heads: Tensor) -> Tensor:
    # A flip is an index to torch.compile, the concatenation of two halves a kernel of its own.
    return heads.unflatten(-1, (2, -1)).flip(-2).flatten(-2)


def _turn_back(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return _turn(q, k, v, cos, -sin)


def _swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return up * silu(gate)  # (M, F)


def _swiglu_gradients(gradient: Tensor, gate_up: Tensor) -> Pair:
    """What _swiglu returns (M, F), and its input's gradient (M, 2F)."""
    gate, up = gate_up.chunk(2, dim=-1)
    activated = silu(gate)
    of_gate = torch.ops.aten.silu_backward(gradient * up, gate)
    return up * activated, torch.cat([of_gate, gradient * activated], dim=-1)


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(QUICK * x)


def _quick_gelu_gradients(gradient: Tensor, x: Tensor) -> Pair:
    """What _quick_gelu returns, and its input's gradient: (M, F) each."""
    share = torch.sigmoid(QUICK * x)
    of_share = torch.ops.aten.sigmoid_backward(gradient * x, share)
    return x * share, gradient * share + QUICK * of_share

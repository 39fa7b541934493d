"""The output head and its loss, without a tensor of tokens x vocabulary.

`Head(hidden)` gives logits; `Head(hidden, targets)` gives the summed cross entropy, a chunk of
tokens at a time. The loss is made inside the module because under ZeRO-3 the matrix is whole only
there. Surprising: the gradients are made in the forward pass, while a chunk's logits are there, and
the backward pass only scales them; activation checkpointing around the head would cost, not save.

Letters: T trained tokens, C tokens of a chunk, D width, V vocabulary.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from inspect import signature
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy, log_softmax

from phi3v.errors import ConfigError
from phi3v.sample import IGNORED

Loss = Literal["liger", "chunked"]

# Tokens of a chunk. Its logits (bf16) and probabilities (float32) take 197 MB at V = 32,064.
CHUNK = 1024


class Head(nn.Linear):
    """The output matrix (V, D); `loss` says by what its loss is made, see `choose_loss`."""

    loss: Loss = "chunked"

    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__(width, vocabulary, bias=False)

    def forward(self, hidden: Tensor, targets: Tensor | None = None) -> Tensor:
        """Make logits or, with targets, the sum of the cross entropies.

        hidden   (..., D); with targets (T, D), of trained positions only
        targets  (T,) the token to be predicted at each
        returns  logits (..., V); or a scalar in float32, not divided by anything (0, with zero
                 gradients, if T is 0)
        """
        if targets is None:
            return super().forward(hidden)
        # Liger cannot take 0 tokens, and leaves the matrix without a gradient if `hidden` has none.
        if self.loss == "liger" and len(hidden) and hidden.requires_grad:
            return liger_loss(hidden, self.weight, targets)
        return chunked_loss(hidden, self.weight, targets)


def choose_loss(wanted: Literal["auto", "liger", "chunked"], device: torch.device) -> Loss:
    """Name what makes the loss on a device; "auto" is ours, "chunked".

    Liger's waits for the device at each pack (it counts the targets that are ignored), and no gain
    of its kernel was measured.

    Raises: ConfigError if "liger" is wanted and cannot run here.
    """
    if wanted != "liger":
        return "chunked"
    obstacle = _liger_obstacle(device)
    if obstacle:
        raise ConfigError(
            f"model.loss is 'liger', which cannot run here: {obstacle}; use 'auto' or 'chunked'"
        )
    return "liger"


def _liger_obstacle(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"it needs a CUDA device, this one is {device.type}"
    if find_spec("liger_kernel") is None:
        return "the package liger-kernel is not installed (pip install -e '.[kernels]')"
    try:
        function = _liger_function()
    except Exception as error:  # it imports triton, transformers and more of itself than we call
        return f"`import liger_kernel` fails with {type(error).__name__}: {_first_line(error)}"
    if "accum_dtype" not in signature(function.forward).parameters:
        return "the installed liger-kernel adds gradients up in bf16, 0.6.2 or later is needed"
    return None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "no message")


def _liger_function() -> Any:
    # Optional, and loads triton, which comes with torch for CUDA only.
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    return LigerFusedLinearCrossEntropyFunction


def liger_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Do what `chunked_loss` does by Liger's kernel; T > 0, and `hidden` needs a gradient.

    Its chunks have about T * D / V tokens (T / 11 in the published model), and each is added to the
    whole (V, D) gradient: with few trained tokens it passes over that more often than
    `chunked_loss`. Its backward pass scales in place, so it can run once only.

    Source: liger-kernel 0.6.2 to 0.8.5, ops/fused_linear_cross_entropy.py. Function.apply takes no
    keywords; the options are bias, ce_weight, ignore_index, lse_square_scale, label_smoothing,
    reduction, softcap, return_z_loss, accum_dtype.
    """
    options = (None, None, -100, 0.0, 0.0, "sum", None, False, torch.float32)
    return _liger_function().apply(hidden, weight, targets, *options)[0]


def chunked_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Sum the cross entropies of softmax(hidden @ weight.T); arguments as in `Head.forward`.

    weight   (V, D)
    returns  scalar, float32 or wider

    Logits are in the weight's dtype and the softmax in float32, as over full logits.
    """
    assert hidden.dtype == weight.dtype, f"a product of {hidden.dtype} and {weight.dtype}"
    assert targets.dtype == torch.int64, targets.dtype
    if not torch.is_grad_enabled():  # inside the function, needs_input_grad would not tell
        hidden, weight = hidden.detach(), weight.detach()
    return _ChunkedLoss.apply(hidden, weight, targets)


class _ChunkedLoss(Function):
    """Gradients are made in the forward pass, as Liger's are, and wait there to be scaled.

    Making the logits again in the backward pass would need a fourth product of T * D * V beside the
    three that count as model FLOPs: a third more for the head, 0.9 % for the language model if
    every token is trained. It would save no memory: both ways keep a (T, D), and add up a (V, D) in
    float32 while all activations are there (394 MB at V = 32,064, D = 3,072).

    In bf16 the gradient of `hidden` is rounded before it is scaled and after.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        wide = torch.promote_types(weight.dtype, torch.float32)
        needs_hidden, needs_weight, _ = ctx.needs_input_grad
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if needs_weight else None
        total = torch.zeros((), dtype=wide, device=hidden.device)
        for start in range(0, len(hidden), CHUNK):
            part = slice(start, start + CHUNK)
            grad_part = None if grad_hidden is None else grad_hidden[part]
            total += _chunk(hidden[part], weight, targets[part], grad_part, grad_weight)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.dtype = weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * factor
        if grad_weight is not None:
            scaled = torch.empty_like(grad_weight, dtype=ctx.dtype)
            grad_weight = torch.mul(grad_weight, factor, out=scaled)  # no second float32 (V, D)
        return grad_hidden, grad_weight, None


def _chunk(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    grad_hidden: Tensor | None,
    grad_weight: Tensor | None,
) -> Tensor:
    """Return the loss of C tokens; write their `grad_hidden` (C, D), add to `grad_weight` (V, D).

    A function of its own, so that a chunk's memory is free before the next begins.
    """
    logits = hidden @ weight.T  # (C, V)
    log_shares = log_softmax(logits, 1, dtype=torch.promote_types(logits.dtype, torch.float32))
    picked = torch.arange(len(targets), device=targets.device), targets
    loss = -log_shares[picked].sum()
    if grad_hidden is None and grad_weight is None:
        return loss
    shares = log_shares.exp_()
    shares[picked] -= 1
    grad_logits = logits.copy_(shares)  # (C, V), in the logits' memory
    if grad_hidden is not None:
        torch.mm(grad_logits, weight, out=grad_hidden)
    if grad_weight is not None:
        _add_product(grad_weight, grad_logits.T, hidden)
    return loss


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add `left @ right` to `total`, in place and in total's dtype: theirs, or float32.

    CUDA has no other products, and a fake device would not notice.
    """
    assert left.dtype == right.dtype and total.dtype in (left.dtype, torch.float32), (
        f"a product of {left.dtype} and {right.dtype} into {total.dtype}"
    )
    if left.dtype == total.dtype:
        torch.addmm(total, left, right, out=total)
    elif left.is_cpu:  # has no product of bf16 into float32
        total += left @ right
    else:  # torch.addmm itself DeepSpeed's profiler replaces by one that does not know out_dtype
        torch.ops.aten.addmm.dtype_out(total, left, right, total.dtype, out=total)


def next_tokens(labels: Tensor, segment_lengths: Sequence[int]) -> Tensor:
    """Shift labels so that position t holds the token to be predicted there.

    A sample's first token is nobody's target: in a pack it would be predicted by a neighbour.
    """
    targets = torch.full_like(labels, IGNORED)
    targets[:, :-1] = labels[:, 1:]
    last = torch.as_tensor(segment_lengths, device=labels.device).cumsum(0) - 1
    targets[:, last] = IGNORED
    return targets


def mean_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy of a padded batch over its trained positions; 0 if there is none."""
    targets = next_tokens(labels, [labels.shape[1]]).to(logits.device)
    total = cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    return total / (targets != IGNORED).sum().clamp(min=1)

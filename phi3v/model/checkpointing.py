"""How much of a layer is computed a second time in the backward pass, to keep less until then.

    none       keep what autograd keeps
    selective  keep the layer's input and the results of its matrix products and attention; compute
               norms, rotary embedding, activation and sums a second time, and no product
    full       keep the layer's input; compute all but the last product a second time

In bfloat16 at the published widths, counted by tests/cuda:

               bytes per token and layer       FLOPs of products beside "none"
               none   selective    full        selective    full
    decoder  82,056      69,760   6,144             1.00    1.26
    tower    24,656      20,544   2,048             1.00    1.22

SDPA, sample by sample, keeps 88,200 in the decoder under "none".

torch's own selective checkpoint is not used. It hands out a product into which something was
written later (DeepSpeed's linear adds its bias so) and lets it be written a second time: the
gradients are wrong, and nothing says so.
"""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import checkpoint

from phi3v.config.schema import Checkpointing
from phi3v.model.attention import ATTENTION_OPS

aten = torch.ops.aten
PRODUCTS = {op.default for op in (aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.convolution)}
DEAR = PRODUCTS | set(ATTENTION_OPS)


def run_layer(
    layer: Callable[..., Tensor], how: Checkpointing, offload: bool, hidden: Tensor, **kwargs: Any
) -> Tensor:
    """Call `layer(hidden, **kwargs)`, keeping of it what `how` says.

    layer    ends in a matrix product and sums: nothing else may need that product's result
    offload  whether under `full` the input waits in host memory, pinned for a CUDA tensor
    hidden   (B, T, D)
    kwargs   what all layers share; stays on the device
    returns  (B, T, D)

    The copies to the host and back run on the stream that computes, and are waited for nowhere.
    """
    if how == "none":
        return layer(hidden, **kwargs)
    # The checkpoint takes what the layer saves; only the layer's input reaches these hooks.
    waits = offload and how == "full"
    with saved_tensors_hooks(_to_host, _from_host) if waits else nullcontext():
        return checkpoint(
            layer, hidden, use_reentrant=False, context_fn=lambda: _both_runs(how), **kwargs
        )


def _to_host(tensor: Tensor) -> tuple[torch.device, Tensor]:
    """As torch's save_on_cpu, which waits for each copy to the host."""
    held = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return tensor.device, held.copy_(tensor, non_blocking=True)


def _from_host(packed: tuple[torch.device, Tensor]) -> Tensor:
    device, held = packed
    return held.to(device, non_blocking=True)


def _both_runs(how: Checkpointing) -> tuple[TorchDispatchMode, TorchDispatchMode]:
    results: deque[Any] = deque()
    return _FirstRun(results, keeps=how == "selective"), _SecondRun(results)


class _FirstRun(TorchDispatchMode):
    """Note the result of each dear operation, or None where it is to be computed again."""

    def __init__(self, results: deque[Any], keeps: bool) -> None:
        super().__init__()
        self.results, self.keeps = results, keeps
        self.last: Any = None

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # otherwise torch.compile would not run below this mode

    def __torch_dispatch__(
        self, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = op(*args, **(kwargs or {}))
        if op in DEAR:
            if self.results and not self.keeps:
                self.results[-1] = None
            # autograd will hang its graph on `result` itself
            self.results.append(tree_map_only(Tensor, Tensor.detach, result))
            self.last = op
        return result

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        if self.last in PRODUCTS:
            # Needed by no gradient. Not a number, so that a layer in which it is shows it.
            last = self.results.pop()
            self.results.append(last.new_full((), torch.nan).expand_as(last))


class _SecondRun(TorchDispatchMode):
    """Hand out the results of the first run in their order; compute everything else."""

    def __init__(self, results: deque[Any]) -> None:
        super().__init__()
        self.results = results
        # The storages of those results, by identity. A weak reference keeps none of their memory
        # but the identity, which a later tensor's storage would take otherwise.
        self.kept: dict[int, StorageWeakRef] = {}

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(
        self, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = self.results.popleft() if op in DEAR else None
        if result is not None:
            storages = (x.untyped_storage() for x in tree_leaves(result) if isinstance(x, Tensor))
            self.kept |= {storage._cdata: StorageWeakRef(storage) for storage in storages}
            return result
        for written in _written(op, args, kwargs):
            if written.untyped_storage()._cdata in self.kept:
                return written  # was written in the first run
        return op(*args, **kwargs)


def _written(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    """The tensors into which an operation writes."""
    if not op._schema.is_mutable:
        return
    for place, argument in enumerate(op._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = kwargs[argument.name] if argument.name in kwargs else args[place]
            if isinstance(value, Tensor):
                yield value

"""What computing on a CUDA device asks of it, seen without one; see stub.py.

    with FakeDevice() as gpu:
        model(...)
    gpu.live, gpu.peak, gpu.waits

Tensors on "cuda" are fake: they have shapes, dtypes and a device, and no numbers. Those of the host
are real; what comes back from the device is zeros. A tensor on the wrong device raises, as on a
GPU. An operation for which the host waits until the device has done its work is noted, and the
memory of all tensors on it is counted. Fake tensors do not know which dtypes a kernel refuses,
streams, fragmentation, nor speed.
"""

import weakref
from collections import Counter
from pathlib import Path
from traceback import extract_stack
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CUDA = torch.device("cuda", 0)
PACKAGE = str(Path(__file__).parents[2] / "phi3v")
# The host reads a number, or a size that only the device knows.
WAITS = {
    *("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "bincount"),
    *("masked_scatter_backward", "unique_dim", "_unique", "_unique2", "repeat_interleave"),
}


class FakeDevice(TorchDispatchMode):
    """Computes in shapes what is on the device; `live` and `peak` are bytes on it.

    waits  how often the host waited, by the operation and the place in phi3v that asked for it
    """

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.live = self.peak = 0
        self.waits: Counter[str] = Counter()
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        if not any(_is_on_device(leaf) for leaf in leaves):
            return op(*args, **kwargs)  # the host's own work
        name = op.name().split("::")[1].split(".")[0]
        if _waits(name, args, kwargs):
            self.waits[f"{name} by {_place()}"] += 1
        if (result := _on_host(name, args, kwargs)) is not None:
            return result
        with self.fake:
            result = op(*args, **kwargs)
        for tensor in tree_leaves(result):
            if isinstance(tensor, FakeTensor) and tensor.is_cuda:
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def free(_: object) -> None:
            del self._known[key]
            self.live -= size

        self._known[key] = weakref.ref(storage, free)
        self.live += size
        self.peak = max(self.peak, self.live)


def _is_on_device(value: Any) -> bool:
    if isinstance(value, torch.device):
        return value.type == "cuda"
    return isinstance(value, FakeTensor)


def _waits(name: str, args: Any, kwargs: Any) -> bool:
    """Whether the host waits for the device before this operation returns."""
    if name in ("index", "index_put", "index_put_", "_unsafe_index_put", "_index_put_impl_"):
        # Places on the host are sent over first; a mask is searched for its places.
        places = [x for x in tree_leaves(args[1]) if isinstance(x, Tensor)]
        return any(x.dtype == torch.bool or (x.dim() and not x.is_cuda) for x in places)
    if name == "_to_copy":
        target = kwargs.get("device") or args[0].device
        is_asked_for = kwargs.get("non_blocking", False)
        return _copy_waits(args[0], target, None, is_asked_for)
    if name == "copy_":
        is_asked_for = len(args) > 2 and args[2]
        return _copy_waits(args[1], args[0].device, args[0], is_asked_for)
    return name in WAITS


def _copy_waits(
    source: Tensor, target: torch.device, into: Tensor | None, is_asked_for: bool
) -> bool:
    """Whether a copy is waited for: between host and device, unless from or to pinned memory."""
    if source.device.type == target.type or not source.numel():
        return False
    on_host = source if target.type == "cuda" else into
    return not (is_asked_for and on_host is not None and on_host.is_pinned())


def _on_host(name: str, args: Any, kwargs: Any) -> Any:
    """What an operation brings to the host, or None: a tensor or a number."""
    if name == "_local_scalar_dense":
        return torch.zeros((), dtype=args[0].dtype).item()
    if name == "copy_" and not args[0].is_cuda:
        return args[0]
    if name == "_to_copy" and kwargs.get("device") and kwargs["device"].type == "cpu":
        return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
    return None


def _place() -> str:
    """The innermost functions of phi3v that are being called, two of them; autograd calls none."""
    frames = [frame for frame in extract_stack() if frame.filename.startswith(PACKAGE)]
    names = [f"{Path(frame.filename).name} {frame.name}" for frame in frames[:-3:-1]]
    return " < ".join(names) or "autograd"

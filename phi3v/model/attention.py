"""Attention of the decoder and of the tower: one function per backend, registered by name.

A pack goes through the kernel of the backend: flash-attn's, torch's variable-length one, or one
SDPA call per sample. A padded batch, with its mask and cache, is SDPA's under every name, so that
answers do not depend on the choice. transformers builds no mask for us: see `padding_mask`.

    config._attn_implementation = choose_attention("auto", device, torch.bfloat16)
    segments = Segments.of([812, 4096], device)    # once per forward; every layer is given it

Letters: B sequences, N views, H heads, T tokens, K head width.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from inspect import signature
from itertools import accumulate
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from phi3v.errors import ConfigError
from phi3v.model.sending import send

# Not "phi3v_flash": transformers takes any name with "flash" in it for a package of its own.
FLASH, VARLEN, SDPA = "phi3v_fa", "phi3v_varlen", "phi3v_sdpa"
VIEWS, FLASH_VIEWS = "phi3v_views", "phi3v_views_fa"

# The names by what `model.attention` says, fastest first; the tower's for each of the decoder's.
BACKENDS = {"flash": FLASH, "varlen": VARLEN, "sdpa": SDPA}
TOWER = {FLASH: FLASH_VIEWS, VARLEN: VIEWS, SDPA: VIEWS}

HALVES = (torch.bfloat16, torch.float16)
# From torch 2.12 on; before, grouped heads needed no word.
TAKES_GROUPING = "enable_gqa" in signature(varlen_attn).parameters


def _find(package: str) -> ModuleType | None:
    """Import flash-attn, if it can be; its version 4 has a `flash_attn` without these functions."""
    try:
        module = import_module(package)
    except ImportError:
        return None
    return module if hasattr(module, "flash_attn_varlen_func") else None


# At import, so that ATTENTION_OPS are complete: a package registers its operators when imported.
FLASH_3, FLASH_2 = _find("flash_attn_interface"), _find("flash_attn")


@dataclass(frozen=True, eq=False)
class Segments:
    """Where the samples of a pack lie: made once per forward, read by every layer.

    lengths     tokens of each sample
    longest     tokens of the longest
    boundaries  (samples + 1,) int32 on the device: 0, and the end of each sample

    Lengths 3, 5, 2 have boundaries 0, 3, 8, 10.
    """

    lengths: tuple[int, ...]
    longest: int
    boundaries: Tensor

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> "Segments":
        """Describe samples laid end to end; the copy to the device waits for nothing."""
        ends = list(accumulate(lengths, initial=0))
        return cls(
            tuple(lengths), max(lengths), send(torch.tensor(ends, dtype=torch.int32), device)
        )

    def __post_init__(self) -> None:
        """Hold what kernels demand of boundaries, and what a fake device would not notice."""
        assert self.boundaries.dtype == torch.int32, self.boundaries.dtype
        assert self.boundaries.is_contiguous()
        assert type(self.longest) is int, type(self.longest)


Kernel = Callable[[Tensor, Tensor, Tensor, Segments, float | None, int | None], Tensor]


def choose_attention(wanted: str, device: torch.device, dtype: torch.dtype) -> str:
    """Choose the decoder's attention, by its registered name; `TOWER` has the tower's for it.

    wanted  `model.attention` of the recipe; auto: the first of flash, varlen, sdpa that runs
    dtype   of the weights

    Raises: ConfigError if what is wanted cannot run here.
    """
    if wanted == "auto":
        return next(name for name in BACKENDS.values() if not _obstacle(name, device, dtype))
    obstacle = _obstacle(BACKENDS[wanted], device, dtype)
    if obstacle:
        raise ConfigError(
            f"model.attention={wanted} cannot run on this {device.type} device: {obstacle}; "
            "set model.attention=auto for the fastest that can"
        )
    return BACKENDS[wanted]


def _obstacle(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Say why a backend cannot run, or None if it can."""
    if name == SDPA:
        return None
    if device.type != "cuda":
        return "it needs CUDA"
    if dtype not in HALVES:
        return f"it needs weights in bfloat16 or float16, these are {dtype}"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"it needs compute capability 8.0 or more, this is {major}.{minor}"
    if name == VARLEN and not torch.backends.cuda.is_flash_attention_available():
        return f"torch {torch.__version__} was built without flash attention"
    if name == FLASH and _flash(device) is None:
        return "`import flash_attn` fails; pip install -e '.[flash-attn]', see docs/install.md"
    return None


@cache
def _flash(device: torch.device) -> ModuleType | None:
    """flash-attn for this device: version 3, which is for Hopper only, before version 2."""
    if device.type != "cuda":
        return None
    is_hopper = torch.cuda.get_device_capability(device)[0] == 9
    return FLASH_3 if FLASH_3 and is_hopper else FLASH_2


def attend(
    kernel: Kernel,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    segments: Segments | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend causally: a pack by the backend's kernel, a padded batch by SDPA.

    query           (B, H, T, K); key and value may have fewer heads and, with a cache, more tokens
    attention_mask  (B, 1, T, keys) bool, True where a key is seen, or None: all before and at
    segments        the samples of a pack (B = 1)
    sliding_window  for the samples of a pack; that of a padded batch is in its mask
    returns         (B, T, H, K)
    """
    if segments is not None:
        return kernel(query, key, value, segments, scaling, sliding_window), None
    is_causal = attention_mask is None and query.shape[2] > 1
    return _sdpa(query, key, value, attention_mask, is_causal, scaling), None


def by_sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """One call per sample: as many kernels as samples, and a mask for those beyond the window."""
    parts = []
    samples = (x.split(segments.lengths, dim=2) for x in (query, key, value))
    for q, k, v in zip(*samples, strict=True):
        mask = padding_mask(None, q.shape[2], q.shape[2], window, q.device)
        parts.append(_sdpa(q, k, v, mask, mask is None, scaling))
    return torch.cat(parts, dim=1)  # (1, T, H, K)


def by_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """torch's flash attention over all samples at once."""
    _hold_halves(query, key, value)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (T, H, K)
    is_grouped = query.shape[1] != key.shape[1]
    grouping: dict[str, Any] = {"enable_gqa": is_grouped} if TAKES_GROUPING else {}
    attended = varlen_attn(
        q,
        k,
        v,
        segments.boundaries,
        segments.boundaries,
        segments.longest,
        segments.longest,
        scale=scaling,
        window_size=_window(window),
        **grouping,
    )
    return _output(attended)[None]


def by_flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """The flash-attn package's kernel over all samples at once."""
    package = _flash(query.device)
    assert package is not None, "choose_attention would not have chosen it"
    _hold_halves(query, key, value)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (T, H, K)
    attended = package.flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q=segments.boundaries,
        cu_seqlens_k=segments.boundaries,
        max_seqlen_q=segments.longest,
        max_seqlen_k=segments.longest,
        softmax_scale=scaling,
        causal=True,
        window_size=_window(window),
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return _output(attended)[None]


def attend_views(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Let every patch of a view see all its patches: (N, H, T, K) -> (N, T, H, K)."""
    return _sdpa(query, key, value, None, False, scaling), None


def attend_views_by_flash(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The same by the flash-attn package; by SDPA where the model has since left its device."""
    package = _flash(query.device)
    if package is None or query.dtype not in HALVES:
        return attend_views(module, query, key, value, None, scaling)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))  # (N, T, H, K)
    attended = package.flash_attn_func(
        q,
        k,
        v,
        softmax_scale=scaling,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return _output(attended), None


def _sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scaling: float | None,
) -> Tensor:
    """torch's choice of kernel for one dense call: (B, H, T, K) -> (B, T, H, K)."""
    is_grouped = query.shape[1] != key.shape[1]
    attended = scaled_dot_product_attention(
        query, key, value, mask, is_causal=is_causal, scale=scaling, enable_gqa=is_grouped
    )
    return attended.transpose(1, 2)


def _hold_halves(*tensors: Tensor) -> None:
    """Flash kernels take no other dtypes on a GPU, and a fake one would not notice."""
    dtypes = {tensor.dtype for tensor in tensors if tensor.is_cuda}
    assert dtypes <= set(HALVES) and len(dtypes) <= 1, dtypes


def _window(window: int | None) -> tuple[int, int]:
    """Keys before and after each query, as flash kernels count them: the query itself is extra."""
    return (-1 if window is None else window, 0)


def _output(attended: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Drop the log-sum-exp that may come along, as early builds of flash-attn 3 had it."""
    return attended[0] if isinstance(attended, tuple) else attended


def padding_mask(
    attention_mask: Tensor | None, queries: int, keys: int, window: int | None, device: torch.device
) -> Tensor | None:
    """Which keys each query sees: causal, not padding, at most `window` back.

    attention_mask  (B, keys) 1 for tokens and 0 for padding, or None
    returns         (B, 1, queries, keys) bool, or None where a plain causal mask says the same

    The published window counts the keys *before* the query (window + 1 are seen). A padded query
    sees itself, because a row of the mask without any key has no softmax.
    """
    is_padded = attention_mask is not None and not bool(attention_mask.all())
    is_windowed = window is not None and keys > window + 1
    if not is_padded and not is_windowed and (queries == 1 or queries == keys):
        return None
    query = torch.arange(keys - queries, keys, device=device)[:, None]
    key = torch.arange(keys, device=device)[None, :]
    seen = key <= query
    if window is not None:
        seen = seen & (key >= query - window)
    seen = seen[None, None]  # (1, 1, queries, keys)
    if attention_mask is not None:
        seen = seen & attention_mask[:, None, None, :].bool()
    return seen | (key == query)


# What attention is to the dispatcher, where a forward's operators are seen one by one.
OPERATORS = {
    "aten": (
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
    ),
    "torch_attn": ("_varlen_attn",),
    "flash_attn": ("_flash_attn_varlen_forward", "_flash_attn_forward"),
    "flash_attn_3": ("_flash_attn_forward", "fwd"),
}


def _registered() -> Iterator[torch._ops.OpOverload]:
    """The operators that this process has: a package's are missing where it is."""
    for library, names in OPERATORS.items():
        operators = getattr(torch.ops, library)
        yield from (getattr(operators, name).default for name in names if hasattr(operators, name))


ATTENTION_OPS = tuple(_registered())
"""The forward of every backend, for a selective checkpoint to keep."""

for _name, _kernel in {FLASH: by_flash, VARLEN: by_varlen, SDPA: by_sdpa}.items():
    AttentionInterface.register(_name, partial(attend, _kernel))
AttentionInterface.register(VIEWS, attend_views)
AttentionInterface.register(FLASH_VIEWS, attend_views_by_flash)

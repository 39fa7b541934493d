"""Attention of the decoder: a padded batch with a mask, or a pack of samples that never mix.

Registered with transformers as `phi3v`, so that its Phi-3 layers call it. transformers builds no
mask for us: the model makes its own (see `padding_mask`).

Letters: B sequences, H heads, T tokens, K head width.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

ATTENTION = "phi3v"


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    segment_lengths: Sequence[int] | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend causally, by segment if `segment_lengths` are given.

    query            (B, H, T, K); key and value may have fewer heads and, with a cache, more tokens
    attention_mask   (B, 1, T, keys) bool, True where a key is seen, or None: all before and at
    segment_lengths  tokens of each sample of a pack (B = 1), summing to T
    sliding_window   for the samples of a pack; that of a padded batch is in its mask
    returns          (B, T, H, K)
    """
    grouped = query.shape[1] != key.shape[1]
    if segment_lengths is not None:
        lengths = list(segment_lengths)
        segments = (tensor.split(lengths, dim=2) for tensor in (query, key, value))
        masks = [padding_mask(None, n, n, sliding_window, query.device) for n in lengths]
        parts = [
            scaled_dot_product_attention(
                q, k, v, mask, is_causal=mask is None, scale=scaling, enable_gqa=grouped
            )
            for q, k, v, mask in zip(*segments, masks, strict=True)
        ]
        return torch.cat(parts, dim=2).transpose(1, 2), None
    is_causal = attention_mask is None and query.shape[2] > 1
    attended = scaled_dot_product_attention(
        query, key, value, attention_mask, is_causal=is_causal, scale=scaling, enable_gqa=grouped
    )
    return attended.transpose(1, 2), None


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


AttentionInterface.register(ATTENTION, attend)

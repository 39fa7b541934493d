"""Phi-3's rotary angles ("su", longrope): two sets of factors, chosen by length.

A sequence beyond `original_max_position_embeddings` tokens uses the long factors for all of its
positions, others the short ones. The module keeps no buffer: a model cast to bf16 would round its
frequencies, and cos would be wrong by up to 2.
"""

import math

import torch
from torch import Tensor

from phi3v.model.configuration import Phi3VConfig
from phi3v.model.sending import send


def rotary(
    config: Phi3VConfig, positions: Tensor, is_long: Tensor | bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position, scaled, in `dtype`.

    positions  (B, T)
    is_long    (B, T) or one choice for all: use the long factors
    returns    two (B, T, K), K the head's width

    inv_freq[i] = 1 / (factor[i] * theta ** (2i / K)); both are multiplied by
    sqrt(1 + ln(max / original) / ln(original)), 1.19024 in the published model.
    Source: Phi-3-V modeling_phi3_v.py `Phi3SuScaledRotaryEmbedding`.
    """
    device = positions.device
    choice = torch.as_tensor(is_long, device=device)[..., None]
    short, long = (_frequencies(config, name, device) for name in ("short_factor", "long_factor"))
    angles = positions[..., None].float() * torch.where(choice, long, short)
    angles = torch.cat([angles, angles], dim=-1)  # (B, T, K)
    scale = _attention_scale(config)
    return (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)


def _frequencies(config: Phi3VConfig, name: str, device: torch.device) -> Tensor:
    width = config.hidden_size // config.num_attention_heads
    factors = send(torch.tensor(config.rope_parameters[name], dtype=torch.float32), device)
    exponents = torch.arange(0, width, 2, dtype=torch.int64, device=device).float() / width
    return 1.0 / (factors * config.rope_parameters["rope_theta"] ** exponents)  # (K / 2,)


def _attention_scale(config: Phi3VConfig) -> float:
    original = config.original_max_position_embeddings
    stretch = config.max_position_embeddings / original
    return math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0

"""The layers of the decoder and of the vision tower, with half the activations of transformers'.

Parameters have the names, and are made in the order, of transformers' Phi3DecoderLayer and
CLIPEncoderLayer. In bfloat16 at the published widths a decoder layer keeps 82.4 KB per token for
the backward pass and a tower layer 24.6 (transformers': 158.2 and 41.0); see fused.py.

Letters: B sequences or views, T tokens, D width, F width inside the MLP, H heads, G heads of keys
and of values, K head width.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, Phi3Config
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from phi3v.errors import ConfigError
from phi3v.model.fused import quick_gelu_linear, rms_norm, rotate, swiglu_linear


class RMSNorm(nn.Module):
    """Root mean square norm with a learned scale."""

    compiled = False

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        return rms_norm(hidden, self.weight, self.eps, self.compiled)


class SwigluLinear(nn.Linear):
    """silu(gate) * up, projected: (..., 2F) -> (..., D)."""

    compiled = False

    def forward(self, gate_up: Tensor) -> Tensor:
        return swiglu_linear(gate_up, self.weight, self.compiled)


class QuickGeluLinear(nn.Linear):
    """QuickGELU, projected: (..., F) -> (..., D)."""

    compiled = False

    def forward(self, x: Tensor) -> Tensor:
        return quick_gelu_linear(x, self.weight, self.bias, self.compiled)


class Attention(nn.Module):
    """Causal attention with rotary positions, through the function that the configuration names."""

    compiled = False
    is_causal = True

    def __init__(self, config: Phi3Config, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.heads = config.num_attention_heads
        self.head_dim = config.hidden_size // self.heads
        self.num_key_value_groups = self.heads // config.num_key_value_heads
        width = (self.heads + 2 * config.num_key_value_heads) * self.head_dim
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.qkv_proj = nn.Linear(config.hidden_size, width, bias=False)

    def forward(
        self,
        hidden: Tensor,
        attention_mask: Tensor | None,
        past_key_values: Cache | None,
        position_embeddings: tuple[Tensor, Tensor],
        places: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        cos, sin = position_embeddings
        assert cos.shape[-1] == self.head_dim, "the whole width of a head is turned"
        query, key, value = rotate(self.qkv_proj(hidden), cos, sin, self.heads, self.compiled)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        window = self.config.sliding_window
        attended = _attend(self, query, key, value, attention_mask, sliding_window=window, **kwargs)
        return self.o_proj(attended if places is None else attended[:, places])


class GatedMLP(nn.Module):
    """Gate and other half in one projection, SwiGLU, back to the width."""

    def __init__(self, config: Phi3Config) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down_proj = SwigluLinear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down_proj(self.gate_up_proj(hidden))


class DecoderLayer(nn.Module):
    """A layer of the decoder.

    Raises: ConfigError for an activation or a dropout that the published model does not have.
    """

    def __init__(self, config: Phi3Config, layer_idx: int) -> None:
        super().__init__()
        for key, value in (("resid_pdrop", 0), ("attention_dropout", 0), ("hidden_act", "silu")):
            _expect(config, key, value)
        self.self_attn = Attention(config, layer_idx)
        self.mlp = GatedMLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        hidden: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        *,
        position_embeddings: tuple[Tensor, Tensor],
        places: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Run the layer; other keywords go to the attention function.

        hidden               (B, T, D)
        attention_mask       as the attention function wants it
        past_key_values      the cache of generation, to which keys and values are added
        position_embeddings  cosine and sine, (B or 1, T, K)
        places               (P,) positions that are wanted; all others are only attended to
        returns              (B, T, D), or (B, P, D)
        """
        attended = self.self_attn(
            self.input_layernorm(hidden),
            attention_mask,
            past_key_values,
            position_embeddings,
            places,
            **kwargs,
        )
        hidden = (hidden if places is None else hidden[:, places]) + attended
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class TowerAttention(nn.Module):
    """Attention of all patches of a view to all."""

    is_causal = False

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden: Tensor, attention_mask: Tensor | None, **kwargs: Any) -> Tensor:
        query, key, value = (
            projection(hidden).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, H, T, K)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(_attend(self, query, key, value, attention_mask, **kwargs))


class TowerMLP(nn.Module):
    """Out to the inner width and back, the activation between."""

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        is_quick = config.hidden_act == "quick_gelu"
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = (QuickGeluLinear if is_quick else nn.Linear)(
            config.intermediate_size, config.hidden_size
        )
        self.activation = nn.Identity() if is_quick else ACT2FN[config.hidden_act]

    def forward(self, hidden: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(hidden)))


class TowerLayer(nn.Module):
    """A layer of the vision tower.

    Raises: ConfigError for a dropout, which the published model does not have.
    """

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        _expect(config, "attention_dropout", 0, "vision_config.")
        self.self_attn = TowerAttention(config)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = TowerMLP(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(
        self, hidden: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """(B, T, D) -> (B, T, D); other keywords go to the attention function."""
        hidden = hidden + self.self_attn(self.layer_norm1(hidden), attention_mask, **kwargs)
        return hidden + self.mlp(self.layer_norm2(hidden))


def use_compiled(model: nn.Module, compiled: bool) -> None:
    """Let the element-wise parts of all layers run as kernels of torch.compile, or not."""
    for module in model.modules():
        if isinstance(module, (RMSNorm, Attention, SwigluLinear, QuickGeluLinear)):
            module.compiled = compiled


def _attend(
    module: Attention | TowerAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    **kwargs: Any,
) -> Tensor:
    """Call the function that the module's configuration names: (B, H, T, K) -> (B, T, D)."""
    function = ALL_ATTENTION_FUNCTIONS[module.config._attn_implementation]
    scaling = module.head_dim**-0.5
    attended, _ = function(module, query, key, value, mask, dropout=0.0, scaling=scaling, **kwargs)
    return attended.flatten(2)


def _expect(config: Phi3Config | CLIPVisionConfig, key: str, value: object, at: str = "") -> None:
    found = getattr(config, key)
    if found != value:
        raise ConfigError(
            f"{at}{key} {found!r} in config.json is not supported; "
            f"the published model has {value!r}, set it to that"
        )

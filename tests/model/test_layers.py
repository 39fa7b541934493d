"""Our layers are transformers' layers: names, first weights, numbers; but they keep half as much.

Measured worst cases over all variants stand beside each tolerance (one x86 core).
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, DynamicCache, Phi3Config
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.clip.modeling_clip import CLIPEncoderLayer
from transformers.models.phi3.modeling_phi3 import Phi3DecoderLayer

from phi3v.errors import ConfigError
from phi3v.model.layers import DecoderLayer, TowerLayer, use_compiled

# Largest difference by the largest number, of the output and of every gradient.
TOLERANCES = {
    torch.float32: 1e-6,  # measured: 3.2e-7; outputs are equal
    torch.bfloat16: 2**-8,  # one step of rounding; measured: 0
}
DECODER_BYTES, TOWER_BYTES = 95_000, 25_000  # per token; measured: 82,440 and 24,648

Make = Callable[[], nn.Module]


def decoder_config(**changes: Any) -> Phi3Config:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    config = Phi3Config(**sizes | {"num_key_value_heads": 4, "pad_token_id": 0} | changes)
    config._attn_implementation = "sdpa"
    return config


def tower_config(**changes: Any) -> CLIPVisionConfig:
    sizes = {"hidden_size": 24, "intermediate_size": 48, "num_attention_heads": 3}
    config = CLIPVisionConfig(**sizes | changes)
    config._attn_implementation = "sdpa"
    return config


def angles(tokens: int, width: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    turns = torch.randn(1, tokens, width // 2).repeat(1, 1, 2)
    return turns.cos().to(dtype), turns.sin().to(dtype)


def lower_left(tokens: int, padded: int) -> Tensor:
    """The mask of two sequences, the first with `padded` tokens of padding before it."""
    seen = torch.ones(tokens, tokens, dtype=torch.bool).tril().repeat(2, 1, 1, 1)
    seen[0, ..., :padded] = False
    return seen | torch.eye(tokens, dtype=torch.bool)


VARIANTS: dict[str, tuple[Make, Make, Callable[[torch.dtype], dict[str, Any]]]] = {
    name: (
        lambda config=config: DecoderLayer(config, 0),  # type: ignore[misc]
        lambda config=config: Phi3DecoderLayer(config, 0),  # type: ignore[misc]
        lambda dtype, mask=mask: {  # type: ignore[misc]
            "attention_mask": mask,
            "position_embeddings": angles(9, 8, dtype),
        },
    )
    for name, config, mask in (
        ("decoder", decoder_config(), None),
        ("decoder, padded", decoder_config(), lower_left(9, 4)),
        ("decoder, grouped heads", decoder_config(num_key_value_heads=2), None),
    )
} | {
    name: (
        lambda config=config: TowerLayer(config),  # type: ignore[misc]
        lambda config=config: CLIPEncoderLayer(config),  # type: ignore[misc]
        lambda dtype: {"attention_mask": None},
    )
    for name, config in (
        ("tower", tower_config()),
        ("tower, another activation", tower_config(hidden_act="gelu")),
    )
}


def make_pair(name: str) -> tuple[nn.Module, nn.Module]:
    """Ours and transformers', of the same weights, none of which is 0 or 1."""
    layers = []
    for make in VARIANTS[name][:2]:
        layer = make()
        torch.manual_seed(0)
        for key, parameter in layer.named_parameters():
            nn.init.normal_(parameter, mean=1.0 if "norm" in key else 0.0, std=0.2)
        layers.append(layer)
    return layers[0], layers[1]


def draw(name: str, dtype: torch.dtype) -> tuple[Tensor, dict[str, Any]]:
    torch.manual_seed(1)
    width = 32 if name.startswith("decoder") else 24
    return torch.randn(2, 9, width, dtype=dtype), VARIANTS[name][2](dtype)


def numbers(layer: nn.Module, hidden: Tensor, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """The output, and the gradients of the input and of every trained parameter."""
    layer.zero_grad(set_to_none=True)
    hidden = hidden.clone().requires_grad_()
    output = layer(hidden, **inputs)
    torch.manual_seed(2)
    output.backward(torch.randn_like(output))
    gradients = {key: p.grad for key, p in layer.named_parameters() if p.grad is not None}
    assert hidden.grad is not None
    return {"output": output.detach(), "input": hidden.grad, **gradients}


def assert_near(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert ours.keys() == expected.keys()
    largest = max(float(value.abs().max()) for value in expected.values())
    for name, value in expected.items():
        assert ours[name].dtype == value.dtype
        # Floored, because the gradient of the keys' bias is zero but for rounding.
        size = max(float(value.abs().max()), 1e-3 * largest)
        assert (ours[name] - value).abs().max() <= TOLERANCES[value.dtype] * size, name


@pytest.mark.parametrize("name", VARIANTS)
def test_names_shapes_and_seeded_first_weights_are_transformers(name: str) -> None:
    states = []
    for make in VARIANTS[name][:2]:
        torch.manual_seed(0)
        states.append(make().state_dict())
    assert list(states[0]) == list(states[1])
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("name", VARIANTS)
def test_output_and_every_gradient_are_transformers(name: str, dtype: torch.dtype) -> None:
    ours, theirs = (layer.to(dtype) for layer in make_pair(name))
    hidden, inputs = draw(name, dtype)
    trained = numbers(ours, hidden, inputs)
    assert_near(trained, numbers(theirs, hidden, inputs))
    with torch.no_grad():
        assert torch.equal(ours(hidden, **inputs), trained["output"])


@pytest.mark.parametrize("trained", ["nothing", "mlp", "norm", "proj"])
@pytest.mark.parametrize("name", VARIANTS)
def test_frozen_parameters_get_no_gradient_and_the_others_the_same(name: str, trained: str) -> None:
    pair = make_pair(name)
    for layer in pair:
        for key, parameter in layer.named_parameters():
            parameter.requires_grad_(trained in key)
    hidden, inputs = draw(name, torch.float32)
    assert_near(*(numbers(layer, hidden, inputs) for layer in pair))


def test_with_a_cache_the_tokens_get_what_they_get_in_one_run() -> None:
    layer = DecoderLayer(decoder_config(num_key_value_heads=2), 0)
    hidden, (cos, sin) = torch.randn(2, 6, 32), angles(6, 8)
    with torch.no_grad():
        whole = layer(hidden, position_embeddings=(cos, sin))
        cache, parts = DynamicCache(), []
        for start, end in ((0, 4), (4, 5), (5, 6)):
            turned = (cos[:, start:end], sin[:, start:end])
            part = layer(hidden[:, start:end], past_key_values=cache, position_embeddings=turned)
            parts.append(part)
    assert cache.get_seq_length() == 6
    assert (torch.cat(parts, dim=1) - whole).abs().max() < 1e-6


@pytest.mark.parametrize("name", ["decoder", "tower"])
def test_the_attention_function_gets_the_keywords_that_the_layer_does_not_know(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    got: dict[str, Any] = {}

    def attend(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any) -> Any:
        got.update(kwargs, module=module, mask=mask)
        return v.transpose(1, 2), None

    layer = VARIANTS[name][0]()
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "recording", attend)
    monkeypatch.setattr(layer.self_attn.config, "_attn_implementation", "recording")
    hidden, inputs = draw(name, torch.float32)
    layer(hidden, **inputs | {"attention_mask": "a mask"}, segments="three of them")
    assert (got["segments"], got["mask"]) == ("three of them", "a mask")
    assert got["module"] is layer.self_attn
    assert got["scaling"] == 8**-0.5


@pytest.mark.parametrize("key", ["resid_pdrop", "attention_dropout", "hidden_act"])
def test_a_decoder_of_another_kind_is_refused(key: str) -> None:
    value = "gelu" if key == "hidden_act" else 0.1
    with pytest.raises(ConfigError, match=f"^{key} {value!r} in config.json is not supported"):
        DecoderLayer(decoder_config(**{key: value}), 0)


def test_a_tower_with_dropout_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^vision_config.attention_dropout 0.5 in config.json"):
        TowerLayer(tower_config(attention_dropout=0.5))


def test_all_fused_parts_of_a_model_are_switched_at_once() -> None:
    model = nn.ModuleList([DecoderLayer(decoder_config(), 0), TowerLayer(tower_config())])
    parts = [module for module in model.modules() if hasattr(module, "compiled")]
    assert len(parts) == 5  # two norms, attention, two projections
    assert not any(part.compiled for part in parts)
    use_compiled(model, True)
    assert all(part.compiled for part in parts)
    use_compiled(model, False)
    assert not any(part.compiled for part in parts)


def kept_bytes(layer: nn.Module, hidden: Tensor, inputs: dict[str, Any]) -> float:
    """Bytes per token that autograd keeps, parameters apart; a view counts its whole storage."""
    own = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        kept[storage.data_ptr()] = storage
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        output = layer(hidden.requires_grad_(), **inputs)
    size = sum(storage.nbytes() for address, storage in kept.items() if address not in own)
    return size / output[..., 0].numel()


def zeros(make: Make) -> nn.Module:
    """A layer of bfloat16 zeros: a whole one takes seconds to draw."""
    with torch.device("meta"):
        layer = make().bfloat16()
    layer = layer.to_empty(device="cpu")
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def test_at_the_published_widths_a_decoder_layer_keeps_95_kilobytes_per_token() -> None:
    config = decoder_config(
        hidden_size=3072, intermediate_size=8192, num_attention_heads=32, num_key_value_heads=32
    )
    layer = zeros(lambda: DecoderLayer(config, 0))
    hidden = torch.randn(1, 64, 3072, dtype=torch.bfloat16)
    inputs = {"position_embeddings": angles(64, 96, torch.bfloat16)}
    assert 0 < kept_bytes(layer, hidden, inputs) <= DECODER_BYTES


def test_at_the_published_widths_a_tower_layer_keeps_25_kilobytes_per_patch() -> None:
    config = tower_config(hidden_size=1024, intermediate_size=4096, num_attention_heads=16)
    layer = zeros(lambda: TowerLayer(config))
    assert 0 < kept_bytes(layer, torch.randn(1, 577, 1024).bfloat16(), {}) <= TOWER_BYTES

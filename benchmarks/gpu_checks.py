"""What gpu.py checks and measures piece by piece: one number for each backend, kernel and layer."""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from fullsize import Scale, synchronize
from mixture import draw_mixture
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from phi3v.data.batch import collate, model_inputs
from phi3v.errors import ConfigError
from phi3v.model import Phi3VForCausalLM
from phi3v.model.attention import TOWER, Segments, choose_attention
from phi3v.model.execution import Execution
from phi3v.model.layers import DecoderLayer, TowerLayer, use_compiled
from phi3v.model.loss import choose_loss
from phi3v.model.rotary import rotary
from phi3v.samples.tiny import TinySizes, tiny_config, train_tokenizer
from phi3v.views import ViewSettings

# Relative L2 of all gradients: measured on a CPU, 5.5e-3 between float32 and bf16 attention.
TOLERANCE = {torch.bfloat16: 3e-2, torch.float32: 1e-5}
SETTINGS = ViewSettings(56, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
REPEATS = 5


def available(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """The attention backends that run here, with their registered names."""
    found = {}
    for wanted in ("sdpa", "varlen", "flash"):
        try:
            found[wanted] = choose_attention(wanted, device, dtype)
        except ConfigError:
            continue
    return found


def runs_liger(device: torch.device) -> bool:
    """Whether Liger's loss can be had here."""
    try:
        return choose_loss("liger", device) == "liger"
    except ConfigError:
        return False


def check_all(device: torch.device, dtype: torch.dtype) -> Iterator[str]:
    """Hold every way of computing against the plain one, on a small model."""
    torch.manual_seed(0)
    model = Phi3VForCausalLM(tiny_config(TinySizes(), train_tokenizer(["a b"], 2)))
    model = model.to(device, dtype).train()
    mixture = draw_mixture(6, 4, 3, model.config.image_side, (10, 10))
    samples = list(mixture.samples(SETTINGS.crop_size, model.config.vocab_size))
    inputs = model_inputs(collate(samples), SETTINGS, device)

    def gradients(execution: Execution) -> tuple[Tensor, dict[str, Tensor]]:
        model.set_execution(execution)
        model.zero_grad(set_to_none=True)
        loss = model(**inputs)
        loss.backward()
        return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    plain = Execution()
    ways = {
        f"attention {n}": replace(plain, attention=a) for n, a in available(device, dtype).items()
    }
    ways |= {"compiled kernels": replace(plain, compiled=True)} if device.type == "cuda" else {}
    if runs_liger(device):
        ways["loss liger"] = replace(plain, loss="liger")
    for how in ("selective", "full"):
        ways[f"checkpointing {how}"] = replace(plain, checkpointing=how, vision_checkpointing=how)
    ways["full, offloaded"] = replace(ways["checkpointing full"], offload=True)
    loss, expected = gradients(plain)
    for name, execution in ways.items():
        other, found = gradients(execution)
        yield _verdict(name, float(abs(other - loss) / loss), far(found, expected), dtype)
    for name, attention in available(device, dtype).items():
        model.set_execution(replace(plain, attention=attention))
        with torch.no_grad():
            together = model(**inputs)
            alone = sum(model(**model_inputs(collate([s]), SETTINGS, device)) for s in samples)
        difference = float(abs(together - alone) / alone)
        yield _verdict(f"packed as alone, {name}", difference, 0.0, dtype)


def far(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Norm of the difference of all gradients, as a share of their norm."""
    assert found.keys() == expected.keys()
    pairs = [(found[name].double(), expected[name].double()) for name in expected]
    difference = sum(float((a - b).square().sum()) for a, b in pairs)
    return (difference / sum(float(b.square().sum()) for _, b in pairs)) ** 0.5


def _verdict(name: str, loss: float, gradient: float, dtype: torch.dtype) -> str:
    limit = TOLERANCE[dtype]
    line = f"{name:28} loss {loss:.1e}, gradients {gradient:.1e} apart (at most {limit:.0e})"
    assert loss < limit and gradient < limit, line
    return line


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """The median of some calls, after two that are not counted."""
    taken = []
    for _ in range(REPEATS + 2):
        synchronize(device)
        began = time.perf_counter()
        call()
        synchronize(device)
        taken.append(time.perf_counter() - began)
    return sorted(taken[2:])[REPEATS // 2]


def time_attention(scale: Scale) -> Iterator[str]:
    """Forward and backward of each backend: a pack of equal samples, and a picture's views."""
    config, tower = scale.config, scale.config.vision_config
    longs = scale.max_tokens // scale.text
    segments = Segments.of([scale.text] * longs, scale.device)
    heads, width = config.num_attention_heads, config.hidden_size
    text = _states(scale, 1, heads, longs * scale.text, width // heads)
    flops = 3 * 2 * longs * scale.text**2 * width
    patches = (tower.image_size // tower.patch_size) ** 2 + 1
    views = scale.grid.views * 4
    of_views = _states(
        scale,
        views,
        tower.num_attention_heads,
        patches,
        tower.hidden_size // tower.num_attention_heads,
    )
    view_flops = 3 * 4 * views * patches**2 * tower.hidden_size
    for name, attention in available(scale.device, scale.dtype).items():
        seconds = seconds_of(lambda a=attention: _attend(a, text, segments), scale.device)
        yield f"{name:8} pack of {longs} x {scale.text}: {_rate(seconds, flops)}"
        of_tower = TOWER[attention]
        seconds = seconds_of(lambda a=of_tower: _attend(a, of_views, None), scale.device)
        yield f"{name:8} {views} views: {_rate(seconds, view_flops)}"


def _states(scale: Scale, rows: int, heads: int, tokens: int, width: int) -> list[Tensor]:
    shape = (rows, tokens, heads, width)
    return [
        torch.randn(shape, device=scale.device, dtype=scale.dtype).transpose(1, 2).requires_grad_()
        for _ in range(3)
    ]


def _attend(attention: str, states: list[Tensor], segments: Segments | None) -> None:
    arguments = {} if segments is None else {"segments": segments}
    scaling = states[0].shape[-1] ** -0.5
    attended, _ = ALL_ATTENTION_FUNCTIONS[attention](
        nn.Identity(), *states, None, scaling=scaling, **arguments
    )
    torch.autograd.grad(attended.sum(), states)


def _rate(seconds: float, flops: float) -> str:
    return f"{seconds * 1e3:8.2f} ms forward and backward, {flops / seconds / 1e12:6.1f} TFLOP/s"


def measure_activations(scale: Scale) -> Iterator[str]:
    """Bytes per token that one layer keeps for its backward pass, parameters left out."""
    config, tower = scale.config, scale.config.vision_config
    execution = Execution(attention=choose_attention("auto", scale.device, scale.dtype))
    config._attn_implementation = execution.attention
    tower._attn_implementation = TOWER[execution.attention]
    tokens, patches = scale.text, (tower.image_size // tower.patch_size) ** 2 + 1
    positions = torch.arange(tokens, device=scale.device)[None]
    arguments = {
        "position_embeddings": rotary(config, positions, False, scale.dtype),
        "segments": Segments.of([tokens], scale.device),
    }
    layers = {
        "decoder": (DecoderLayer(config, 0), config.hidden_size, tokens, arguments),
        "tower": (TowerLayer(tower), tower.hidden_size, patches, {}),
    }
    for name, (layer, width, length, given) in layers.items():
        layer = layer.to(scale.device, scale.dtype)
        use_compiled(layer, scale.is_full)
        hidden = torch.randn(1, length, width, device=scale.device, dtype=scale.dtype)
        kept = kept_bytes(lambda h=hidden, m=layer, g=given: m(h.requires_grad_(), **g), layer)
        yield f"{name:8} {kept / length / 1e3:6.1f} KB a token and layer"


def kept_bytes(forward: Callable[[], Tensor], layer: nn.Module) -> int:
    """Bytes of all storages that autograd keeps of a forward, parameters left out."""
    owned = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    storages: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = forward()
    del result
    return sum(storages.values())

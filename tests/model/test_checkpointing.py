"""Computing parts of a layer a second time changes memory and time, and no gradient."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.clip.modeling_clip import CLIPEncoderLayer
from transformers.models.phi3.modeling_phi3 import Phi3DecoderLayer

from phi3v.config.schema import Checkpointing
from phi3v.model.attention import ATTENTION_OPS, SDPA, Segments
from phi3v.model.checkpointing import run_layer
from phi3v.model.configuration import Phi3VConfig
from phi3v.model.layers import DecoderLayer, TowerLayer, use_compiled

WIDTH, HEADS, TOKENS = 96, 4, 48  # the published decoder's sizes by 32, as are the MLP's
WAYS: tuple[Checkpointing, ...] = ("none", "selective", "full")
LAYERS = (DecoderLayer, TowerLayer, Phi3DecoderLayer, CLIPEncoderLayer)
Case = tuple[nn.Module, dict[str, Any]]


def make_config() -> Phi3VConfig:
    config = Phi3VConfig(
        hidden_size=WIDTH,
        intermediate_size=WIDTH * 8 // 3,
        num_attention_heads=HEADS,
        num_hidden_layers=1,
        vision_config={"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH}
        | {"num_attention_heads": HEADS},
    )
    config._attn_implementation = SDPA
    config.vision_config._attn_implementation = "sdpa"
    return config


def make_case(kind: type[nn.Module]) -> Case:
    """A layer with random weights, and its keywords for a pack of three samples or for views."""
    config = make_config()
    torch.manual_seed(0)
    if kind in (TowerLayer, CLIPEncoderLayer):
        layer, kwargs = kind(config.vision_config), {"attention_mask": None}
    else:
        angles = torch.randn(1, TOKENS, WIDTH // HEADS // 2).repeat(1, 1, 2)
        segments = Segments.of([20, 3, 25], torch.device("cpu"))
        layer = kind(config, 0)
        kwargs = {"attention_mask": None, "segments": segments}
        kwargs["position_embeddings"] = (angles.cos(), angles.sin())
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.2)
    return layer.train(), kwargs


def gradients(case: Case, how: Checkpointing, offload: bool = False) -> list[Tensor]:
    """Of the input and of all parameters, after two layers of the same weights."""
    layer, kwargs = case
    hidden = torch.randn(2, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))
    hidden = hidden[:1] if "segments" in kwargs else hidden
    hidden.requires_grad_()
    out = hidden
    for _ in range(2):
        out = run_layer(layer, how, offload, out, **kwargs)
    leaves = [hidden, *(p for p in layer.parameters() if p.requires_grad)]
    return list(torch.autograd.grad(out.square().sum(), leaves))


def assert_equal(found: list[Tensor], wanted: list[Tensor]) -> None:
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("how", ["selective", "full"])
@pytest.mark.parametrize("kind", LAYERS)
def test_gradients_are_those_without_bit_for_bit(
    kind: type[nn.Module], how: Checkpointing, offload: bool
) -> None:
    case = make_case(kind)
    assert_equal(gradients(case, how, offload), gradients(case, "none"))


@pytest.mark.parametrize("how", ["selective", "full"])
@pytest.mark.parametrize("kind", [DecoderLayer, TowerLayer])
def test_a_frozen_layer_passes_the_same_gradient_on(
    kind: type[nn.Module], how: Checkpointing
) -> None:
    layer, kwargs = make_case(kind)
    layer.requires_grad_(False)
    assert_equal(gradients((layer, kwargs), how), gradients((layer, kwargs), "none"))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["selective", "full"])
@pytest.mark.parametrize("kind", [DecoderLayer, TowerLayer])
def test_compiled_layers_have_the_same_gradients_too(
    kind: type[nn.Module], how: Checkpointing
) -> None:
    case = make_case(kind)
    use_compiled(case[0], True)
    assert_equal(gradients(case, how), gradients(case, "none"))


class Biased(nn.Module):
    """Adds a bias and a factor to a product where it lies, as DeepSpeed's linear does."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH)
        self.bias = nn.Parameter(torch.randn(WIDTH))

    def forward(self, hidden: Tensor) -> Tensor:
        product = self.inner(hidden)
        product += self.bias
        product[..., ::2].mul_(3)
        return hidden + self.outer(torch.sin(product))


@pytest.mark.parametrize("how", ["selective", "full"])
def test_what_was_written_into_a_kept_product_is_not_written_again(how: Checkpointing) -> None:
    case: Case = (Biased(), {})
    assert_equal(gradients(case, how), gradients(case, "none"))


class Forgetful(nn.Module):
    """Drops a product as soon as it is used, and writes into what then lies in its place."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden: Tensor) -> Tensor:
        scale = self.inner(hidden).mean(-1, keepdim=True)
        fresh = [hidden.clone() for _ in range(20)]
        for copy in fresh:
            copy += 1
        return hidden + self.outer(torch.sin(torch.stack(fresh)).sum(0) * scale)


@pytest.mark.parametrize("how", ["selective", "full"])
def test_memory_of_a_kept_product_that_is_used_again_is_written_again(how: Checkpointing) -> None:
    case: Case = (Forgetful(), {})
    assert_equal(gradients(case, how), gradients(case, "none"))


class Normed(nn.Module):
    """A layer that breaks the rule: its last product's result is needed for a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.norm(self.inner(hidden))


@pytest.mark.parametrize("how", ["selective", "full"])
def test_a_layer_that_needs_its_last_product_gets_no_number_rather_than_a_wrong_one(
    how: Checkpointing,
) -> None:
    assert any(bool(gradient.isnan().any()) for gradient in gradients((Normed(), {}), how))


class Watch(TorchDispatchMode):
    """Counts attention, and knows the memory of all results that is still there."""

    def __init__(self) -> None:
        super().__init__()
        self.attended = 0
        self.memory: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = op(*args, **(kwargs or {}))
        self.attended += op in ATTENTION_OPS
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.memory[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return result

    def kept_bytes(self, layer: nn.Module) -> int:
        """Of what is still there, without the weights."""
        weights = {p.untyped_storage()._cdata for p in layer.parameters()}
        kept = {key: value for key, value in self.memory.items() if key not in weights}
        return sum(size for reference, size in kept.values() if not reference.expired())


def measure(case: Case, how: Checkpointing) -> tuple[float, int, int]:
    """Bytes per token that a layer keeps, FLOPs of products, calls of attention; all of a step."""
    layer, kwargs = case
    kept = []
    for depth in (1, 2):
        hidden = torch.zeros(1, TOKENS, WIDTH, requires_grad=True)
        with Watch() as watch, FlopCounterMode(display=False) as flops:
            for _ in range(depth):
                hidden = run_layer(layer, how, False, hidden, **kwargs)
            kept.append(watch.kept_bytes(layer))
            hidden.sum().backward()
    return (kept[1] - kept[0]) / TOKENS, flops.get_total_flops(), watch.attended


@pytest.mark.parametrize("kind", LAYERS)
def test_selective_computes_no_product_and_no_attention_twice(kind: type[nn.Module]) -> None:
    case = make_case(kind)
    assert measure(case, "selective")[1:] == measure(case, "none")[1:]


@pytest.mark.parametrize("kind", LAYERS)
def test_full_computes_all_but_the_last_product_twice(kind: type[nn.Module]) -> None:
    case = make_case(kind)
    _, stock, attended = measure(case, "none")
    _, flops, again = measure(case, "full")
    forward = 2 * TOKENS * sum(p.numel() for p in case[0].parameters() if p.dim() == 2)
    last = max(p.numel() for n, p in case[0].named_parameters() if "down" in n or "fc2" in n)
    assert flops - stock == 2 * (forward - 2 * TOKENS * last)  # two layers
    assert again == 2 * attended


@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_keeps_its_input_products_and_attention_or_its_input_alone(
    kind: type[nn.Module],
) -> None:
    case = make_case(kind)
    stock, selective, full = (measure(case, how)[0] for how in WAYS)
    of_input = WIDTH * 4  # bytes, float32
    widths = (p.shape[0] for n, p in case[0].named_parameters() if p.dim() == 2)
    products = 4 * sum(widths) - of_input  # the last is not kept
    attention = of_input + 4 * HEADS  # and the logarithms of its sums
    assert full == pytest.approx(of_input, abs=1)  # a number for the last product
    assert selective == pytest.approx(of_input + products + attention, abs=1)
    assert selective < stock


@pytest.mark.parametrize("how", WAYS)
def test_an_output_that_nobody_wants_takes_with_it_what_was_kept(how: Checkpointing) -> None:
    layer, kwargs = make_case(TowerLayer)
    with Watch() as watch:
        run_layer(layer, how, False, torch.ones(1, TOKENS, WIDTH, requires_grad=True), **kwargs)
    assert watch.kept_bytes(layer) == 0


def test_only_the_input_of_a_layer_is_moved_to_the_host() -> None:
    layer, kwargs = make_case(DecoderLayer)
    moved: list[torch.Size] = []

    def move(tensor: Tensor) -> Tensor:
        moved.append(tensor.shape)
        return tensor

    hidden = torch.zeros(1, TOKENS, WIDTH, requires_grad=True)
    with saved_tensors_hooks(move, lambda tensor: tensor):
        run_layer(layer, "full", False, hidden, **kwargs)
    assert [shape for shape in moved if shape.numel()] == [hidden.shape]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_offloaded_inputs_leave_the_device() -> None:
    layer, kwargs = make_case(TowerLayer)
    layer.cuda()

    def kept_bytes(offload: bool) -> int:
        hidden = torch.randn(64, TOKENS, WIDTH, device="cuda", requires_grad=True)
        before = torch.cuda.memory_allocated()
        for _ in range(8):
            hidden = run_layer(layer, "full", offload, hidden, **kwargs)
        return torch.cuda.memory_allocated() - before

    of_input = 64 * TOKENS * WIDTH * 4
    assert kept_bytes(False) - kept_bytes(True) == 7 * of_input

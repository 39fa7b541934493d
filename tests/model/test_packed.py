"""A sample in a pack gets exactly the numbers that it gets alone.

Alone is the published call on one sequence; packed is ours, samples laid end to end. Measured worst
cases stand beside the tolerances.
"""

from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

from phi3v.geometry import Grid
from phi3v.model import Phi3VForCausalLM
from phi3v.model.execution import Execution
from phi3v.sample import IGNORED
from tests.model.tiny import LIMIT, Drawn, draw, gradients, make_model, pack

LOSS = 1e-5  # of each token; measured: 1.9e-6
ROUNDING = 4e-3  # of a token in the mean, bfloat16; on a CPU 6.6e-7, without segments 8e-3 to 1.4
GRADIENT = 1e-4  # relative L2 of each parameter; measured: 1.1e-6

ONE, WIDE, SQUARE = Grid(1, 1), Grid(1, 3), Grid(2, 2)  # 13, 21 and 27 tokens
PACKS = {
    "text": [(20, ()), (5, ()), (33, ())],
    "text and images": [(10, (ONE,)), (12, ()), (8, (SQUARE, ONE))],
    "a long text between short ones": [(20, (ONE,)), (LIMIT + 26, ()), (30, ())],
    "long by its images": [(9, ()), (15, (SQUARE, WIDE)), (LIMIT, ())],
    "at the limit and one above": [(LIMIT, ()), (LIMIT + 1, ()), (LIMIT, ())],
    "the smallest": [(1, ()), (2, ()), (1, ()), (3, ())],
    "one sample": [(25, (WIDE,))],
}


@pytest.fixture(scope="module", params=[4, 2], ids=["heads", "grouped heads"])
def model(request: pytest.FixtureRequest) -> Phi3VForCausalLM:
    return make_model(num_key_value_heads=request.param)


def samples_of(name: str) -> list[Drawn]:
    return [draw(seed, text, grids) for seed, (text, grids) in enumerate(PACKS[name])]


def alone(model: Phi3VForCausalLM, sample: Drawn) -> Tensor:
    """Losses of a sample's trained tokens by the published call: (trained,)."""
    logits = model(**sample.inputs).logits[0, :-1]
    targets = sample.labels[0, 1:]
    trained = targets != IGNORED
    return cross_entropy(logits[trained], targets[trained], reduction="none")


def packed(model: Phi3VForCausalLM, samples: list[Drawn]) -> tuple[Tensor, Tensor]:
    """The packed loss, and the losses of its trained tokens: (), (trained,)."""
    seen: list[tuple[Tensor, Tensor]] = []
    hook = model.lm_head.register_forward_hook(lambda head, args, loss: seen.append(args))
    loss = model(**pack(samples))
    hook.remove()
    ((hidden, targets),) = seen
    expected = torch.cat([sample.labels[0, 1:] for sample in samples])
    assert torch.equal(targets, expected[expected != IGNORED])
    return loss, cross_entropy(model.lm_head(hidden), targets, reduction="none")


def assert_same_gradients(
    ours: dict[str, Tensor | None], expected: dict[str, Tensor | None]
) -> None:
    """None, of a tower that a text never meets, counts as zero; a frozen parameter has none."""
    for name, gradient in ours.items():
        other = expected[name]
        if gradient is None:
            assert other is None, name
        elif other is None:
            assert not gradient.any(), name
        else:
            assert (gradient - other).norm() <= GRADIENT * other.norm() + 1e-6, name


@pytest.mark.parametrize("name", PACKS)
def test_every_token_has_the_loss_that_it_has_alone(model: Phi3VForCausalLM, name: str) -> None:
    samples = samples_of(name)
    with torch.no_grad():
        total, losses = packed(model, samples)
        expected = torch.cat([alone(model, sample) for sample in samples])
    assert (losses - expected).abs().max() < LOSS
    assert abs(total - expected.sum()) < LOSS * len(expected)


@pytest.mark.parametrize("name", PACKS)
def test_gradients_are_the_sum_of_those_alone(model: Phi3VForCausalLM, name: str) -> None:
    samples = samples_of(name)
    model(**pack(samples)).backward()
    ours = gradients(model)
    torch.cat([alone(model, sample) for sample in samples]).sum().backward()
    assert_same_gradients(ours, gradients(model))


def test_the_order_of_samples_changes_nothing(model: Phi3VForCausalLM) -> None:
    samples = samples_of("long by its images")
    with torch.no_grad():
        _, losses = packed(model, samples)
        _, reversed_losses = packed(model, samples[::-1])
    lengths = [int((sample.labels[0, 1:] != IGNORED).sum()) for sample in samples]
    parts = reversed_losses.split(lengths[::-1])
    assert (losses - torch.cat(parts[::-1])).abs().max() < LOSS


@pytest.mark.parametrize("window", [16, 40])
def test_a_sliding_window_holds_in_a_pack_too(window: int) -> None:
    model = make_model(sliding_window=window)
    samples = samples_of("long by its images")
    with torch.no_grad():
        _, losses = packed(model, samples)
        expected = torch.cat([alone(model, sample) for sample in samples])
    assert (losses - expected).abs().max() < LOSS


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_recomputing_activations_changes_no_gradient(model: Phi3VForCausalLM) -> None:
    inputs = pack(samples_of("text and images"))
    model(**inputs).backward()
    expected = gradients(model)
    layers = [model.model.layers[0], model.model.vision_embed_tokens.img_processor.vision_model]
    calls: list[str] = []
    hooks = [
        layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append("decoder")),
        layers[1].encoder.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append("tower")),
    ]
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model(**inputs).backward()
    model.gradient_checkpointing_disable()
    model.eval()
    for hook in hooks:
        hook.remove()
    assert sorted(calls) == ["decoder", "decoder", "tower", "tower"]
    assert_same_gradients(gradients(model), expected)


@pytest.mark.parametrize("how", ["selective", "full"])
def test_by_whatever_is_recomputed_gradients_stay(
    model: Phi3VForCausalLM, how: Literal["selective", "full"]
) -> None:
    inputs = pack(samples_of("text and images"))
    model(**inputs).backward()
    expected = gradients(model)
    model.set_execution(Execution(checkpointing=how))
    model(**inputs).backward()
    model.set_execution(Execution())
    assert_same_gradients(gradients(model), expected)


def test_behind_the_last_attention_only_trained_positions_go_on(model: Phi3VForCausalLM) -> None:
    inputs = pack(samples_of("text and images"))
    seen: list[int] = []
    hooks = [
        layer.mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        model(**inputs)
    for hook in hooks:
        hook.remove()
    trained = sum(int((s.labels[0, 1:] != IGNORED).sum()) for s in samples_of("text and images"))
    assert 0 < trained < inputs["input_ids"].shape[1] // 2
    assert seen == [inputs["input_ids"].shape[1]] * (len(seen) - 1) + [trained]


def test_a_pack_of_text_gives_the_vision_side_zero_gradients(model: Phi3VForCausalLM) -> None:
    """Zero, not None: under ZeRO-3 every rank must reduce the same parameters."""
    model(**pack(samples_of("text"))).backward()
    for name, gradient in gradients(model).items():
        if "vision_embed_tokens" in name and model.get_parameter(name).requires_grad:
            assert gradient is not None, name
            assert not gradient.any(), name


def test_the_blank_view_of_a_pack_of_text_changes_no_loss(
    model: Phi3VForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = pack(samples_of("text"))
    with torch.no_grad():
        loss = model(**inputs)
        embedding = model.model.vision_embed_tokens
        monkeypatch.setattr(embedding, "forward", lambda views, grids: torch.zeros(1))
        assert torch.equal(model(**inputs), loss)


def test_a_pack_without_a_trained_token_has_loss_and_gradients_of_zero(
    model: Phi3VForCausalLM,
) -> None:
    inputs = pack(samples_of("text and images"))
    inputs["labels"] = torch.full_like(inputs["labels"], IGNORED)
    loss = model(**inputs)
    loss.backward()
    assert loss.item() == 0
    for name, gradient in gradients(model).items():
        if model.get_parameter(name).requires_grad:
            assert gradient is not None and not gradient.any(), name


@pytest.mark.parametrize("replaced", [-1, 5])
def test_images_that_do_not_fill_their_places_are_refused(
    model: Phi3VForCausalLM, replaced: int
) -> None:
    """A place more, which nothing fills, or one less, so that a vector would be left over."""
    inputs = pack(samples_of("text and images"))
    of_image = inputs["input_ids"][0] < 0
    changed = int((of_image if replaced > 0 else ~of_image).nonzero()[0, 0])
    inputs["input_ids"][0, changed] = replaced
    with pytest.raises(
        (RuntimeError, IndexError), match="index_copy_?\\(\\).*[Nn]umber of indices"
    ):
        model(**inputs)


def test_a_label_on_a_first_token_is_nobodys_target(model: Phi3VForCausalLM) -> None:
    samples = samples_of("text")
    inputs = pack(samples)
    starts = [0, samples[0].tokens, samples[0].tokens + samples[1].tokens]
    with_first = inputs["labels"].clone()
    with_first[0, starts] = inputs["input_ids"][0, starts]
    without = inputs["labels"].clone()
    without[0, starts] = IGNORED
    with torch.no_grad():
        losses = [model(**inputs | {"labels": labels}) for labels in (with_first, without)]
    assert torch.equal(*losses)


DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
    ),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", PACKS)
def test_in_bfloat16_on_flash_attention_a_pack_differs_by_rounding_only(
    name: str, device: str
) -> None:
    model = make_model().to(device, torch.bfloat16)
    samples = samples_of(name)
    with torch.no_grad(), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        together = model(**on_device(pack(samples), device))
        parts = [model(**on_device(pack([sample]), device)) for sample in samples]
    trained = sum(int((sample.labels[0, 1:] != IGNORED).sum()) for sample in samples)
    assert abs(together - sum(parts)) < ROUNDING * max(1, trained)


def on_device(inputs: dict[str, Any], device: str) -> dict[str, Any]:
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items()}

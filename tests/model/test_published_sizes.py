"""The full-size model, on the meta device: every published name, shape and count."""

import json
from collections import Counter

import pytest
import torch

from phi3v.model import Phi3VConfig, Phi3VForCausalLM
from tests.model.test_configuration import PUBLISHED
from tests.parity.goldens import REFERENCE, needs_reference

COUNTS = {
    "language": 3_821_079_552,
    "tower": 303_507_456,
    "projector": 22_026_240,
    "separators": 8_192,
}
FROZEN = 12_598_272  # the last layer of the tower and post_layernorm


@pytest.fixture(scope="module")
def model() -> Phi3VForCausalLM:
    with torch.device("meta"):
        return Phi3VForCausalLM(Phi3VConfig.from_dict(PUBLISHED))


def part_of(name: str) -> str:
    if "vision_embed_tokens" not in name:
        return "language"
    if "img_processor" in name:
        return "tower"
    return "projector" if "img_projection" in name else "separators"


def test_the_model_has_the_published_number_of_parameters(model: Phi3VForCausalLM) -> None:
    counts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        counts[part_of(name)] += parameter.numel()
    assert counts == COUNTS
    assert sum(counts.values()) == 4_146_621_440


def test_what_never_receives_a_gradient_is_frozen(model: Phi3VForCausalLM) -> None:
    assert sum(p.numel() for p in model.parameters() if not p.requires_grad) == FROZEN


def test_nothing_but_parameters_is_saved(model: Phi3VForCausalLM) -> None:
    names = [name for name, _ in model.named_parameters()]
    assert list(model.state_dict()) == names
    assert len(names) == 592


@needs_reference
def test_every_name_and_shape_is_the_published(model: Phi3VForCausalLM) -> None:
    published = json.loads((REFERENCE / "phi3_vision" / "param_shapes.json").read_text())
    ours = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    assert ours == published


@needs_reference
@pytest.mark.parametrize("release", ["phi3_vision", "phi35_vision"])
def test_a_published_configuration_gives_the_same_model(
    model: Phi3VForCausalLM, release: str
) -> None:
    with torch.device("meta"):
        built = Phi3VForCausalLM(Phi3VConfig.from_pretrained(REFERENCE / release))
    shapes = [{n: p.shape for n, p in each.named_parameters()} for each in (model, built)]
    assert shapes[0] == shapes[1]
    index = json.loads((REFERENCE / "phi3_vision/model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(shapes[1])
    assert index["metadata"]["total_size"] == 2 * sum(p.numel() for p in built.parameters())

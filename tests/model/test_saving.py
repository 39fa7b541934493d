"""A folder written by save_pretrained is read back as the same model, by class or by Auto class."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor

import phi3v  # noqa: F401  registers our classes
from phi3v.errors import CheckpointError
from phi3v.geometry import Grid
from phi3v.model import Phi3VConfig, Phi3VForCausalLM
from phi3v.processing import Phi3VProcessor
from phi3v.samples.tiny import TinySizes, make_tiny_model
from tests.model.tiny import SIZES, draw, gradients, make_model
from tests.parity.goldens import REFERENCE, needs_reference

UNUSED = ("vision_model.encoder.layers.2.", "vision_model.post_layernorm.")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny"
    make_tiny_model(path, ["a red cat"], SIZES)
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_model_gives_the_same_logits_bit_for_bit(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    model = make_model(rope_length="keys", num_key_value_heads=2).to(dtype)
    model.save_pretrained(tmp_path)
    again = Phi3VForCausalLM.from_pretrained(tmp_path)
    assert again.dtype == dtype
    assert again.config.rope_length == "keys"
    inputs = draw(0, 12, (Grid(2, 2),)).inputs
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)


def test_the_unused_tower_layer_is_frozen_and_keeps_its_names(tmp_path: Path) -> None:
    model = make_model()
    model.save_pretrained(tmp_path)
    for candidate in (model, Phi3VForCausalLM.from_pretrained(tmp_path)):
        sample = draw(0, 12, (Grid(1, 1),))
        candidate(**sample.inputs, labels=sample.labels).loss.backward()
        unused = {name for name in candidate.state_dict() if any(part in name for part in UNUSED)}
        assert len(unused) == 16 + 2
        for name, gradient in gradients(candidate).items():
            assert candidate.get_parameter(name).requires_grad == (name not in unused), name
            assert (gradient is None) == (name in unused), name


def test_a_published_folder_with_the_embedding_twice_is_read(tmp_path: Path) -> None:
    """Fine-tunes by the published code repeat it as `vision_embed_tokens.wte`."""
    model = make_model()
    weights = model.state_dict()
    twice = weights["model.embed_tokens.weight"].clone()
    weights["model.vision_embed_tokens.wte.weight"] = twice
    model.save_pretrained(tmp_path, state_dict=weights)
    again, report = Phi3VForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert torch.equal(again.model.embed_tokens.weight, twice)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", "1 missing: lm_head.weight; use weights and a"),
        ("unknown", "1 unknown: lm_head.bias; use weights and a"),
        (
            "shape",
            r"1 of another shape: lm_head.weight \(9, 32\) for \(384, 32\); use weights and a",
        ),
    ],
)
def test_weights_that_are_not_exactly_the_models_are_refused(
    tmp_path: Path, change: str, message: str
) -> None:
    """transformers would draw them at random, or pass over them."""
    model = make_model()
    weights = model.state_dict()
    if change == "unknown":
        weights["lm_head.bias"] = torch.zeros(9)
    elif change == "shape":
        weights["lm_head.weight"] = torch.zeros(9, 32)
    else:
        del weights["lm_head.weight"]
    model.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(CheckpointError, match=message):
        Phi3VForCausalLM.from_pretrained(tmp_path)


def test_the_auto_classes_return_ours(folder: Path) -> None:
    assert type(AutoConfig.from_pretrained(folder)) is Phi3VConfig
    assert type(AutoModelForCausalLM.from_pretrained(folder)) is Phi3VForCausalLM
    processor = AutoProcessor.from_pretrained(folder)
    assert type(processor) is Phi3VProcessor  # a folder without our entry gives a bare tokenizer
    assert processor.side == SIZES.image_size // 28


@needs_reference
@pytest.mark.parametrize("release", ["phi3_vision", "phi35_vision"])
def test_the_auto_classes_return_ours_for_a_published_folder(release: str) -> None:
    """Its config.json names remote code, and its files are of transformers 4."""
    config = AutoConfig.from_pretrained(REFERENCE / release)
    assert type(config) is Phi3VConfig
    assert type(AutoProcessor.from_pretrained(REFERENCE / release)) is Phi3VProcessor
    with torch.device("meta"):
        assert type(AutoModelForCausalLM.from_config(config)) is Phi3VForCausalLM


def test_a_tower_of_another_size_is_read_back(folder: Path) -> None:
    config = Phi3VConfig.from_pretrained(folder)
    assert config.vision_config.hidden_size == SIZES.vision_width
    assert config.vision_config.image_size == SIZES.image_size
    assert (config.image_side, config.tower_layers) == (2, SIZES.vision_layers - 1)


def test_published_weights_come_back_byte_for_byte_also_in_shards(tmp_path: Path) -> None:
    """Published names -> ours -> published names, in bfloat16, as the published files are."""
    published = tmp_path / "published"
    make_tiny_model(published, ["one two"], TinySizes(text_pieces=20))
    random = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn(value.shape, generator=random).to(torch.bfloat16)
        for name, value in load_file(published / "model.safetensors").items()
    }
    save_file(weights, published / "model.safetensors", {"format": "pt"})
    model = Phi3VForCausalLM.from_pretrained(published, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "shards", max_shard_size="500KB")
    files = sorted((tmp_path / "shards").glob("*.safetensors"))
    assert len(files) > 3 and (tmp_path / "shards/model.safetensors.index.json").is_file()
    saved = {name: value for file in files for name, value in load_file(file).items()}
    assert saved.keys() == weights.keys()
    assert all(
        torch.equal(saved[n].view(torch.int16), w.view(torch.int16)) for n, w in weights.items()
    )
    again = Phi3VForCausalLM.from_pretrained(tmp_path / "shards", dtype=torch.bfloat16)
    assert all(torch.equal(p, weights[name]) for name, p in again.named_parameters())

"""Phi3VConfig reads the published config.json as it is and writes its keys back as they were."""

import json
from pathlib import Path
from typing import Any

import pytest

from phi3v.errors import ConfigError
from phi3v.model import Phi3VConfig
from phi3v.model.configuration import PUBLISHED_TOWER
from tests.parity.goldens import REFERENCE, needs_reference

# Not kept: how and from where it was loaded, and by which transformers.
PASSING = {"_attn_implementation", "_name_or_path", "torch_dtype", "transformers_version"}
FACTORS = {"short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
PUBLISHED: dict[str, Any] = {  # the keys that both releases have, with the sizes of Phi-3-vision
    "architectures": ["Phi3VForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "embd_layer": {
        "embedding_cls": "image",
        "hd_transform_order": "sub_glb",
        "projection_cls": "mlp",
        "use_hd_transform": True,
        "with_learnable_separator": True,
    },
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 3072,
    "img_processor": {
        "image_dim_out": 1024,
        "model_name": "openai/clip-vit-large-patch14-336",
        "name": "clip_vision_model",
        "num_img_tokens": 144,
    },
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "model_type": "phi3_v",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {"type": "su"} | FACTORS,
    "rope_theta": 10000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "use_cache": True,
    "vocab_size": 32064,
}


def round_trip(published: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Write a config.json, load it, save it, and read what was saved."""
    (folder / "config.json").write_text(json.dumps(published))
    Phi3VConfig.from_pretrained(folder).save_pretrained(folder / "saved")
    return json.loads((folder / "saved" / "config.json").read_text())


def test_the_published_keys_are_kept(tmp_path: Path) -> None:
    saved = round_trip(PUBLISHED | {"_attn_implementation": "flash_attention_2"}, tmp_path)
    assert {key: saved.get(key) for key in PUBLISHED} == PUBLISHED
    for ours in ("vision_config", "rope_parameters", "rope_length", "_attn_implementation"):
        assert ours not in saved


def test_a_second_round_trip_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "saved").mkdir()
    once = round_trip(PUBLISHED, tmp_path)
    assert round_trip(once, tmp_path / "saved") == once


@needs_reference
@pytest.mark.parametrize("release", ["phi3_vision", "phi35_vision"])
def test_a_published_file_is_kept(release: str, tmp_path: Path) -> None:
    published = json.loads((REFERENCE / release / "config.json").read_text())
    saved = round_trip(published, tmp_path)
    kept = published.keys() - PASSING
    assert {key: saved.get(key) for key in kept} == {key: published[key] for key in kept}
    added = {"dtype": "bfloat16", "embd_pdrop": 0.0, "resid_pdrop": 0.0, "pad_token_id": 32000}
    extra = {key: saved[key] for key in saved.keys() - published.keys()}
    assert extra.items() <= added.items()
    assert saved["dtype"] == published["torch_dtype"]


def test_what_differs_from_the_published_is_written(tmp_path: Path) -> None:
    changes = {
        "vision_config": {"hidden_size": 64, "num_attention_heads": 4, "image_size": 56},
        "rope_length": "keys",
        "rope_theta": 5000.0,
        "num_key_value_heads": 8,
    }
    saved = round_trip(PUBLISHED | changes, tmp_path)
    assert saved | changes == saved


def test_the_published_tower_has_its_sizes_without_being_told() -> None:
    config = Phi3VConfig.from_dict(PUBLISHED)
    sizes = {key: getattr(config.vision_config, key) for key in PUBLISHED_TOWER}
    assert sizes == PUBLISHED_TOWER
    assert (config.image_side, config.tower_layers) == (12, 23)


def test_a_configuration_can_be_shown_and_compared() -> None:
    assert "phi3_v" in repr(Phi3VConfig())
    assert "su" in repr(Phi3VConfig.from_dict(PUBLISHED))
    assert Phi3VConfig.from_dict(PUBLISHED).to_dict() == Phi3VConfig.from_dict(PUBLISHED).to_dict()


def test_a_kind_of_rotary_scaling_that_would_be_computed_wrongly_is_refused() -> None:
    """The published code scales yarn by 1.3466, su by 1.1902; no published model uses yarn."""
    rope = PUBLISHED["rope_scaling"] | {"type": "yarn"}
    with pytest.raises(ConfigError, match="rope_scaling.type 'yarn' in config.json is not support"):
        Phi3VConfig.from_dict(PUBLISHED | {"rope_scaling": rope})


def test_an_unknown_rule_for_the_rotary_factors_is_refused() -> None:
    with pytest.raises(ConfigError, match="rope_length 'tokens' in config.json must be one of pos"):
        Phi3VConfig.from_dict(PUBLISHED | {"rope_length": "tokens"})

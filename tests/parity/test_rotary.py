"""Rotary angles of both published configurations, at positions up to 131,071."""

import numpy as np
import pytest
import torch

from phi3v.model import Phi3VConfig, Phi3VForCausalLM
from phi3v.model.rotary import rotary
from tests.parity.goldens import IS_SAME_CPU, golden

TABLES = np.load(golden("rope/rope.npz"))
KINDS = ["short", "long"]
# A frequency that is off by its last bit turns position 131,071 by 0.008. Without AVX: 1.2e-7.
TOLERANCE = 0.0 if IS_SAME_CPU else 0.01


def config_of(release: str, longest: int = 131072) -> Phi3VConfig:
    """A model of one decoder layer and the tiniest tower, with the release's heads and factors."""
    factors = {f"{kind}_factor": TABLES[f"{release}.{kind}_factor"].tolist() for kind in KINDS}
    return Phi3VConfig(
        vocab_size=8,
        hidden_size=192,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=0,
        max_position_embeddings=longest,
        original_max_position_embeddings=4096,
        rope_theta=10000.0,
        rope_scaling={"type": "su"} | factors,
        vision_config={
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_hidden_layers": 2,
            "num_attention_heads": 1,
            "image_size": 28,
        },
    )


def assert_equals_table(ours: torch.Tensor, name: str) -> None:
    """Compare (1, T, K) with a table, bit for bit where the CPU rounds alike."""
    assert np.abs(ours[0].float().numpy() - TABLES[name]).max() <= TOLERANCE


def positions_of(kind: str) -> torch.Tensor:
    """(1, 10)."""
    return torch.from_numpy(TABLES[f"positions_{kind}"])[None]


@pytest.mark.parametrize("release", ["phi3", "phi35"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "suffix"), [(torch.float32, ""), (torch.bfloat16, "_bf16")])
def test_angles_are_the_published_bit_for_bit(
    release: str, kind: str, dtype: torch.dtype, suffix: str
) -> None:
    config = config_of(release)
    for ours, name in zip(
        rotary(config, positions_of(kind), kind == "long", dtype), ("cos", "sin"), strict=True
    ):
        assert ours.dtype == dtype
        assert_equals_table(ours, f"{release}.{kind}.{name}{suffix}")


def test_a_model_that_was_never_stretched_scales_nothing() -> None:
    angles = rotary(config_of("phi3", 4096), positions_of("short"), False, torch.float32)
    for ours, name in zip(angles, ("cos", "sin"), strict=True):
        assert_equals_table(ours, f"phi3.noscale_mpe4096.short.{name}")


def test_each_position_can_choose_its_factors() -> None:
    config, positions = config_of("phi3"), torch.tensor([[7, 7, 100, 100]])
    mixed = rotary(config, positions, torch.tensor([[True, False, True, False]]), torch.float32)
    for kind, chosen in (("long", slice(0, None, 2)), ("short", slice(1, None, 2))):
        alone = rotary(config, positions, kind == "long", torch.float32)
        for ours, expected in zip(mixed, alone, strict=True):
            assert torch.equal(ours[:, chosen], expected[:, chosen])


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_cast_to_bfloat16_keeps_exact_angles(kind: str) -> None:
    """Frequencies kept in a buffer would be rounded: cos wrong by 2.38 at position 131,071."""
    model = Phi3VForCausalLM(config_of("phi3")).bfloat16()
    assert list(model.buffers()) == []
    seen = []
    model.model.layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["position_embeddings"]), with_kwargs=True
    )
    positions = positions_of(kind)
    model(torch.zeros_like(positions), position_ids=positions)
    for ours, name in zip(seen[0], ("cos", "sin"), strict=True):
        assert_equals_table(ours, f"phi3.{kind}.{name}_bf16")

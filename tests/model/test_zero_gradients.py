"""Which gradients are zero, exactly or but for rounding: what docs/numerics.md says of them."""

from typing import Any

import torch
from torch import Tensor

from phi3v.geometry import Grid
from tests.model.tiny import draw, gradients, make_model, pack

TOWER = "model.vision_embed_tokens.img_processor.vision_model."
PICTURES = [draw(0, 12, [Grid(1, 2)]), draw(1, 9), draw(2, 7, [Grid(1, 1)])]


def gradients_of(batch: dict[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    model = make_model().to(dtype).train()
    views = batch["views"]
    model(**batch | {"views": None if views is None else views.to(dtype)}).backward()
    return {name: g.double() for name, g in gradients(model).items() if g is not None}


def test_what_the_features_do_not_need_is_not_trained() -> None:
    frozen = {n for n, p in make_model().named_parameters() if not p.requires_grad}
    parts = (f"{TOWER}encoder.layers.2.", f"{TOWER}post_layernorm.")
    assert frozen == {n for n, _ in make_model().named_parameters() if n.startswith(parts)} != set()


def test_of_a_pack_with_pictures_only_the_keys_biases_are_rounding() -> None:
    """Measured: norms of 1e-7 in float32, 5e-16 in float64, 3e-3 in bf16; others 0.2 at least."""
    for dtype, most in ((torch.float64, 1e-13), (torch.float32, 1e-5), (torch.bfloat16, 0.05)):
        found = gradients_of(pack(PICTURES), dtype)
        small = {name for name, gradient in found.items() if gradient.norm() < most}
        biases = {f"{TOWER}encoder.layers.{k}.self_attn.k_proj.bias" for k in (0, 1)}
        assert small == biases


def test_a_bias_of_the_keys_changes_no_loss() -> None:
    model = make_model().double()
    batch = pack(PICTURES)
    batch["views"] = batch["views"].double()
    with torch.no_grad():
        before = model(**batch)
        for name, parameter in model.named_parameters():
            if name.endswith("k_proj.bias"):
                parameter.add_(1.0)
        assert abs(model(**batch) - before) < 1e-10 * before


def test_rows_of_tokens_that_are_not_there_are_exactly_zero_but_not_those_of_the_head() -> None:
    batch = pack(PICTURES)
    found = gradients_of(batch, torch.float32)
    moved = found["model.embed_tokens.weight"].any(dim=1).nonzero()[:, 0].tolist()
    assert set(moved) <= set(batch["input_ids"].flatten().tolist())
    assert len(moved) > 20 and found["lm_head.weight"].any(dim=1).all()


def test_a_pack_of_text_leaves_the_whole_vision_side_exactly_zero() -> None:
    found = gradients_of(pack([draw(0, 12)]), torch.float32)
    zero = {name for name, gradient in found.items() if not gradient.any()}
    assert zero == {name for name in found if name.startswith("model.vision_embed_tokens.")}

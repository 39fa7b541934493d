"""The published call: what it refuses, what it leaves alone, what it does not compute."""

import pytest
import torch
from torch import Tensor

from phi3v.geometry import Grid
from phi3v.model import Phi3VForCausalLM
from phi3v.sample import IGNORED
from tests.model.tiny import SIZES, draw, gradients, make_model, pack

ONE, SQUARE = Grid(1, 1), Grid(2, 2)


@pytest.fixture(scope="module")
def model() -> Phi3VForCausalLM:
    return make_model()


def assert_untouched(inputs: dict[str, Tensor], copies: dict[str, Tensor]) -> None:
    for name, copy in copies.items():
        assert torch.equal(inputs[name], copy), name


def test_the_published_call_edits_none_of_its_inputs(model: Phi3VForCausalLM) -> None:
    """The published v3 overwrites the negative ids with zeros, in place."""
    sample = draw(0, 12, (ONE, SQUARE))
    inputs = sample.inputs | {
        "labels": sample.labels,
        "attention_mask": torch.ones_like(sample.ids),
        "position_ids": torch.arange(sample.tokens)[None],
    }
    copies = {name: tensor.clone() for name, tensor in inputs.items()}
    model.train()
    model(**inputs).loss.backward()
    model.eval()
    gradients(model)
    assert_untouched(inputs, copies)


def test_the_packed_call_edits_none_of_its_inputs(model: Phi3VForCausalLM) -> None:
    inputs = pack([draw(0, 12, (ONE,)), draw(1, 9)])
    copies = {name: v.clone() for name, v in inputs.items() if isinstance(v, Tensor)}
    model(**inputs).backward()
    gradients(model)
    assert_untouched(inputs, copies)


def test_generation_edits_none_of_its_inputs(model: Phi3VForCausalLM) -> None:
    inputs = draw(0, 12, (ONE,)).inputs
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    copies = {name: tensor.clone() for name, tensor in inputs.items()}
    out = model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert_untouched(inputs, copies)
    assert torch.equal(out[:, : copies["input_ids"].shape[1]], copies["input_ids"])


def test_a_batch_without_a_trained_token_has_loss_and_gradients_of_zero(
    model: Phi3VForCausalLM,
) -> None:
    """The published code divides by no tokens, and gives NaN."""
    sample = draw(0, 12, (ONE,))
    loss = model(**sample.inputs, labels=torch.full_like(sample.labels, IGNORED)).loss
    loss.backward()
    assert loss.item() == 0
    for name, gradient in gradients(model).items():
        if model.get_parameter(name).requires_grad:
            assert gradient is not None and not gradient.any(), name


def test_only_the_used_slots_reach_the_tower(model: Phi3VForCausalLM) -> None:
    sample = draw(0, 6, (ONE, SQUARE))
    inputs, seen = sample.inputs, []
    tower = model.model.vision_embed_tokens.img_processor
    hook = tower.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        logits = model(**inputs).logits
        inputs["pixel_values"][0, 2:] = torch.nan  # slots behind the one crop
        assert torch.equal(model(**inputs).logits, logits)
    hook.remove()
    assert torch.equal(seen[0], sample.views)  # 2 + 5 views of 2 x 5 slots


def test_pixels_of_a_text_are_not_looked_at(model: Phi3VForCausalLM) -> None:
    text, image = draw(0, 12), draw(1, 3, (ONE,)).inputs
    with torch.no_grad():
        expected = model(text.ids).logits
        given = {name: image[name] for name in ("pixel_values", "image_sizes")}
        assert torch.equal(model(text.ids, **given).logits, expected)


def test_the_number_of_an_image_tag_does_not_matter_its_place_does(
    model: Phi3VForCausalLM,
) -> None:
    inputs = draw(0, 6, (ONE, ONE)).inputs
    swapped = inputs["input_ids"].clone()
    swapped[swapped < 0] = -3 - swapped[swapped < 0]  # -1 <-> -2
    with torch.no_grad():
        expected = model(**inputs).logits
        assert torch.equal(model(**inputs | {"input_ids": swapped}).logits, expected)


@pytest.mark.parametrize("missing", ["pixel_values", "image_sizes"])
def test_image_positions_without_images_are_refused(model: Phi3VForCausalLM, missing: str) -> None:
    inputs = draw(0, 6, (ONE,)).inputs
    del inputs[missing]
    with pytest.raises(ValueError, match=r"have 13 image positions but pixel_values or image_size"):
        model(**inputs)


@pytest.mark.parametrize("cut", [1, 5])
def test_a_prompt_truncated_through_its_image_is_refused(model: Phi3VForCausalLM, cut: int) -> None:
    inputs = draw(0, 6, (SQUARE,)).inputs
    inputs["input_ids"] = inputs["input_ids"][:, : -1 - cut]
    needed = f"have {27 - cut} image positions, the images of pixel_values need 27; do not truncate"
    with pytest.raises(ValueError, match=needed):
        model(**inputs)


def test_an_image_size_that_is_not_the_prompts_is_refused(model: Phi3VForCausalLM) -> None:
    inputs = draw(0, 6, (SQUARE,)).inputs
    inputs["image_sizes"] = torch.tensor([[SIZES.image_size, 2 * SIZES.image_size]])
    with pytest.raises(ValueError, match="have 27 image positions, the images of pixel_values nee"):
        model(**inputs)


@pytest.mark.parametrize("images", [1, 3])
def test_another_number_of_images_than_sizes_is_refused(
    model: Phi3VForCausalLM, images: int
) -> None:
    inputs = draw(0, 6, (ONE, ONE)).inputs
    inputs["pixel_values"] = inputs["pixel_values"][[0] * images]
    with pytest.raises(ValueError, match=f"hold {images} images of 5 views, .* describe \\[2, 2]"):
        model(**inputs)


def test_fewer_slots_than_an_image_has_views_are_refused(model: Phi3VForCausalLM) -> None:
    inputs = draw(0, 6, (SQUARE,)).inputs
    inputs["pixel_values"] = inputs["pixel_values"][:, :4]
    with pytest.raises(ValueError, match=r"hold 1 images of 4 views, .* describe \[5] views"):
        model(**inputs)


def test_only_the_last_logits_are_made_on_request(model: Phi3VForCausalLM) -> None:
    inputs = draw(0, 12).inputs
    with torch.no_grad():
        every = model(**inputs).logits
        last = model(**inputs, logits_to_keep=1).logits
    assert torch.allclose(last, every[:, -1:], atol=1e-5)


def test_logits_are_float32_in_a_model_of_bfloat16() -> None:
    sample = draw(0, 12, (ONE,))
    with torch.no_grad():
        out = make_model().bfloat16()(**sample.inputs, labels=sample.labels)
    assert (out.logits.dtype, out.loss.dtype) == (torch.float32, torch.float32)

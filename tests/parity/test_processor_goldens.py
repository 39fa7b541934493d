"""Our processor gives the published pixels, sizes, token counts and ids, bit for bit."""

import hashlib
import re
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from phi3v.errors import SampleError
from phi3v.geometry import hd_layout, image_tokens
from phi3v.processing import Phi3VProcessor
from phi3v.processing.canvas import hd_canvas
from phi3v.processing.prompt import render
from phi3v.samples.tiny import CLIP_MEAN, CLIP_STD
from phi3v.views import ViewSettings, pixel_values
from tests.parity.goldens import IS_SAME_CPU, REFERENCE, golden, needs_reference, picture, records

SETTINGS = ViewSettings(336, CLIP_MEAN, CLIP_STD)
IMAGES = records("processor/image_processor.json")["records"]
SAMPLES = np.load(golden("processor/image_processor_samples.npz"))


def sha256(array: np.ndarray | torch.Tensor) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def name_of(record: dict[str, Any]) -> str:
    return f"{record['image']}.nc{record['num_crops']}"


@pytest.mark.parametrize("record", IMAGES, ids=name_of)
def test_every_picture_becomes_the_published_pixels(record: dict[str, Any]) -> None:
    image, crops = picture(record["image"]), record["num_crops"]
    assert (image.mode, list(image.size)) == (record["source_mode"], record["source_size_wh"])
    if "raises" in record:
        with pytest.raises(SampleError, match="image is too narrow"):
            hd_canvas(image, crops, 336)
        return
    canvas = hd_canvas(image, crops, 336)
    assert list(canvas.shape) == record["hd_uint8_shape_hwc"]
    assert sha256(canvas) == record["hd_uint8_sha256"]
    values = pixel_values([canvas], crops + 1, SETTINGS)
    used = record["used_slots"]
    assert values.dtype == torch.float32
    assert list(values.shape) == record["pixel_values_shape"]
    assert sha256(values[0, 1:used]) == record["sub_crops_float32_sha256"]
    assert not values[0, used:].any()
    if IS_SAME_CPU:
        assert sha256(values[0, 0]) == record["global_float32_sha256"]
    grid, patch = (SAMPLES[f"{name_of(record)}.{part}"] for part in ("grid", "global_patch"))
    assert np.abs(values[0, :used, :, 5::24, 7::24].numpy() - grid).max() < 1e-5  # without AVX 5e-7
    assert np.abs(values[0, 0, :, 100:112, 200:212].numpy() - patch).max() < 1e-5


@pytest.mark.parametrize("record", [r for r in IMAGES if "raises" not in r], ids=name_of)
def test_every_picture_takes_the_published_number_of_tokens(record: dict[str, Any]) -> None:
    layout = hd_layout(*record["source_size_wh"], record["num_crops"], 336)
    assert [image_tokens(layout.grid, 12)] == record["num_img_tokens"]
    assert layout.grid.views == record["used_slots"]
    assert [[layout.grid.rows * 336, layout.grid.cols * 336]] == record["image_sizes"]
    resized = record["resize_to_hw_before_padding_maybe_transposed"]
    assert [layout.resized_short, layout.resized_long] == resized


def test_several_pictures_are_stacked_in_order() -> None:
    call = records("processor/multi_image_call.json")
    canvases = [hd_canvas(picture(name), call["num_crops"], 336) for name in call["images"]]
    values = pixel_values(canvases, call["num_crops"] + 1, SETTINGS)
    assert list(values.shape) == call["pixel_values_shape"]
    assert [list(canvas.shape[:2]) for canvas in canvases] == call["image_sizes"]
    if IS_SAME_CPU:
        assert [sha256(image) for image in values] == call["sha_per_image"]


def test_every_row_of_the_size_table_is_met() -> None:
    """3,290 sizes; the one whose short side vanishes raises, where the original counts tokens."""
    for width, height, crops, *published in np.load(golden("processor/size_table.npz"))["table"]:
        if published[1] == 0:
            with pytest.raises(SampleError, match="too narrow"):
                hd_layout(width, height, crops, 336)
            continue
        layout = hd_layout(width, height, crops, 336)
        grid, resized = layout.grid, (layout.resized_long, layout.resized_short)
        ours = [*resized, grid.cols * 336, grid.rows * 336, image_tokens(grid, 12)]
        assert ours == published, (width, height, crops)


def test_chats_are_rendered_as_by_the_published_template() -> None:
    for chat in records("processor/chat_template.json"):
        is_answered = chat["messages"][-1]["role"] == "assistant"
        for_answer = chat["add_generation_prompt"] and not is_answered
        assert render(chat["messages"], for_answer) == chat["rendered"]


@pytest.fixture(scope="module", params=["phi3_vision", "phi35_vision"])
def processor(request: pytest.FixtureRequest) -> Phi3VProcessor:
    return Phi3VProcessor.from_pretrained(REFERENCE / request.param)


@needs_reference
def test_the_published_settings_are_read(processor: Phi3VProcessor) -> None:
    release = processor.tokenizer.name_or_path
    assert processor.num_crops == (4 if release.endswith("phi35_vision") else 16)
    assert (processor.image_mean, processor.image_std) == (CLIP_MEAN, CLIP_STD)
    assert (processor.crop_size, processor.side) == (336, 12)


@needs_reference
def test_every_text_gets_the_published_ids(processor: Phi3VProcessor) -> None:
    goldens, tokenizer = records("processor/tokenizer_encodings.json"), processor.tokenizer
    for encoding in goldens["encodings"]:
        text, ids = encoding["text"], encoding["ids"]
        assert tokenizer(text)["input_ids"] == ids, text
        bare = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert bare == encoding["ids_no_special"], text
        assert tokenizer.convert_ids_to_tokens(ids) == encoding["tokens"]
        assert processor.decode(ids) == encoding["decoded"]
        assert processor.decode(ids, skip_special_tokens=True) == encoding["decoded_skip"]
    batch = goldens["padded_batch"]
    padded = tokenizer(batch["texts"], padding=True)
    assert padded["input_ids"] == batch["input_ids"]
    assert padded["attention_mask"] == batch["attention_mask"]


@needs_reference
def test_every_chat_gets_the_published_ids(processor: Phi3VProcessor) -> None:
    for chat in records("processor/chat_template.json"):
        question = {"add_generation_prompt": chat["add_generation_prompt"], "tokenize": False}
        rendered = processor.apply_chat_template(chat["messages"], **question)
        assert rendered == chat["rendered"]
        assert processor.tokenizer(rendered)["input_ids"] == chat["ids"]


# The processor refuses what the original asserts, with an error of ours that says how to go on.
REFUSALS = {
    "err_text_list": (TypeError, "with images, text must be one string"),
    "err_too_few_images": (SampleError, "image tags [1, 2] do not number 1 images; "),
    "err_too_many_images": (SampleError, "image tags [1] do not number 2 images; "),
    "err_gap": (SampleError, "image tags [1, 3] do not number 2 images; "),
    "err_zero_based": (SampleError, "image tags [0] do not number 1 images; "),
    "err_no_tag": (SampleError, "image tags none do not number 1 images; use <|image_1|>"),
}


@needs_reference
@pytest.mark.slow
def test_every_prompt_gets_the_published_ids_or_is_refused() -> None:
    goldens = records("processor/processor_prompts.json")
    arrays = np.load(golden("processor/processor_prompts.npz"))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(REFERENCE / "phi3_vision")
    assert {prompt["name"] for prompt in goldens if "raises" in prompt} == set(REFUSALS)
    for prompt in goldens:
        processor = Phi3VProcessor(tokenizer, prompt["num_crops"], CLIP_MEAN, CLIP_STD)
        images = [picture(name) for name in prompt["images"]]
        if "raises" in prompt:
            error, message = REFUSALS[prompt["name"]]
            with pytest.raises(error, match=re.escape(message)):
                processor(prompt["prompt"], images)
            continue
        inputs = processor(prompt["prompt"], images or None)
        for key in ("input_ids", "attention_mask"):
            expected = arrays[f"{prompt['name']}.nc{prompt['num_crops']}.{key}"]
            assert np.array_equal(inputs[key].numpy(), expected), (prompt["name"], key)
        assert set(inputs) == set(prompt["keys"])
        if images:
            assert inputs["image_sizes"].tolist() == prompt["image_sizes"]
            assert inputs["image_sizes"].dtype == torch.int64
            assert list(inputs["pixel_values"].shape) == prompt["pixel_values_shape"]

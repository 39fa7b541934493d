"""Phi3VProcessor: one call for a prompt and its pictures, settings from a model folder."""

import configparser
import errno
import importlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoConfig, ProcessorMixin
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING

from phi3v.errors import ConfigError, MachineError, SampleError
from phi3v.processing import Phi3VImageProcessor, Phi3VProcessor
from phi3v.processing import processor as module
from phi3v.samples.tiny import CLIP_MEAN, CLIP_STD, TinySizes, processor_settings
from tests.processing.tokens import tokenizer

SIZES = TinySizes(num_crops=6)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What of a model folder the processor reads."""
    tokenizer().save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor_settings(SIZES)))
    (tmp_path / "config.json").write_text('{"vision_config": {"image_size": 56}}')
    return tmp_path


def picture(width: int, height: int) -> Image.Image:
    random = np.random.default_rng(width)
    return Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_settings_are_read_from_a_model_folder(folder: Path) -> None:
    processor = Phi3VProcessor.from_pretrained(folder)
    assert (processor.num_crops, processor.crop_size, processor.side) == (6, 56, 2)
    assert (processor.image_mean, processor.image_std) == (CLIP_MEAN, CLIP_STD)
    text = "A red cat, 12.50 EUR."
    assert processor.tokenizer(text).input_ids == tokenizer()(text).input_ids


def test_num_crops_can_be_chosen(folder: Path) -> None:
    assert Phi3VProcessor.from_pretrained(folder, num_crops=1).num_crops == 1


def test_upscaling_can_be_forgone(folder: Path) -> None:
    """A picture of 40 x 40 then fills one crop of 56, 13 tokens, in canvas and counts alike."""
    published = Phi3VProcessor.from_pretrained(folder)
    processor = Phi3VProcessor.from_pretrained(folder, never_upscale=True)
    assert published.canvas(picture(40, 40)).shape == (112, 112, 3)
    canvas = processor.canvas(picture(40, 40))
    assert canvas.shape == (56, 56, 3)
    assert processor.canvas_tokens(canvas) == 13
    assert processor.calc_num_image_tokens_from_image_size(40, 40) == 13
    text, text_tokens = "<|image_1|>", len(processor.tokenizer(["", ""])["input_ids"])
    assert processor.count_tokens(text, [(40, 40)]) == 13 + text_tokens
    inputs = processor(text, [picture(40, 40)])
    assert ((inputs["input_ids"] < 0).sum(), inputs["image_sizes"].tolist()) == (13, [[56, 56]])


def test_without_sizes_in_config_json_the_tower_is_the_published(folder: Path) -> None:
    (folder / "config.json").write_text("{}")
    processor = Phi3VProcessor.from_pretrained(folder)
    assert (processor.crop_size, processor.side) == (336, 12)


@pytest.mark.parametrize("missing", ["preprocessor_config.json", "config.json"])
def test_a_folder_without_its_settings_is_refused(folder: Path, missing: str) -> None:
    (folder / missing).unlink()
    with pytest.raises(ConfigError, match=f"has no {missing}; name a model folder"):
        Phi3VProcessor.from_pretrained(folder)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("runs/nothere", "HF_HUB_OFFLINE keeps the hub from being asked"),
        ("/no/such/folder", "its name is none of the hub's"),
    ],
)
def test_a_mistyped_folder_is_said_to_be_none(name: str, reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Phi3VProcessor.from_pretrained(name)
    assert str(caught.value) == (
        f"there is no folder {name}, and {reason}; name a model folder or a hub model such as "
        "microsoft/Phi-3.5-vision-instruct, or make a tiny one there: python launch/tiny_model.py "
        f"{name}"
    )


def test_the_folder_of_a_run_is_no_model_and_is_to_be_exported(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").touch()
    with pytest.raises(ConfigError) as caught:
        Phi3VProcessor.from_pretrained(tmp_path)
    assert str(caught.value) == (
        f"model {tmp_path} is the folder of a run, not of a model; export what it has learnt: "
        f"python launch/export.py {tmp_path} --out DIR, and name that DIR"
    )


def test_the_hub_is_asked_once_for_a_model_that_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a connection that is refused is said in the same line; nothing listens at this port."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ConfigError, match="there is no folder a/b, and the hub cannot be asked"):
        Phi3VProcessor.from_pretrained("a/b")


def test_the_digest_is_of_the_whole_tokenizer(folder: Path) -> None:
    digest = Phi3VProcessor.from_pretrained(folder).tokenizer_digest
    assert digest == Phi3VProcessor.from_pretrained(folder).tokenizer_digest
    path = folder / "tokenizer.json"
    definition = json.loads(path.read_text())
    definition["normalizer"] = None
    path.write_text(json.dumps(definition))
    assert Phi3VProcessor.from_pretrained(folder).tokenizer_digest != digest


@pytest.fixture
def processor() -> Phi3VProcessor:
    return Phi3VProcessor(tokenizer(), 4, CLIP_MEAN, CLIP_STD, 56)


def test_a_prompt_with_pictures(processor: Phi3VProcessor) -> None:
    pictures = [picture(60, 60), picture(224, 56)]
    copies = [each.copy() for each in pictures]
    inputs = processor("<|image_1|> or <|image_2|>?", pictures)
    assert inputs["image_sizes"].tolist() == [[112, 112], [56, 224]]
    assert inputs["pixel_values"].shape == (2, 5, 3, 56, 56)
    ids = inputs["input_ids"]
    assert [(ids == -number).sum().item() for number in (1, 2)] == [27, 25]
    assert torch.equal(inputs["attention_mask"], torch.ones_like(ids))
    assert pictures == copies


def test_one_picture_needs_no_list(processor: Phi3VProcessor) -> None:
    one, listed = (processor("<|image_1|>", each) for each in (picture(9, 9), [picture(9, 9)]))
    for key, value in listed.items():
        assert torch.equal(torch.as_tensor(one[key]), torch.as_tensor(value)), key


@pytest.mark.parametrize("images", [None, [], ()])
def test_a_text_alone_is_only_tokenised(processor: Phi3VProcessor, images: list | None) -> None:
    inputs = processor("A cat.", images)
    assert set(inputs) == {"input_ids", "attention_mask"}
    assert inputs["input_ids"].tolist() == [tokenizer()("A cat.").input_ids]


def test_a_tag_without_pictures_is_text(processor: Phi3VProcessor) -> None:
    """As the published processor."""
    assert (processor("<|image_1|>").input_ids >= 0).all()


def test_several_texts_with_pictures_are_refused(processor: Phi3VProcessor) -> None:
    with pytest.raises(TypeError, match="with images, text must be one string"):
        processor(["<|image_1|>"], [picture(9, 9)])


def test_another_number_of_pictures_than_tags_is_refused(processor: Phi3VProcessor) -> None:
    with pytest.raises(SampleError, match="do not number 2 images"):
        processor("<|image_1|>", [picture(9, 9), picture(9, 9)])


def test_ids_are_decoded_by_the_tokenizer(processor: Phi3VProcessor) -> None:
    ids = processor("A red cat.").input_ids
    assert processor.decode(ids[0], skip_special_tokens=True) == "A red cat."
    assert processor.batch_decode(ids, skip_special_tokens=True) == ["A red cat."]


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(8, 90), st.integers(8, 90)), min_size=1, max_size=3),
    words=st.lists(st.text("ab ,.1\n", max_size=12), min_size=4, max_size=4),
)
def test_tokens_are_counted_from_sizes_as_the_processor_makes_them(
    sizes: list[tuple[int, int]], words: list[str]
) -> None:
    processor = Phi3VProcessor(tokenizer(), 6, CLIP_MEAN, CLIP_STD, crop_size=56)
    tags = [f"<|image_{n}|>" for n in range(1, len(sizes) + 1)]
    text = "".join(w + t for w, t in zip(words, [*tags, ""], strict=False))
    made = processor(text, [picture(*size) for size in sizes])
    assert processor.count_tokens(text, sizes) == made["input_ids"].shape[1]


def published_tokens(width: int, height: int, num_crops: int) -> int:
    """image_processing_phi3_v.py `calc_num_image_tokens_from_image_size`, at 336 pixels."""
    long, short = max(width, height), min(width, height)
    ratio, scale = long / short, 1
    while scale * np.ceil(scale / ratio) <= num_crops:
        scale += 1
    across = (scale - 1) * 336
    down = int(np.ceil(int(across / ratio) / 336) * 336)
    lines = (down if width >= height else across) // 336
    return (across // 336 * down // 336 + 1) * 144 + 1 + (lines + 1) * 12


@pytest.mark.parametrize("num_crops", [4, 16])
@pytest.mark.parametrize("size", [(640, 427), (336, 336), (50, 800), (1344, 200), (1, 1)])
def test_what_a_server_asks_of_the_processor_has_its_published_name_and_value(
    num_crops: int, size: tuple[int, int]
) -> None:
    processor = Phi3VProcessor(tokenizer(), num_crops, CLIP_MEAN, CLIP_STD)
    width, height = size
    found = processor.calc_num_image_tokens_from_image_size(width=width, height=height)
    assert found == published_tokens(width, height, num_crops)
    assert "".join(processor.img_tokens[:2]) == "<|image_1|><|image_2|>"
    assert isinstance(processor, ProcessorMixin)


def test_a_text_alone_is_tokenised_as_a_server_asks(processor: Phi3VProcessor) -> None:
    inputs = processor("A cat.", return_tensors="pt", add_special_tokens=False)
    assert inputs["input_ids"].tolist() == [
        tokenizer()("A cat.", add_special_tokens=False).input_ids
    ]


def test_the_image_processor_is_the_processors_half(folder: Path) -> None:
    images = Phi3VImageProcessor.from_pretrained(folder)(picture(60, 40))
    inputs = Phi3VProcessor.from_pretrained(folder)("<|image_1|>", picture(60, 40))
    assert images.pop("num_img_tokens") == [(inputs["input_ids"] < 0).sum()]
    assert set(images) == {"pixel_values", "image_sizes"}
    for name in images:
        assert torch.equal(images[name], inputs[name]), name


def test_vllm_finds_what_registers_the_classes() -> None:
    config = configparser.ConfigParser()
    config.read(Path(__file__).parents[2] / "setup.cfg")
    (entry,) = config["options.entry_points"]["vllm.general_plugins"].strip().splitlines()
    module, function = entry.split(" = ")[1].split(":")
    getattr(importlib.import_module(module), function)()  # a second time, after the import
    config_class = AutoConfig.for_model("phi3_v").__class__
    assert IMAGE_PROCESSOR_MAPPING[config_class] == {"pil": Phi3VImageProcessor}


def test_a_model_that_the_machine_cannot_read_is_not_missing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(module, "cached_file", failing)
    with pytest.raises(MachineError, match="tokenizer.json of model .*Too many open files.*ulimit"):
        module.model_file(str(folder), "tokenizer.json")

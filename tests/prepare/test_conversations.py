"""What the model reads and what it learns of a row."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import PreTrainedTokenizerFast

from phi3v.data import Dataset
from phi3v.errors import ConfigError
from phi3v.prepare import prepare
from phi3v.processing import Phi3VProcessor
from phi3v.sample import IGNORED, Sample
from tests.tiny import recipe, turn, write_jsonl, write_picture

SIZES = {"square.png": (60, 60), "wide.png": (200, 70), "tall.png": (40, 150)}
CANVASES = {"square.png": (112, 112), "wide.png": (56, 112), "tall.png": (168, 56)}


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> PreTrainedTokenizerFast:
    return Phi3VProcessor.from_pretrained(tiny_model).tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, (name, size) in enumerate(SIZES.items()):
        write_picture(tmp_path / name, *size, seed=number)
    return tmp_path


def prepare_one(model: Path, folder: Path, row: dict[str, Any], **source: Any) -> Sample:
    write_jsonl(folder / "rows.jsonl", [row])
    prepare(recipe(model, folder / "out", {"path": str(folder / "rows.jsonl"), **source}))
    (sample,) = Dataset(folder / "out", "train")
    return sample


def spoken(tokenizer: PreTrainedTokenizerFast, sample: Sample) -> list[tuple[bool, str]]:
    """The text in runs of learnt and of other tokens; image tokens left out."""
    is_learnt = sample.labels != IGNORED
    runs = np.split(np.arange(len(is_learnt)), np.flatnonzero(np.diff(is_learnt)) + 1)
    return [
        (bool(is_learnt[run[0]]), tokenizer.decode([i for i in sample.input_ids[run] if i >= 0]))
        for run in runs
    ]


def learnt(tokenizer: PreTrainedTokenizerFast, sample: Sample) -> list[str]:
    return [text for is_learnt, text in spoken(tokenizer, sample) if is_learnt]


MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "<|image_1|>\nWhat is it?"},
    {"role": "assistant", "content": "A cat, 12 kg."},
    {"role": "user", "content": "Its name?"},
    {"role": "assistant", "content": "M\u00fc\U0001f600\nor so"},
]


def test_labels_are_the_answers_and_their_ends_and_nothing_else(
    folder: Path, tiny_model: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    sample = prepare_one(tiny_model, folder, {"messages": MESSAGES, "images": ["square.png"]})
    answers = ["A cat, 12 kg.<|end|>", "M\u00fc\U0001f600\nor so<|end|>"]
    assert learnt(tokenizer, sample) == answers
    others = [text for is_learnt, text in spoken(tokenizer, sample) if not is_learnt]
    assert [text.count("<|assistant|>") for text in others] == [1, 1, 0]
    assert "Be brief." in others[0] and "What is it?" in others[0] and "Its name?" in others[1]
    is_learnt = sample.labels != IGNORED
    assert np.array_equal(sample.labels[is_learnt], sample.input_ids[is_learnt])
    assert (sample.input_ids[is_learnt] > 0).all()


def test_ids_are_the_processors_of_the_rendered_template(folder: Path, tiny_model: Path) -> None:
    """The public processor, given the chat template's text and the pictures, says the same."""
    processor = Phi3VProcessor.from_pretrained(tiny_model)
    picture = Image.open(folder / "wide.png")
    sample = prepare_one(tiny_model, folder, {"messages": MESSAGES, "images": ["wide.png"]})
    inputs = processor(processor.apply_chat_template(MESSAGES, tokenize=False), [picture])
    assert sample.input_ids.tolist() == inputs["input_ids"][0].tolist()
    assert tuple(inputs["image_sizes"][0].tolist()) == sample.images[0].size
    assert np.array_equal(sample.images[0].pixels, processor.canvas(picture))


def test_the_prompt_ends_where_the_last_answer_starts(
    folder: Path, tiny_model: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    sample = prepare_one(tiny_model, folder, {"messages": MESSAGES, "images": ["square.png"]})
    assert sample.meta["reference"] == "M\u00fc\U0001f600\nor so"
    assert tokenizer.decode([sample.prompt_ids[-1]]) == "<|assistant|>"
    rest = sample.input_ids[len(sample.prompt_ids) :]
    assert tokenizer.decode(rest).split("<|end|>") == ["M\u00fc\U0001f600\nor so", " \n"]


def test_the_prompt_ends_where_the_last_answer_that_is_trained_starts(
    folder: Path, tiny_model: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    messages = [*MESSAGES[:-1], MESSAGES[-1] | {"weight": 0}]
    sample = prepare_one(tiny_model, folder, {"messages": messages, "images": ["square.png"]})
    assert sample.meta["reference"] == "A cat, 12 kg."
    assert sample.meta["trained_answers"] == [True, False]
    assert tokenizer.decode([sample.prompt_ids[-1]]) == "<|assistant|>"
    assert sample.input_ids.tolist().count(sample.prompt_ids[-1]) == 2
    rest = sample.input_ids[len(sample.prompt_ids) :]
    assert tokenizer.decode(rest).startswith("A cat, 12 kg.<|end|>")


def test_a_sample_has_at_most_max_tokens(folder: Path, tiny_model: Path) -> None:
    row = {"messages": MESSAGES, "images": ["square.png"]}
    length = len(prepare_one(tiny_model, folder, row).input_ids)
    source = {"path": str(folder / "rows.jsonl")}
    prepare(recipe(tiny_model, folder / "exact", source, max_tokens=length))
    assert len(Dataset(folder / "exact", "train")) == 1
    with pytest.raises(ConfigError, match=f"too many tokens: {length}, max_tokens is {length - 1}"):
        prepare(recipe(tiny_model, folder / "less", source, max_tokens=length - 1))


def test_a_row_without_images_is_a_sample_without_canvases(
    folder: Path, tiny_model: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    sample = prepare_one(tiny_model, folder, turn("Hi", "Ho"))
    assert (sample.images, sample.input_ids.min() > 0) == ((), True)
    assert learnt(tokenizer, sample) == ["Ho<|end|>"]


def test_images_are_stored_and_numbered_as_they_appear(
    folder: Path, tiny_model: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """The published processor takes tags out of order, and its model then swaps the pictures."""
    row = turn("<|image_3|> <|image_1|>", "Yes.", images=["wide.png", "square.png", "tall.png"])
    row["messages"] += turn("<|image_2|>", "No.")["messages"]
    sample = prepare_one(tiny_model, folder, row)
    order = ["tall.png", "wide.png", "square.png"]
    assert [canvas.size for canvas in sample.images] == [CANVASES[name] for name in order]
    seen = [int(i) for i in sample.input_ids if i < 0]
    assert sorted(seen, reverse=True) == seen and set(seen) == {-1, -2, -3}
    text = tokenizer.decode([i for i in sample.input_ids if i > 0])
    assert "image" not in text


def test_white_space_around_an_answer_is_not_learnt(
    folder: Path, tiny_model: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    sample = prepare_one(tiny_model, folder, turn("  Hi ", " \n Ho  ho \t\n"))
    assert learnt(tokenizer, sample) == ["Ho  ho<|end|>"]
    assert sample.meta["reference"] == "Ho  ho"


def test_templates_name_any_column_and_leave_other_braces_alone(
    folder: Path, tiny_model: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    row = {"id": 7, "Full Price": 12.5, "n": 0, "title": "{n} <b>", "other": None}
    template = '{"title": "{title}", "price": {Full Price}, "n": {n}}'
    sample = prepare_one(tiny_model, folder, row, user="Tell {title}", assistant=template)
    assert sample.id == "7"
    assert sample.meta["reference"] == '{"title": "{n} <b>", "price": 12.5, "n": 0}'


@pytest.mark.parametrize("name", [None, "", float("nan")])
def test_a_row_without_an_id_is_named_by_its_number(
    folder: Path, tiny_model: Path, name: object
) -> None:
    assert prepare_one(tiny_model, folder, turn("Hi", "Ho", id=name)).id == "0"


@pytest.mark.parametrize(
    ("source", "split", "message"),
    [
        (
            {"user": "{question}", "assistant": "{answre}"},
            {},
            "has no column 'answre', it has: question, answer; name these in the recipe",
        ),
        (
            {"user": "<|image_1|>", "assistant": "{answer}", "images": ["picture"]},
            {},
            "has no column 'picture', it has: question, answer; name these in the recipe",
        ),
        (
            {"user": "{question}", "assistant": "{answer}", "references": "answers"},
            {},
            "has no column 'answers', it has: question, answer; name these in the recipe",
        ),
        (
            {"user": "{question}", "assistant": "{answer}"},
            {"validation": 0.5, "by": "code"},
            "has no column 'code', it has: question, answer; name these in the recipe",
        ),
        (
            {},
            {},
            "has no column 'messages', it has: question, answer; set source.user and "
            "source.assistant to make messages of these",
        ),
        (
            {"format": "llava"},
            {},
            "has no column 'conversations', it has: question, answer; set source.format to what "
            "its rows hold",
        ),
        (
            {"user": "{question}", "assistant": "{answers[0]}"},
            {},
            "has no column 'answers[0]', it has: question, answer; name these in the recipe",
        ),
    ],
)
def test_a_column_that_is_not_there_is_refused_with_those_that_are(
    tmp_path: Path, tiny_model: Path, source: dict, split: dict, message: str
) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("question,answer\nHi,Ho\n")
    cfg = recipe(tiny_model, tmp_path / "out", {"path": str(path), **source}, split=split)
    with pytest.raises(ConfigError) as caught:
        prepare(cfg)
    assert str(caught.value) == f"source.path {path} {message}"
    assert not (tmp_path / "out").exists()

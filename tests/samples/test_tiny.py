"""The tiny model is a genuine phi3_v folder: whatever reads the published one reads it."""

import json
import re
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoModelForCausalLM, AutoProcessor, PreTrainedTokenizerFast

from phi3v.errors import ConfigError
from phi3v.model import Phi3VForCausalLM
from phi3v.processing import Phi3VProcessor
from phi3v.samples.products import sample_texts
from phi3v.samples.tiny import (
    CONTROL_TOKENS,
    FILES,
    TinySizes,
    make_tiny_model,
    tokenizer_settings,
    train_tokenizer,
)
from tests.commands import LAUNCH, last_line, run

SMALL = TinySizes(
    vision_width=16,
    vision_layers=2,
    vision_heads=2,
    width=16,
    layers=1,
    heads=2,
    mlp_width=32,
    text_pieces=60,
)
TEXTS = ["Product: Red cap, Price: 120", "What is shown in this image?"]
TEXT = st.text(st.characters(exclude_characters="\u2581", exclude_categories=("Cs",)))


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> PreTrainedTokenizerFast:
    return Phi3VProcessor.from_pretrained(tiny_model).tokenizer


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# The folder


def test_the_folder_holds_what_a_published_one_does(tiny_model: Path) -> None:
    assert {path.name for path in tiny_model.iterdir()} == set(FILES)
    config = json.loads((tiny_model / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("phi3_v", ["Phi3VForCausalLM"])
    assert config["vision_config"]["image_size"] == TinySizes().image_size
    assert config["vocab_size"] % 64 == 0
    settings = json.loads((tiny_model / "preprocessor_config.json").read_text())
    assert settings["num_crops"] == TinySizes().num_crops


def test_it_opens_through_the_auto_classes_and_answers(tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    processor = AutoProcessor.from_pretrained(tiny_model)
    assert isinstance(model, Phi3VForCausalLM) and isinstance(processor, Phi3VProcessor)
    inputs = processor("<|user|>\n<|image_1|>\nWhat?<|end|>\n", Image.new("RGB", (90, 40)))
    with torch.no_grad():
        logits = model(**inputs).logits
    assert logits.shape[:2] == inputs["input_ids"].shape
    assert logits.isfinite().all()
    assert len(processor.tokenizer) <= logits.shape[2]


def test_the_model_stops_where_an_answer_ends(tiny_model: Path) -> None:
    generation = json.loads((tiny_model / "generation_config.json").read_text())
    tokenizer = Phi3VProcessor.from_pretrained(tiny_model).tokenizer
    assert tokenizer.convert_ids_to_tokens(generation["eos_token_id"]) == [
        "<|end|>",
        "<|endoftext|>",
    ]


def test_the_weights_are_drawn_from_the_seed_alone(tmp_path: Path) -> None:
    state = torch.random.get_rng_state()
    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        torch.rand(3)
        make_tiny_model(tmp_path / name, TEXTS, SMALL, seed)
    assert contents(tmp_path / "one") == contents(tmp_path / "same")
    one, other = contents(tmp_path / "one"), contents(tmp_path / "other")
    assert {name for name in one if one[name] != other[name]} == {"model.safetensors"}
    torch.random.set_rng_state(state)


def test_the_callers_random_state_is_left_alone(tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    make_tiny_model(tmp_path / "one", TEXTS, SMALL)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_tiny_model_is_replaced_by_another(tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "a", TEXTS, SMALL)
    make_tiny_model(tmp_path / "a", TEXTS, replace(SMALL, num_crops=9))
    assert json.loads((tmp_path / "a/preprocessor_config.json").read_text())["num_crops"] == 9
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("name", ["thesis.txt", "modeling_phi3_v.py", "checkpoint/x"])
def test_a_folder_with_other_files_is_not_replaced(tmp_path: Path, name: str) -> None:
    """A downloaded Phi-3-Vision holds a config.json, too, and more than a tiny model."""
    foreign = tmp_path / "a" / name
    foreign.parent.mkdir(parents=True)
    foreign.write_text("mine")
    (tmp_path / "a/config.json").write_text('{"model_type": "phi3_v"}')
    with pytest.raises(ConfigError, match="a exists and is no tiny model; name another folder"):
        make_tiny_model(tmp_path / "a", TEXTS, SMALL)
    assert foreign.read_text() == "mine"


def test_a_file_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("mine")
    with pytest.raises(ConfigError, match="a exists and is no tiny model"):
        make_tiny_model(tmp_path / "a", TEXTS, SMALL)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"image_size": 50}, "image_size 50 is not a multiple of twice patch_size 14; use 56 or"),
        ({"width": 100, "heads": 3}, "width 100 is not a multiple of twice heads 3; use 48"),
        ({"vision_width": 90}, "vision_width 90 is not a multiple of twice vision_heads 4; use 64"),
        ({"patch_size": 0}, "patch_size must be at least 1, got 0"),
        ({"heads": 0}, "heads must be at least 1, got 0"),
        ({"vision_layers": 1}, "vision_layers must be at least 2, got 1"),
        ({"text_pieces": -1}, "text_pieces must be at least 1, got -1"),
    ],
)
def test_sizes_that_make_no_model_are_refused(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        TinySizes(**sizes)


# The tokenizer


@settings(deadline=None)
@given(TEXT)
def test_any_text_survives_the_tokenizer(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assume(not any(token in text for token in tokenizer.get_added_vocab()))  # a control token
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids[1:]) == text


def test_a_character_never_seen_becomes_its_bytes(tokenizer: PreTrainedTokenizerFast) -> None:
    pieces = tokenizer.tokenize("\U0001f600")
    assert [piece for piece in pieces if piece != "\u2581"] == [
        f"<0x{byte:02X}>" for byte in "\U0001f600".encode()
    ]


def test_digits_stay_single_pieces(tokenizer: PreTrainedTokenizerFast) -> None:
    vocabulary = tokenizer.get_vocab()
    learnt = [piece for piece in vocabulary if not piece.startswith("<")]
    assert [p for p in learnt if any(c.isdigit() for c in p) and len(p) > 1] == []
    assert tokenizer.tokenize("228")[-3:] == ["2", "2", "8"]


def test_words_of_the_texts_are_pieces(tokenizer: PreTrainedTokenizerFast) -> None:
    assert "\u2581Product" in tokenizer.tokenize("Product: Red")
    ids = tokenizer(sample_texts()[0])["input_ids"]
    assert len(ids) < len(sample_texts()[0]) / 2


def test_control_tokens_swallow_white_space_as_the_published_do(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    """reference: 32001 <|assistant|>, placeholders and <|image|> strip, the others do not."""
    for text, strips in CONTROL_TOKENS:
        (number,) = tokenizer.convert_tokens_to_ids([text])
        ids = tokenizer(f"{text}\n \n", add_special_tokens=False)["input_ids"]
        assert (ids == [number]) == strips, text
        assert ids[0] == number
    assert [text for text, strips in CONTROL_TOKENS if not strips] == [
        "<|endoftext|>",
        "<|system|>",
        "<|end|>",
        "<|user|>",
    ]


def test_control_tokens_have_the_published_order(tokenizer: PreTrainedTokenizerFast) -> None:
    names = ["<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>", "<|image|>"]
    first, *others = tokenizer.convert_tokens_to_ids(names)
    assert [number - first for number in others] == [1, 6, 7, 10, 44]
    assert len(tokenizer) == first + 45


def test_the_chat_template_is_the_published_one(tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [{"role": "system", "content": "A"}, {"role": "user", "content": "B"}]
    text = "<|system|>\nA<|end|>\n<|user|>\nB<|end|>\n"
    render = tokenizer.apply_chat_template
    assert render(messages, tokenize=False) == text
    opened = render(messages, tokenize=False, add_generation_prompt=True)
    assert opened == f"{text}<|assistant|>\n"


def test_a_tokenizer_depends_on_its_texts_alone() -> None:
    one, same, other = (train_tokenizer(texts, 60) for texts in (TEXTS, TEXTS, TEXTS[1:]))
    assert one.to_str() == same.to_str() != other.to_str()
    assert tokenizer_settings(one) == tokenizer_settings(same)


# The command


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    """Run the command in this process, 5 seconds faster; its errors are raised."""
    command = LAUNCH / "tiny_model.py"
    monkeypatch.setattr(sys, "argv", [str(command), *map(str, arguments)])
    runpy.run_path(str(command))["main"]()


FLAGS = [
    *("--vision_width", 16, "--vision_layers", 2, "--vision_heads", 2, "--width", 16),
    *("--layers", 1, "--heads", 2, "--mlp_width", 32, "--text_pieces", 60),
]


def test_every_size_is_a_flag_and_texts_come_from_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in zip("ab", TEXTS, strict=True):
        (tmp_path / name).write_text(f"{text}\n", encoding="utf-8")
    files = [tmp_path / "a", tmp_path / "b"]
    call(monkeypatch, tmp_path / "made", "--texts", *files, *FLAGS)
    make_tiny_model(tmp_path / "expected", TEXTS, SMALL)
    assert contents(tmp_path / "made") == contents(tmp_path / "expected")


def test_without_texts_it_can_spell_the_sample_products(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call(monkeypatch, tmp_path / "made", *FLAGS, "--seed", 3)
    make_tiny_model(tmp_path / "expected", sample_texts(), SMALL, seed=3)
    assert contents(tmp_path / "made") == contents(tmp_path / "expected")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "gone.txt does not exist; name text files"),
        (b"\xff", "gone.txt is no text in UTF-8 ("),
    ],
)
def test_texts_that_cannot_be_read_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes | None, message: str
) -> None:
    if data:
        (tmp_path / "gone.txt").write_bytes(data)
    with pytest.raises(ConfigError, match=re.escape(message)):
        call(monkeypatch, tmp_path / "made", "--texts", tmp_path / "gone.txt")


@pytest.mark.slow
def test_the_command_makes_the_same_model_in_a_process_of_its_own(tmp_path: Path) -> None:
    """Neither hash seeds nor threads decide what the tokenizer learns."""
    command = [sys.executable, LAUNCH / "tiny_model.py"]
    done = run(*command, "made", *FLAGS, cwd=tmp_path, PYTHONHASHSEED="7")
    assert (done.returncode, done.stdout) == (0, "tiny model: made\n")
    make_tiny_model(tmp_path / "expected", sample_texts(), SMALL)
    assert contents(tmp_path / "made") == contents(tmp_path / "expected")
    refused = run(*command, "made", "--heads", 5, cwd=tmp_path)
    assert refused.returncode == 2
    assert last_line(refused, "ConfigError") == (
        "ConfigError: width 128 is not a multiple of twice heads 5; use 80"
    )

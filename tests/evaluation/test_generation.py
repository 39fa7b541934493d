"""Answers in a batch are the answers one by one, and end where the model ends them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from phi3v.data import Dataset
from phi3v.errors import SampleError
from phi3v.evaluation.generation import Generator, Prompt, pad_left
from phi3v.evaluation.held_out import prompt_of
from phi3v.evaluation.models import open_model
from phi3v.evaluation.streaming import TextPieces

LIMIT = 512  # tokens up to which the tiny model's short rotary factors hold
NEW_TOKENS = 12


@pytest.fixture(scope="module")
def generator(tiny_model: Path) -> Generator:
    return open_model(tiny_model, max_new_tokens=NEW_TOKENS, batch_rows=4)


@pytest.fixture(scope="module")
def prompts(mixed_shards: Path) -> list[Prompt]:
    """Ten lengths; with one picture, without, and with two, in turn."""
    dataset = Dataset(mixed_shards, "train")
    one, none, other = (prompt_of(dataset[index]) for index in range(3))
    assert [len(prompt.images) for prompt in (one, none, other)] == [1, 0, 1]
    second = np.where(other.ids == -1, -2, other.ids)
    two = Prompt(np.concatenate([one.ids, second]), one.images + other.images)
    kinds = (one, none, two)
    return [
        Prompt(np.concatenate([words(7 * k, seed=k).ids, kinds[k % 3].ids]), kinds[k % 3].images)
        for k in range(10)
    ]


@contextmanager
def batches_of(generator: Generator) -> Iterator[list[tuple[int, ...]]]:
    """The shapes (rows, tokens) of what the model is asked meanwhile."""
    shapes: list[tuple[int, ...]] = []
    generate = generator.model.generate

    def record(**inputs: Tensor) -> Tensor:
        shapes.append(tuple(inputs["input_ids"].shape))
        return generate(**inputs)

    with mock.patch.object(generator.model, "generate", record):
        yield shapes


def one_by_one(generator: Generator, prompts: Sequence[Prompt]) -> list[str]:
    return [generator.answer([prompt], quiet=True)[0] for prompt in prompts]


def words(length: int, seed: int = 0) -> Prompt:
    """A prompt of that many tokens, none of them a control token."""
    ids = np.random.default_rng(seed).integers(259, 400, length)
    return Prompt(ids.astype(np.int32), ())


# --- batches ---


def test_a_batch_answers_as_each_row_alone(generator: Generator, prompts: list[Prompt]) -> None:
    with batches_of(generator) as shapes:
        together = generator.answer(prompts, quiet=True)
    assert [rows for rows, _ in shapes] == [4, 4, 2]
    assert together == one_by_one(generator, prompts)
    assert len(set(together)) > 3, "the rows must differ for their order to matter"


def test_answers_come_in_the_order_given(generator: Generator, prompts: list[Prompt]) -> None:
    forwards = generator.answer(prompts, quiet=True)
    assert generator.answer(prompts[::-1], quiet=True) == forwards[::-1]


def test_rows_without_any_picture_make_a_batch(generator: Generator, prompts: list[Prompt]) -> None:
    texts = [prompt for prompt in prompts if not prompt.images]
    assert generator.answer(texts, quiet=True) == one_by_one(generator, texts)


def test_nothing_is_answered_with_nothing(generator: Generator) -> None:
    assert generator.answer([], quiet=True) == []


def test_rows_that_may_cross_the_factors_limit_are_answered_alone(generator: Generator) -> None:
    assert generator.model.config.original_max_position_embeddings == LIMIT
    longest = LIMIT - NEW_TOKENS
    lengths = [longest + 1, 5, longest, LIMIT + 3, 7, longest + 6]
    prompts = [words(length, seed) for seed, length in enumerate(lengths)]
    wide = replace(generator, batch_rows=100)
    with batches_of(wide) as shapes:
        together = wide.answer(prompts, quiet=True)
    alone = [(1, length) for length in sorted(lengths) if length > longest]
    assert shapes == [(3, longest), *alone]
    assert together == one_by_one(generator, prompts)


def test_padding_is_on_the_left_and_masked() -> None:
    ids, mask = pad_left([np.array([5, -1, -1, 6], np.int32), np.array([7], np.int32)], 9)
    assert ids.tolist() == [[5, -1, -1, 6], [9, 9, 9, 7]]
    assert mask.tolist() == [[1, 1, 1, 1], [0, 0, 0, 1]]
    assert ids.dtype == mask.dtype == torch.int64


# --- where an answer ends ---


class Script(nn.Module):
    """In the place of the output head: says what each row is to say, token by token."""

    def __init__(self, rows: Sequence[Sequence[int]], vocab: int) -> None:
        super().__init__()
        self.rows, self.vocab, self.said = rows, vocab, 0

    def forward(self, hidden: Tensor) -> Tensor:
        logits = torch.zeros(len(self.rows), 1, self.vocab)
        for row, tokens in enumerate(self.rows):
            logits[row, 0, tokens[self.said]] = 1
        self.said += 1
        return logits


@pytest.fixture
def say(generator: Generator):
    """Have the model say these tokens; returns its answers, and how many steps it took."""
    vocab = generator.model.config.vocab_size

    def run(*rows: str) -> tuple[list[str], int]:
        tokens = [generator.tokenizer.convert_tokens_to_ids(row.split()) for row in rows]
        assert all(token is not None for row in tokens for token in row)
        script = Script(tokens, vocab)
        prompts = [words(3 + row) for row in range(len(rows))]
        with mock.patch.object(generator.model, "lm_head", script):
            return generator.answer(prompts, quiet=True), script.said

    return run


@pytest.mark.parametrize("stop", ["<|end|>", "<|endoftext|>"])
def test_an_answer_ends_before_a_stop_token(say, stop: str) -> None:
    answers, steps = say(f"a b c {stop} d d d d d d d d")
    assert answers == ["abc"]
    assert steps == 4, "generation must not go on behind the stop token"


def test_each_row_ends_at_its_own_stop_token(say) -> None:
    first = "a <|end|> x x x x x x x x x x"
    answers, steps = say(first, "b b b <|endoftext|> x x x x x x x x", "<|end|> " + "x " * 11)
    assert answers == ["a", "bbb", ""]
    assert steps == 4


def test_the_configurations_own_eos_is_no_end(say, generator: Generator) -> None:
    """Published Phi-3-Vision's config.json names </s>, which some models say first."""
    assert generator.tokenizer.convert_tokens_to_ids("</s>") == generator.model.config.eos_token_id
    answers, _ = say("</s> a b <|end|> x x x x x x x x")
    assert answers == ["</s>ab"]


def test_an_answer_without_an_end_has_the_tokens_that_were_asked_for(say) -> None:
    answers, steps = say("a " * NEW_TOKENS)
    assert answers == ["a" * NEW_TOKENS]
    assert steps == NEW_TOKENS


# --- an answer in pieces ---


def streamed(generator: Generator, ids: Sequence[int]) -> list[str]:
    """The pieces of an answer that consists of these tokens."""
    shown: list[str] = []
    pieces = TextPieces(generator.tokenizer, generator.stop_ids, shown.append)
    pieces.put(torch.tensor([[1, 2, 3]]))
    for token in ids:
        pieces.put(torch.tensor([token]))
    pieces.end()
    pieces.finish(generator._text(list(ids)))
    return shown


def test_a_streamed_answer_is_the_answer(generator: Generator, prompts: list[Prompt]) -> None:
    answers = generator.answer(prompts[:3], quiet=True)
    for prompt, answer in zip(prompts, answers, strict=False):
        shown: list[str] = []
        assert generator.stream(prompt, shown.append) == answer == "".join(shown)
        assert len(shown) > 1


def test_pieces_of_any_tokens_make_the_answer(generator: Generator) -> None:
    """Half of them bytes, valid characters or not; control tokens and white space among them."""
    draw = np.random.default_rng(0)
    byte = generator.tokenizer.convert_tokens_to_ids("<0x00>")
    for _ in range(300):
        ids = draw.integers(0, generator.model.config.vocab_size, 30)
        is_byte = draw.random(30) < 0.5
        ids[is_byte] = byte + draw.integers(0, 256, is_byte.sum())
        shown = streamed(generator, ids.tolist())
        assert "".join(shown) == generator._text(ids.tolist())


def test_a_character_of_several_tokens_is_shown_whole(generator: Generator) -> None:
    names = [f"<0x{byte:02X}>" for byte in "\u00e9\U0001f600".encode()] + ["a", "b"]
    ids = generator.tokenizer.convert_tokens_to_ids(names)
    assert streamed(generator, ids) == ["\u00e9\U0001f600a", "b"]


def test_nothing_is_shown_behind_a_stop_token(generator: Generator) -> None:
    ids = generator.tokenizer.convert_tokens_to_ids(["a", "<|end|>", "b"])
    assert streamed(generator, ids) == ["a"]


def test_a_prompt_without_room_for_an_answer_is_refused(generator: Generator) -> None:
    longest = generator.model.config.max_position_embeddings - NEW_TOKENS
    generator.check(words(longest))
    with pytest.raises(SampleError, match="4,085 tokens and 12 of the answer are more than the"):
        generator.check(words(longest + 1))

"""Greedy decoding with a cache equals computing everything anew at each token.

Below and across the length where the rotary factors change, with images, alone and padded on the
left. Measured worst case of a logit, over all tests here: 5.7e-6.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from phi3v.evaluation.generation import Generator, Prompt
from phi3v.geometry import Grid
from phi3v.model import Phi3VForCausalLM
from phi3v.sample import Canvas
from phi3v.samples.tiny import CLIP_MEAN, CLIP_STD, TinySizes, make_tiny_model
from phi3v.views import ViewSettings
from tests.model.tiny import LIMIT, SIZES, TOKENIZER, Drawn, draw, make_model

NEAR = 5e-5
ONE, WIDE, SQUARE = Grid(1, 1), Grid(1, 3), Grid(2, 2)  # 13, 21 and 27 tokens
STEPS = 8


@pytest.fixture(scope="module", params=["positions", "keys"])
def model(request: pytest.FixtureRequest) -> Phi3VForCausalLM:
    return make_model(rope_length=request.param, num_key_value_heads=2)


def decode(
    model: Phi3VForCausalLM, inputs: dict[str, Tensor], **options: Any
) -> tuple[Tensor, Tensor]:
    """New tokens (B, steps) and their logits (B, steps, V), by generate()."""
    out = model.generate(
        **inputs,
        max_new_tokens=STEPS,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    new = out.sequences[:, inputs["input_ids"].shape[1] :]
    return new, torch.stack(out.logits, dim=1)


@torch.no_grad()
def recompute(model: Phi3VForCausalLM, sample: Drawn) -> tuple[Tensor, Tensor]:
    """The same of one unpadded prompt, by the forward call alone: no cache, no generate()."""
    inputs, logits = sample.inputs, []
    for _ in range(STEPS):
        logits.append(model(**inputs).logits[:, -1])
        ids = torch.cat([inputs["input_ids"], logits[-1].argmax(-1, keepdim=True)], dim=1)
        inputs = inputs | {"input_ids": ids}
    return inputs["input_ids"][:, -STEPS:], torch.stack(logits, dim=1)


def padded(samples: list[Drawn], width: int) -> dict[str, Tensor]:
    """Prompts stacked, padded on the left with token 0 to a width."""
    inputs: dict[str, Tensor] = {
        "input_ids": torch.zeros(len(samples), width, dtype=torch.int64),
        "attention_mask": torch.zeros(len(samples), width, dtype=torch.int64),
    }
    for row, sample in enumerate(samples):
        inputs["input_ids"][row, width - sample.tokens :] = sample.ids[0]
        inputs["attention_mask"][row, width - sample.tokens :] = 1
    with_images = [sample.inputs for sample in samples if sample.grids]
    if with_images:
        for name in ("pixel_values", "image_sizes"):
            inputs[name] = torch.cat([each[name] for each in with_images])
    return inputs


def assert_same(ours: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(ours[0], expected[0])
    assert (ours[1] - expected[1]).abs().max() < NEAR


CROSSING = {  # prompts of at most LIMIT tokens, whose answers go beyond it
    "text": (LIMIT - 3, ()),
    "one image": (LIMIT - 31, (SQUARE,)),
    "two images": (13, (SQUARE, WIDE)),
    "the first new token crosses": (LIMIT, ()),
}


@pytest.mark.parametrize("prompt", CROSSING)
def test_decoding_across_the_limit_equals_recomputation(
    model: Phi3VForCausalLM, prompt: str
) -> None:
    text, grids = CROSSING[prompt]
    sample = draw(3, text, grids)
    assert sample.tokens <= LIMIT < sample.tokens + STEPS
    assert_same(decode(model, sample.inputs), recompute(model, sample))


@pytest.mark.parametrize("tokens", [20, LIMIT - STEPS, LIMIT + 1, LIMIT + 40])
def test_decoding_on_one_side_of_the_limit_equals_recomputation(
    model: Phi3VForCausalLM, tokens: int
) -> None:
    sample = draw(4, tokens)
    assert_same(decode(model, sample.inputs), recompute(model, sample))


def test_decoding_without_a_cache_equals_decoding_with_it(model: Phi3VForCausalLM) -> None:
    inputs = draw(3, LIMIT - 31, (SQUARE,)).inputs
    assert_same(decode(model, inputs, use_cache=False), decode(model, inputs))


@pytest.mark.parametrize("prompt", CROSSING)
def test_padding_on_the_left_changes_nothing_across_the_limit(prompt: str) -> None:
    """By v3's rule, which counts positions; v3.5's counts the padding, so it crosses earlier."""
    model, (text, grids) = make_model(), CROSSING[prompt]
    sample = draw(3, text, grids)
    inputs = padded([sample], sample.tokens + 9)
    assert_same(decode(model, inputs), recompute(model, sample))


BATCH = [(20, ()), (7, (ONE,)), (5, (WIDE, ONE)), (30, ()), (2, (SQUARE,))]


def test_a_batch_padded_on_the_left_is_answered_row_by_row(model: Phi3VForCausalLM) -> None:
    samples = [draw(seed, text, grids) for seed, (text, grids) in enumerate(BATCH)]
    width = max(sample.tokens for sample in samples)
    assert width + STEPS <= LIMIT
    tokens, logits = decode(model, padded(samples, width))
    for row, sample in enumerate(samples):
        ours = tokens[row : row + 1], logits[row : row + 1]
        assert_same(ours, recompute(model, sample))
        assert_same(ours, decode(model, sample.inputs))


def test_a_batch_padded_on_the_right_is_answered_as_one_padded_on_the_left(
    model: Phi3VForCausalLM,
) -> None:
    samples = [draw(seed, text, grids) for seed, (text, grids) in enumerate(BATCH)]
    width = max(sample.tokens for sample in samples)
    left = padded(samples, width)
    right = dict(left)
    for name in ("input_ids", "attention_mask"):
        rows = [row.roll(s.tokens - width) for row, s in zip(left[name], samples, strict=True)]
        right[name] = torch.stack(rows)
    assert not right["attention_mask"][:, -1].all()
    assert_same(decode(model, right), decode(model, left))
    given = right["input_ids"].clone()
    sequences = model.generate(**right, max_new_tokens=1, do_sample=False)
    assert torch.equal(sequences[:, :width], given), "the prompts come back as they were given"
    assert torch.equal(right["input_ids"], given), "inputs are not edited"


def test_a_model_folder_stops_at_what_its_tokenizer_ends_answers_with(tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "tiny", ["one two"], TinySizes(text_pieces=20))
    (tmp_path / "tiny/generation_config.json").write_text('{"eos_token_id": 2}')
    model = Phi3VForCausalLM.from_pretrained(tmp_path / "tiny")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path / "tiny")
    ends = tokenizer.convert_tokens_to_ids(["<|end|>", "<|endoftext|>"])
    assert model.generation_config.eos_token_id == ends
    for end in ends:
        with torch.no_grad():
            model.lm_head.weight.zero_()
            model.lm_head.weight[end] = 1000 * model.model.norm.weight
        hidden = model.model(input_ids=torch.tensor([[5]])).last_hidden_state
        if (hidden @ model.lm_head.weight[end]).item() < 0:
            with torch.no_grad():
                model.lm_head.weight[end] *= -1
        out = model.generate(input_ids=torch.tensor([[5]]), max_new_tokens=5, do_sample=False)
        assert out[0].tolist() == [5, end]


def test_a_batch_beyond_the_limit_is_answered_row_by_row() -> None:
    """All rows by the long factors: there is nothing to choose."""
    model = make_model()
    samples = [draw(0, LIMIT + 9), draw(1, LIMIT - 20, (SQUARE,)), draw(2, 50, (WIDE,))]
    assert all(sample.tokens > LIMIT for sample in samples)
    tokens, logits = decode(model, padded(samples, max(sample.tokens for sample in samples)))
    for row, sample in enumerate(samples):
        assert_same((tokens[row : row + 1], logits[row : row + 1]), recompute(model, sample))


@pytest.mark.parametrize("first", [20, LIMIT - 10])
@pytest.mark.parametrize("more", [5, 30])
def test_going_on_with_a_cache_equals_starting_anew(
    model: Phi3VForCausalLM, first: int, more: int
) -> None:
    """A second question on the cache of the first, several tokens at once."""
    start = model.generate(
        draw(5, first).ids, max_new_tokens=3, do_sample=False, return_dict_in_generate=True
    )
    ids = torch.cat([start.sequences, draw(6, more).ids], dim=1)
    ours = decode(model, {"input_ids": ids}, past_key_values=start.past_key_values)
    assert_same(ours, decode(model, {"input_ids": ids}))


def prompt_of(seed: int, text: int, grids: tuple[Grid, ...]) -> Prompt:
    """Random ids, and canvases of noise."""
    noise, size = np.random.default_rng(seed), SIZES.image_size
    shapes = [(grid.rows * size, grid.cols * size, 3) for grid in grids]
    canvases = [noise.integers(0, 256, shape, dtype=np.uint8) for shape in shapes]
    ids = draw(seed, text, grids).ids[0].numpy()
    return Prompt(ids, tuple(Canvas(pixels) for pixels in canvases))


def test_no_answer_depends_on_the_rows_of_its_batch(model: Phi3VForCausalLM) -> None:
    """Prompts that may cross the limit, or are beyond it, are answered alone."""
    asked = BATCH + list(CROSSING.values()) + [(LIMIT + 20, ()), (55, (ONE,))]
    prompts = [prompt_of(seed, text, grids) for seed, (text, grids) in enumerate(asked)]
    views = ViewSettings(SIZES.image_size, CLIP_MEAN, CLIP_STD)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=TOKENIZER)
    together, alone = (
        Generator(model, tokenizer, views, max_new_tokens=STEPS, batch_rows=rows)
        for rows in (len(prompts), 1)
    )
    answers = together.answer(prompts, quiet=True)
    assert len(set(answers)) > len(answers) // 2
    assert answers == alone.answer(prompts, quiet=True)
    assert answers == [alone.answer([prompt], quiet=True)[0] for prompt in prompts]

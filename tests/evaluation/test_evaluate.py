"""Scores, loss and blind control of held-out rows, on one rank and shared among several."""

import re
from collections import Counter
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from phi3v.config.running import EvalSection
from phi3v.data import Dataset
from phi3v.data.batch import collate, model_inputs
from phi3v.errors import ConfigError, ShardError
from phi3v.evaluation.evaluate import (
    Evaluation,
    Interrupted,
    blind_prompt,
    evaluate,
    exchange,
    open_held_out,
    prompt_of,
)
from phi3v.evaluation.generation import Generator
from phi3v.evaluation.models import open_model
from phi3v.geometry import grid_of, image_tokens
from phi3v.prepare import prepare
from phi3v.sample import Sample, with_images
from tests.tiny import product_recipe

PATTERN = "Product: {title}, Category: {category}, Full Price: {price:float}"
METRICS = ("exact_match", "parse_rate", "title_exact_match", "title_exact_match_unseen")
SETTINGS = EvalSection(rows=7, metrics=METRICS, pattern=PATTERN, max_new_tokens=8, batch_rows=3)
CROP, SIDE = 56, 2  # pixels and merged patches of the tiny model's views
# Measured: 4e-7 between summing a sample's losses alone and in one pack.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def generator(tiny_model: Path) -> Generator:
    return open_model(tiny_model, SETTINGS.max_new_tokens, SETTINGS.batch_rows)


@pytest.fixture(scope="module")
def held_out(tiny_shards: Path) -> Dataset:
    return Dataset(tiny_shards, "validation")


@pytest.fixture(scope="module")
def shapes(tiny_shards: Path) -> list[Sample]:
    """A sample of each size of canvas that the catalogue has."""
    found = {sample.images[0].size: sample for sample in Dataset(tiny_shards, "train")}
    assert len(found) > 1
    return list(found.values())


@pytest.fixture(scope="module")
def evaluation(generator: Generator, tiny_shards: Path) -> Evaluation:
    return evaluate(generator, [str(tiny_shards)], SETTINGS)


def on_ranks(
    generator: Generator, shards: Path, settings: EvalSection, ranks: int
) -> list[Evaluation]:
    """What each of several ranks returns: each is run to the point where it gathers, then all."""
    shares: list[Any] = []

    class Gathering(Exception):
        pass

    def hand_in(share: Any) -> list[Any]:
        shares.append(share)
        raise Gathering

    for rank in range(ranks):
        with pytest.raises(Gathering):
            evaluate(generator, [str(shards)], settings, rank, ranks, hand_in)
    return [
        evaluate(generator, [str(shards)], settings, rank, ranks, lambda _: shares)
        for rank in range(ranks)
    ]


# --- the blind control ---


@given(st.lists(st.integers(0, 3), max_size=30))
def test_pictures_are_exchanged_among_rows_with_as_many(image_counts: list[int]) -> None:
    partners = exchange(image_counts)
    sizes = Counter(image_counts)
    for row, (count, partner) in enumerate(zip(image_counts, partners, strict=True)):
        if count == 0 or sizes[count] == 1:
            assert partner is None
        else:
            assert partner is not None and partner != row
            assert image_counts[partner] == count
    given_away = [partner for partner in partners if partner is not None]
    assert len(given_away) == len(set(given_away)), "each row's pictures are shown once"


def test_a_blind_prompt_is_the_question_about_another_canvas(shapes: list[Sample]) -> None:
    """Pictures of other shapes fill other numbers of positions; the words stay as they are."""
    for sample, donor in product(shapes, shapes):
        prompt = blind_prompt(sample, donor, CROP, SIDE)
        words = sample.prompt_ids[sample.prompt_ids >= 0]
        assert np.array_equal(prompt.ids[prompt.ids >= 0], words)
        assert (prompt.ids == -1).sum() == image_tokens(grid_of(*donor.images[0].size, CROP), SIDE)
        assert prompt.images == donor.images
        assert prompt.ids.dtype == sample.prompt_ids.dtype


def test_each_of_several_pictures_gets_its_own_number_of_positions(shapes: list[Sample]) -> None:
    ids = np.array([1, 7, -1, -1, 1, 8, -2, 1, 9], dtype=np.int32)
    images = (*shapes[0].images, *shapes[1].images)
    first, second = (image_tokens(grid_of(*image.size, CROP), SIDE) for image in images)
    assert first != second
    found = with_images(ids, images, CROP, SIDE)
    assert found.tolist() == [1, 7, *[-1] * first, 1, 8, *[-2] * second, 1, 9]


def test_a_prompt_has_the_pictures_of_its_own_turns(held_out: Dataset) -> None:
    sample = held_out[0]
    asked = prompt_of(sample)
    assert np.array_equal(asked.ids, sample.input_ids[: sample.meta["prompt_length"]])
    assert len(asked.images) == 1
    late = Sample(
        sample.id,
        np.concatenate([asked.ids, [5], -2 * np.ones(9, np.int32)]).astype(np.int32),
        sample.labels,
        sample.images * 2,
        sample.meta,
    )
    assert len(prompt_of(late).images) == 1, "a picture behind the prompt is not shown"


def test_blind_answers_are_those_to_the_partners_picture(
    generator: Generator, evaluation: Evaluation
) -> None:
    data, outcomes = evaluation.dataset, evaluation.outcomes
    partners = exchange([1] * len(outcomes))
    for outcome, partner in zip(outcomes, partners, strict=True):
        assert partner is not None
        donor = data[outcomes[partner].row]
        prompt = blind_prompt(data[outcome.row], donor, CROP, SIDE)
        assert generator.answer([prompt], quiet=True) == [outcome.blind]
        seen = generator.answer([prompt_of(data[outcome.row])], quiet=True)
        assert seen == [outcome.prediction]


def test_rows_without_pictures_have_no_blind_answer(
    generator: Generator, mixed_shards: Path
) -> None:
    settings = EvalSection(split="train", rows=8, max_new_tokens=4)
    found = evaluate(generator, [str(mixed_shards)], settings)
    for outcome in found.outcomes:
        assert (outcome.blind is None) == (not found.dataset[outcome.row].images)
    assert 0 < found.scores["blind_exact_match"].n < 8 == found.scores["exact_match"].n


def test_without_the_blind_control_nothing_is_asked_twice(
    generator: Generator, tiny_shards: Path, evaluation: Evaluation
) -> None:
    found = evaluate(generator, [str(tiny_shards)], replace(SETTINGS, blind=False))
    assert all(outcome.blind is None for outcome in found.outcomes)
    seen = {k: v for k, v in evaluation.scores.items() if not k.startswith("blind_")}
    assert found.scores == seen


# --- the whole ---


def test_two_ranks_find_what_one_finds(
    generator: Generator, tiny_shards: Path, evaluation: Evaluation
) -> None:
    for found in on_ranks(generator, tiny_shards, SETTINGS, 2):
        assert found.outcomes == evaluation.outcomes
        assert found.scores == evaluation.scores
        assert found.loss == pytest.approx(evaluation.loss, rel=1e-12)  # the sum's order differs


def test_a_rank_may_be_without_rows(generator: Generator, tiny_shards: Path) -> None:
    settings = replace(SETTINGS, rows=1)
    alone = evaluate(generator, [str(tiny_shards)], settings)
    assert [len(e.outcomes) for e in on_ranks(generator, tiny_shards, settings, 2)] == [1, 1]
    assert on_ranks(generator, tiny_shards, settings, 2)[1].scores == alone.scores


def test_a_rank_that_is_told_to_stop_ends_the_evaluation_of_all(
    generator: Generator, tiny_shards: Path, evaluation: Evaluation
) -> None:
    """At its next batch; the others hear of it where they would have gathered."""
    batches: list[int] = []

    def tick() -> None:
        batches.append(len(batches))
        if len(batches) == 2:
            raise Interrupted

    shares: list[Any] = []

    def gather(share: Any) -> list[Any]:
        shares.append(share)
        return [share, ([], 0.0)]

    stopped = replace(generator, tick=tick, batch_rows=2)
    with pytest.raises(Interrupted):
        evaluate(stopped, [str(tiny_shards)], SETTINGS, 0, 2, gather)
    assert shares == [None] and len(batches) == 2
    share = (evaluation.outcomes, np.array([1.0, 1.0]))
    with pytest.raises(Interrupted):
        evaluate(generator, [str(tiny_shards)], SETTINGS, 1, 2, lambda _: [None, share])


def test_rows_are_spread_over_the_split(evaluation: Evaluation, held_out: Dataset) -> None:
    rows = [outcome.row for outcome in evaluation.outcomes]
    assert rows == sorted(set(rows)) and len(rows) == 7
    assert (rows[0], rows[-1]) == (0, len(held_out) - 1)
    for outcome in evaluation.outcomes:
        sample = held_out[outcome.row]
        assert (outcome.id, outcome.reference) == (sample.id, sample.meta["reference"])


def test_more_rows_than_there_are_means_all(generator: Generator, tiny_shards: Path) -> None:
    settings = EvalSection(rows=10_000, blind=False, max_new_tokens=1)
    found = evaluate(generator, [str(tiny_shards)], settings)
    assert [outcome.row for outcome in found.outcomes] == list(range(len(found.dataset)))


def test_the_loss_is_the_mean_over_the_trained_tokens_of_all_rows(
    generator: Generator, evaluation: Evaluation
) -> None:
    data = evaluation.dataset
    pack = collate([data[outcome.row] for outcome in evaluation.outcomes])
    with torch.inference_mode():
        total = generator.model(**model_inputs(pack, data.view_settings, torch.device("cpu")))
    assert evaluation.loss == pytest.approx(float(total) / pack.label_tokens, abs=TOLERANCE)


def test_unseen_metrics_count_the_rows_whose_value_is_new(
    evaluation: Evaluation, tiny_shards: Path
) -> None:
    def title(reference: str) -> str:
        found = re.fullmatch(r"Product: (.*), Category: .*, Full Price: .*", reference)
        assert found is not None
        return found[1]

    old = {title(sample.meta["reference"]) for sample in Dataset(tiny_shards, "train")}
    new = [o for o in evaluation.outcomes if title(o.reference) not in old]
    assert 0 < len(new) < len(evaluation.outcomes)
    assert evaluation.scores["title_exact_match_unseen"].n == len(new)
    assert evaluation.scores["blind_title_exact_match_unseen"].n == len(new)
    assert evaluation.scores["title_exact_match"].n == len(evaluation.outcomes)


def test_scores_are_those_of_the_metrics_with_their_blind_controls(
    evaluation: Evaluation,
) -> None:
    assert list(evaluation.scores) == [*METRICS, *(f"blind_{name}" for name in METRICS)]


def test_a_question_is_shown_in_words(evaluation: Evaluation) -> None:
    assert {outcome.prompt for outcome in evaluation.outcomes} == {
        "<s><|user|> \n<|image|><s> \nWhat is shown in this image?<|end|> \n<|assistant|>"
    }


def test_examples_are_the_first_rows_with_their_pictures(evaluation: Evaluation) -> None:
    right = replace(evaluation.outcomes[1], prediction=evaluation.outcomes[1].reference)
    edited = replace(evaluation, outcomes=[evaluation.outcomes[0], right, *evaluation.outcomes[2:]])
    assert len(edited.examples()) == 7
    shown = edited.examples(3)
    assert [example.is_right for example in shown] == [False, True, False]
    for example, outcome in zip(shown, edited.outcomes, strict=False):
        canvas = edited.dataset[outcome.row].images[0]
        assert example.image is not None and np.array_equal(example.image, canvas.pixels)
        for name in ("prompt", "reference", "prediction", "blind"):
            assert getattr(example, name) == getattr(outcome, name)


def test_an_example_without_a_picture_has_none(generator: Generator, mixed_shards: Path) -> None:
    settings = EvalSection(split="train", rows=8, max_new_tokens=1, blind=False)
    shown = evaluate(generator, [str(mixed_shards)], settings).examples()
    assert {example.image is None for example in shown} == {True, False}


# --- what cannot be evaluated ---


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rows": 0}, "eval.rows is 0, so there is nothing to evaluate; set it above 0"),
        ({"metrics": ("bleu",)}, "eval.metrics has 'bleu', but without a pattern the known names"),
        (
            {"metrics": ("a_mape",), "pattern": "{a}"},
            "eval.metrics has 'a_mape', which the pattern",
        ),
        ({"pattern": "no field"}, "eval.pattern 'no field' has no field; "),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_is_asked(
    tiny_shards: Path, values: dict[str, Any], message: str
) -> None:
    for attempt in (open_held_out, lambda *a: evaluate(None, *a)):  # no model is needed to refuse
        with pytest.raises(ConfigError) as caught:
            attempt([str(tiny_shards)], EvalSection(**values))
        assert str(caught.value).startswith(message)


def test_an_empty_split_is_refused(catalogue: Path, tiny_model: Path, tmp_path: Path) -> None:
    recipe = product_recipe(catalogue, tiny_model, tmp_path / "shards", split={"validation": 1e-12})
    prepare(recipe)
    with pytest.raises(ConfigError) as caught:
        open_held_out([str(tmp_path / "shards")], EvalSection())
    assert str(caught.value) == (
        f"{tmp_path / 'shards'} has no rows in split 'validation'; prepare it with a larger "
        "split.validation, or set eval.rows=0"
    )


def test_an_unknown_split_is_refused(tiny_shards: Path) -> None:
    with pytest.raises(ShardError, match="has no split 'test', it has: train, validation; "):
        open_held_out([str(tiny_shards)], EvalSection(split="test"))

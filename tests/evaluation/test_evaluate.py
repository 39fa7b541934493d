"""Scores, loss and blind control of held-out rows, on one rank and shared among several."""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import pytest
import torch

from phi3v.config.running import EvalSection
from phi3v.data import Dataset
from phi3v.data.batch import collate, model_inputs
from phi3v.evaluation import losses
from phi3v.evaluation.evaluate import (
    Evaluation,
    Interrupted,
    _tell_doubtful,
    evaluate,
    limit_owner,
)
from phi3v.evaluation.generation import Generator
from phi3v.evaluation.held_out import blind_prompt, prompt_of
from phi3v.evaluation.models import open_model
from phi3v.evaluation.outcomes import Job
from tests.evaluation.knowing import knowing
from tests.tiny import write_samples

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
def evaluation(generator: Generator, tiny_shards: Path) -> Evaluation:
    return evaluate(generator, [str(tiny_shards)], SETTINGS)


def on_ranks(
    generator: Generator, shards: Path, settings: EvalSection, ranks: int, name: str = ""
) -> list[Evaluation]:
    """What each of several ranks returns: threads, which meet where they gather."""
    shares: list[Any] = [None] * ranks
    barrier = Barrier(ranks)

    def run(rank: int) -> Evaluation:
        def gather(share: Any) -> list[Any]:
            shares[rank] = json.loads(json.dumps(share))  # as between processes
            barrier.wait(60)
            return list(shares)

        return evaluate(generator, [str(shards)], settings, rank, ranks, gather, name)

    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(run, range(ranks)))


# --- the blind control ---


def test_blind_answers_are_those_to_the_partners_picture(
    generator: Generator, evaluation: Evaluation
) -> None:
    data, outcomes = evaluation.dataset, evaluation.outcomes
    asked = {outcome.row for outcome in outcomes}
    for outcome in outcomes:
        assert outcome.donor is not None and outcome.donor in asked
        donor = data[outcome.donor]
        assert outcome.donor_reference == donor.meta["reference"]
        assert not np.array_equal(donor.images[0].pixels, data[outcome.row].images[0].pixels)
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


@pytest.mark.parametrize("ranks", [2, 3])
def test_any_number_of_ranks_finds_the_same(
    generator: Generator,
    tiny_shards: Path,
    evaluation: Evaluation,
    ranks: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(losses, "PACK_TOKENS", 250)
    assert 4 <= len(losses.cut_packs(evaluation.dataset, None)) < len(evaluation.dataset)
    alone = losses.mean_loss(losses.sum_losses(Job(generator, evaluation.dataset, SETTINGS), None))
    for found in on_ranks(generator, tiny_shards, SETTINGS, ranks):
        assert found.outcomes == evaluation.outcomes
        assert found.scores == evaluation.scores
        assert (found.loss, found.loss_rows) == (alone, len(found.dataset))


def test_a_rank_may_have_only_text_or_nothing_at_all(
    generator: Generator, mixed_shards: Path
) -> None:
    settings = EvalSection(split="train", rows=2, max_new_tokens=4)
    alone = evaluate(generator, [str(mixed_shards)], settings)
    assert [len(alone.dataset[o.row].images) for o in alone.outcomes] == [1, 0]
    for found in on_ranks(generator, mixed_shards, settings, 3):
        assert (found.outcomes, found.scores) == (alone.outcomes, alone.scores)
        assert found.loss == alone.loss


def test_a_rank_that_is_told_to_stop_ends_the_evaluation_of_all(
    generator: Generator, tiny_shards: Path
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
        return [share, [[], []]]

    stopped = replace(generator, tick=tick, batch_rows=2)
    with pytest.raises(Interrupted):
        evaluate(stopped, [str(tiny_shards)], SETTINGS, 0, 2, gather)
    assert shares == [None] and len(batches) == 2
    with pytest.raises(Interrupted):
        evaluate(generator, [str(tiny_shards)], SETTINGS, 1, 2, lambda share: [None, share])


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


@pytest.mark.parametrize("loss_rows", [None, 5])
def test_the_loss_is_the_mean_over_the_trained_tokens_of_the_split(
    generator: Generator, evaluation: Evaluation, tiny_shards: Path, loss_rows: int | None
) -> None:
    data = evaluation.dataset
    if loss_rows is not None:
        settings = EvalSection(rows=1, loss_rows=loss_rows, blind=False, max_new_tokens=1)
        evaluation = evaluate(generator, [str(tiny_shards)], settings)
    rows = np.linspace(0, len(data) - 1, loss_rows or len(data)).round().astype(int)
    pack = collate([data[int(row)] for row in rows])
    with torch.inference_mode():
        total = generator.model(**model_inputs(pack, data.view_settings, torch.device("cpu")))
    assert evaluation.loss == pytest.approx(float(total) / pack.label_tokens, abs=TOLERANCE)
    assert evaluation.loss_rows == len(rows)


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
    assert list(evaluation.scores) == [
        prefix + name for prefix in ("", "blind_", "constant_") for name in METRICS
    ]


def test_a_question_is_shown_in_words(evaluation: Evaluation) -> None:
    assert {outcome.prompt for outcome in evaluation.outcomes} == {
        "<s><|user|> \n<|image|><s> \nWhat is shown in this image?<|end|> \n<|assistant|>"
    }


def test_each_row_has_its_own_scores_and_the_worst_are_shown_first(
    generator: Generator, tiny_shards: Path, held_out: Dataset
) -> None:
    settings = replace(SETTINGS, metrics=("parse_rate", "price_mape", "exact_match"))
    right = [held_out[0], held_out[6]]
    found = evaluate(knowing(generator, right), [str(tiny_shards)], settings)
    good = [outcome.row for outcome in found.outcomes if outcome.is_right]
    assert good and len(good) < len(found.outcomes)
    for outcome in found.outcomes:
        is_good = float(outcome.row in good)
        own = {"parse_rate": is_good, "price_mape": 1 - is_good, "exact_match": is_good}
        assert outcome.scores == own
    shown = found.examples()
    assert [example.is_right for example in shown] == [False] * (7 - len(good)) + [True] * len(good)
    order = sorted(found.outcomes, key=lambda outcome: (outcome.row in good, outcome.row))
    for example, outcome in zip(shown, order, strict=True):
        canvas = held_out[outcome.row].images[0]
        assert example.image is not None and np.array_equal(example.image, canvas.pixels)
        for name in ("id", "prompt", "reference", "prediction", "blind", "scores"):
            assert getattr(example, name) == getattr(outcome, name)
    assert [example.id for example in found.examples(3)] == [o.id for o in order[:3]]


def test_the_worst_have_the_largest_error_and_rows_without_a_value_come_last(
    evaluation: Evaluation,
) -> None:
    values = (0.5, None, 2.0, 1.0)
    outcomes = [
        replace(outcome, scores={"price_mae": value, "exact_match": 0.0})
        for outcome, value in zip(evaluation.outcomes, values, strict=False)
    ]
    shown = replace(evaluation, outcomes=outcomes).examples()
    assert [example.scores["price_mae"] for example in shown] == [2.0, 1.0, 0.5, None]


def test_any_accepted_answer_of_a_row_is_right(
    generator: Generator, mixed_shards: Path, tmp_path: Path
) -> None:
    text = [s for s in Dataset(mixed_shards, "train") if not s.images][:2]
    known = [replace(s, meta=s.meta | {"references": ["no", s.meta["reference"]]}) for s in text]
    write_samples(tmp_path, known, "validation")
    found = evaluate(knowing(generator, text[:1]), [str(tmp_path)], EvalSection())
    assert [outcome.references for outcome in found.outcomes] == [
        tuple(sample.meta["references"]) for sample in known
    ]
    assert [outcome.is_right for outcome in found.outcomes] == [True, False]
    assert found.scores["exact_match"].value == 0.5


def test_teacher_forced_answers_are_made_only_for_their_metric(
    generator: Generator, tiny_shards: Path, evaluation: Evaluation
) -> None:
    assert all(outcome.teacher_forced is None for outcome in evaluation.outcomes)
    names = ("teacher_forced_price_error",)
    settings = replace(SETTINGS, rows=2, metrics=names)
    found = evaluate(generator, [str(tiny_shards)], settings)
    assert all(outcome.teacher_forced for outcome in found.outcomes)
    assert found.scores["teacher_forced_price_error"].n == 2
    assert "blind_teacher_forced_price_error" not in found.scores, "it is not asked blind"


# --- the time box ---


def test_when_the_time_is_up_no_further_batch_begins(
    generator: Generator,
    tiny_shards: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each rank does its first pack and its first batch, and the rest is counted and said."""
    monkeypatch.setattr(losses, "PACK_TOKENS", 250)
    settings = replace(SETTINGS, max_seconds=1e-9, batch_rows=2)
    for found in on_ranks(generator, tiny_shards, settings, 2, "run (its own)"):
        assert (len(found.outcomes), found.unanswered) == (4, 3)
        assert all(outcome.blind is not None for outcome in found.outcomes)
        assert {score.n for name, score in found.scores.items() if "unseen" not in name} == {4}
        assert 0 < found.loss_rows < len(found.dataset)
    said = [line for line in capsys.readouterr().err.splitlines() if "max_seconds" in line]
    assert said == [
        "run (its own): eval.max_seconds=1e-09 ended the evaluation: 4 of 7 rows are answered, "
        f"the loss is over {found.loss_rows} of 14; raise it, or lower eval.rows and eval.loss_rows"
    ]


def test_whose_time_limit_it_is_can_be_said() -> None:
    assert limit_owner(["runs/a", "runs/b"], ["eval.rows=4"]) == "runs/a"
    assert limit_owner(["runs/a"], ["eval.max_seconds=1"]) == "the command line"
    assert limit_owner([], []) == "the command line"


def test_time_enough_changes_nothing(
    generator: Generator,
    tiny_shards: Path,
    evaluation: Evaluation,
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = evaluate(generator, [str(tiny_shards)], replace(SETTINGS, max_seconds=1e4))
    assert replace(found, dataset=evaluation.dataset) == evaluation
    assert "max_seconds" not in capsys.readouterr().err


def test_an_example_without_a_picture_has_none(generator: Generator, mixed_shards: Path) -> None:
    settings = EvalSection(split="train", rows=8, max_new_tokens=1, blind=False)
    shown = evaluate(generator, [str(mixed_shards)], settings).examples()
    assert {example.image is None for example in shown} == {True, False}


def test_numbers_that_may_be_meant_as_thousands_are_told(
    evaluation: Evaluation, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "Product: Bag, Category: BAGS, Full Price: {}"
    prices = ("1.250", "19.99", "2.400")
    outcomes = [
        replace(outcome, reference=text.format(price))
        for outcome, price in zip(evaluation.outcomes, prices, strict=False)
    ]
    _tell_doubtful(SETTINGS, outcomes)
    assert capsys.readouterr().err == (
        "2 of 3 true answers have a number like 1.250, read as 1.25, for a point begins the "
        "decimals; where it groups thousands, write 1250 in the data\n"
    )
    _tell_doubtful(SETTINGS, outcomes[1:2])
    _tell_doubtful(replace(SETTINGS, pattern=None, metrics=("exact_match",)), outcomes)
    assert capsys.readouterr().err == ""

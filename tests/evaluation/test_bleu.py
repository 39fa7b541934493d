"""BLEU is sacrebleu's, and its interval needs the rows' counts alone."""

import math

import pytest
from sacrebleu import corpus_bleu, sentence_bleu
from sacrebleu.metrics import BLEU

from phi3v.evaluation.metrics import Answer, compile_pattern, row_scores, score

ANSWERS = [
    Answer("1", "The cat is on the mat.", "the cat sat on the mat."),
    Answer("2", "A red bag of leather, 120 EUR", "A red bag of wool, 120 EUR"),
    Answer("3", "Yes", "Yes"),
    Answer("4", "It is a small blue scarf.", ""),
]


def found(answers: list[Answer]) -> float | None:
    return score(["bleu"], answers, None)["bleu"].value


def test_the_corpus_bleu_is_sacrebleus_by_its_default_signature():
    predictions = [answer.prediction for answer in ANSWERS]
    bleu = BLEU()
    expected = bleu.corpus_score(predictions, [[answer.reference for answer in ANSWERS]])
    assert found(ANSWERS) == pytest.approx(expected.score / 100, rel=1e-12)
    assert str(bleu.get_signature()).startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|")


def test_answers_of_fewer_than_four_words_have_no_corpus_bleu():
    answer = Answer("1", "a red bag", "a red bag")
    assert found([answer]) == corpus_bleu(["a red bag"], [["a red bag"]]).score == 0.0
    assert row_scores(["bleu"], [answer], None)[0]["bleu"] == 1.0


def test_bleu_has_its_hand_worked_value():
    # The cat sat / The cat ran on: 4 words against 3; 2/3, 1/2 and, by smoothing, 1/2 of 1; none of
    # four words, so there is no BLEU of order 4 but a row's own of the orders it has.
    answer = Answer("1", "The cat ran on", "The cat sat")
    expected = math.exp(1 - 4 / 3) * (2 / 3 * 1 / 2 * 1 / 2) ** (1 / 3)
    assert row_scores(["bleu"], [answer], None)[0]["bleu"] == pytest.approx(expected)


def test_all_accepted_answers_count_together():
    answers = [
        Answer("1", "a red bag", "a blue leather bag here", ("a red bag", "the blue leather bag")),
        Answer("2", "one small cat sat", "one small cat sat", ("one small cat sat",)),
    ]
    references = [["a red bag", "one small cat sat"], ["the blue leather bag", None]]
    expected = corpus_bleu([answer.prediction for answer in answers], references)
    assert found(answers) == pytest.approx(expected.score / 100, rel=1e-12)


def test_a_rows_bleu_is_the_sentence_bleu_and_their_mean_is_not_the_corpus_bleu():
    rows = [row["bleu"] for row in row_scores(["bleu"], ANSWERS, None)]
    for row, answer in zip(rows, ANSWERS, strict=True):
        expected = sentence_bleu(answer.prediction, [answer.reference])
        assert row == pytest.approx(expected.score / 100)
    assert rows[2:] == [1.0, 0.0]
    assert abs(sum(rows) / 4 - (found(ANSWERS) or 0)) > 0.05


def test_the_interval_is_of_resampled_corpora():
    right, wrong = ANSWERS[1].reference, "nothing of this"
    half = [Answer(str(n), right, right if n % 2 else wrong) for n in range(200)]
    interval = score(["bleu"], half, None)["bleu"]
    assert interval.low is not None and interval.high is not None and interval.value is not None
    assert 0 < interval.low < interval.value < interval.high < 1
    # Precisions near 160 / 220 words; a share of a half has a standard error of 0.035.
    assert 0.05 < interval.high - interval.low < 0.2
    one = score(["bleu"], ANSWERS[:1], None)["bleu"]
    assert one.low == one.value == one.high and one.n == 1


def test_a_field_named_bleu_is_a_field():
    answers = [Answer("1", "x", "y"), Answer("2", "x", "x")]
    scores = score(["bleu_accuracy"], answers, compile_pattern("{bleu}"))
    assert scores["bleu_accuracy"].value == 0.5

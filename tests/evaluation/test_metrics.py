"""Hand-worked scores, their intervals, and the sentence of every refusal."""

import json
import math

import numpy as np
import pytest

from phi3v.errors import ConfigError
from phi3v.evaluation.metrics import (
    Answer,
    Score,
    compile_pattern,
    find_metrics,
    interval,
    score,
)

TEMPLATE = "Product: {title}, Category: {category}, Full Price: {price:float}"
PATTERN = compile_pattern(TEMPLATE)


def product(title: str, category: str, price: str) -> str:
    return f"Product: {title}, Category: {category}, Full Price: {price}"


ANSWERS = [
    Answer("r1", product("Red Bag", "BAGS", "100.00"), product("Red Bag", "BAGS", "100.00")),
    Answer("r2", product("Blue Bag", "BAGS", "200.00"), product("Blue Bag", "BAGS", "150")),
    Answer("r3", product("Red Scarf", "SCARVES", "50.00"), product("Red Bag", "SCARVES", "100")),
    Answer("r4", product("Tie", "TIES", "1,000.00"), "I cannot say."),
]


def value(name: str, **options) -> float | None:
    return score([name], ANSWERS, PATTERN, **options)[name].value


# --- the metrics, worked by hand on ANSWERS ---


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("exact_match", 1 / 4),  # r1
        ("parse_rate", 3 / 4),  # not r4
        ("category_accuracy", 3 / 4),  # r4 is unparsable, so wrong
        ("title_exact_match", 2 / 4),
        ("price_accuracy", 1 / 4),
        ("price_mape", (0 + 0.25 + 1.0 + 1.0) / 4),  # the last is the unparsable one
        ("price_mae", (0 + 50 + 50 + 1000) / 4),  # which counts as 0
        ("price_log_error", (0 + math.log(4 / 3) + math.log(2) + math.log(10)) / 4),
        # Two titles are right; Red Scarf is 4 edits from Red Bag, and the longer has 9 letters.
        ("title_similarity", (1 + 1 + 5 / 9 + 0) / 4),
    ],
)
def test_each_metric_has_its_hand_worked_value(name, expected):
    assert value(name) == pytest.approx(expected)


def test_unseen_metrics_count_only_rows_whose_value_is_new():
    train = [product("Red Bag", "BAGS", "7"), product("Other", "SCARVES", "1000"), "free text"]
    scores = score(
        ["title_exact_match_unseen", "category_accuracy_unseen", "price_mape_unseen"],
        ANSWERS,
        PATTERN,
        train,
    )
    assert (scores["title_exact_match_unseen"].n, scores["category_accuracy_unseen"].n) == (3, 1)
    assert scores["title_exact_match_unseen"].value == pytest.approx(1 / 3)  # r2 of r2, r3, r4
    assert scores["category_accuracy_unseen"].value == 0.0  # r4 only
    assert scores["price_mape_unseen"].value == pytest.approx((0 + 0.25 + 1.0) / 3)


def test_unseen_exact_match_compares_whole_texts_and_needs_no_pattern():
    train = [f" {ANSWERS[0].reference}\n"]
    scores = score(["exact_match", "exact_match_unseen"], ANSWERS, None, train)
    assert (scores["exact_match"].n, scores["exact_match"].value) == (4, 0.25)
    assert (scores["exact_match_unseen"].n, scores["exact_match_unseen"].value) == (3, 0.0)


def test_a_metric_without_rows_is_null_and_valid_json():
    train = [answer.reference for answer in ANSWERS]
    empty = score(["price_mape_unseen"], ANSWERS, PATTERN, train)["price_mape_unseen"]
    assert empty == Score(None, None, None, 0)
    assert json.loads(json.dumps(empty.as_dict(), allow_nan=False)) == {
        "value": None,
        "low": None,
        "high": None,
        "n": 0,
    }


def test_a_reference_of_zero_has_no_relative_error_and_is_not_counted():
    free = Answer("r5", product("Gift", "BAGS", "0"), product("Gift", "BAGS", "5"))
    mape = score(["price_mape"], [*ANSWERS, free], PATTERN)["price_mape"]
    assert mape.n == 4 and mape.value == pytest.approx(2.25 / 4)


@pytest.mark.parametrize(
    ("truth", "guess", "error"),
    [
        ("100", "50", math.log(2)),
        ("50", "100", math.log(2)),
        ("100", "0", math.log(10)),  # no logarithm
        ("100", "-100", math.log(10)),
        ("100", "1", math.log(100)),  # worse than no number
        ("0", "5", None),
        ("-5", "5", None),
    ],
)
def test_the_log_error_of_what_has_no_logarithm(truth, guess, error):
    answer = Answer("r", product("Bag", "BAGS", truth), product("Bag", "BAGS", guess))
    found = score(["price_log_error"], [answer], PATTERN)["price_log_error"]
    assert (found.value, found.n) == (error and pytest.approx(error), int(error is not None))


def test_a_fields_accuracy_forgives_spelling_that_its_exact_match_does_not():
    said = product("red  BAG.", "BAGS", "1,000.00")
    answer = Answer("r", product("Red Bag", "BAGS", "1000"), said)
    names = ["title_accuracy", "title_exact_match", "price_accuracy", "price_exact_match"]
    found = score(names, [answer], PATTERN)
    assert [found[name].value for name in names] == [1.0, 0.0, 1.0, 1.0]


def test_a_prediction_of_endless_digits_stays_finite():
    wild = Answer("r5", product("Bag", "BAGS", "1"), product("Bag", "BAGS", "9" * 15))
    assert math.isfinite(score(["price_mape"], [wild], PATTERN)["price_mape"].value or math.nan)


# --- the interval ---


def test_the_interval_of_a_rate_is_that_of_the_binomial():
    found = interval([1.0] * 50 + [0.0] * 50)
    # standard error sqrt(0.25 / 100) = 0.05, so about 0.5 -+ 0.098
    assert found.value == 0.5 and found.n == 100
    assert found.low == pytest.approx(0.402, abs=0.02)
    assert found.high == pytest.approx(0.598, abs=0.02)


def test_the_interval_narrows_with_more_rows():
    few, many = interval([0.0, 1.0] * 20), interval([0.0, 1.0] * 2000)
    assert few.high - few.low > 5 * (many.high - many.low)  # sqrt(100) = 10 times in expectation


def test_the_interval_of_equal_values_has_no_width():
    assert interval([0.25] * 8) == Score(0.25, 0.25, 0.25, 8)


@pytest.mark.parametrize("values", [[0.1], [0.1] * 3, [1 / 3] * 7, [0.0]])
def test_one_row_and_equal_rows_have_an_interval_without_width(values):
    found = interval(values)
    assert found.low == found.value == found.high == pytest.approx(values[0])


def test_the_interval_of_a_mean_is_that_of_its_standard_error():
    values = np.random.default_rng(0).normal(5.0, 2.0, size=400)
    found = interval(list(values))
    half = 1.96 * values.std() / 20
    assert found.low == pytest.approx(values.mean() - half, abs=0.15 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.15 * half)


def test_the_interval_depends_on_the_seed_only():
    names = ["price_mape", "exact_match"]
    assert score(names, ANSWERS, PATTERN) == score(names, ANSWERS, PATTERN)
    assert (
        score(names, ANSWERS, PATTERN)["exact_match"]
        == score(names[1:], ANSWERS, PATTERN)["exact_match"]
    )
    values = [0.0, 0.1, 0.5, 0.7, 2.0, 3.1]
    assert interval(values, seed=0) != interval(values, seed=1)


# --- refusals ---


@pytest.mark.parametrize(
    ("name", "pattern", "fault"),
    [
        ("exat_match", None, "which is no metric; did you mean 'exact_match'? (docs/evaluation.md"),
        ("colour", PATTERN, "which is no metric; known are title_accuracy, title_exact_match, "),
        ("colour_accuracy", PATTERN, f"but the pattern '{TEMPLATE}' has no field {{colour}}; "),
        ("titel_accuracy", PATTERN, "did you mean 'title_accuracy'?"),
        ("title_mape", PATTERN, "which needs a number, {title:float}; the pattern 'Product"),
        ("price_similarity", PATTERN, "which needs a text, {price}; the pattern 'Product"),
        ("parse_rate", None, "which reads parts of an answer, but eval.pattern is not set; set"),
        ("category_accuracy_unseen", None, "which reads parts of an answer, but eval.pattern is"),
        ("category_accuracy_unsene", PATTERN, "did you mean 'category_accuracy'?"),
    ],
)
def test_an_unknown_metric_is_refused_with_what_to_write(name, pattern, fault):
    with pytest.raises(ConfigError) as caught:
        find_metrics(["exact_match", name], pattern)
    assert str(caught.value).startswith(f"eval.metrics has '{name}', ")
    assert fault in str(caught.value)


def test_a_reference_that_does_not_fit_is_refused_with_row_text_and_pattern():
    odd = Answer("r9", "A bag.", ANSWERS[0].prediction)
    with pytest.raises(ConfigError) as caught:
        score(["parse_rate"], [*ANSWERS, odd], PATTERN)
    assert "row 'r9': the reference 'A bag.' does not fit the pattern" in str(caught.value)
    assert TEMPLATE in str(caught.value)


def test_no_answers_are_refused():
    with pytest.raises(ConfigError, match="the evaluation split has no rows"):
        score(["exact_match"], [], None)

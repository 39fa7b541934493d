"""Hand-worked scores, their intervals, and the sentence of every refusal."""

import json
import math

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


# --- the pattern ---


def test_a_pattern_knows_its_fields_and_their_types():
    assert PATTERN.fields == {"title": str, "category": str, "price": float}
    assert compile_pattern("{a:str}").fields == {"a": str}


@pytest.mark.parametrize(
    ("text", "price"),
    [("1,250", 1250.0), ("120.50", 120.5), ("-3", -3.0), ("1,234,567.8", 1234567.8)],
)
def test_a_float_field_reads_thousands_and_decimals(text, price):
    assert PATTERN.parse(product("Bag", "BAGS", text)) == {
        "title": "Bag",
        "category": "BAGS",
        "price": price,
    }


@pytest.mark.parametrize("text", ["1,25", "12,", "abc", "", "1.2.3", "1e5", "nan", "9" * 400])
def test_a_text_that_is_no_number_does_not_parse_as_one(text):
    assert PATTERN.parse(product("Bag", "BAGS", text)) is None


def test_a_text_must_fit_as_a_whole_but_for_white_space_around_it():
    whole = product("Bag", "BAGS", "1")
    assert PATTERN.parse(f"\n  {whole} ") is not None
    assert PATTERN.parse(f"{whole} and more") is None
    assert PATTERN.parse(f"Well: {whole}") is None


def test_a_text_field_is_as_short_as_the_rest_allows():
    fields = compile_pattern("{a}, {b}").parse("x, y, z")
    assert fields == {"a": "x", "b": "y, z"}


def test_a_text_field_may_be_empty_or_span_lines():
    pattern = compile_pattern("a: {a}; b: {b}")
    assert pattern.parse("a: ; b: x\ny") == {"a": "", "b": "x\ny"}


def test_other_characters_are_literal_and_doubled_braces_are_braces():
    pattern = compile_pattern("(a|b)* {{{x}}} {{{y:float}")
    assert pattern.parse("(a|b)* {1} {2") == {"x": "1", "y": 2.0}
    assert pattern.parse("a {1} {2") is None


@pytest.mark.parametrize(
    ("template", "fault"),
    [
        ("no field here", "no field"),
        ("{a} and {a}", "{a} twice"),
        ("{a:int}", "unknown type 'int' in {a:int}"),
        ("{a", "unbalanced braces"),
        ("{}", "unknown field {...}"),
        ("{a b}", "unknown field {a b...}"),
        ("{a!r}", "unknown field {a!...}"),
        ("{a}{b}", "no text between {b} and the field before it"),
    ],
)
def test_a_bad_pattern_is_refused_with_its_fault_and_an_example(template, fault):
    with pytest.raises(ConfigError) as caught:
        compile_pattern(template)
    assert f"eval.pattern '{template}' has " in str(caught.value)
    assert fault in str(caught.value)
    assert "for example 'Product: {title}" in str(caught.value)


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


def test_exact_match_ignores_white_space_around_the_text_only():
    answers = [Answer("r1", "a b", " a b\n"), Answer("r2", "a b", "a  b")]
    assert score(["exact_match"], answers, None)["exact_match"].value == 0.5


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


def test_an_unknown_metric_is_refused_with_the_known_names():
    with pytest.raises(ConfigError) as caught:
        score(["colour_accuracy"], ANSWERS, PATTERN)
    message = str(caught.value)
    assert "eval.metrics has 'colour_accuracy'" in message and TEMPLATE in message
    assert "exact_match, parse_rate, title_accuracy, title_exact_match" in message
    assert "price_mape" in message and "title_mape" not in message


def test_a_relative_error_of_a_text_field_is_refused():
    with pytest.raises(ConfigError, match="eval.metrics has 'title_mape'"):
        find_metrics(["title_mape"], PATTERN)


@pytest.mark.parametrize("name", ["parse_rate", "category_accuracy", "category_accuracy_unseen"])
def test_a_metric_that_needs_a_pattern_is_refused_without_one(name):
    with pytest.raises(ConfigError) as caught:
        score([name], ANSWERS, None)
    assert f"eval.metrics has '{name}', but without a pattern" in str(caught.value)
    assert "known names are exact_match (also with _unseen); set eval.pattern" in str(caught.value)


def test_a_reference_that_does_not_fit_is_refused_with_row_text_and_pattern():
    odd = Answer("r9", "A bag.", ANSWERS[0].prediction)
    with pytest.raises(ConfigError) as caught:
        score(["parse_rate"], [*ANSWERS, odd], PATTERN)
    assert "row 'r9': the reference 'A bag.' does not fit the pattern" in str(caught.value)
    assert TEMPLATE in str(caught.value)


def test_no_answers_are_refused():
    with pytest.raises(ConfigError, match="the evaluation split has no rows"):
        score(["exact_match"], [], None)

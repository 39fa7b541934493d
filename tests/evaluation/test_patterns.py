"""What a pattern reads of an answer, and which patterns are refused."""

import pytest

from phi3v.errors import ConfigError
from phi3v.evaluation.metrics import compile_pattern

PATTERN = compile_pattern("Product: {title}, Category: {category}, Full Price: {price:float}")


def product(title: str, category: str, price: str) -> str:
    return f"Product: {title}, Category: {category}, Full Price: {price}"


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


@pytest.mark.parametrize(
    ("price", "doubtful"),
    [
        ("1.250", True),
        ("-999.999", True),
        ("1.25", False),
        ("1250", False),
        ("1,250", False),
        ("1,250.000", False),
        ("1250.125", False),
        ("19.9", False),
    ],
)
def test_a_number_that_may_be_meant_with_a_point_for_thousands_is_known(price, doubtful):
    found = PATTERN.doubtful_number(product("Bag 1.250", "BAGS", price))
    assert found == (price if doubtful else None)


def test_an_answer_that_does_not_fit_has_no_doubtful_number():
    assert PATTERN.doubtful_number("1.250") is None

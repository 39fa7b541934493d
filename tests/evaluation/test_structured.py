"""Answers that are JSON: what is read, when two fields are equal, and the values by hand."""

import re

import pytest

from phi3v.errors import ConfigError
from phi3v.evaluation.metrics import Answer, find_metrics, score
from phi3v.evaluation.metrics.structured import (
    exact_match,
    field_accuracy,
    field_f1,
    parse_rate,
    path_accuracy,
    read_tree,
)

RECEIPT = '{"total": {"net": 5, "tax": 1}, "items": [{"name": "Cap"}, {"name": "Bag"}]}'


@pytest.mark.parametrize(
    "text",
    [
        '{"a": 1}',
        ' [1, "a", null]\n',
        "{}",
        '```json\n{"a": 1}\n```',
        '```\n{"a": 1}\n```\n',
        '```JSON\n{"a":\n1}\n  ```',
    ],
)
def test_an_object_or_a_list_is_read_also_within_a_fence(text: str) -> None:
    assert read_tree(text) is not None and parse_rate(text, "{}") == 1.0


@pytest.mark.parametrize(
    "text",
    [
        "",
        "5",
        '"a"',
        "null",
        "{'a': 1}",
        '{"a": 1,}',
        '{"a": 1} ok',
        'Here: {"a": 1}',
        'Here: ```json\n{"a": 1}\n```',
        '{"a": 1, "a": 1}',
        '{"b": {"a": 1, "a": 2}}',
        '{"a": NaN}',
        "[Infinity]",
        "[-Infinity]",
        "[1e999]",
        "[" + "9" * 5000 + "]",
        "[" * 100_000 + "]" * 100_000,
        '{"a": 1}{"b": 2}',
    ],
)
def test_what_a_reader_of_json_could_take_in_two_ways_or_not_at_all_is_none(text: str) -> None:
    assert read_tree(text) is None
    for metric in (parse_rate, exact_match, field_accuracy, field_f1):
        assert metric(text, '{"a": 1}') == 0.0
    assert path_accuracy(text, '{"a": 1}', "a") == 0.0


@pytest.mark.parametrize(
    ("one", "other", "is_same"),
    [
        ("5", "5.0", True),
        ("5", "0.5e1", True),
        ("0", "-0.0", True),
        ("5", '"5"', False),
        ("5", "5.0000001", False),
        ("1", "true", False),
        ("0", "false", False),
        ("0", "null", False),
        ('""', "null", False),
        ("null", "null", True),
        ('"null"', "null", False),
        ('"Red  Cap."', '" red cap"', True),
        ('"red"', '"reds"', False),
        ("[]", "[]", True),
        ("{}", "{}", True),
        ("[]", "{}", False),
        ("[]", "null", False),
        ("[1, 2]", "[2, 1]", True),
        ("[1, 2, 2]", "[2, 1, 1]", False),
        ("[1]", "1", False),
    ],
)
def test_two_fields_are_equal_by_type_and_value(one: str, other: str, is_same: bool) -> None:
    for said, wanted in ((one, other), (other, one)):
        pair = f'{{"a": {said}}}', f'{{"a": {wanted}}}'
        assert (field_f1(*pair) == 1.0) == is_same
        assert (field_accuracy(*pair) == 1.0) == is_same


@pytest.mark.parametrize(
    ("said", "f1", "accuracy", "exact"),
    [
        (RECEIPT, 1.0, 1.0, 1.0),
        # Of 4 fields: net, tax, two names.
        ('{"total": {"net": 5}}', 2 * 1 / (1 + 4), 1 / 4, 0),
        ('{"total": {"net": 5, "tax": 2, "tip": 0}, "items": [{"name": "bag"}]}', 1 / 2, 1 / 2, 0),
        (RECEIPT.replace("Cap", "?").replace("Bag", "Cap").replace("?", "Bag"), 1, 1, 0),
        (RECEIPT.replace("Cap", "Bag"), 3 / 4, 3 / 4, 0),
        ('{"net": 5, "tax": 1}', 0.0, 0.0, 0.0),
        ('{"total.net": 5}', 0.0, 0.0, 0.0),
        ("{}", 0.0, 0.0, 0.0),
    ],
)
def test_fields_are_counted_by_their_path(
    said: str, f1: float, accuracy: float, exact: float
) -> None:
    assert field_f1(said, RECEIPT) == pytest.approx(f1)
    assert field_accuracy(said, RECEIPT) == pytest.approx(accuracy)
    assert exact_match(said, RECEIPT) == exact


def test_the_exact_match_is_of_letters_and_of_which_belongs_to_which() -> None:
    wanted = '[{"name": "Cap", "price": 5}, {"name": "Bag", "price": 9}]'
    swapped = wanted.replace("5", "7").replace("9", "5").replace("7", "9")
    assert field_f1(swapped, wanted) == 1.0, "fields of a list's items are not paired"
    assert exact_match(swapped, wanted) == 0.0
    assert exact_match(wanted.replace("Cap", "cap"), wanted) == 0.0
    assert exact_match(wanted.replace("Cap", " Cap "), wanted) == 1.0
    assert exact_match('{"b": 1, "a": 2.0}', '{"a": 2, "b": 1}') == 1.0


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("total.net", 1.0),
        ("total.tax", 0.0),
        ("items[].name", 1.0),
        ("total.tip", None),
        ("items", None),
    ],
)
def test_a_field_is_right_or_wrong_where_the_reference_has_it(
    path: str, value: float | None
) -> None:
    said = '{"total": {"net": 5}, "items": [{"name": "bag"}, {"name": "cap"}]}'
    assert path_accuracy(said, RECEIPT, path) == value
    name = f"json.{path}_accuracy"
    found = score([name], [Answer("a", RECEIPT, said)], None)[name]
    assert (found.value, found.n) == (value, int(value is not None))


def test_lists_at_the_root_and_in_lists_have_names_too() -> None:
    tree = read_tree('[{"a": 1}, [2, 3], []]')
    assert tree is not None
    assert {path: values.total() for path, values in tree.paths.items()} == {
        "[].a": 1,
        "[][]": 2,
        "[]": 1,
    }


def test_the_best_of_several_right_answers_counts() -> None:
    answer = Answer("a", '{"a": 1}', '{"a": 2}', ('{"a": 1, "b": 1}', '{"a": 2, "b": 1}'))
    found = score(["json_field_f1", "json.a_accuracy"], [answer], None)
    assert found["json_field_f1"].value == pytest.approx(2 / 3)
    assert found["json.a_accuracy"].value == 1.0


def test_an_unseen_field_is_one_whose_value_no_training_answer_has() -> None:
    answers = [Answer(name, f'{{"a": "{name}"}}', '{"a": "x"}') for name in ("old", "x")]
    names = ["json.a_accuracy_unseen", "json.a_accuracy"]
    found = score(names, answers, None, ['{"b": 1, "a": "OLD"}', "no JSON"])
    assert [(found[name].value, found[name].n) for name in names] == [(1.0, 1), (0.5, 2)]


def test_a_reference_that_is_no_json_is_refused_by_its_row() -> None:
    for reference, references in (("5", ()), ('{"a": 1, "a": 2}', ()), ("{}", ("none",))):
        with pytest.raises(ConfigError, match="row 'r7': the reference '.*' is no object or list"):
            score(["json_parse_rate"], [Answer("r7", reference, "{}", references)], None)


def test_the_names_of_json_metrics_are_known_and_misspelt_ones_refused() -> None:
    (metric,) = find_metrics(["json.a_b.c_accuracy_unseen"], None)
    assert (metric.field, metric.is_json, metric.is_unseen) == ("a_b.c", True, True)
    for name in ("json.a_f1", "json._accuracy", "json_accuracy"):
        with pytest.raises(ConfigError, match=re.escape(f"eval.metrics has '{name}', ")):
            find_metrics([name], None)


def test_a_field_counts_as_often_as_it_is_there() -> None:
    assert field_f1("[1, 1, 1]", "[1, 1, 1]") == 1.0
    assert field_f1("[1]", "[1, 1, 1]") == field_f1("[1, 1, 1]", "[1]") == 2 / 4
    assert field_accuracy("[1, 1, 2]", "[1, 1, 1]") == 2 / 3
    assert field_accuracy("[1, 1, 1]", "[1]") == 1.0, "fields too many cost nothing here"

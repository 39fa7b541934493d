"""A template is filled by columns, whole; what looks like a field of it and is none is refused."""

from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from phi3v.errors import ConfigError, SampleError
from phi3v.prepare import prepare
from phi3v.prepare.rows import ClassName
from phi3v.prepare.templates import fill, find, left_over
from tests.tiny import recipe, write_jsonl

ROW: dict[str, Any] = {
    "title": "Hat",
    "hint": None,
    "choices": ["red", "blue", "green"],
    "answer": 1,
    "letter": "2",
    "label": ClassName("pear", 7),
    "price": Decimal("1250.00"),
    "answers": [{"text": "five"}, {"text": None}, {"text": "5"}],
    "odd?": "mark",
    "odd:commas": "colon",
}


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{choices:letters}", "A. red\nB. blue\nC. green"),
        ("{answer:letter}. {choices[answer]}", "B. blue"),
        ("{letter:letter} {choices[letter]}", "C green"),
        ("{choices:commas}", "red, blue, green"),
        ("{label} {label.id}", "pear 7"),
        ("{price}", "1250.00"),
        ("{title}\nHint: {hint?}\nEnd", "Hat\nEnd"),
        ("{title}{hint?}", "Hat"),
        ("{title}\n({hint?})\nEnd", "Hat\nEnd"),
        ("{title}\nWhich colour? {hint?}", "Hat\nWhich colour?"),
        ("<|image_1|> {hint?}", "<|image_1|>"),
        ("What is it? Hint: {hint?}", "What is it? Hint:"),
        ("{hint?}{title}\n", "Hat\n"),
        ("{title?}", "Hat"),
        ("{odd?} {odd:commas}", "mark colon"),
        ('{"title": "{title}", "sizes": { "a": 1}}', '{"title": "Hat", "sizes": { "a": 1}}'),
    ],
)
def test_fields_become_texts(template: str, text: str) -> None:
    assert left_over(template) is None
    assert fill(template, ROW) == text


def test_all_items_of_a_list_are_found() -> None:
    assert find(ROW, "answers[].text") == ["five", None, "5"]  # the third stays the third
    assert find(ROW, "answers[]") == ROW["answers"]
    assert find(ROW, "title[].text") is None
    assert find(ROW, "answers[].txt") == []


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{title:letters}", "column 'title' is not a list of texts, as :letters needs"),
        ("{answers:commas}", "column 'answers' is not a list of texts, as :commas needs"),
        ("{title:letter}", "column 'title' is no place of a letter, 0 to 25: 'Hat'"),
        ("{choices[title]}", "column 'choices[title]' is empty"),
        ("{hint:commas}", "column 'hint' is empty"),
    ],
)
def test_fields_of_another_kind_are_refused(template: str, message: str) -> None:
    with pytest.raises(SampleError) as caught:
        fill(template, ROW)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("template", "left"),
    [
        ("A { title }.", "{ title }"),
        ("A {{title}}.", "{{title}}"),
        ("{choices[{answer}]}", "{choices[{answer}]}"),
        ("{}", "{}"),
        ("{% if title %}", "{% if title %}"),
        ("A {title", "{title"),
        ("A {title}}.", "{title}}"),
    ],
)
def test_what_looks_like_a_field_is_refused_with_the_columns_there_are(
    tmp_path: Path, tiny_model: Path, template: str, left: str
) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"title": "Hat", "answer": 0, "choices": ["x"]}])
    source = {"path": str(path), "user": "What?", "assistant": template}
    with pytest.raises(ConfigError) as caught:
        prepare(recipe(tiny_model, tmp_path / "out", source))
    assert str(caught.value) == (
        f"source.assistant holds {left!r}, which no column fills; write {{name}}, without blanks "
        f"or braces in it; source.path {path} has the columns title, answer, choices"
    )


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"user": "Q?", "assistant": "title"}, "source.assistant is 'title', a column's name and"),
        ({"user": "<title>", "assistant": "{title}"}, "source.user is '<title>', a column's name"),
        ({"user": "Q?", "assistant": "A hat."}, "source.user, source.assistant and source.images"),
        (
            {"user": "{meta.size}", "assistant": "{title}"},
            "has nothing in any row that 'meta.size' of the recipe names; its columns are title, ",
        ),
        (
            {"user": "{hint?}", "assistant": "{title}"},
            "has nothing in any row that 'hint?' of the recipe names",
        ),
        (
            {"user": "Q?", "assistant": "{title}", "references": "meta.all[].text"},
            "has nothing in any row that 'meta.all[].text' of the recipe names",
        ),
    ],
)
def test_a_recipe_that_matches_nothing_is_refused(
    tmp_path: Path, tiny_model: Path, source: dict[str, Any], message: str
) -> None:
    rows = [{"title": "Hat", "meta": {"sizes": [k]}} for k in range(3)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(ConfigError) as caught:
        prepare(recipe(tiny_model, tmp_path / "out", {"path": str(path), **source}))
    assert message in str(caught.value) and "title, meta" in str(caught.value)


def test_a_nested_name_that_one_row_answers_to_is_right(tmp_path: Path, tiny_model: Path) -> None:
    rows: list[dict[str, Any]] = [{"title": "Hat", "meta": {}} for _ in range(3)]
    rows.append({"title": "Cap", "meta": {"all": [{"text": "cap"}]}})
    source = {"path": str(write_jsonl(tmp_path / "rows.jsonl", rows)), "user": "What?"}
    source |= {"assistant": "{title}", "references": "meta.all[].text"}
    manifest = prepare(recipe(tiny_model, tmp_path / "out", source))
    assert manifest["splits"]["train"]["samples"] == 4


@pytest.mark.parametrize(
    "value",
    [
        *((1, 2), {1, 2}, range(3), Path("a"), object(), bytearray(b"x"), 1j, b"x"),
        *(np.array([1, 2]), np.array([]), pd.NA, memoryview(b"x"), [("k", 1)], [None, "b"], [[1]]),
    ],
)
def test_a_value_without_a_text_of_its_own_is_refused(value: Any) -> None:
    for template, held in (("{x}", value), ("{x:commas}", value), ("{x:letters}", [value])):
        with pytest.raises(SampleError, match="column 'x' "):
            fill(template, {"x": held})


@pytest.mark.parametrize("value", [float("nan"), np.float32("nan"), Decimal("NaN"), pd.NaT, None])
def test_no_number_is_empty_of_whatever_type(value: Any) -> None:
    with pytest.raises(SampleError, match="column 'x' is empty"):
        fill("{x}", {"x": value})
    with pytest.raises(SampleError, match="column 'x' has nothing at place 1 of its list"):
        fill("{x:commas}", {"x": ["a", value]})
    assert fill("{y}{x?}", {"y": "a", "x": value}) == "a"


def test_scalars_of_numpy_are_written_as_their_values() -> None:
    row = {"f": np.float32(19.99), "i": np.int64(3), "b": np.bool_(True), "s": np.str_("x")}
    assert fill("{f} {i} {b} {s}", row) == "19.99 3 True x"
    with pytest.raises(SampleError, match="column 'x' is not finite: inf"):
        fill("{x}", {"x": np.float32("inf")})

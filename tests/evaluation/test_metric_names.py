"""What each name says, which way it is better, and that the page explains every one."""

import re
from typing import Any

import pytest

from phi3v.evaluation.metrics import (
    Answer,
    compile_pattern,
    describe,
    find_metrics,
    is_lower_better,
    is_rate,
    row_scores,
    score,
)
from phi3v.evaluation.metrics.names import OF_FIELD, WHOLE
from tests.commands import ROOT

PATTERN = compile_pattern('{{"title": "{title}", "price": {price:float}}}')  # which is JSON
OF_TITLE = ("accuracy", "exact_match", "similarity")
OF_PRICE = ("accuracy", "exact_match", "mae", "mape", "log_error")
OF_JSON = ("json.title_accuracy", "json.price_accuracy")
NAMES = [
    *WHOLE,
    *OF_JSON,
    *(f"title_{name}" for name in OF_TITLE),
    *(f"price_{name}" for name in OF_PRICE),
]
ERRORS = {"price_mae", "price_mape", "price_log_error", "teacher_forced_price_error"}


def text(price: str, title: str = "Red cap") -> str:
    return f'{{"title": "{title}", "price": {price}}}'


def answer(row: int, said: str, name: str = "Red cap") -> Answer:
    reference = text(f"1{row}", name)
    return Answer(f"r{row}", reference, said, (), reference)


RIGHT = [answer(row, text(f"1{row}")) for row in range(4)]
WRONG = [answer(row, "Nothing 7") for row in range(4)]


@pytest.mark.parametrize("name", NAMES)
def test_a_metric_says_which_way_is_better(name: str) -> None:
    """Right answers have the best value there is, and wrong ones another."""
    assert is_lower_better(name) == (name in ERRORS)
    best = 0.0 if name in ERRORS else 1.0
    assert score([name], RIGHT, PATTERN)[name].value == best
    if name != "teacher_forced_price_error":  # which reads no generated answer
        assert score([name], WRONG, PATTERN)[name].value != best
    assert describe(name).startswith("lower is better: ") == (name in ERRORS)


def test_every_name_is_known_and_there_are_no_others() -> None:
    unseen = [f"{name}_unseen" for name in NAMES]
    assert len(find_metrics([*NAMES, *unseen], PATTERN)) == 2 * len(NAMES)
    assert set(OF_TITLE + OF_PRICE) == set(OF_FIELD)


@pytest.mark.parametrize("name", ["price_mape", "anls", "title_accuracy", "parse_rate", "own:f"])
def test_the_blind_control_and_unseen_rows_are_shown_as_the_metric_itself(name: str) -> None:
    for other in (f"blind_{name}", f"{name}_unseen", f"blind_{name}_unseen"):
        assert is_rate(other) == is_rate(name) is True
        assert is_lower_better(other) == is_lower_better(name)
        assert describe(other).startswith(describe(name))
    assert describe(f"{name}_unseen").endswith("; only values that never occur in training")


def test_errors_with_a_unit_and_bleu_are_no_percentages() -> None:
    shown = {name for name in NAMES if not is_rate(name)}
    assert shown == (ERRORS - {"price_mape"}) | {"bleu"}


def test_a_name_of_another_program_has_no_description() -> None:
    assert (describe("loss"), is_rate("loss"), is_lower_better("perplexity")) == ("", False, False)


def test_a_field_is_described_by_its_words() -> None:
    assert describe("full_price_mape").startswith("lower is better: mean relative error of full pr")
    assert describe("json.net_sum_accuracy").startswith("rows whose JSON is right in net_sum, ")
    assert describe("my_own:f_unseen").startswith("mean of my_own:f, a function of the recipe's ")


@pytest.mark.parametrize(
    "name", [*WHOLE, "json.PATH_accuracy", *(f"FIELD_{name}" for name in OF_FIELD)]
)
def test_the_page_explains_every_metric(name: str) -> None:
    page = (ROOT / "docs/evaluation.md").read_text(encoding="utf-8")
    assert f"| `{name}` |" in page


def test_row_scores_are_what_the_scores_are_means_of() -> None:
    answers = [*RIGHT[:2], *WRONG[2:], answer(9, text("10"), name="Tie")]
    names = [*(name for name in NAMES if name != "bleu"), "title_accuracy_unseen"]
    train = [text("1")]
    rows = row_scores(names, answers, PATTERN, train)
    for name, found in score(names, answers, PATTERN, train).items():
        values = [row[name] for row in rows if row[name] is not None]
        assert found.n == len(values)
        assert found.value == pytest.approx(sum(values) / len(values)), name
    assert [row["title_accuracy_unseen"] for row in rows] == [None, None, None, None, 0.0]
    assert row_scores([], answers, None) == [{}] * 5


def block(text: str) -> str:
    """The page's piece of Python that holds a text."""
    page = (ROOT / "docs/evaluation.md").read_text(encoding="utf-8")
    blocks = [piece.split("```")[0] for piece in page.split("```python\n")[1:]]
    return next(piece for piece in blocks if text in piece)


def test_the_pages_metric_of_ones_own_is_one() -> None:
    found: dict[str, Any] = {}
    exec(compile(block("def brevity"), "docs/evaluation.md", "exec"), found)
    brevity = found["brevity"]
    assert (brevity("", ("abc",)), brevity("abcdef", ("abcd", "abc")), brevity("ab", ("abc",))) == (
        1.0,
        0.5,
        1.0,
    )


def test_the_pages_program_prints_what_the_page_says(capsys: pytest.CaptureFixture[str]) -> None:
    program = block("print(score(")
    exec(compile(program, "docs/evaluation.md", "exec"), {})
    shown = capsys.readouterr().out.splitlines()
    told = [line.split("#")[1].strip() for line in program.splitlines() if "#" in line]
    assert len(shown) == len(told) == 2
    for line, pattern in zip(shown, told, strict=True):
        assert re.fullmatch(re.escape(pattern).replace(r"\.\.\.", ".*"), line), line

"""Two models on the same rows: what is said of their difference, and what is written down."""

import json
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from phi3v.config.running import EvalSection
from phi3v.data import Dataset
from phi3v.errors import ConfigError
from phi3v.evaluation.comparison import (
    Comparison,
    check_request,
    compare_models,
)
from phi3v.evaluation.evaluate import Evaluation
from phi3v.evaluation.metrics import Difference, score
from phi3v.evaluation.outcomes import Outcome
from phi3v.evaluation.suite import Found, Part, write_found
from phi3v.evaluation.table import difference_table
from tests.commands import LAUNCH

SETTINGS = EvalSection(metrics=("exact_match",))
ROWS = 40


@pytest.fixture
def dataset(tiny_shards: Path) -> Dataset:
    return Dataset(tiny_shards, "validation")


def answered(dataset: Dataset, num_right: int, loss: float | None = 1.0) -> Evaluation:
    """A model that is right in its first rows."""
    outcomes = [
        Outcome(row, f"r{row}", "What?", "cat", "cat" if row < num_right else "dog", None)
        for row in range(ROWS)
    ]
    scores = score(SETTINGS.metrics, [outcome.answer for outcome in outcomes], None)
    return Evaluation(scores, loss, outcomes, dataset, loss_rows=ROWS)


@pytest.mark.parametrize(
    ("models", "out", "message"),
    [
        (["a", "b", "a/"], None, "a/ is named twice; name each model once"),
        ([], None, "no MODEL is named, only settings; name a model folder or a run folder"),
        (["a"], "none/b.json", "--out {}/none/b.json: there is no folder {}/none; make it"),
        (["a"], "", "--out {} is a folder; name a file, for example comparison.json"),
    ],
)
def test_what_cannot_be_compared_or_written_is_refused_at_once(
    models: list[str], out: str | None, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        check_request(models, None if out is None else tmp_path / out)
    assert str(caught.value) == message.replace("{}", str(tmp_path))


def test_the_command_refuses_before_it_opens_anything(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    main = runpy.run_path(str(LAUNCH / "evaluate.py"))["main"]
    monkeypatch.setitem(main.__globals__, "set_environment", lambda: None)
    for words, message in (
        (["none", "none"], "none is named twice; "),
        (["eval.rows=1"], "no MODEL is named, "),
        (["none", "--out", str(tmp_path)], f"--out {tmp_path} is a folder; "),
    ):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *words, "--shards", "none"])
        with pytest.raises(ConfigError, match=message):
            main()


def test_a_file_that_is_there_may_be_written_anew(tmp_path: Path) -> None:
    (tmp_path / "out.json").touch()
    for name in ("out.json", "other.json"):
        check_request(["a", "b"], tmp_path / name)
    with pytest.raises(ConfigError, match="^--out /dev/null is no ordinary file; name a file, "):
        check_request(["a"], Path("/dev/null"))


def test_each_model_is_tested_against_the_first(dataset: Dataset) -> None:
    models = {name: answered(dataset, n) for name, n in (("a", 10), ("b", 30), ("c", 10))}
    pairs = compare_models(models, [], SETTINGS)
    assert [(pair.first, pair.other) for pair in pairs] == [("a", "b"), ("a", "c")]
    assert pairs[0].verdict("exact_match") == "b is better"
    assert pairs[0].differences["exact_match"].value == 0.5
    assert pairs[1].verdict("exact_match") == "no difference seen"
    (back,) = compare_models({name: models[name] for name in "ba"}, [], SETTINGS)
    assert back.verdict("exact_match") == "b is better"


def test_only_rows_that_both_have_answered_are_compared(dataset: Dataset) -> None:
    """Where one was right in other rows, those do not count."""
    a, b = answered(dataset, 20), answered(dataset, 20)
    a, b = replace(a, outcomes=a.outcomes[15:]), replace(b, outcomes=b.outcomes[:35])
    (pair,) = compare_models({"a": a, "b": b}, [], SETTINGS)
    found = pair.differences["exact_match"]
    assert (found.value, found.n) == (0.0, 20)


@pytest.mark.parametrize(
    ("name", "difference", "verdict"),
    [
        ("exact_match", Difference(-0.2, -0.3, -0.1, 0.001, 50), "a is better"),
        ("price_mae", Difference(-0.2, -0.3, -0.1, 0.001, 50), "b is better"),
        ("price_mape_unseen", Difference(0.2, 0.1, 0.3, 0.049, 50), "a is better"),
        ("exact_match", Difference(0.2, 0.0, 0.4, 0.05, 50), "no difference seen"),
        ("exact_match", Difference(0.2, -0.01, 0.4, 0.04, 50), "no difference seen"),
        ("price_mae", Difference(0.0, 0.0, 0.0, 1.0, 50), "no difference seen"),
        (
            "price_mae",
            Difference(-1.0, -1.0, -1.0, 0.001, 13),
            "no verdict: all rows differ by the same, which gives no interval",
        ),
        ("exact_match", Difference(None, None, None, None, 0), "no rows"),
    ],
)
def test_a_difference_is_called_one_if_chance_would_rarely_make_it(
    name: str, difference: Difference, verdict: str
) -> None:
    assert Comparison("a", "b", {name: difference}).verdict(name) == verdict


def test_differences_are_shown_with_their_interval_p_and_what_they_say() -> None:
    differences = {
        "exact_match": Difference(0.4, 0.25, 0.55, 0.0001, 40),
        "price_mae": Difference(-1234.0, -2000.0, -0.0, 0.2, 140),
        "bleu": Difference(0.4371, 0.25, 0.5, 0.0001, 140),
        "anls_unseen": Difference(None, None, None, None, 0),
    }
    assert difference_table(Comparison("models/base", "runs/demo", differences)).splitlines() == [
        "runs/demo - models/base   difference",
        "exact_match               +40.0 pp [+25.0, +55.0] n=40   p=0.0001   runs/demo is better",
        "price_mae                 -1,234 [-2,000, +0] n=140      p=0.2000   no difference seen",
        "bleu                      +0.4371 [+0.25, +0.5] n=140    p=0.0001   runs/demo is better",
        "anls_unseen               no rows",
    ]


def test_the_file_holds_settings_scores_answers_and_differences(
    dataset: Dataset, tmp_path: Path
) -> None:
    models = {"a": answered(dataset, 10), "b": answered(dataset, 30, loss=None)}
    pairs = compare_models(models, [], SETTINGS)
    part = Part("", ("shards",), SETTINGS, "the command line")
    write_found(tmp_path / "out.json", [Found(part, models, pairs)])
    found = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert (found["shards"], found["eval"]["metrics"]) == (["shards"], ["exact_match"])
    assert found["models"]["a"]["metrics"]["exact_match"]["value"] == 0.25
    assert [found["models"][name]["loss"] for name in "ab"] == [1.0, None]
    answers = found["models"]["b"]["answers"]
    assert [answer["row"] for answer in answers] == list(range(ROWS))
    assert answers[39] | {"prediction": "dog", "reference": "cat"} == answers[39]
    (pair,) = found["comparisons"]
    assert (pair["first"], pair["other"]) == ("a", "b")
    difference = pair["differences"]["exact_match"]
    assert (difference["value"], difference["n"]) == (0.5, ROWS)
    assert difference["verdict"] == "b is better" and difference["low"] <= 0.5

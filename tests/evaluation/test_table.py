"""The table of scores: a column per model, a line per metric."""

from pathlib import Path

import pytest

from phi3v.data import Dataset
from phi3v.evaluation.comparison import Comparison
from phi3v.evaluation.evaluate import Evaluation
from phi3v.evaluation.metrics import Difference, Score
from phi3v.evaluation.table import all_tables, difference_table, score_table

SCORES = {
    "category_accuracy": Score(0.98127, 0.963, 0.9961, 267),
    "price_mape": Score(0.1, 0.05, 0.15, 266),
    "price_mae": Score(1234.5678, 9.0, 1e4, 266),
    "title_exact_match_unseen": Score(None, None, None, 0),
    "blind_category_accuracy": Score(0.11236, 0.08, 0.15, 250),
    "constant_category_accuracy": Score(0.0749, 0.04, 0.11, 267),
    "blind_price_mape": Score(None, None, None, 0),
}


@pytest.fixture
def dataset(tiny_shards: Path) -> Dataset:
    return Dataset(tiny_shards, "validation")


def test_models_stand_side_by_side(dataset: Dataset) -> None:
    one = Evaluation(SCORES, 0.51234, [], dataset)
    other = Evaluation({**SCORES, "price_mape": Score(0.25, 0.2, 0.3, 266)}, 12.0, [], dataset)
    cell = "98.1% [96.3%, 99.6%] n=267   blind 11.2% n=250   constant 7.5%"
    rows = [
        ("metric", "runs/demo", "models/tiny"),
        ("loss", "0.5123", "12.0000"),
        ("category_accuracy", cell, cell),
        ("price_mape", "10.0% [5.0%, 15.0%] n=266", "25.0% [20.0%, 30.0%] n=266"),
        ("price_mae", "1,235 [9, 1e+04] n=266", "1,235 [9, 1e+04] n=266"),
        ("title_exact_match_unseen", "no rows", "no rows"),
    ]
    assert score_table({"runs/demo": one, "models/tiny": other}).splitlines() == [
        f"{name:24}   {left:62}   {right}" for name, left, right in rows
    ]


def test_without_a_blind_control_none_is_shown(dataset: Dataset) -> None:
    scores = {"exact_match": Score(0.5, 0.25, 0.75, 8)}
    table = score_table({"m": Evaluation(scores, 1.0, [], dataset)})
    assert table.splitlines() == [
        "metric        m",
        "loss          1.0000",
        "exact_match   50.0% [25.0%, 75.0%] n=8",
    ]


def test_without_metrics_there_is_no_table_of_differences(dataset: Dataset) -> None:
    models = {name: Evaluation({}, 1.0, [], dataset) for name in "ab"}
    assert all_tables(models, [Comparison("a", "b", {})]) == score_table(models)
    pair = Comparison("a", "b", {"anls": Difference(0.5, 0.25, 0.75, 0.001, 9)})
    assert all_tables(models, [pair]).split("\n\n")[1].startswith("b - a   difference\n")


def test_an_interval_that_says_too_little_says_so(dataset: Dataset) -> None:
    scores = {
        "price_mae": Score(1.5, 1.0, 2.0, 6),
        "price_mape": Score(0.1, 0.1, 0.1, 160),
        "bleu": Score(1.0, 1.0, 1.0, 1),
        "exact_match": Score(1.0, 0.541, 1.0, 6),
        "price_log_error": Score(0.5, 0.4, 0.6, 100),
    }
    assert score_table({"m": Evaluation(scores, 1.0, [], dataset)}).splitlines()[2:] == [
        "price_mae         1.5 [1, 2] n=6 (few rows: interval too narrow)",
        "price_mape        10.0% [10.0%, 10.0%] n=160 (equal rows: no interval)",
        "bleu              1 [1, 1] n=1 (equal rows: no interval)",
        "exact_match       100.0% [54.1%, 100.0%] n=6",
        "price_log_error   0.5 [0.4, 0.6] n=100",
    ]
    pair = Comparison("a", "b", {"price_mae": Difference(-1.0, -1.0, -1.0, 0.001, 13)})
    assert difference_table(pair).splitlines()[1] == (
        "price_mae   -1 [-1, -1] n=13 (equal rows: no interval)   p=0.0010   "
        "no verdict: all rows differ by the same, which gives no interval"
    )

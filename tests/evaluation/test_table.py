"""The table of scores: a column per model, a line per metric."""

from pathlib import Path

import pytest

from phi3v.data import Dataset
from phi3v.evaluation.evaluate import Evaluation
from phi3v.evaluation.metrics import Score
from phi3v.evaluation.table import score_table

SCORES = {
    "category_accuracy": Score(0.98127, 0.963, 0.9961, 267),
    "price_mape": Score(0.1, 0.05, 0.15, 266),
    "title_exact_match_unseen": Score(None, None, None, 0),
    "blind_category_accuracy": Score(0.11236, 0.08, 0.15, 267),
    "blind_price_mape": Score(None, None, None, 0),
}


@pytest.fixture
def dataset(tiny_shards: Path) -> Dataset:
    return Dataset(tiny_shards, "validation")


def test_models_stand_side_by_side(dataset: Dataset) -> None:
    one = Evaluation(SCORES, 0.51234, [], dataset)
    other = Evaluation({**SCORES, "price_mape": Score(0.25, 0.2, 0.3, 266)}, 12.0, [], dataset)
    assert score_table({"runs/demo": one, "models/tiny": other}) == (
        "metric                     runs/demo                                  models/tiny\n"
        "loss                       0.5123                                     12.0000\n"
        "category_accuracy          0.981 [0.963, 0.996] n=267   blind 0.112   "
        "0.981 [0.963, 0.996] n=267   blind 0.112\n"
        "price_mape                 0.100 [0.050, 0.150] n=266                 "
        "0.250 [0.200, 0.300] n=266\n"
        "title_exact_match_unseen   no rows                                    no rows"
    )


def test_without_a_blind_control_none_is_shown(dataset: Dataset) -> None:
    scores = {"exact_match": Score(0.5, 0.25, 0.75, 8)}
    table = score_table({"m": Evaluation(scores, 1.0, [], dataset)})
    assert table.splitlines() == [
        "metric        m",
        "loss          1.0000",
        "exact_match   0.500 [0.250, 0.750] n=8",
    ]

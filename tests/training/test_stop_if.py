"""When a run ends before its last step, by the lines of evaluations.jsonl alone."""

from typing import Any

import pytest

from phi3v.config.running import StopIfSection
from phi3v.training.stop_if import reason_to_end

NAN = None  # as JSON has a loss that is not finite


def entries(*values: float | None, metric: str = "loss") -> list[dict[str, Any]]:
    """An evaluation every 10 steps, of the base first."""
    score = [{metric: {"value": value}} for value in values]
    return [
        {"step": 10 * n, "loss": value if metric == "loss" else 1.0, "metrics": score[n]}
        for n, value in enumerate(values)
    ]


def ends(values: list[float | None], metric: str = "loss", **rule: Any) -> list[int]:
    """The steps after which a run ends whose evaluations give these values."""
    found = entries(*values, metric=metric)
    section = StopIfSection(metric=metric, **rule)
    return [e["step"] for e in found if reason_to_end(found, section, e["step"])]


@pytest.mark.parametrize(
    ("values", "rule", "steps"),
    [
        ([5, 4, 3, 2, 1], {"patience": 1}, []),
        ([5, 4, 4, 3], {"patience": 1}, [20]),
        ([5, 4, 4, 3, 3, 3], {"patience": 2}, [50]),
        ([5, 4, 4.5, 4.2, 4.1], {"patience": 3}, [40]),  # better than the last is not enough
        ([5, 4.9, 4.8, 4.7, 4.6], {"patience": 2, "min_delta": 0.25}, [20]),  # 4.7 is .3 below 5
        ([5, 4.75, 4.5], {"patience": 1, "min_delta": 0.25}, [10]),  # the edge is not enough
        ([5, NAN, NAN, 4], {"patience": 2}, [20]),  # no number is no better
        ([NAN, NAN], {"patience": 2}, [10]),
        ([NAN, 5, 4], {"patience": 2}, []),
        ([5, 3, 1], {"below": 3}, [20]),
        ([5, 4.5, 3], {"above": 4}, [10]),  # nothing ends before the first step
        ([5, NAN], {"above": 6, "below": 1}, []),
        ([2, 4, 7], {"patience": 5, "above": 6}, [20]),
    ],
)
def test_a_run_ends_where_the_loss_gets_no_better_or_passes_a_limit(
    values: list[float | None], rule: dict[str, Any], steps: list[int]
) -> None:
    assert ends(values, **rule) == steps


def test_better_is_more_of_a_rate_and_less_of_an_error() -> None:
    up: list[float | None] = [0.1, 0.2, 0.3]
    assert ends(up, "anls", patience=1) == ends(up[::-1], "price_mape", patience=1) == []
    assert ends(up[::-1], "anls", patience=1) == ends(up, "price_mae", patience=1) == [10, 20]
    assert ends(up, "my_metrics:f", above=0.25) == [20]
    assert ends([None, None], "anls", patience=2) == [10], "a metric without rows"


def test_the_decision_does_not_ask_for_later_steps_or_the_order_of_lines() -> None:
    """A run that was killed goes on from before evaluations that are in the file already."""
    found = entries(5, 4, 4, 3)
    rule = StopIfSection(metric="loss", patience=1)
    assert reason_to_end(found, rule, 19) is None
    assert reason_to_end(found[::-1], rule, 20) == reason_to_end(found, rule, 20) is not None
    assert reason_to_end([], rule, 20) is None
    assert reason_to_end(found, None, 20) is None


@pytest.mark.parametrize(
    ("metric", "rule", "reason"),
    [
        ("loss", {"patience": 1}, "loss is no better than 0.5000 of step 0 in 2 evaluations"),
        (
            "anls",
            {"patience": 2, "min_delta": 0.2},
            "anls is no better than 50.0% of step 0 by more than 0.2 in 2 evaluations",
        ),
        ("anls", {"above": 0.55}, "anls is 60.0% at step 20, above 55.0%"),
        ("price_mae", {"below": 0.65}, "price_mae is 0.6 at step 20, below 0.65"),
    ],
)
def test_the_reason_is_a_sentence(metric: str, rule: dict[str, Any], reason: str) -> None:
    found = entries(0.5, 0.6, 0.6, metric=metric)
    assert reason_to_end(found, StopIfSection(metric=metric, **rule), 20) == reason


def test_a_metric_that_never_was_a_number_ends_the_run_by_its_patience() -> None:
    found = entries(NAN, NAN)
    rule = StopIfSection(metric="loss", patience=2)
    assert reason_to_end(found, rule, 10) == "loss is no number in 2 evaluations"

"""Whether a run ends before its last step: `train.stop_if`, by what its evaluations gave.

    why = reason_to_end(folder.read_evaluations(), cfg.train.stop_if, step=800)
    # "anls is no better than 81.2% of step 600 in 2 evaluations"

The decision is a function of evaluations.jsonl, so it is the same after a kill, and on any number
of ranks. The learning rates are those of the whole run, whether it ends before or not.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from phi3v.config.running import StopIfSection
from phi3v.evaluation.metrics import is_lower_better
from phi3v.evaluation.report.words import loss_value, metric_value

Entry = Mapping[str, Any]
"""A line of evaluations.jsonl."""
LOSS = "loss"


@dataclass(frozen=True)
class _Point:
    """What an evaluation gave; the value is None where there was none, as of a loss that is nan."""

    step: int
    value: float | None


def reason_to_end(entries: Sequence[Entry], rule: StopIfSection | None, step: int) -> str | None:
    """Why a run ends after a step, by the last evaluation up to there; None if it goes on.

    entries  one of each step, in any order; those of later steps are about to be repeated. That of
             step 0 is what later ones are compared with, and ends nothing
    """
    if rule is None or step == 0:
        return None
    found = sorted((e for e in entries if e["step"] <= step), key=lambda entry: entry["step"])
    points = [_Point(entry["step"], value_of(entry, rule.metric)) for entry in found]
    return (_reached(points[-1], rule) or _no_better(points, rule)) if points else None


def value_of(entry: Entry, metric: str) -> float | None:
    """A metric of an evaluation, or its loss; None where it gave no number."""
    value: float | None
    if metric == LOSS:
        value = entry["loss"]
    else:
        value = entry["metrics"].get(metric, {}).get("value")
    return value


def goodness(metric: str, value: float) -> float:
    """A value of a metric or of the loss so that more is better."""
    return -value if metric == LOSS or is_lower_better(metric) else value


def _reached(last: _Point, rule: StopIfSection) -> str | None:
    """Whether the last value is beyond one of the limits."""
    if last.value is None:
        return None
    for word, limit, is_beyond in (
        ("above", rule.above, rule.above is not None and last.value > rule.above),
        ("below", rule.below, rule.below is not None and last.value < rule.below),
    ):
        if is_beyond:
            shown = f"{_shown(rule.metric, last.value)} at step {last.step}"
            return f"{rule.metric} is {shown}, {word} {_shown(rule.metric, limit)}"
    return None


def _no_better(points: Sequence[_Point], rule: StopIfSection) -> str | None:
    """Whether the last values, `patience` of them, are no better than the best before."""
    if rule.patience is None:
        return None
    best: _Point | None = None
    since = 0
    for point in points:
        if point.value is not None and (best is None or _is_better(point, best, rule)):
            best, since = point, 0
        else:
            since += 1
    if since < rule.patience:
        return None
    if best is None or best.value is None:
        return f"{rule.metric} is no number in {since} evaluations"
    by = f" by more than {rule.min_delta:g}" if rule.min_delta else ""
    shown = f"{_shown(rule.metric, best.value)} of step {best.step}"
    return f"{rule.metric} is no better than {shown}{by} in {since} evaluations"


def _is_better(point: _Point, best: _Point, rule: StopIfSection) -> bool:
    assert point.value is not None and best.value is not None
    gain = goodness(rule.metric, point.value) - goodness(rule.metric, best.value)
    return gain > rule.min_delta


def _shown(metric: str, value: float | None) -> str:
    return loss_value(value, digits=4) if metric == LOSS else metric_value(metric, value)

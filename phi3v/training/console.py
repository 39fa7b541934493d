"""What rank 0 says about its steps: one live line on a terminal, a line now and then in a log.

step 120/1000, 1:02:40 left, loss 1.284, lr 2e-05, 12,345 tokens/s, MFU 41.2%, packed 99.1%
evaluation at step 120: loss 1.31, anls 61.0% (55.1% to 66.9% n=256, blind 12.5% n=256, constant 9%)
"""

import math
import time
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm

from phi3v.evaluation.metrics.names import BLIND, CONSTANT, controls
from phi3v.evaluation.report.words import interval_fault, loss_value, metric_value
from phi3v.output import is_watched, say
from phi3v.progress import progress

MOST_METRICS = 3  # of an evaluation
LOG_SECONDS = 30.0  # between lines where nobody watches; the first and the last step have theirs


class Console:
    """Shows the steps of this process as they are done; silent on all ranks but the first.

    total_steps  of the whole run
    done         steps that were done before
    """

    def __init__(self, total_steps: int, done: int, is_first: bool) -> None:
        self._total, self._is_first = total_steps, is_first
        self._is_live = is_first and is_watched()
        settings = {"initial": done, "disable": not self._is_live, "bar_format": "{desc}"}
        self._bar = progress(None, "train", "step", total_steps, **settings)
        self._first: tuple[int, float] | None = None  # number and end of the first step here
        self._shown = -math.inf

    def step(self, metrics: Mapping[str, Any]) -> None:
        """Show a step by its line of metrics.jsonl."""
        if not self._is_first:
            return
        number, now = metrics["step"], time.monotonic()
        self._first = self._first or (number, now)
        line = describe(metrics, self._total, self._seconds_left(number, now))
        if self._is_live:
            self._bar.set_description_str(line, refresh=False)
            self._bar.update()
        elif now - self._shown >= LOG_SECONDS or number == self._total:
            self._shown = now
            say(line)

    def close(self) -> None:
        """Leave the live line as it is, and the cursor below it."""
        self._bar.close()

    def _seconds_left(self, number: int, now: float) -> float | None:
        """By the time from step to step, evaluations included; not the first, which compiles."""
        assert self._first is not None
        first, since = self._first
        if number == first:
            return None
        return (now - since) / (number - first) * (self._total - number)


def describe_evaluation(
    step: int, loss: float | None, metrics: Mapping[str, Mapping[str, Any]]
) -> str:
    """An evaluation in one line: the loss, and the first metrics with their 95 % intervals."""
    of_others = controls(metrics)
    seen = [name for name in metrics if name not in of_others]
    scores = (_describe_score(name, metrics) for name in seen[:MOST_METRICS])
    more = len(seen) - MOST_METRICS
    rest = [f"{more} more in evaluations.jsonl"] if more > 0 else []
    return ", ".join([f"evaluation at step {step}: loss {loss_value(loss)}", *scores, *rest])


def _describe_score(name: str, metrics: Mapping[str, Mapping[str, Any]]) -> str:
    score, blind, constant = (metrics.get(prefix + name) for prefix in ("", BLIND, CONSTANT))
    assert score is not None
    value, low, high = (metric_value(name, score[key]) for key in ("value", "low", "high"))
    if score["value"] is None:
        return f"{name} has no rows"
    parts = (
        f"{low} to {high} n={score['n']}",
        interval_fault(name, score["low"], score["high"], score["n"]),
        f"blind {metric_value(name, blind['value'])} n={blind['n']}" if blind else "",
        f"constant {metric_value(name, constant['value'])}" if constant else "",
    )
    return f"{name} {value} ({', '.join(filter(None, parts))})"


def describe(metrics: Mapping[str, Any], total: int, seconds_left: float | None) -> str:
    """A step in one line, the most important first: a narrow terminal cuts its end off."""
    loss, mfu = metrics["loss"], metrics["mfu"]
    parts = (
        f"step {metrics['step']}/{total}",
        "" if seconds_left is None else f"{tqdm.format_interval(seconds_left)} left",
        f"loss {loss_value(loss)}",
        f"lr {max(metrics['lr'].values()):.3g}",  # of the module that learns fastest
        f"{metrics['tokens_per_second']:,.0f} tokens/s",
        "" if mfu is None else f"MFU {mfu:.1%}",
        f"packed {metrics['packing']:.1%}",
    )
    return ", ".join(part for part in parts if part)

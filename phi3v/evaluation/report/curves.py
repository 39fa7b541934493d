"""The curves of a run: of its steps, and of its evaluations beside their controls."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from phi3v.evaluation.charts import Curve, Points, line_chart
from phi3v.evaluation.metrics import is_lower_better, is_rate
from phi3v.evaluation.metrics.names import CONTROL_TITLES, controls
from phi3v.evaluation.report.words import rows_of

Step = Mapping[str, Any]
"""One line of metrics.jsonl."""


def training_section(steps: Sequence[Step]) -> str:
    """Every curve of metrics.jsonl that has a value."""

    def curve(key: str, name: str = "", is_smoothed: bool = True) -> Curve:
        return Curve(name or key, _points(steps, key), is_smoothed)

    rates = module_curves(steps, "lr")
    shared = ", the same for all modules" if len(rates) == 1 and "," in rates[0].name else ""
    charts = (
        line_chart("Loss", [curve("loss")]),
        line_chart(f"Learning rate{shared}", rates),
        line_chart("Gradient norm", [curve("grad_norm")]),
        line_chart("Gradient norm by module", module_curves(steps, "grad_norms", True)),
        line_chart("Tokens per second", [curve("tokens_per_second")]),
        line_chart("Model FLOPs utilisation", [curve("mfu")], is_percent=True),
        line_chart(
            "Seconds per step",
            [curve("step_seconds", "whole step"), curve("data_wait_seconds", "waiting for data")],
        ),
        line_chart(
            "Packing and balance",
            [
                curve("packing", "real tokens over budget"),
                curve("balance", "mean over max cost of the ranks"),
            ],
            is_percent=True,
        ),
        line_chart("Peak memory, GB", [curve("memory_gb", is_smoothed=False)]),
    )
    return _section("training", "Training", charts)


def evaluation_section(evaluations: Sequence[Mapping[str, Any]]) -> str:
    """The loss and each metric of the evaluations over the steps, with their 95% intervals."""
    names = dict.fromkeys(name for entry in evaluations for name in entry["metrics"])
    of_others, what = controls(names), rows_of(evaluations)
    loss = Curve("loss", _points(evaluations, "loss"))
    charts = [line_chart(f"{what.capitalize()} loss (lower is better)", [loss])]
    for name in (name for name in names if name not in of_others):
        lines = [_metric_curve(evaluations, name, what)]
        for prefix, label in CONTROL_TITLES.items():
            if prefix + name in of_others:
                lines.append(_metric_curve(evaluations, prefix + name, label))
        direction = "lower" if is_lower_better(name) else "higher"
        charts.append(line_chart(f"{name} ({direction} is better)", lines, is_rate(name)))
    return _section("evaluations", "Evaluations", charts)


def module_curves(steps: Sequence[Step], key: str, is_smoothed: bool = False) -> list[Curve]:
    """A curve per module of a value by module; modules with identical curves share one."""
    modules = dict.fromkeys(module for step in steps for module in step.get(key) or {})
    names: dict[tuple[tuple[float, float], ...], list[str]] = {}
    for module in modules:
        own = [{"step": step["step"], key: (step.get(key) or {}).get(module)} for step in steps]
        names.setdefault(tuple(_points(own, key)), []).append(module)
    return [Curve(", ".join(group), points, is_smoothed) for points, group in names.items()]


def values(steps: Sequence[Step], key: str) -> list[float]:
    """The values of a key that are numbers."""
    return [value for _, value in _points(steps, key)]


def _metric_curve(evaluations: Sequence[Mapping[str, Any]], name: str, label: str) -> Curve:
    scores = [(entry["step"], entry["metrics"].get(name) or {}) for entry in evaluations]
    lines = [{"step": step, **score} for step, score in scores]
    spans = [
        (line["step"], line["low"], line["high"])
        for line in lines
        if _is_number(line.get("low")) and _is_number(line.get("high"))
    ]
    return Curve(label, _points(lines, "value"), spans=spans)


def _section(name: str, title: str, charts: Iterable[str]) -> str:
    drawn = "".join(charts)
    charts_html = f'<div class="charts">{drawn}</div>'
    return f'<section id="{name}"><h2>{title}</h2>{charts_html}</section>\n' if drawn else ""


def _points(steps: Iterable[Step], key: str) -> Points:
    return [(step["step"], step[key]) for step in steps if _is_number(step.get(key))]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)

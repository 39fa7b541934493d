"""The table of held-out metrics, each beside its controls."""

from collections.abc import Mapping
from html import escape
from typing import Any

from phi3v.evaluation.metrics import describe
from phi3v.evaluation.metrics.names import BLIND, CONSTANT, controls
from phi3v.evaluation.report.words import interval_fault, metric_value

BLIND_TEXT = (
    "Blind control: the same rows with their pictures exchanged, so that each question is asked "
    "about another row's picture. A model that does as well blind has learnt the text and not the "
    "picture."
)
CONSTANT_TEXT = (
    "Constant answer: every row is given the most frequent answer of the training split, or the "
    "one with the field's most frequent value. A model that does no better has learnt no more."
)


def metrics_section(metrics: Mapping[str, Mapping[str, Any]]) -> str:
    """`metrics` of summary.json as a table."""
    if not metrics:
        return ""
    of_others = controls(metrics)
    rows = "".join(_row(name, metrics) for name in metrics if name not in of_others)
    texts = {BLIND: BLIND_TEXT, CONSTANT: CONSTANT_TEXT}
    shown = [
        text for prefix, text in texts.items() if any(name.startswith(prefix) for name in of_others)
    ]
    note = f'<p class="note">{escape(" ".join(shown))}</p>' if shown else ""
    return (
        '<section id="metrics"><h2>Held-out metrics</h2>'
        '<table class="metrics"><thead><tr><th>metric</th><th>held-out value, 95% interval</th>'
        "<th>blind control</th><th>constant answer</th></tr></thead>"
        f"<tbody>{rows}</tbody></table>{note}</section>\n"
    )


def _row(name: str, metrics: Mapping[str, Mapping[str, Any]]) -> str:
    return (
        f"<tr><th>{escape(name)}<small>{escape(describe(name))}</small></th>"
        f'<td data-label="held-out">{_score(name, metrics[name])}</td>'
        f'<td data-label="blind">{_score(name, metrics.get(BLIND + name))}</td>'
        f'<td data-label="constant">{_score(name, metrics.get(CONSTANT + name))}</td></tr>\n'
    )


def _score(name: str, score: Mapping[str, Any] | None) -> str:
    if score is None:
        return '<span class="muted">not measured</span>'
    n = f'<span class="n">n = {score["n"]:,}</span>'
    if score["value"] is None:
        return f'<span class="muted">no rows</span> {n}'
    value, low, high = (metric_value(name, score[key]) for key in ("value", "low", "high"))
    fault = interval_fault(name, score["low"], score["high"], score["n"])
    note = f' <small class="muted">{fault}</small>' if fault else ""
    return f'<b>{value}</b> <span class="interval">{low} &ndash; {high}</span> {n}{note}'

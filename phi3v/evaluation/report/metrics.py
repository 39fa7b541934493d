"""The table of held-out metrics, each beside its controls."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from phi3v.evaluation.metrics import describe
from phi3v.evaluation.metrics.names import BLIND, CONSTANT, CONTROL_TITLES, controls
from phi3v.evaluation.report.words import interval_fault, metric_value, rows_of

BLIND_TEXT = (
    "Blind control: the same rows with their pictures exchanged, so that each question is asked "
    "about another row's picture, where there is one to exchange it for. A model that does as well "
    "blind has learnt the text and not the picture."
)
CONSTANT_TEXT = (
    "Constant answer: every row is given the most frequent answer of the training split, or the "
    "one with the field's most frequent value. A model that does no better has learnt no more."
)


CONTROL_TEXTS = {BLIND: BLIND_TEXT, CONSTANT: CONSTANT_TEXT}


def metrics_section(
    metrics: Mapping[str, Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]] = ()
) -> str:
    """`metrics` of summary.json as a table; a control that no metric has is not spoken of.

    evaluations  lines of evaluations.jsonl, of which the last gave the metrics
    """
    if not metrics:
        return ""
    of_others, what = controls(metrics), rows_of(evaluations[-1:])
    measured = [
        prefix for prefix in CONTROL_TITLES if any(name.startswith(prefix) for name in of_others)
    ]
    rows = "".join(_row(name, metrics, what, measured) for name in metrics if name not in of_others)
    heads = "".join(f"<th>{CONTROL_TITLES[prefix]}</th>" for prefix in measured)
    note = escape(" ".join(CONTROL_TEXTS[prefix] for prefix in measured))
    below = f'<p class="note">{note}</p>' if note else ""
    return (
        f'<section id="metrics"><h2>{what.capitalize()} metrics</h2>'
        f'<table class="metrics"><thead><tr><th>metric</th><th>{what} value, 95% interval</th>'
        f"{heads}</tr></thead><tbody>{rows}</tbody></table>{below}</section>\n"
    )


def _row(
    name: str, metrics: Mapping[str, Mapping[str, Any]], what: str, prefixes: Sequence[str]
) -> str:
    cells = "".join(
        f'<td data-label="{prefix.strip("_")}">{_score(name, metrics.get(prefix + name))}</td>'
        for prefix in prefixes
    )
    return (
        f"<tr><th>{escape(name)}<small>{escape(describe(name))}</small></th>"
        f'<td data-label="{what}">{_score(name, metrics[name])}</td>{cells}</tr>\n'
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

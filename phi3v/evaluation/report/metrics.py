"""The table of held-out metrics, each beside its blind control."""

from collections.abc import Collection, Mapping
from html import escape
from typing import Any

from phi3v.evaluation.metrics import describe
from phi3v.evaluation.metrics.names import BLIND
from phi3v.evaluation.report.words import metric_value

BLIND_TEXT = (
    "Blind control: the same rows with their pictures exchanged, so that each question is asked "
    "about another row's picture. A model that does as well blind has learnt the text and not the "
    "picture."
)


def metrics_section(metrics: Mapping[str, Mapping[str, Any]]) -> str:
    """`metrics` of summary.json as a table."""
    if not metrics:
        return ""
    blind = controls(metrics)
    rows = "".join(
        _row(name, metrics[name], metrics.get(BLIND + name))
        for name in metrics
        if name not in blind
    )
    note = f'<p class="note">{escape(BLIND_TEXT)}</p>' if blind else ""
    return (
        '<section id="metrics"><h2>Held-out metrics</h2>'
        '<table class="metrics"><thead><tr><th>metric</th><th>held-out value, 95% interval</th>'
        f"<th>blind control</th></tr></thead><tbody>{rows}</tbody></table>{note}</section>\n"
    )


def controls(names: Collection[str]) -> set[str]:
    """The names that are the blind control of another."""
    return {name for name in names if name.startswith(BLIND) and name.removeprefix(BLIND) in names}


def _row(name: str, score: Mapping[str, Any], blind: Mapping[str, Any] | None) -> str:
    control = '<span class="muted">not measured</span>' if blind is None else _score(name, blind)
    return (
        f"<tr><th>{escape(name)}<small>{escape(describe(name))}</small></th>"
        f'<td data-label="held-out">{_score(name, score)}</td>'
        f'<td data-label="blind">{control}</td></tr>\n'
    )


def _score(name: str, score: Mapping[str, Any]) -> str:
    n = f'<span class="n">n = {score["n"]:,}</span>'
    if score["value"] is None:
        return f'<span class="muted">no rows</span> {n}'
    value, low, high = (metric_value(name, score[key]) for key in ("value", "low", "high"))
    return f'<b>{value}</b> <span class="interval">{low} &ndash; {high}</span> {n}'

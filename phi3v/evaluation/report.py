"""Write report.html: one file that says how a run went, fit to be sent to a colleague.

    write_report(run / "report.html", "products", steps, summary, examples, {"model": path})

The page holds the key facts, the held-out metrics beside their blind control, the curves of
metrics.jsonl, examples with their pictures, and the run's settings. It needs nothing else: style,
charts and pictures are inline, there is no script, and a content policy forbids any request. What
a run did not measure is left out rather than shown empty.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np

from phi3v.evaluation.charts import CHART_STYLE, Curve, Points, line_chart, short_number
from phi3v.files import write_text
from phi3v.page import facts_section, heading, html_page, jpeg_url

PICTURE_PIXELS = 200
FINAL_STEPS = 20  # the final loss is a mean over so many steps
BLIND = "blind_"

BLIND_TEXT = (
    "Blind control: the same rows with their pictures exchanged, so that each question is asked "
    "about another row's picture. A model that does as well blind has learnt the text and not the "
    "picture."
)

_DESCRIPTIONS = (
    ("_mape", "lower is better: mean relative error of FIELD, 100% for an unparsable answer"),
    ("parse_rate", "answers of the expected form"),
    ("_accuracy", "rows whose FIELD is right"),
    ("_exact_match", "rows whose FIELD is the same text"),
    ("exact_match", "rows whose whole answer is the same text"),
)
_RATES = ("accuracy", "exact_match", "rate", "mape")

_FIGURES: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("steps", "steps", "{:,}".format),
    ("warmup_steps", "steps left out (a process's first: kernels compile)", "{:,}".format),
    ("samples", "samples", "{:,}".format),
    ("tokens", "tokens", "{:,}".format),
    ("seconds", "time", lambda seconds: _duration(seconds)),
    ("tokens_per_second", "tokens per second", "{:,.0f}".format),
    ("views_per_second", "views per second", "{:,.1f}".format),
    ("mfu", "model FLOPs utilisation", "{:.1%}".format),
    ("packing", "packing: real tokens over budget", "{:.1%}".format),
    ("balance", "balance: mean over max cost of the ranks", "{:.1%}".format),
    ("data_wait", "waiting for data", "{:.2%}".format),
    ("memory_gb", "peak memory, GB", "{:,.1f}".format),
)

Step = Mapping[str, Any]
"""One line of metrics.jsonl."""


@dataclass(frozen=True)
class Example:
    """One held-out row as the model saw and answered it.

    image   (H, W, 3) uint8, or None for a row without a picture
    blind   the answer when shown another row's picture, or None where that was not asked
    """

    image: np.ndarray | None
    prompt: str
    reference: str
    prediction: str
    blind: str | None
    is_right: bool


def write_report(
    path: Path,
    title: str,
    steps: Sequence[Step],
    summary: Mapping[str, Any],
    examples: Sequence[Example],
    facts: Mapping[str, str],
) -> None:
    """Write the page, whole or not at all.

    steps     lines of metrics.jsonl in order; a value may be null or absent
    summary   the content of summary.json: `metrics`, `throughput`, totals (top level or under
              `totals`), paths
    facts     settings worth showing, by name
    """
    parts = (
        heading(title, _key_facts(steps)),
        _metrics_section(summary.get("metrics") or {}),
        _charts_section(steps),
        _examples_section(examples),
        facts_section("Throughput", _throughput(summary.get("throughput") or {})),
        facts_section("Settings", facts),
        facts_section("Totals", _totals(summary)),
    )
    write_text(path, html_page(title, "".join(parts), _STYLE + CHART_STYLE))


# Heading


def _key_facts(steps: Sequence[Step]) -> Iterable[tuple[str, str]]:
    if not steps:
        return [("steps", "0")]
    facts = [("steps", f"{steps[-1]['step']:,}")]
    epochs, losses = _values(steps, "epoch"), _values(steps, "loss")
    speeds, seconds = _values(steps, "tokens_per_second"), _values(steps, "step_seconds")
    if epochs:
        facts.append(("epochs", short_number(epochs[-1])))
    if losses:
        last = losses[-FINAL_STEPS:]
        label = f"loss, mean of the last {len(last)} steps (first step {losses[0]:.3g})"
        facts.append((label, f"{fmean(last):.3g}"))
    if speeds:
        facts.append(("tokens per second (median)", short_number(median(speeds))))
    if seconds:
        facts.append(("time in steps", _duration(sum(seconds))))
    return facts


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


# Metrics


def _metrics_section(metrics: Mapping[str, Mapping[str, Any]]) -> str:
    if not metrics:
        return ""
    controls = {name for name in metrics if name.removeprefix(BLIND) in metrics.keys() - {name}}
    rows = "".join(
        _metric_row(name, metrics[name], metrics.get(BLIND + name))
        for name in metrics
        if name not in controls
    )
    note = f'<p class="note">{escape(BLIND_TEXT)}</p>' if controls else ""
    return (
        "<section><h2>Held-out metrics</h2>"
        '<table class="metrics"><thead><tr><th>metric</th><th>held-out value, 95% interval</th>'
        f"<th>blind control</th></tr></thead><tbody>{rows}</tbody></table>{note}</section>\n"
    )


def _metric_row(name: str, score: Mapping[str, Any], blind: Mapping[str, Any] | None) -> str:
    description = _description(name)
    control = '<span class="muted">not measured</span>' if blind is None else _score(name, blind)
    return (
        f"<tr><th>{escape(name)}<small>{escape(description)}</small></th>"
        f'<td data-label="held-out">{_score(name, score)}</td>'
        f'<td data-label="blind">{control}</td></tr>\n'
    )


def _description(name: str) -> str:
    stem = name.removesuffix("_unseen")
    end, text = next((pair for pair in _DESCRIPTIONS if stem.endswith(pair[0])), ("", ""))
    text = text.replace("FIELD", stem.removesuffix(end).replace("_", " "))
    return f"{text}; only values that never occur in training" if stem != name else text


def _score(name: str, score: Mapping[str, Any]) -> str:
    n = f'<span class="n">n = {score["n"]:,}</span>'
    if score["value"] is None:
        return f'<span class="muted">no rows</span> {n}'
    value, low, high = (_metric_value(name, score[key]) for key in ("value", "low", "high"))
    return f'<b>{value}</b> <span class="interval">{low} &ndash; {high}</span> {n}'


def _metric_value(name: str, value: float | None) -> str:
    if value is None:
        return "?"
    if name.removesuffix("_unseen").endswith(_RATES):
        return f"{100 * value:,.1f}%"
    return f"{value:,.4g}"


# Charts


def _charts_section(steps: Sequence[Step]) -> str:
    def curve(key: str, name: str = "", is_smoothed: bool = False) -> Curve:
        return Curve(name or key, _points(steps, key), is_smoothed)

    rates = _rate_curves(steps)
    shared = ", the same for all modules" if len(rates) == 1 and "," in rates[0].name else ""
    charts = (
        line_chart("Loss", [curve("loss", is_smoothed=True)]),
        line_chart(f"Learning rate{shared}", rates),
        line_chart("Tokens per second", [curve("tokens_per_second", is_smoothed=True)]),
        line_chart("Gradient norm", [curve("grad_norm", is_smoothed=True)]),
        line_chart(
            "Packing and balance",
            [
                curve("packing", "real tokens over budget", is_smoothed=True),
                curve("balance", "mean over max cost of the ranks", is_smoothed=True),
            ],
            is_percent=True,
        ),
        line_chart(
            "Seconds per step",
            [
                curve("step_seconds", "whole step", is_smoothed=True),
                curve("data_wait_seconds", "waiting for data", is_smoothed=True),
            ],
        ),
        line_chart("Model FLOPs utilisation", [curve("mfu", is_smoothed=True)], is_percent=True),
        line_chart("Device memory, GB", [curve("memory_gb")]),
    )
    drawn = "".join(charts)
    return f'<section><h2>Training</h2><div class="charts">{drawn}</div></section>\n' * bool(drawn)


def _rate_curves(steps: Sequence[Step]) -> list[Curve]:
    """Return a learning rate curve per module; modules with identical curves share one."""
    modules = dict.fromkeys(module for step in steps for module in step.get("lr") or {})
    names: dict[tuple[tuple[float, float], ...], list[str]] = {}
    for module in modules:
        rates = [{"step": step["step"], "lr": (step.get("lr") or {}).get(module)} for step in steps]
        names.setdefault(tuple(_points(rates, "lr")), []).append(module)
    return [Curve(", ".join(group), points) for points, group in names.items()]


def _points(steps: Sequence[Step], key: str) -> Points:
    return [(step["step"], step[key]) for step in steps if _is_number(step.get(key))]


def _values(steps: Sequence[Step], key: str) -> list[float]:
    return [value for _, value in _points(steps, key)]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


# Examples


def _examples_section(examples: Sequence[Example]) -> str:
    if not examples:
        return ""
    prompt, shows_prompts = examples[0].prompt, len({example.prompt for example in examples}) > 1
    has_blind = any(example.blind is not None for example in examples)
    rows = "".join(
        _example_row(example, number, shows_prompts, has_blind)
        for number, example in enumerate(examples, start=1)
    )
    asked = "" if shows_prompts else f'Asked each time: <span class="text">{escape(prompt)}</span>'
    num_right = sum(example.is_right for example in examples)
    blind_head = "<th>blind prediction</th>" * has_blind
    return (
        f'<section><h2>Examples</h2><p class="note">{num_right} of the {len(examples)} shown are '
        f"right. {asked}</p>"
        '<table class="examples"><thead><tr><th>picture</th><th>reference</th><th>prediction</th>'
        f"{blind_head}<th>result</th></tr></thead><tbody>{rows}</tbody></table></section>\n"
    )


def _example_row(example: Example, number: int, shows_prompt: bool, has_blind: bool) -> str:
    prompt = f'<div class="prompt text">{escape(example.prompt)}</div>' if shows_prompt else ""
    blind = _text_cell("blind prediction", example.blind) if has_blind else ""
    verdict = "right" if example.is_right else "wrong"
    mark = "&#10003;" if example.is_right else "&#10007;"
    return (
        f'<tr><td class="picture">{_picture(example.image, number)}{prompt}</td>'
        f"{_text_cell('reference', example.reference)}"
        f"{_text_cell('prediction', example.prediction)}{blind}"
        f'<td data-label="result"><span class="{verdict}">{mark} {verdict}</span></td></tr>\n'
    )


def _text_cell(label: str, text: str | None) -> str:
    if text is None:
        return f'<td data-label="{label}"><span class="muted">not asked</span></td>'
    return f'<td data-label="{label}"><span class="text">{escape(text)}</span></td>'


def _picture(image: np.ndarray | None, number: int) -> str:
    if image is None:
        return '<span class="muted">no picture</span>'
    url = jpeg_url(image, PICTURE_PIXELS)
    return f'<img src="{url}" alt="picture of example {number}">'


# Facts


def _throughput(figures: Mapping[str, float | None]) -> dict[str, str]:
    """Return the run's rates, in words; what is null or absent is left out."""
    return {
        label: text(value)
        for name, label, text in _FIGURES
        if (value := figures.get(name)) is not None
    }


def _totals(summary: Mapping[str, Any]) -> dict[str, str]:
    """Return what summary.json says in one value each, `totals` first."""
    entries = dict(summary.get("totals") or {}) | dict(summary)
    return {
        name.replace("_", " "): f"{value:,.6g}" if isinstance(value, float) else _plain(value)
        for name, value in entries.items()
        if isinstance(value, str | int | float)
    }


def _plain(value: str | int) -> str:
    is_count = isinstance(value, int) and not isinstance(value, bool)
    return f"{value:,}" if is_count else str(value)


_STYLE = """
.metrics thead th { width: 32%; } .metrics thead th:first-child { width: 36%; }
.metrics b { display: inline-block; min-width: 4.3em; font-size: 1.13em; }
.interval { display: inline-block; min-width: 8.2em; }
.n { color: var(--muted); font-size: 0.87em; white-space: nowrap; }
.picture { width: 174px; }
.picture img { display: block; max-width: 160px; max-height: 160px; border-radius: 4px; }
.prompt { color: var(--muted); font-size: 0.87em; margin-top: 4px; }
.right { color: var(--right); } .wrong { color: var(--wrong); }
.right, .wrong { font-weight: 600; white-space: nowrap; }
@media screen and (max-width: 680px) {
  .metrics thead, .examples thead { display: none; }
  .metrics tr, .examples tr { display: block; border-bottom: 1px solid var(--rule);
    padding: 8px 0; }
  .metrics th, .metrics td, .examples td { display: block; width: auto; border: 0; padding: 3px 0; }
  td[data-label]::before { content: attr(data-label); display: block; color: var(--muted);
    font-size: 0.87em; }
  .metrics td[data-label]::before { display: inline-block; width: 5em; }
  .metrics b { min-width: 3.8em; } .interval { min-width: 8em; } }
"""

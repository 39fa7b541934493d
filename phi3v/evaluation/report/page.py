"""The whole report: what a run left, section by section, in one file.

    write_report(run / "report.html", Report(title="products", steps=steps, summary=summary))

It needs nothing else: style, charts and pictures are inline, there is no script, and a content
policy forbids any request. What a run did not measure is left out rather than shown empty. Curves
are thinned, pictures shrunk, long texts cut and long lists shortened, each saying so: the file of a
run of any length stays below MOST_BYTES.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from statistics import fmean, median
from typing import Any

from phi3v.evaluation.charts import CHART_STYLE, short_number
from phi3v.evaluation.report.curves import Step, evaluation_section, training_section, values
from phi3v.evaluation.report.examples import Example, examples_section
from phi3v.evaluation.report.metrics import metrics_section
from phi3v.evaluation.report.records import (
    Saved,
    checkpoints_section,
    data_section,
    faults_section,
    files_section,
)
from phi3v.evaluation.report.style import REPORT_STYLE
from phi3v.evaluation.report.words import duration, rows_of, throughput_facts, totals_facts
from phi3v.files import write_text
from phi3v.page import facts_section, heading, html_page

FINAL_STEPS = 20  # the final loss is a mean over so many steps
MOST_BYTES = 2_000_000  # 0.2 MB for a run of the demo's size


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a run left; anything may be missing.

    steps        lines of metrics.jsonl in order; a value may be null or absent
    summary      the content of summary.json: `metrics`, `throughput`, totals (top level or under
                 `totals`)
    epochs       passes over the training samples, or None where unknown
    evaluations  lines of evaluations.jsonl in order
    data         `datasets` of data.json
    checkpoints  oldest first
    faults       lines of faults.jsonl
    facts        settings worth showing, by name
    files        texts shown folded, by name: the resolved recipe
    """

    title: str
    steps: Sequence[Step] = ()
    summary: Mapping[str, Any] = field(default_factory=dict)
    epochs: float | None = None
    evaluations: Sequence[Mapping[str, Any]] = ()
    examples: Sequence[Example] = ()
    data: Sequence[Mapping[str, Any]] = ()
    checkpoints: Sequence[Saved] = ()
    faults: Sequence[Mapping[str, Any]] = ()
    facts: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)


def write_report(path: Path, report: Report) -> None:
    """Write the page, whole or not at all."""
    sections = {name: body for name, body in _sections(report) if body}
    links = "".join(f'<a href="#{name}">{name}</a>' for name in sections)
    written = f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M:%S} UTC"
    below = f'<p class="note">Written {written}</p><nav>{links}</nav>'
    head = heading(report.title, _key_facts(report), below)
    body = head + "".join(sections.values())
    write_text(path, html_page(report.title, body, CHART_STYLE + REPORT_STYLE))


def _sections(report: Report) -> Iterator[tuple[str, str]]:
    summary = report.summary
    yield "metrics", metrics_section(summary.get("metrics") or {}, report.evaluations)
    yield "evaluations", evaluation_section(report.evaluations)
    yield "training", training_section(report.steps)
    yield "throughput", facts_section("Throughput", throughput_facts(summary))
    yield "examples", examples_section(report.examples)
    yield "data", data_section(report.data)
    yield "checkpoints", checkpoints_section(report.checkpoints)
    yield "faults", faults_section(report.faults)
    yield "settings", facts_section("Settings", report.facts)
    yield "totals", facts_section("Totals", totals_facts(summary))
    yield "recipe", files_section(report.files)


def _key_facts(report: Report) -> list[tuple[str, str]]:
    steps = report.steps
    if not steps:
        return [("steps", "0")]
    facts = [("steps", f"{steps[-1]['step']:,}")]
    if diverged := report.summary.get("diverged"):
        facts.append((f"this run: {diverged}", "diverged"))
    losses = values(steps, "loss")
    speeds, seconds = values(steps, "tokens_per_second"), values(steps, "step_seconds")
    if report.epochs is not None:
        facts.append(("epochs", f"{report.epochs:,.1f}"))
    if losses:
        last = losses[-FINAL_STEPS:]
        label = f"loss, mean of the last {len(last)} steps (first step {losses[0]:.3g})"
        facts.append((label, f"{fmean(last):.3g}"))
    if (loss := report.summary.get("evaluation_loss")) is not None:
        facts.append((f"{rows_of(report.evaluations[-1:])} loss", f"{loss:.3g}"))
    if speeds:
        facts.append(("tokens per second (median)", short_number(median(speeds))))
    if seconds:
        facts.append(("time in steps", duration(sum(seconds))))
    return facts

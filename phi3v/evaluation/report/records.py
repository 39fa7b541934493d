"""What a run was made of and what it left: its data, checkpoints, faults, and recipe."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from phi3v.evaluation.bars import bar_chart, histogram
from phi3v.evaluation.report.words import shortened

MOST_LINES = 50  # of a table; the newest are shown
MOST_FILE_CHARACTERS = 50_000
MOST_CHARTS = 12  # datasets whose lengths are drawn


@dataclass(frozen=True)
class Saved:
    """A checkpoint that is kept; `saved_at` in UTC, `marks` such as latest and best."""

    step: int
    saved_at: str
    size_bytes: int
    marks: tuple[str, ...] = ()


def data_section(datasets: Sequence[Mapping[str, Any]]) -> str:
    """`datasets` of data.json: sizes by split, what was rejected and why, how long samples are."""
    if not datasets:
        return ""
    heads = ("dataset", "split", "samples", "tokens", "trained", "images")
    rows = [
        [data["folder"], split, *(_count(sizes.get(key)) for key in _SIZES)]
        for data in datasets
        for split, sizes in data["splits"].items()
    ]
    charts = "".join(
        bar_chart(
            f"{data['folder']}, {split}: samples by tokens",
            histogram({int(start): count for start, count in sizes.get("histogram") or ()}),
            "tokens of a sample",
        )
        for data in datasets[:MOST_CHARTS]
        for split, sizes in data["splits"].items()
    )
    notes = "".join(_rejected(data) for data in datasets)
    drawn = f'<div class="charts">{charts}</div>' if charts else ""
    return _section("data", "Data", _table(heads, rows) + notes + drawn)


_SIZES = ("samples", "tokens", "label_tokens", "images")


def checkpoints_section(checkpoints: Sequence[Saved]) -> str:
    """The checkpoints that are kept, oldest first."""
    rows = [
        [
            f"{saved.step:,}",
            saved.saved_at,
            f"{saved.size_bytes / 1e9:,.3f}",
            ", ".join(saved.marks),
        ]
        for saved in checkpoints
    ]
    heads = ("step", "saved at (UTC)", "size, GB", "this is the")
    return _section("checkpoints", "Checkpoints", _table(heads, rows)) if rows else ""


def faults_section(faults: Sequence[Mapping[str, Any]]) -> str:
    """The steps that were skipped, and the times the run went back."""
    rows = [
        [f"back to {fault['back_to']:,}", f"{len(fault['left_out'])} steps are left out", ""]
        if "left_out" in fault
        else [f"{fault['step']:,}", fault["reason"], _loss(fault.get("loss"))]
        for fault in faults
    ]
    heads = ("step", "skipped because", "loss")
    return _section("faults", "Faults", _table(heads, rows)) if rows else ""


def files_section(files: Mapping[str, str]) -> str:
    """Whole texts, folded."""
    folded = "".join(
        f"<details><summary>{escape(name)}</summary><pre>{escape(text[:MOST_FILE_CHARACTERS])}"
        f"{' ...' if len(text) > MOST_FILE_CHARACTERS else ''}</pre></details>\n"
        for name, text in files.items()
    )
    return _section("recipe", "Recipe", folded) if folded else ""


def _rejected(data: Mapping[str, Any]) -> str:
    rejected = data.get("rejected") or {"count": 0}
    if not rejected["count"]:
        return ""
    reasons = ", ".join(f"{reason} ({n:,})" for reason, n in rejected["by_reason"].items())
    text = f"{data['folder']}: {rejected['count']:,} rows were rejected: {reasons}."
    return f'<p class="note">{escape(shortened(text))}</p>'


def _table(heads: Iterable[str], rows: Sequence[Sequence[str]]) -> str:
    """A table that a phone shows as blocks, each value below its heading."""
    heads, left_out = list(heads), max(0, len(rows) - MOST_LINES)
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    body = "".join(
        "<tr>"
        + "".join(
            f'<td data-label="{escape(name)}">{escape(shortened(cell))}</td>'
            for name, cell in zip(heads, row, strict=True)
        )
        + "</tr>\n"
        for row in rows[left_out:]
    )
    note = f'<p class="note">{left_out:,} earlier lines are left out.</p>' if left_out else ""
    return f'{note}<table class="list"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def _section(name: str, title: str, body: str) -> str:
    return f'<section id="{name}"><h2>{title}</h2>{body}</section>\n'


def _count(value: int | None) -> str:
    return "not counted" if value is None else f"{value:,}"


def _loss(value: float | None) -> str:
    return "not finite" if value is None else f"{value:,.4g}"

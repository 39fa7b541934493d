"""Counts as upright bars, inline SVG in the style of the line charts; the page has CHART_STYLE."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from phi3v.data.audit import bin_end
from phi3v.evaluation.charts import GAP, left_margin, short_number

WIDTH, HEIGHT = 480, 190  # units of the viewBox; the page scales it to its column
TOP, BOTTOM = 16, 40
MOST_LABELS = 8  # below the bars
WIDEST = 36  # units of a bar
MOST_COUNTS = 12  # bars that have their count above them


@dataclass(frozen=True)
class Bar:
    """A count, the label below it, and what its tooltip says it counts."""

    label: str
    count: int
    text: str


def histogram(counts: Mapping[int, int]) -> list[Bar]:
    """Bars of samples counted by the start of their bin, empty bins between them included."""
    bars: list[Bar] = []
    start, last = min(counts, default=0), max(counts, default=-1)
    while start <= last:
        end, label, count = bin_end(start), f"{start:,}", counts.get(start, 0)
        span = label if end == start else f"{label} to {end:,}"
        bars.append(Bar(label, count, f"{span}: {count:,} samples"))
        start = end + 1
    return bars


def bar_chart(title: str, bars: Sequence[Bar], axis: str) -> str:
    """Draw counts as upright bars; "" where there are none.

    axis  what the labels below the bars are
    """
    if not bars:
        return ""
    highest = max(bar.count for bar in bars)
    levels = [highest, highest // 2] if highest % 2 == 0 else [highest]
    left = left_margin(map(short_number, levels))
    bottom, slot = HEIGHT - BOTTOM, (WIDTH - left) / len(bars)
    every = -(-len(bars) // MOST_LABELS)
    parts = [_level(n, left, bottom - (bottom - TOP) * n / highest) for n in levels]
    for number, bar in enumerate(bars):
        centre, height = left + (number + 0.5) * slot, (bottom - TOP) * bar.count / highest
        width, middle = min(0.84 * slot, WIDEST), f'x="{centre:.1f}" class="middle"'
        parts.append(
            f'<rect class="bar" x="{centre - width / 2:.1f}" y="{bottom - height:.1f}" '
            f'width="{width:.1f}" height="{height:.1f}"><title>{escape(bar.text)}</title></rect>'
        )
        if len(bars) <= MOST_COUNTS and bar.count:
            count = short_number(bar.count)
            parts.append(f'<text y="{bottom - height - 4:.1f}" {middle}>{count}</text>')
        if number % every == 0:
            parts.append(f'<text y="{bottom + 16}" {middle}>{escape(bar.label)}</text>')
    parts.append(f'<path class="axis" d="M{left:g} {bottom}H{WIDTH}"/>')
    parts.append(f'<text x="{(left + WIDTH) / 2:g}" y="{HEIGHT - 5}" class="middle">{axis}</text>')
    return figure(title, WIDTH, HEIGHT, "".join(parts))


def figure(title: str, width: float, height: float, body: str) -> str:
    """A drawing of so many units with its caption."""
    return (
        f"<figure><figcaption>{escape(title)}</figcaption>"
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">{body}'
        "</svg></figure>\n"
    )


def _level(value: float, left: float, at: float) -> str:
    return (
        f'<path class="grid" d="M{left:g} {at:g}H{WIDTH}"/>'
        f'<text x="{left - GAP:g}" y="{at + 4:g}" class="end">{short_number(value)}</text>'
    )

"""Bars, grids and packs as inline SVG; the page includes CHART_STYLE and VIEW_STYLE."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from phi3v.evaluation.charts import short_number
from phi3v.geometry import Grid

WIDTH, HEIGHT = 480, 190  # units of the viewBox; the page scales it to its column
LEFT, TOP, BOTTOM = 46, 16, 40
MOST_LABELS = 8  # below the bars
WIDEST = 36  # units of a bar
MOST_COUNTS = 12  # bars that have their count above them
CELL = 44  # units of a cell of the grids
PACK_HEIGHT, PACK_GAP = 18, 8


@dataclass(frozen=True)
class Bar:
    """A count, the label below it, and what its tooltip says it counts."""

    label: str
    count: int
    text: str


@dataclass(frozen=True)
class Part:
    """Tokens of one sample in a pack, by what they are."""

    image: int
    text: int
    trained: int


def bar_chart(title: str, bars: Sequence[Bar], axis: str) -> str:
    """Draw counts as upright bars; "" where there are none.

    axis  what the labels below the bars are
    """
    if not bars:
        return ""
    highest = max(bar.count for bar in bars)
    bottom, slot = HEIGHT - BOTTOM, (WIDTH - LEFT) / len(bars)
    every = -(-len(bars) // MOST_LABELS)
    parts = [
        _level(highest, TOP),
        _level(highest / 2, (TOP + bottom) / 2) if highest % 2 == 0 else "",
    ]
    for number, bar in enumerate(bars):
        centre, height = LEFT + (number + 0.5) * slot, (bottom - TOP) * bar.count / highest
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
    parts.append(f'<path class="axis" d="M{LEFT} {bottom}H{WIDTH}"/>')
    parts.append(f'<text x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 5}" class="middle">{axis}</text>')
    return _figure(title, WIDTH, HEIGHT, "".join(parts))


def grid_chart(title: str, counts: Mapping[Grid, int]) -> str:
    """Draw how many canvases have so many rows and columns of crops; "" where there are none."""
    if not counts:
        return ""
    rows, cols = max(grid.rows for grid in counts), max(grid.cols for grid in counts)
    most = max(counts.values())
    parts = [
        f'<text x="{CELL * (col + 1.5)}" y="14" class="middle">{col + 1}</text>'
        for col in range(cols)
    ]
    for row in range(rows):
        top = 20 + CELL * row
        parts.append(f'<text x="{CELL - 8}" y="{top + 26}" class="end">{row + 1}</text>')
        parts += [_cell(Grid(row + 1, col + 1), counts, most, top) for col in range(cols)]
    width = max(WIDTH, CELL * (cols + 1))
    return _figure(f"{title}: rows by columns", width, 22 + CELL * rows, "".join(parts))


def pack_chart(title: str, packs: Sequence[Sequence[Part]], budget: int) -> str:
    """Draw packs as bars as long as their tokens, their samples laid end to end.

    budget  tokens of a pack, the whole width
    """
    width, line = 1000, PACK_HEIGHT + PACK_GAP
    parts = []
    for number, pack in enumerate(packs):
        top = 2 + number * line
        parts.append(f'<rect class="room" x="0" y="{top}" width="{width}" height="{PACK_HEIGHT}"/>')
        parts += _pack(pack, top, width / budget)
    return _figure(title, width, 2 + len(packs) * line, "".join(parts))


def _pack(pack: Sequence[Part], top: int, scale: float) -> list[str]:
    """One path for all stretches of a colour; a hair of room is left behind each sample."""
    paths = {"image": "", "text": "", "trained": ""}
    start = 0
    for part in pack:
        total = part.image + part.text + part.trained
        gap = min(0.8, 0.15 * total * scale)
        for kind in paths:
            stop = start + getattr(part, kind)
            if stop > start:
                total -= stop - start
                length = (stop - start) * scale - (0 if total else gap)
                paths[kind] += f"M{start * scale:.2f} {top}h{length:.2f}v{PACK_HEIGHT}"
                paths[kind] += f"h{-length:.2f}z"
            start = stop
    return [f'<path class="in-{kind}" d="{path}"/>' for kind, path in paths.items() if path]


def _cell(grid: Grid, counts: Mapping[Grid, int], most: int, top: float) -> str:
    count, left = counts.get(grid, 0), CELL * grid.cols
    strength = 0.15 + 0.6 * count / most if count else 0
    rect = (
        f'<rect class="cell" x="{left}" y="{top}" width="{CELL}" height="{CELL}"/>'
        f'<rect class="bar" opacity="{strength:.2f}" x="{left}" y="{top}" width="{CELL}" '
        f'height="{CELL}"/>'
    )
    if not count:
        return rect
    text = f"{grid.rows} x {grid.cols} crops: {count:,} canvases"
    label = f'<text class="middle ink" x="{left + CELL / 2}" y="{top + 27}">{short_number(count)}'
    return f"<g><title>{text}</title>{rect}{label}</text></g>"


def _level(value: float, at: float) -> str:
    return (
        f'<path class="grid" d="M{LEFT} {at}H{WIDTH}"/>'
        f'<text x="{LEFT - 7}" y="{at + 4}" class="end">{short_number(value)}</text>'
    )


def _figure(title: str, width: float, height: float, body: str) -> str:
    return (
        f"<figure><figcaption>{escape(title)}</figcaption>"
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">{body}'
        "</svg></figure>\n"
    )

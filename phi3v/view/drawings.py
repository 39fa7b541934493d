"""Grids and packs as inline SVG; the page includes CHART_STYLE and VIEW_STYLE."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from phi3v.evaluation.bars import WIDTH, figure
from phi3v.evaluation.charts import short_number
from phi3v.geometry import Grid

CELL = 44  # units of a cell of the grids
PACK_HEIGHT, PACK_GAP = 18, 8


@dataclass(frozen=True)
class Part:
    """Tokens of one sample in a pack, by what they are."""

    image: int
    text: int
    trained: int


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
    return figure(f"{title}: rows by columns", width, 22 + CELL * rows, "".join(parts))


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
    return figure(title, width, 2 + len(packs) * line, "".join(parts))


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

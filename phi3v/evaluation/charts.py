"""Line charts as inline SVG, without a plotting package.

    svg = line_chart("Loss", [Curve("loss", [(1, 8.1), (2, 7.9)], is_smoothed=True)])

A chart is text of about 10 kB whatever the length of the run: a curve of more than 400 points is
thinned to the lowest and highest point of each of 200 stretches, so that no spike is lost. Lines
differ in their dashes as well as in their colours; the first of several is broad, so that it is
seen below one that covers it. The page must include `CHART_STYLE` and define the colours `--muted`
and `--rule`.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import accumulate, chain

WIDTH, HEIGHT = 480, 250  # units of the viewBox; the page scales it to its column
LEFT, RIGHT, TOP, BOTTOM = 52, 22, 10, 40  # LEFT is more where a label needs it
GAP = 7  # between a label and the axis
LETTER, WIDE_LETTER = 9.6, 14.3  # units at the size of a phone, in the wide font DejaVu Sans
NUM_TICKS = 5
MOST_POINTS = 400
NUM_STYLES = 6  # the classes s0 ... s5 of lines and their keys

_UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k"))

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Curve:
    """A named line of (step, value) points; a smoothed one is drawn over its faint raw line.

    spans  (step, low, high) of intervals, drawn as faint upright lines
    """

    name: str
    points: Points
    is_smoothed: bool = False
    spans: Sequence[tuple[float, float, float]] = ()


@dataclass(frozen=True)
class _Axis:
    """Values `low` to `high` laid on the viewBox from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float
    ticks: Sequence[float]

    def place(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def line_chart(title: str, curves: Sequence[Curve], is_percent: bool = False) -> str:
    """Draw the curves over the training step as one <figure>; "" where no curve has a point.

    is_percent  values are fractions, and the axis shows them as percent
    """
    curves = [curve for curve in curves if curve.points]
    if not curves:
        return ""
    x, y = _axes(list(chain.from_iterable(_extent(curve) for curve in curves)), is_percent)
    lines = "".join(_curve(curve, index, x, y) for index, curve in enumerate(curves))
    several = ' class="several"' if len(curves) > 1 else ""
    return (
        f"<figure><figcaption>{escape(title)}{_legend(curves)}</figcaption>"
        f'<svg{several} viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(title)} by step">'
        f"{_grid(x, y, is_percent)}{lines}</svg></figure>\n"
    )


def smooth(points: Points) -> Points:
    """Return the mean of each point and its neighbours, about 1/25 of all points.

    The stretch is centred, so a falling curve is not drawn too high as by a running mean. It
    shortens on both sides towards the start, where curves are steep, and on one towards the end.
    """
    widest = len(points) // 50
    sums = [0.0, *accumulate(value for _, value in points)]
    means = []
    for index, (step, _) in enumerate(points):
        reach = min(widest, index)
        start, end = index - reach, min(index + reach + 1, len(points))
        means.append((step, (sums[end] - sums[start]) / (end - start)))
    return means


def left_margin(labels: Iterable[str]) -> float:
    """Return the units that labels left of the axis need, LEFT at least: charts line up then."""
    widths = (sum(WIDE_LETTER if c in "%MG" else LETTER for c in label) for label in labels)
    return max(LEFT, GAP + max(widths))


def short_number(value: float) -> str:
    """Write a number in a few characters: 1234.5 -> 1,234; 0.05 -> 0.05; 2.1e7 -> 21M."""
    rounded = float(f"{value:.3g}")  # first, or 999,999 would be 1e+03k
    for unit, suffix in _UNITS:
        if abs(rounded) >= unit:
            divisor = 1e3 if suffix == "k" else unit
            return f"{rounded / divisor:.3g}{suffix}"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}".replace("e-0", "e-")


def _extent(curve: Curve) -> Points:
    ends = ((step, value) for step, *both in curve.spans for value in both)
    return [*curve.points, *ends]


def _axes(points: Points, is_percent: bool) -> tuple[_Axis, _Axis]:
    steps, values = [step for step, _ in points], [value for _, value in points]
    low, high = _widen(min(values), max(values))
    if min(values) >= 0:  # a rate, a count or a loss is never less
        low = max(low, 0.0)
    if is_percent and max(values) <= 1:  # of shares there is no more than all
        high = min(high, 1.0)
    if 0 < low < high / 2:  # show zero unless that would flatten the curve
        low = 0.0
    ticks = _ticks(low, high)
    y = _Axis(ticks[0], ticks[-1], HEIGHT - BOTTOM, TOP, ticks)
    low, high = _widen(min(steps), max(steps))
    inside = [tick for tick in _ticks(low, high) if low <= tick <= high and _is_whole(tick)]
    return _Axis(low, high, left_margin(_labels(ticks, is_percent)), WIDTH - RIGHT, inside), y


def _widen(low: float, high: float) -> tuple[float, float]:
    """Give a range without extent some: a tenth of the value on each side, or 1 around zero."""
    if high > low:
        return low, high
    margin = abs(low) / 10 or 1.0
    return low - margin, high + margin


def _is_whole(tick: float) -> bool:
    return math.isclose(tick, round(tick), abs_tol=1e-9)


def _ticks(low: float, high: float) -> list[float]:
    """Return round values from at or below `low` to at or above `high`, e.g. 0, 2, 4, 6, 8."""
    rough = (high - low) / NUM_TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def _grid(x: _Axis, y: _Axis, is_percent: bool) -> str:
    left, right, bottom = x.start, WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = []
    for tick, label in zip(y.ticks, _labels(y.ticks, is_percent), strict=True):
        at = y.place(tick)
        parts.append(f'<path class="grid" d="M{left:g} {at:.1f}H{right}"/>')
        parts.append(f'<text x="{left - GAP:g}" y="{at + 4:.1f}" class="end">{label}</text>')
    for tick, label in zip(x.ticks, _labels(x.ticks), strict=True):
        at = x.place(tick)
        parts.append(f'<path class="axis" d="M{at:.1f} {bottom}v4"/>')
        parts.append(f'<text x="{at:.1f}" y="{bottom + 17}" class="middle">{label}</text>')
    parts.append(f'<path class="axis" d="M{left:g} {bottom}H{right}"/>')
    parts.append(f'<text x="{(left + right) / 2:g}" y="{HEIGHT - 6}" class="middle">step</text>')
    return "".join(parts)


def _labels(ticks: Sequence[float], is_percent: bool = False) -> list[str]:
    """Write ticks in the unit of the largest: 0, 5k, 10k; tiny ones each in its own: 5e-6, 1e-5."""
    if is_percent:
        return [f"{100 * tick:.4g}%" for tick in ticks]
    largest = max(abs(tick) for tick in ticks)
    if largest < 0.01:
        return [_scientific(tick) if tick else "0" for tick in ticks]
    unit, suffix = next(((u, s) for u, s in _UNITS if largest >= u), (1.0, ""))
    divisor = 1e3 if suffix == "k" else unit
    return [f"{tick / divisor:,.4g}{suffix}".replace("e-0", "e-") for tick in ticks]


def _scientific(value: float) -> str:
    """1.5e-3 rather than 1.500e-03."""
    factor, power = f"{value:.3e}".split("e")
    return f"{float(factor):g}e{int(power)}"


def _curve(curve: Curve, index: int, x: _Axis, y: _Axis) -> str:
    style = f"s{index % NUM_STYLES}"
    if not curve.is_smoothed:
        return _spans(curve, index, x, y) + _line(curve.points, style, x, y)
    return _line(curve.points, f"{style} faint", x, y) + _line(smooth(curve.points), style, x, y)


def _spans(curve: Curve, index: int, x: _Axis, y: _Axis) -> str:
    """Upright lines, those of each curve a little beside those before."""
    if not curve.spans or len(curve.spans) > MOST_POINTS:
        return ""
    lines = (
        f"M{x.place(step) + 4 * index:.1f} {y.place(low):.1f}V{y.place(high):.1f}"
        for step, low, high in curve.spans
    )
    return f'<path class="s{index % NUM_STYLES} span" d="{"".join(lines)}"/>'


def _line(points: Points, style: str, x: _Axis, y: _Axis) -> str:
    places = [(x.place(step), y.place(value)) for step, value in _thin(points)]
    if len(places) == 1:
        across, down = places[0]
        radius = 3 + 2.5 * int(style[1])  # rings around one another where points coincide
        return f'<circle class="{style}" cx="{across:.1f}" cy="{down:.1f}" r="{radius:g}"/>'
    path = " ".join(f"{across:.1f},{down:.1f}" for across, down in places)
    return f'<polyline class="{style}" points="{path}"/>'


def _thin(points: Points) -> Points:
    """Keep the lowest and the highest point of each stretch, in order."""
    if len(points) <= MOST_POINTS:
        return points
    size = math.ceil(2 * len(points) / MOST_POINTS)
    kept: list[tuple[float, float]] = []
    for start in range(0, len(points), size):
        stretch = sorted(points[start : start + size], key=lambda point: point[1])
        kept += sorted({stretch[0], stretch[-1]})
    return kept


def _legend(curves: Sequence[Curve]) -> str:
    if len(curves) == 1:
        return ""
    keys = (
        '<span class="key"><svg viewBox="0 0 30 6" aria-hidden="true">'
        f'<path class="s{index % NUM_STYLES}" d="M0 3H30"/></svg>{escape(curve.name)}</span>'
        for index, curve in enumerate(curves)
    )
    return f'<span class="legend">{"".join(keys)}</span>'


CHART_STYLE = """
:root { --s0: #2459b8; --s1: #cc5f00; --s2: #25804a; --s3: #8a3fa8; --s4: #00798c; --s5: #a33b55; }
@media screen and (prefers-color-scheme: dark) { :root { --s0: #7fabff; --s1: #ffa657;
  --s2: #6fce8d; --s3: #d39bf0; --s4: #5fd0e0; --s5: #ff9db3; } }
figure { margin: 0; break-inside: avoid; }
figcaption { font-weight: 600; margin-bottom: 4px; }
.legend { display: block; font-size: 0.87em; font-weight: 400; }
.key { display: inline-block; margin-right: 14px; overflow-wrap: anywhere; }
.key svg { display: inline-block; width: 30px; height: 6px; margin-right: 6px;
  vertical-align: middle; }
svg { display: block; width: 100%; height: auto; }
svg text { font-size: 12.5px; fill: var(--muted); font-variant-numeric: tabular-nums; }
.end { text-anchor: end; } .middle { text-anchor: middle; }
.grid { stroke: var(--rule); } .axis { stroke: var(--muted); }
.bar { fill: var(--s0); print-color-adjust: exact; }
polyline, circle, .key path, .span { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
.s0 { stroke: var(--s0); }
.several polyline.s0:not(.faint), .key .s0 { stroke-width: 3.6; }
.s1 { stroke: var(--s1); stroke-dasharray: 5 4; }
.s2 { stroke: var(--s2); stroke-dasharray: 2 2.5; }
.s3 { stroke: var(--s3); stroke-dasharray: 9 3 2 3; }
.s4 { stroke: var(--s4); stroke-dasharray: 4 2; }
.s5 { stroke: var(--s5); stroke-dasharray: 12 3 2 3 2 3; }
.faint, .span { opacity: 0.25; stroke-dasharray: none; } .faint { stroke-width: 1; }
.span { stroke-width: 3; opacity: 0.35; }
@media screen and (max-width: 680px) { svg text { font-size: 15px; } }
"""

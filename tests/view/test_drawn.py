"""The page as a browser draws it: colours, places and widths, on a desktop, a phone, in the dark.

A colour may differ by 2 of 255 in each channel, for drawing with antialiasing rounds.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from phi3v.data import Dataset
from tests.browser import Box, Browser, Drawn, needs_chromium
from tests.view.conftest import BLUE, View

pytestmark = [needs_chromium, pytest.mark.slow]

TRAINED, IMAGE, CONTROL = (211, 240, 219), (219, 231, 251), (107, 75, 143)
DARK_TRAINED, DARK_IMAGE, DARK_PAGE = (23, 73, 42), (29, 58, 107), (20, 24, 29)
IMAGE_BAR, TEXT_BAR, TRAINED_BAR = (36, 89, 184), (93, 103, 116), (37, 128, 74)
CUT, WHITE = (232, 89, 12), (255, 255, 255)


Draw = Callable[..., Drawn]


@pytest.fixture
def draw(browser: Browser, tmp_path: Path) -> Draw:
    """Draws the page that `view` has written."""
    return partial(browser.draw, tmp_path / "view.html")


def near(colour: tuple[int, ...], other: tuple[int, ...], tolerance: int = 2) -> bool:
    return max(abs(a - b) for a, b in zip(colour, other, strict=True)) <= tolerance


def shows(drawn: Drawn, box: Box, colour: tuple[int, ...]) -> bool:
    return any(near(found, colour) for found in drawn.colours(box))


def test_trained_masked_control_and_image_tokens_have_their_colours(view: View, draw: Draw) -> None:
    view(ids=("square-1", "<i>1</i>"))
    sequence = "div.tokens "
    names = [sequence + name for name in (".trained", ".masked", ".image", ".masked b")]
    drawn = draw(names)
    trained, masked, image, control = (drawn.boxes[name] for name in names)
    assert [box.text.strip() for box in trained][0] == "a blue picture. a blue picture.<|end|>"
    assert len(trained) == 2 and len(image) == 1
    assert all(shows(drawn, box, TRAINED) for box in trained)
    assert all(shows(drawn, box, IMAGE) and not shows(drawn, box, TRAINED) for box in image)
    assert not any(shows(drawn, box, IMAGE) for box in masked if box.height < 40)
    assert control and all(box.text.startswith("<") for box in control)
    assert all(shows(drawn, box, CONTROL) for box in control)
    # The question stands before its answer, and both are within the window.
    assert masked[0].y <= trained[0].y and max(b.x + b.width for b in trained) < 1280


@pytest.mark.parametrize(
    ("name", "rows", "columns"), [("square-0", 2, 2), ("tall-0", 2, 1)], ids=["2x2", "2x1"]
)
def test_a_canvas_is_drawn_with_lines_between_its_crops(
    view: View, draw: Draw, name: str, rows: int, columns: int
) -> None:
    view(ids=(name,))
    drawn = draw([".canvas svg", ".canvas img"])
    (canvas,), (overview,) = drawn.boxes[".canvas svg"], drawn.boxes[".canvas img"]
    assert canvas.width / canvas.height == pytest.approx(columns / rows, rel=0.01)
    # Beside lines the other way: a tenth of a crop off the middle.
    across, down = canvas.width / columns, canvas.height / rows
    for line in range(columns + 1):
        assert has_cut(drawn, canvas.x + line * across, canvas.y + 0.6 * down)
    for line in range(rows + 1):
        assert has_cut(drawn, canvas.x + 0.6 * across, canvas.y + line * down, is_flat=True)
    middle = (canvas.x + 0.5 * across, canvas.y + 0.5 * down)
    assert near(drawn.pixel(*middle), BLUE, 6)  # JPEG
    assert overview.x > canvas.x + canvas.width and overview.width == overview.height
    centre = (overview.x + overview.width / 2, overview.y + overview.height / 2)
    assert near(drawn.pixel(*centre), BLUE, 8)


def has_cut(drawn: Drawn, x: float, y: float, is_flat: bool = False) -> bool:
    """Whether a line of the cuts' colour lies within 2 pixels of a place."""
    steps = [(0, n) if is_flat else (n, 0) for n in range(-2, 3)]
    found = [drawn.pixel(x + dx, y + dy) for dx, dy in steps]
    return any(near(colour, CUT) for colour in found)


def test_the_padding_of_a_canvas_is_visible_within_its_outline(view: View, draw: Draw) -> None:
    view(ids=("padded",))
    drawn = draw([".canvas svg"])
    (canvas,) = drawn.boxes[".canvas svg"]
    x = canvas.x + 0.25 * canvas.width
    # 90 x 60 pixels become 112 x 74 of 112 x 112: 19 above and below are white.
    for y, colour in ((10, WHITE), (30, BLUE), (85, BLUE), (102, WHITE)):
        assert near(drawn.pixel(x, canvas.y + y * canvas.height / 112), colour, 8)
    assert has_cut(drawn, x, canvas.y, is_flat=True)


def test_bars_are_as_high_as_their_counts(view: View, draw: Draw, shards: Path) -> None:
    view(rows=1)
    name = 'svg[aria-label="Views per sample"] .bar'
    drawn = draw([name])
    views = np.concatenate([Dataset(shards, split).views for split in ("train", "validation")])
    counts = np.bincount(views)
    bars = [box for box in drawn.boxes[name]]
    assert len(bars) == len(counts)
    heights = [box.height for box in bars]
    assert heights == pytest.approx((counts / counts.max() * max(heights)).tolist(), abs=0.3)
    tallest = bars[int(np.argmax(heights))]
    at = (tallest.x + tallest.width / 2, tallest.y + tallest.height / 2)
    assert near(drawn.pixel(*at), IMAGE_BAR)


def test_packs_are_as_long_as_their_tokens_with_parts_by_kind(
    view: View, draw: Draw, shards: Path
) -> None:
    train = Dataset(shards, "train")
    budget = int(train.tokens.sum() / 0.8)
    view(rows=1, max_tokens=budget, max_views=1000)
    names = [f"#packs svg .in-{kind}" for kind in ("image", "text", "trained")] + [".room"]
    drawn = draw(names)
    *parts, rooms = (drawn.boxes[name] for name in names)
    assert [len(boxes) for boxes in (*parts, rooms)] == [1, 1, 1, 1]
    (room,), ends = rooms, max(box.x + box.width for boxes in parts for box in boxes)
    assert ends - room.x == pytest.approx(0.8 * room.width, abs=2)
    row = drawn.pixels[int(room.y + room.height / 2), int(room.x) : int(ends)].astype(int)
    # One pixel at each of 50 boundaries is a blend, of 790: 0.03 more text was measured.
    bars = np.array([IMAGE_BAR, TEXT_BAR, TRAINED_BAR])
    row = row[row.min(axis=1) < 150]  # without the room between samples
    kinds = np.abs(row[:, None] - bars).sum(axis=2).argmin(axis=1)  # the nearest colour's
    text = train.tokens - train.image_tokens - train.label_tokens
    for kind, tokens in enumerate((train.image_tokens, text, train.label_tokens)):
        assert (kinds == kind).mean() == pytest.approx(tokens.sum() / train.tokens.sum(), abs=0.05)


def test_nothing_sticks_out_on_a_phone(view: View, draw: Draw) -> None:
    view(rows=20)
    drawn = draw(["article", ".canvas svg"], width=390)
    assert drawn.width == 390
    assert all(box.x + box.width <= 390 for name in drawn.boxes for box in drawn.boxes[name])
    assert len(drawn.boxes["article"]) == 20


def test_in_the_dark_the_page_is_dark_and_tokens_keep_their_difference(
    view: View, draw: Draw
) -> None:
    view(ids=("square-1",))
    names = ["div.tokens .trained", "div.tokens .image"]
    drawn = draw(names, is_dark=True)
    assert near(drawn.pixel(2, 2), DARK_PAGE)
    assert shows(drawn, drawn.boxes[names[0]][0], DARK_TRAINED)
    assert shows(drawn, drawn.boxes[names[1]][0], DARK_IMAGE)

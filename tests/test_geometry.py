"""The HD layout and the token count, against a derivation of the published rule in numpy."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from phi3v.errors import SampleError
from phi3v.geometry import Grid, Layout, grid_of, hd_layout, image_tokens

SIZES = 100_000
CROP = 336
PIXELS, CROPS = st.integers(1, 5000), st.integers(1, 24)


def published_layouts(width: np.ndarray, height: np.ndarray, num_crops: np.ndarray) -> np.ndarray:
    """Long side, short side before and after padding, of every size at once: (3, sizes)."""
    ratio = np.maximum(width, height) / np.minimum(width, height)
    scale = np.zeros_like(num_crops)
    for tried in range(1, num_crops.max() + 1):
        scale = np.where(tried * np.ceil(tried / ratio) <= num_crops, tried, scale)
    short = np.trunc(CROP * scale / ratio).astype(int)
    return np.stack([CROP * scale, short, -(-short // CROP) * CROP])


def test_every_layout_of_100_000_sizes_is_the_published() -> None:
    random = np.random.default_rng(0)
    width, height = np.exp(random.uniform(0, np.log(8000), (2, SIZES))).astype(int)
    num_crops = random.integers(1, 25, SIZES)
    expected = published_layouts(width, height, num_crops).T.tolist()
    cases = zip(width.tolist(), height.tolist(), num_crops.tolist(), expected, strict=True)
    vanished = 0
    for w, h, crops, (long, short, padded) in cases:
        if short == 0:
            vanished += 1
            with pytest.raises(SampleError):
                hd_layout(w, h, crops, CROP)
            continue
        rows, cols = (long, padded) if w < h else (padded, long)
        grid = Grid(rows // CROP, cols // CROP)
        assert hd_layout(w, h, crops, CROP) == Layout(long, short, padded, w < h, grid)
    assert 100 < vanished < SIZES // 10  # of both kinds there are enough


@settings(deadline=None)
@given(PIXELS, PIXELS, CROPS, st.sampled_from([28, 56, 336]))
def test_a_layout_fills_the_crops_it_may_and_keeps_the_shape(
    width: int, height: int, num_crops: int, crop: int
) -> None:
    try:
        layout = hd_layout(width, height, num_crops, crop)
    except SampleError:
        return
    long, short = max(width, height), min(width, height)
    scale = layout.resized_long // crop
    larger = scale + 1
    assert layout.grid.crops <= num_crops
    assert larger * math.ceil(larger / (long / short)) > num_crops
    assert 0 <= layout.resized_long * short / long - layout.resized_short < 1 + 1e-6
    assert 0 <= layout.padded_short - layout.resized_short < crop
    after = layout.padded_short - layout.resized_short - layout.pad_before
    assert after - layout.pad_before in (0, 1)


@settings(deadline=None)
@given(PIXELS, PIXELS, CROPS)
def test_a_portrait_is_laid_out_as_the_landscape_on_its_side(a: int, b: int, crops: int) -> None:
    assume(a != b)
    try:
        landscape = hd_layout(max(a, b), min(a, b), crops, CROP)
    except SampleError:
        return
    portrait = hd_layout(min(a, b), max(a, b), crops, CROP)
    on_its_side = Grid(landscape.grid.cols, landscape.grid.rows)
    assert portrait == replace(landscape, is_portrait=True, grid=on_its_side)
    assert not landscape.is_portrait


@settings(deadline=None)
@given(PIXELS, PIXELS, CROPS, st.sampled_from([28, 56, 336]))
def test_without_upscaling_no_picture_gets_more_crops_than_its_long_side_needs(
    width: int, height: int, num_crops: int, crop: int
) -> None:
    try:
        published = hd_layout(width, height, num_crops, crop)
    except SampleError:
        return
    layout = hd_layout(width, height, num_crops, crop, never_upscale=True)
    needed = -(-max(width, height) // crop)
    assert layout.resized_long == min(published.resized_long, needed * crop)
    assert image_tokens(layout.grid, 12) <= image_tokens(published.grid, 12)
    if published.resized_long <= needed * crop:
        assert layout == published
    assert layout.resized_short >= min(min(width, height) - 1, published.resized_short)


@settings(deadline=None)
@given(PIXELS, PIXELS, CROPS)
def test_without_upscaling_a_portrait_is_the_landscape_on_its_side(
    a: int, b: int, crops: int
) -> None:
    assume(a != b)
    try:
        landscape = hd_layout(max(a, b), min(a, b), crops, CROP, never_upscale=True)
    except SampleError:
        return
    portrait = hd_layout(min(a, b), max(a, b), crops, CROP, never_upscale=True)
    on_its_side = Grid(landscape.grid.cols, landscape.grid.rows)
    assert portrait == replace(landscape, is_portrait=True, grid=on_its_side)


@pytest.mark.parametrize(
    ("width", "height", "num_crops", "grid", "tokens"),
    [
        (200, 200, 16, Grid(1, 1), 313),
        (336, 336, 16, Grid(1, 1), 313),
        (337, 300, 16, Grid(2, 2), 757),
        (200, 500, 16, Grid(2, 1), 469),
        (1344, 1008, 16, Grid(3, 4), 1921),
        (5000, 5000, 16, Grid(4, 4), 2509),
    ],
)
def test_examples_without_upscaling(
    width: int, height: int, num_crops: int, grid: Grid, tokens: int
) -> None:
    assert hd_layout(width, height, num_crops, CROP, never_upscale=True).grid == grid
    assert image_tokens(grid, 12) == tokens


@pytest.mark.parametrize(
    ("width", "height", "num_crops", "resized", "grid"),
    [
        (640, 427, 4, (672, 448), Grid(2, 2)),
        (427, 640, 4, (672, 448), Grid(2, 2)),
        (336, 336, 16, (1344, 1344), Grid(4, 4)),
        (336, 336, 1, (336, 336), Grid(1, 1)),
        (1344, 336, 4, (1344, 336), Grid(1, 4)),
        (336, 1344, 4, (1344, 336), Grid(4, 1)),
        (1, 1000, 4, (1344, 1), Grid(4, 1)),
        (1756, 6, 1, (336, 1), Grid(1, 1)),
    ],
)
def test_examples(
    width: int, height: int, num_crops: int, resized: tuple[int, int], grid: Grid
) -> None:
    layout = hd_layout(width, height, num_crops, CROP)
    assert (layout.resized_long, layout.resized_short, layout.grid) == (*resized, grid)


def test_an_image_whose_short_side_vanishes_is_refused() -> None:
    with pytest.raises(SampleError, match=r"1756x3 pixels.* num_crops 1; crop it to a ratio below"):
        hd_layout(1756, 3, 1, CROP)


@pytest.mark.parametrize(
    ("grid", "tokens"),
    [
        (Grid(1, 1), 313),
        (Grid(1, 4), 745),
        (Grid(4, 1), 781),
        (Grid(2, 2), 757),
        (Grid(4, 4), 2509),
    ],
)
def test_the_published_numbers_of_image_tokens(grid: Grid, tokens: int) -> None:
    assert image_tokens(grid, 12) == tokens


@settings(deadline=None)
@given(st.integers(1, 16), st.integers(1, 16), st.integers(1, 14))
def test_image_tokens_are_the_merged_patches_and_one_separator_a_line(
    rows: int, cols: int, side: int
) -> None:
    def lines(high: int, wide: int) -> int:
        return side * high * (side * wide + 1)

    assert image_tokens(Grid(rows, cols), side) == lines(rows, cols) + 1 + lines(1, 1)


def test_a_canvas_tells_its_grid() -> None:
    assert grid_of(3 * CROP, 2 * CROP, CROP) == Grid(3, 2)
    assert (Grid(3, 2).crops, Grid(3, 2).views) == (6, 7)

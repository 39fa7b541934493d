"""Pictures of all kinds become canvases of whole crops."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from phi3v.errors import SampleError
from phi3v.geometry import hd_layout
from phi3v.processing.canvas import hd_canvas
from phi3v.samples.tiny import CLIP_MEAN, CLIP_STD
from phi3v.views import ViewSettings, pixel_values

CROP = 28


def noise(width: int, height: int, channels: int = 3) -> Image.Image:
    random = np.random.default_rng(width * height)
    return Image.fromarray(random.integers(0, 256, (height, width, channels), dtype=np.uint8))


@settings(deadline=None)
@given(st.integers(28, 300), st.integers(28, 300), st.integers(1, 12), st.booleans())
def test_a_canvas_is_the_picture_between_white_bars(
    width: int, height: int, num_crops: int, never_upscale: bool
) -> None:
    layout = hd_layout(width, height, num_crops, CROP, never_upscale)
    black = Image.new("RGB", (width, height))
    canvas = hd_canvas(black, num_crops, CROP, never_upscale)
    assert canvas.dtype == np.uint8 and canvas.flags.c_contiguous and canvas.flags.writeable
    assert canvas.shape == (layout.grid.rows * CROP, layout.grid.cols * CROP, 3)
    lines = canvas.transpose(1, 0, 2) if layout.is_portrait else canvas
    end = layout.pad_before + layout.resized_short
    assert not lines[layout.pad_before : end].any()
    assert (lines[: layout.pad_before] == 255).all()
    assert (lines[end:] == 255).all()


@settings(deadline=None)
@given(st.integers(28, 200), st.integers(1, 100), st.integers(1, 12))
def test_a_portrait_is_the_landscape_on_its_side(short: int, more: int, num_crops: int) -> None:
    landscape = noise(short + more, short)
    portrait = landscape.transpose(Image.Transpose.TRANSPOSE)
    canvas = hd_canvas(landscape, num_crops, CROP)
    assert np.array_equal(hd_canvas(portrait, num_crops, CROP), canvas.transpose(1, 0, 2))


def test_a_portrait_is_resized_as_if_it_lay_on_its_side() -> None:
    """As published: turned, resized, turned back; upright, other bytes come of the rounding."""
    picture = noise(45, 80)
    layout = hd_layout(45, 80, 6, CROP)
    size = (layout.resized_long, layout.resized_short)
    turned = picture.transpose(Image.Transpose.TRANSPOSE).resize(size, Image.Resampling.BILINEAR)
    expected = np.asarray(turned).transpose(1, 0, 2)
    end = layout.pad_before + layout.resized_short
    assert np.array_equal(hd_canvas(picture, 6, CROP)[:, layout.pad_before : end], expected)
    upright = picture.resize(size[::-1], Image.Resampling.BILINEAR)
    assert not np.array_equal(np.asarray(upright), expected)


def test_a_picture_of_the_right_size_is_kept_bit_for_bit() -> None:
    picture = noise(56, 28)
    assert np.array_equal(hd_canvas(picture, 2, CROP), np.asarray(picture))


def test_alpha_is_dropped_not_composited() -> None:
    """As published: what is under a transparent pixel is seen."""
    picture = noise(28, 28, 4)
    expected = np.asarray(picture)[..., :3]
    assert np.array_equal(hd_canvas(picture, 1, CROP), expected)


def test_the_orientation_of_a_camera_is_ignored() -> None:
    """As published: a photo with EXIF orientation 6 stays on its side."""
    picture = noise(56, 28)
    turned = picture.copy()
    turned.getexif()[0x0112] = 6
    assert np.array_equal(hd_canvas(turned, 2, CROP), hd_canvas(picture, 2, CROP))


@pytest.mark.parametrize("mode", ["L", "LA", "P", "CMYK", "1", "RGBA"])
def test_a_picture_of_any_mode_is_read_as_rgb(mode: str) -> None:
    picture = noise(40, 30).convert(mode)
    expected = hd_canvas(picture.convert("RGB"), 4, CROP)
    assert np.array_equal(hd_canvas(picture, 4, CROP), expected)


def test_a_picture_is_not_edited() -> None:
    picture = noise(40, 61)
    copy = picture.copy()
    hd_canvas(picture, 4, CROP)
    assert picture == copy


def test_a_picture_that_is_too_narrow_is_refused() -> None:
    with pytest.raises(SampleError, match="1x1000 pixels"):
        hd_canvas(noise(1, 1000), 1, CROP)


def test_unused_slots_are_zero() -> None:
    canvases = [hd_canvas(noise(*size), 6, CROP) for size in ((28, 28), (168, 28), (50, 60))]
    values = pixel_values(canvases, 7, ViewSettings(CROP, CLIP_MEAN, CLIP_STD))
    used = [1 + canvas.size // (3 * CROP**2) for canvas in canvases]
    assert used == [5, 7, 5]
    for slots, views in zip(values, used, strict=True):
        assert slots[:views].flatten(1).any(dim=1).all()
        assert not slots[views:].any()

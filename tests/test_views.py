"""Views made from a stored canvas are the pixels that the processor gives a model."""

from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image

from phi3v.errors import SampleError
from phi3v.geometry import hd_layout
from phi3v.processing import Phi3VProcessor
from phi3v.samples.tiny import CLIP_MEAN, CLIP_STD
from phi3v.views import ViewSettings, make_views
from tests.processing.tokens import tokenizer


def noise(random: np.random.Generator, width: int, height: int) -> Image.Image:
    return Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))


def numpy_crops(canvas: np.ndarray, crop_size: int) -> np.ndarray:
    """(N - 1, 3, size, size) float32: each crop cut out and normalised by itself."""
    high, wide = (side // crop_size for side in canvas.shape[:2])
    tiles = [
        canvas[row * crop_size : (row + 1) * crop_size, col * crop_size : (col + 1) * crop_size]
        for row in range(high)
        for col in range(wide)
    ]
    scaled = np.stack(tiles).astype(np.float32) / np.float32(255)
    normal = (scaled - np.array(CLIP_MEAN, np.float32)) / np.array(CLIP_STD, np.float32)
    return normal.transpose(0, 3, 1, 2)


@cache
def bicubic_weights(out: int, size: int) -> np.ndarray:
    """(out, size): bicubic interpolation with a = -0.75, borders repeated, no antialiasing."""
    a, weights = -0.75, np.zeros((out, size))
    for target in range(out):
        centre = (target + 0.5) * size / out - 0.5
        first = int(np.floor(centre))
        for tap in range(first - 1, first + 3):
            x = abs(centre - tap)
            near = (a + 2) * x**3 - (a + 3) * x**2 + 1
            far = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
            weights[target, min(max(tap, 0), size - 1)] += near if x <= 1 else far
    return weights


def numpy_overview(canvas: np.ndarray, crop_size: int) -> np.ndarray:
    """(3, size, size) float64: the thumbnail of the normalised canvas."""
    normal = (canvas / 255 - np.array(CLIP_MEAN)) / np.array(CLIP_STD)
    rows, cols = (bicubic_weights(crop_size, side) for side in canvas.shape[:2])
    return rows @ normal.transpose(2, 0, 1) @ cols.T


def check(image: Image.Image, crop_size: int, num_crops: int) -> None:
    """A picture through the processor, and its canvas through make_views, as in training."""
    processor = Phi3VProcessor(tokenizer(), num_crops, CLIP_MEAN, CLIP_STD, crop_size)
    canvas = processor.canvas(image)
    inputs = processor("<|image_1|>", [image])
    views = make_views(torch.from_numpy(canvas), processor.views)
    pixels = inputs["pixel_values"][0]
    assert pixels.shape == (num_crops + 1, 3, crop_size, crop_size)
    assert inputs["image_sizes"].tolist() == [list(canvas.shape[:2])]
    assert torch.equal(views[1:], pixels[1 : len(views)])
    assert (views[0] - pixels[0]).abs().max() <= 1e-6  # measured: 0
    assert not pixels[len(views) :].any()
    assert np.array_equal(views[1:].numpy(), numpy_crops(canvas, crop_size))
    difference = np.abs(views[0].numpy() - numpy_overview(canvas, crop_size)).max()
    assert difference < 5e-6  # float32 against float64; measured: 6.3e-7
    counted = int((inputs["input_ids"] < 0).sum())
    assert counted == processor.canvas_tokens(canvas)
    assert processor.calc_num_image_tokens_from_image_size(*image.size) == counted


def test_views_of_a_canvas_are_the_processors_at_1_000_sizes() -> None:
    random, done = np.random.default_rng(0), 0
    while done < 1000:
        width, height = np.exp(random.uniform(0, np.log(400), 2)).astype(int)
        num_crops = int(random.integers(1, 13))
        try:
            hd_layout(width, height, num_crops, 28)
        except SampleError:
            continue
        check(noise(random, width, height), 28, num_crops)
        done += 1


@pytest.mark.parametrize(
    ("width", "height", "num_crops"),
    [(640, 427, 4), (427, 640, 4), (336, 336, 1), (100, 900, 6), (1344, 336, 4), (37, 50, 2)],
)
def test_views_of_a_canvas_are_the_processors_at_the_published_crop_size(
    width: int, height: int, num_crops: int
) -> None:
    check(noise(np.random.default_rng(width), width, height), 336, num_crops)


def test_crops_are_cut_row_by_row_behind_the_global_view() -> None:
    canvas = np.zeros((56, 84, 3), dtype=np.uint8)
    for row in range(2):
        for col in range(3):
            canvas[28 * row : 28 * (row + 1), 28 * col : 28 * (col + 1)] = 10 * row + col
    settings = ViewSettings(28, (0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255))
    views = make_views(torch.from_numpy(canvas), settings)
    assert views[1:, 0, 14, 14].round().tolist() == [0, 1, 2, 10, 11, 12]
    assert views[0, 0, 0, [0, 27]].round().tolist() == [0, 2]


def test_a_canvas_is_not_edited() -> None:
    canvas = torch.randint(0, 256, (28, 56, 3), dtype=torch.uint8)
    copy = canvas.clone()
    make_views(canvas, ViewSettings(28, CLIP_MEAN, CLIP_STD))
    assert torch.equal(canvas, copy)

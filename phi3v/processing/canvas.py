"""The HD transform: a picture becomes a canvas of whole crops."""

import numpy as np
from PIL import Image

from phi3v.config.dataset import ImagesSection
from phi3v.geometry import Layout, hd_layout
from phi3v.pictures import PUBLISHED
from phi3v.processing.pixels import to_rgb

WHITE = 255


def hd_canvas(
    image: Image.Image,
    num_crops: int,
    crop_size: int,
    never_upscale: bool = False,
    rules: ImagesSection = PUBLISHED,
) -> np.ndarray:
    """Resize and pad a picture to a canvas; the settings are those of `hd_layout` and `to_rgb`.

    returns  uint8 (height, width, 3), both multiples of `crop_size`
    Raises: SampleError if the picture is too narrow, or as `to_rgb`.
    Source: Phi-3-V image_processing_phi3_v.py `HD_transform`, `padding_336`. As published, alpha is
    dropped, not composited, and EXIF orientation ignored.
    """
    image = to_rgb(image, rules).image
    layout = hd_layout(image.width, image.height, num_crops, crop_size, never_upscale)
    pixels = np.asarray(_resize(image, layout))
    shape = (layout.grid.rows * crop_size, layout.grid.cols * crop_size, 3)
    canvas = np.full(shape, WHITE, dtype=np.uint8)
    filled = slice(layout.pad_before, layout.pad_before + layout.resized_short)
    canvas[(slice(None), filled) if layout.is_portrait else filled] = pixels
    return canvas


def _resize(image: Image.Image, layout: Layout) -> Image.Image:
    """Resize along the long side first, then along the short one.

    Each pass rounds to whole values, so their order shows. Pillow goes along rows first, and the
    published code turns a portrait on its side for it; two calls give the same bits unturned.
    """
    size = (layout.resized_long, layout.resized_short)
    size = size[::-1] if layout.is_portrait else size
    if image.size == size:
        return image
    if layout.is_portrait:
        image = image.resize((image.width, size[1]), Image.Resampling.BILINEAR)
    return image.resize(size, Image.Resampling.BILINEAR)

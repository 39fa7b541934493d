"""The HD transform: a picture becomes a canvas of whole crops."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from phi3v.geometry import hd_layout
from phi3v.views import ViewSettings, make_views

WHITE = 255


def hd_canvas(image: Image.Image, num_crops: int, crop_size: int) -> np.ndarray:
    """Resize and pad a picture to a canvas.

    returns  uint8 (height, width, 3), both multiples of `crop_size`
    Raises: SampleError if the picture is too narrow.
    Source: Phi-3-V image_processing_phi3_v.py `HD_transform`, `padding_336`. Alpha is dropped, not
    composited, and EXIF orientation ignored, as published.
    """
    image = image.convert("RGB")
    layout = hd_layout(image.width, image.height, num_crops, crop_size)
    if layout.is_portrait:
        image = image.transpose(Image.Transpose.TRANSPOSE)
    size = (layout.resized_long, layout.resized_short)
    if image.size != size:
        image = image.resize(size, Image.Resampling.BILINEAR)
    canvas = np.full((layout.padded_short, layout.resized_long, 3), WHITE, dtype=np.uint8)
    canvas[layout.pad_before : layout.pad_before + layout.resized_short] = np.asarray(image)
    if layout.is_portrait:
        canvas = np.ascontiguousarray(canvas.transpose(1, 0, 2))
    return canvas


def pixel_values(canvases: Sequence[np.ndarray], slots: int, settings: ViewSettings) -> Tensor:
    """The published processor's tensor: views of each image, then slots of zeros.

    returns  (I, slots, 3, crop_size, crop_size) float32
    """
    stacked = torch.zeros(len(canvases), slots, 3, settings.crop_size, settings.crop_size)
    for index, canvas in enumerate(canvases):
        views = make_views(torch.from_numpy(canvas), settings)
        stacked[index, : len(views)] = views
    return stacked

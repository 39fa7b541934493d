"""From a uint8 canvas to the views that the vision tower sees, on whatever device the canvas is.

Both the processor (on the CPU, once) and training (on the device, every step) make their views
here, so that they are the same numbers. The global view is a bicubic thumbnail of the *normalised*
canvas, which is why it cannot be stored as uint8 and is made anew each time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate


@dataclass(frozen=True)
class ViewSettings:
    """The tower's image size in pixels, and mean and deviation by channel."""

    crop_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


def make_views(canvas: Tensor, settings: ViewSettings) -> Tensor:
    """Cut a canvas into its global view and its crops, row by row.

    canvas   (height, width, 3) uint8
    returns  (N, 3, crop_size, crop_size) float32; N = crops + 1, the global view first

    Source: Phi-3-V image_processing_phi3_v.py `preprocess`.
    """
    side = settings.crop_size
    rows, cols = canvas.shape[0] // side, canvas.shape[1] // side
    image = normalise(canvas, settings)
    overview = interpolate(image[None], size=(side, side), mode="bicubic", align_corners=False)
    crops = image.reshape(3, rows, side, cols, side)
    crops = crops.permute(1, 3, 0, 2, 4).reshape(rows * cols, 3, side, side)
    return torch.cat([overview, crops])


def normalise(canvas: Tensor, settings: ViewSettings) -> Tensor:
    """Scale (height, width, 3) uint8 to [0, 1], then to zero mean and unit deviation by channel.

    returns  (3, height, width) float32
    """
    white, mean, std = _constants(settings, canvas.device)
    image = canvas.permute(2, 0, 1).to(torch.float32).div(white)
    return image.sub(mean).div(std).contiguous()


@lru_cache(maxsize=8)
def _constants(settings: ViewSettings, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """255, mean and deviation, made once: to make a tensor from Python waits for the device.

    255 is a tensor because CUDA multiplies by the reciprocal of a number, which may round otherwise
    than the processor's division.
    """
    values = ((255.0,), settings.mean, settings.std)
    white, mean, std = (torch.tensor(v, dtype=torch.float32, device=device) for v in values)
    return white, mean[:, None, None], std[:, None, None]


def pixel_values(canvases: Sequence[np.ndarray], slots: int, settings: ViewSettings) -> Tensor:
    """The published processor's tensor: views of each image, then slots of zeros.

    returns  (I, slots, 3, crop_size, crop_size) float32
    """
    stacked = torch.zeros(len(canvases), slots, 3, settings.crop_size, settings.crop_size)
    for index, canvas in enumerate(canvases):
        views = make_views(torch.from_numpy(canvas), settings)
        stacked[index, : len(views)] = views
    return stacked

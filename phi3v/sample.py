"""A sample: one prepared conversation, and the canvases of its images."""

from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from phi3v.geometry import grid_of, image_tokens

IGNORED = -100  # label of a position that is not trained


@dataclass(frozen=True)
class Canvas:
    """An image after the HD transform: uint8 (height, width, 3), whole crops each way."""

    pixels: np.ndarray

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.pixels.shape[0], self.pixels.shape[1]


@dataclass(frozen=True)
class Sample:
    """One conversation, ready for training.

    input_ids  int32 (T,); image k fills its positions with -k
    labels     int32 (T,); -100 elsewhere than on the assistants' texts and their <|end|>
    meta       prompt_length (tokens before the last answer that is trained), reference (its text),
               trained_answers (of each answer whether its row asks to train it; not in shards of
               before), source, row, and references (all accepted texts) where the source names them
    """

    id: str
    input_ids: np.ndarray
    labels: np.ndarray
    images: tuple[Canvas, ...]
    meta: dict[str, Any]

    @property
    def prompt_ids(self) -> np.ndarray:
        """The tokens up to where the last answer starts."""
        return self.input_ids[: self.meta["prompt_length"]]


def count_views(images: tuple[Canvas, ...], crop_size: int) -> int:
    """Views (crops and global views) of all images."""
    grids = [grid_of(image.size[0], image.size[1], crop_size) for image in images]
    return sum(grid.views for grid in grids)


def with_images(
    prompt_ids: np.ndarray, images: tuple[Canvas, ...], crop_size: int, side: int
) -> np.ndarray:
    """Rewrite a prompt for other images: the run of -k becomes as long as images[k-1] needs.

    [1, 5, -1, -1, -1, 1, 9] with an image of two tokens -> [1, 5, -1, -1, 1, 9]
    """
    pieces: list[np.ndarray] = []
    for value, run in groupby(prompt_ids.tolist()):
        length = len(list(run))
        if value < 0:
            height, width = images[-value - 1].size
            length = image_tokens(grid_of(height, width, crop_size), side)
        pieces.append(np.full(length, value, dtype=prompt_ids.dtype))
    return np.concatenate(pieces)

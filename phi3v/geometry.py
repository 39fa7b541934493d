"""How an image becomes a grid of crops and a number of tokens, from its width and height alone.

The HD transform enlarges (or shrinks) a picture so that it fills as many crops of the vision
tower's image size as `num_crops` allows while keeping its shape, then pads its short side to whole
crops. Portraits are laid on their side first and put back at the end, so everything here works on
the long and the short side.

    640 x 427, num_crops 4, crop 336  ->  resized 672 x 448, canvas 672 x 672, grid 2 x 2
"""

import math
from dataclasses import dataclass

from phi3v.errors import SampleError


@dataclass(frozen=True)
class Grid:
    """The crops of one canvas: `rows` x `cols` of them."""

    rows: int
    cols: int

    @property
    def crops(self) -> int:
        return self.rows * self.cols

    @property
    def views(self) -> int:
        """Crops and the global view."""
        return self.crops + 1


@dataclass(frozen=True)
class Layout:
    """What the HD transform does to one image; long and short side in pixels."""

    resized_long: int
    resized_short: int
    padded_short: int
    is_portrait: bool
    grid: Grid

    @property
    def pad_before(self) -> int:
        """White pixels before the short side; the rest goes after it."""
        return (self.padded_short - self.resized_short) // 2


def hd_layout(
    width: int, height: int, num_crops: int, crop_size: int, never_upscale: bool = False
) -> Layout:
    """Lay out an image of width x height pixels on at most `num_crops` crops.

    With `never_upscale` its long side gets no more crops than its own pixels need, rounded up: at
    16 crops of 336 pixels 200 x 200 fill one crop (313 tokens), as published 4 x 4 (2,509 tokens).

    Raises: SampleError if the image is so narrow that nothing of its short side would be left.
    Source: Phi-3-V image_processing_phi3_v.py `HD_transform`; float division and truncation are
    part of the published behaviour (integer arithmetic gives other heights).
    """
    is_portrait = width < height
    long, short = (height, width) if is_portrait else (width, height)
    ratio = long / short
    scale = 1
    while (scale + 1) * math.ceil((scale + 1) / ratio) <= num_crops:
        scale += 1
    if never_upscale:
        scale = min(scale, math.ceil(long / crop_size))
    resized_long = scale * crop_size
    resized_short = int(resized_long / ratio)
    if resized_short == 0:
        raise SampleError(
            f"image is too narrow: {width}x{height} pixels, nothing of the short side is left at "
            f"num_crops {num_crops}; crop it to a ratio below {resized_long}:1"
        )
    lines = math.ceil(resized_short / crop_size)
    grid = Grid(scale, lines) if is_portrait else Grid(lines, scale)
    return Layout(resized_long, resized_short, lines * crop_size, is_portrait, grid)


def grid_of(height: int, width: int, crop_size: int) -> Grid:
    """The grid of a canvas of height x width pixels, both multiples of `crop_size`."""
    return Grid(height // crop_size, width // crop_size)


def image_tokens(grid: Grid, side: int) -> int:
    """Sequence positions of one image whose views have `side` x `side` merged patches.

    `side` = image_size / (2 * patch_size), 12 in the published model. A line of every view ends
    with a separator, and one separator stands between the crops and the global view:
    2 x 2 crops of the published model take (4 + 1) * 144 + 1 + (2 + 1) * 12 = 757 tokens.

    Source: Phi-3-V processing_phi3_v.py `calc_num_image_tokens_from_image_size`.
    """
    return grid.views * side * side + 1 + (grid.rows + 1) * side

"""Pictures of a canvas: as it is stored, with the lines along which it is cut, and its overview."""

import numpy as np
import torch

from phi3v.geometry import Grid
from phi3v.page import jpeg_url
from phi3v.sample import Canvas
from phi3v.views import ViewSettings, make_views

SHOWN = 220  # CSS pixels of a canvas's longer side
MAX_BYTES = 145_000  # of a JPEG; about 195 kB as text in the page


def canvas_figure(
    canvas: Canvas, number: int, grid: Grid, tokens: int, settings: ViewSettings, side: int
) -> str:
    """Draw a canvas with its crop grid, and beside it the global view that the model gets.

    side  pixels of the longer side of a picture in the page, at most
    """
    height, width = canvas.size
    shown = SHOWN * width / max(width, height)
    text = (
        f"image {number}: {width} &times; {height} pixels, {grid.rows} &times; {grid.cols} crops, "
        f"{tokens:,} tokens"
    )
    url = jpeg_url(canvas.pixels, side, MAX_BYTES)
    lines = f'<path class="under" d="{_cuts(grid, settings.crop_size)}"/>'
    lines += lines.replace("under", "cut")
    overview = jpeg_url(global_view(canvas, settings), side // 2, MAX_BYTES)
    return (
        f'<figure class="canvas"><div><svg viewBox="0 0 {width} {height}" role="img" '
        f'style="width: {shown:.0f}px; aspect-ratio: {width} / {height}" '
        f'aria-label="canvas of image {number}">'
        f'<image href="{url}" width="{width}" height="{height}" preserveAspectRatio="none"/>'
        f'{lines}</svg><img src="{overview}" alt="global view of image {number}"></div>'
        f"<figcaption>{text}</figcaption></figure>\n"
    )


def global_view(canvas: Canvas, settings: ViewSettings) -> np.ndarray:
    """The global view as a picture: uint8 (crop_size, crop_size, 3), its normalisation undone."""
    view = make_views(torch.tensor(canvas.pixels), settings)[0]
    mean, std = (torch.tensor(values)[:, None, None] for values in (settings.mean, settings.std))
    pixels = (view * std + mean).clamp(0, 1).mul(255).round()
    return pixels.to(torch.uint8).permute(1, 2, 0).numpy()


def _cuts(grid: Grid, crop: int) -> str:
    """The outline and the lines between crops, in pixels of the canvas, as an SVG path."""
    height, width = grid.rows * crop, grid.cols * crop
    down = "".join(f"M{crop * col} 0V{height}" for col in range(grid.cols + 1))
    return down + "".join(f"M0 {crop * row}H{width}" for row in range(grid.rows + 1))

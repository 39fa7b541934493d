"""An encoded picture: its header, its likeness, its pixels, its canvas, each within a budget.

    picture = open_picture(data, "a.webp", max_pixels=100_000_000, rules=cfg.images)
    picture.width, picture.height
    picture.canvas(num_crops=16, crop_size=336, never_upscale=False)

A file of a kilobyte can ask a decoder for gigabytes or for hours, and what it asks for shows in no
header. So only pictures whose structure bounds their cost (structure.py: JPEG and PNG of moderate
size, as nearly all are) are decoded in this process; all others go to one that may take
`bounded.MOST_BYTES` and `most_seconds` for it (bounded.py), in every command. What its pixels are
is decided in pixels.py, here as there.
"""

import hashlib
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from typing import TypeVar

import numpy as np
from PIL import AvifImagePlugin, Image, ImageFile, UnidentifiedImageError
from PIL import GifImagePlugin as _Gif  # noqa: F401
from PIL import Jpeg2KImagePlugin as _Jpeg2K  # noqa: F401
from PIL import TiffImagePlugin as _Tiff  # noqa: F401
from PIL import WebPImagePlugin as _WebP  # noqa: F401

from phi3v.config.dataset import ImagesSection
from phi3v.content import HEAD, content_kind, unquoted
from phi3v.errors import Phi3VError, SampleError
from phi3v.processing.bounded import Overspent, bounded
from phi3v.processing.canvas import hd_canvas
from phi3v.processing.pixels import (
    FORMATS,
    Pixels,
    flatten,
    orientation,
    to_rgb,
    turned,
    upright_size,
)
from phi3v.processing.structure import ENDLESS, MOST_SCANS, is_endless, is_plain, webp_size

Result = TypeVar("Result")

SECONDS, SECONDS_PER_MEGAPIXEL, MOST_SECONDS = 2.0, 0.36, 20.0
"""Of processor time; the slowest honest pictures, JPEG 2000, take 0.12 for a million pixels."""

NO_MEMORY = re.compile(r"decoder error -9|out of memory", re.IGNORECASE)  # of Pillow's decoders

AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # see bounded.ONE_THREAD


@dataclass(frozen=True)
class Picture:
    """An encoded image whose header was read.

    name           for messages: its path or address, or how many bytes it has
    width, height  pixels, as `rules` turn it
    known          what was done to `data` when they were made of a picture that was decoded before
    """

    data: bytes = field(repr=False)
    name: str
    width: int
    height: int
    rules: ImagesSection
    known: frozenset[str] = frozenset()

    @property
    def digest(self) -> bytes:
        """The first 16 bytes of the SHA-256 of `data`."""
        return hashlib.sha256(self.data).digest()[:16]

    def decode(self) -> Pixels:
        """Decode the first frame to RGB.

        Raises: SampleError if it is damaged, takes too much, or its pixels have no agreed meaning.
        """
        array, traits = self._made(rgb_array)
        return Pixels(Image.fromarray(array), traits | self.known)

    def canvas(
        self, num_crops: int, crop_size: int, never_upscale: bool
    ) -> tuple[np.ndarray, frozenset[str]]:
        """Decode the first frame to the canvas that `hd_canvas` makes of it, and tell its traits.

        returns  uint8 (height, width, 3), and which of `pixels.TRAITS` it has
        Raises: as `decode`.
        """
        canvas, traits = self._made(canvas_of, num_crops, crop_size, never_upscale)
        return canvas, traits | self.known

    def thumbnail(self, side: int) -> np.ndarray:
        """Shrink the first frame to gray, for comparison with others.

        A JPEG is decoded at up to an eighth of its size, one of 1344 x 1008 in 2 ms instead of 12.

        returns  uint8 (side, side)
        Raises: as `decode`.
        """
        return _within_budget(
            gray_thumbnail, self.data, self.name, self.rules, side, pixels=self.width * self.height
        )

    def _made(self, function: Callable[..., Result], *arguments: object) -> Result:
        size = self.width, self.height
        return _within_budget(
            function, self.data, self.name, self.rules, size, *arguments, pixels=size[0] * size[1]
        )


def open_picture(data: bytes, name: str, max_pixels: int, rules: ImagesSection) -> Picture:
    """Read the header of an encoded image.

    Raises: SampleError if it is none, has more pixels than `max_pixels`, or its header takes too
    much.
    """
    if not data:
        raise SampleError(f"image cannot be read: {name}, it has 0 bytes")
    if not is_plain(data) and is_endless(data):
        raise SampleError(
            f"image takes too much to decode: {name}, a JPEG of more than {MOST_SCANS} scans or "
            f"{ENDLESS:,} segments"
        )
    width, height = _within_budget(header_size, data, name, rules, max_pixels, pixels=0)
    return Picture(data, name, width, height, rules)


def most_seconds(pixels: int) -> float:
    """Of processor time, what decoding a picture may take."""
    return min(MOST_SECONDS, SECONDS + SECONDS_PER_MEGAPIXEL * pixels / 1e6)


def _within_budget(
    function: Callable[..., Result], data: bytes, name: str, *arguments: object, pixels: int
) -> Result:
    """Call `function(data, name, *arguments)` where it can do no harm.

    Raises: SampleError naming the picture; Phi3VError where this machine has no memory for a
    picture that needs little.
    """
    try:
        if is_plain(data):
            return function(data, name, *arguments)
        return bounded(function, data, name, *arguments, seconds=most_seconds(pixels))
    except Overspent as error:
        raise SampleError(f"image takes too much to decode: {name}, it {error}") from None
    except MemoryError as error:
        raise Phi3VError(
            f"memory ran out at {name}, which needs little; start again to go on, with fewer "
            "workers"
        ) from error


# --- in either process ---


def header_size(data: bytes, name: str, rules: ImagesSection, max_pixels: int) -> tuple[int, int]:
    """Width and height of a picture that is not decoded, as `rules` turn it.

    Raises: SampleError as `open_picture`.
    """
    if size := webp_size(data):
        check_size(*size, name, max_pixels)
    with reading(name, data), _open(data) as image:
        check_size(*image.size, name, max_pixels)
        return upright_size(image, data, rules)


def rgb_array(
    data: bytes, name: str, rules: ImagesSection, size: tuple[int, int]
) -> tuple[np.ndarray, frozenset[str]]:
    """The first frame, uint8 (height, width, 3), and its traits.

    Raises: SampleError as `Picture.decode`.
    """
    pixels = _decoded(data, name, rules, size)
    return np.asarray(pixels.image), pixels.traits


def canvas_of(
    data: bytes,
    name: str,
    rules: ImagesSection,
    size: tuple[int, int],
    num_crops: int,
    crop_size: int,
    never_upscale: bool,
) -> tuple[np.ndarray, frozenset[str]]:
    """The first frame's canvas, and its traits.

    Raises: SampleError as `Picture.canvas`.
    """
    pixels = _decoded(data, name, rules, size)
    return hd_canvas(pixels.image, num_crops, crop_size, never_upscale, rules), pixels.traits


def gray_thumbnail(data: bytes, name: str, rules: ImagesSection, side: int) -> np.ndarray:
    """The first frame in gray, uint8 (side, side).

    Raises: SampleError as `Picture.thumbnail`.
    """
    with reading(name, data), _open(data) as image:
        drafted = image.draft("L", (side, side))
        box = drafted[1] if drafted else None  # of the smaller picture, without padding
        with named(name):
            gray = flatten(image, rules).image.convert("L")
        small = gray.resize((side, side), Image.Resampling.BILINEAR, box)
        turn = orientation(image) if rules.exif == "apply" else 1
        return np.asarray(turned(small, turn))


def _decoded(data: bytes, name: str, rules: ImagesSection, size: tuple[int, int]) -> Pixels:
    with reading(name, data), _open(data) as image:
        with named(name):
            pixels = to_rgb(image, rules)
    found = pixels.image
    if found.size != size:
        raise SampleError(
            f"image cannot be read: {name}, {found.width}x{found.height} pixels where "
            f"its header says {size[0]}x{size[1]}"
        )
    return pixels


def check_size(width: int, height: int, name: str, max_pixels: int) -> None:
    """Refuse a picture without pixels, or with too many.

    Raises: SampleError naming it.
    """
    if not width * height:
        raise SampleError(f"image cannot be read: {name}, {width}x{height} pixels")
    if width * height > max_pixels:
        raise SampleError(
            f"image has too many pixels: {width}x{height}, {name}; max_pixels is {max_pixels:,}"
        )


def _open(data: bytes) -> ImageFile.ImageFile:
    # Pillow's own limit is one for all, below what max_pixels may allow, and does not tell width
    # and height. Ours is checked on the header, which says how much decoding allocates.
    Image.MAX_IMAGE_PIXELS = None
    return Image.open(BytesIO(data), formats=FORMATS)


@contextmanager
def reading(name: str, data: bytes = b"") -> Iterator[None]:
    """Turn whatever Pillow raises into a SampleError, but for want of memory.

    Its warnings are of odd tags in files that it then reads, or raises an error for.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except (SampleError, MemoryError):
            raise
        except UnidentifiedImageError as error:  # its text holds an address in memory
            what = f"cannot identify image file, it is {content_kind(data[:HEAD])}"
            raise SampleError(f"image cannot be read: {name}, {what}") from error
        except Exception as error:  # seen: OSError, SyntaxError, ValueError, RuntimeError, KeyError
            if NO_MEMORY.search(str(error)):
                raise MemoryError from error
            raise SampleError(f"image cannot be read: {name}, {unquoted(error)}") from error


@contextmanager
def named(name: str) -> Iterator[None]:
    """Say which picture it is whose pixels have no agreed meaning."""
    try:
        yield
    except SampleError as error:
        raise SampleError(f"{error} ({name})") from error

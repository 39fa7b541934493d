"""Whatever a picture file holds, to RGB of 8 bits: the one place that decides pixels.

    pixels = to_rgb(Image.open(path), ImagesSection(alpha="white", exif="apply"))
    pixels.image   # RGB, upright
    pixels.traits  # what was done to it: of transparent, turned, deep

docs/data.md lists the rule of every kind. What Pillow makes of a mode by `convert("RGB")` holds but
where that misreads it: transparency is composited or dropped as the setting says, 16 bits are
scaled instead of clipped, and 32 bits, which have no range of their own, are refused.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile

from phi3v.config.dataset import ImagesSection
from phi3v.errors import SampleError

TRANSPARENT, TURNED, DEEP = TRAITS = ("transparent", "turned", "deep")

# Not EPS (starts Ghostscript), not WMF or FITS, none without a signature of its own (TGA, SPIDER).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")

ORIENTATION = 0x0112  # of EXIF and TIFF
BITS_PER_SAMPLE, PHOTOMETRIC = 258, 262  # of TIFF
Transpose = Image.Transpose
TURNS = {  # by EXIF's orientation; 1 is upright
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}
SIDEWAYS = 5  # from here on width and height change places
LATE_CHUNKS = (b"eXIf", b"iTXt", b"zTXt", b"tEXt")  # of a PNG, that may tell an orientation

SHALLOW = "1 L P RGB RGBX RGBA RGBa LA La PA CMYK YCbCr LAB HSV".split()  # 8 bits a sample
GRAY16 = ("I;16", "I;16L", "I;16B", "I;16N")
FULL = 65535
BAND = 1 << 21  # pixels of a picture that are changed at once
DECLARED = ("PPM", "JPEG2000")  # formats that say how many bits there are, and Pillow scales them
LEAST = 1 << 14  # of the largest value of a picture that has 16 bits in earnest
UNSCALED_KEY = {"L;2": 85, "L;4": 17}  # Pillow scales such a PNG's samples, not its transparent one


@dataclass(frozen=True)
class Pixels:
    """A picture in RGB, and what it was before: of `TRAITS`."""

    image: Image.Image
    traits: frozenset[str]


@dataclass(frozen=True)
class Depth:
    """What white is in a gray picture of 9 to 16 bits; `is_inverted`: zero is."""

    full: int
    is_inverted: bool


def to_rgb(image: Image.Image, rules: ImagesSection) -> Pixels:
    """Decode a picture (of an animation the first frame) to RGB.

    The result is what `to_rgb` gives of it again. A picture that is RGB already is not copied.

    Raises: SampleError if its pixels have no agreed meaning; whatever Pillow raises of damage.
    """
    pixels = flatten(image, rules)
    turn = orientation(image)
    if turn == 1:
        return pixels
    traits = pixels.traits | {TURNED}
    return Pixels(turned(pixels.image, turn) if rules.exif == "apply" else pixels.image, traits)


def flatten(image: Image.Image, rules: ImagesSection) -> Pixels:
    """`to_rgb`, as the picture is stored: not turned.

    Beside the picture and its result (4 bytes a pixel) a band of BAND pixels is in memory.

    Raises: as `to_rgb`.
    """
    rawmode = _rawmode(image)
    image.load()
    if image.mode == "RGB" and "transparency" not in image.info:
        return Pixels(image, frozenset())
    depth = None if image.mode in SHALLOW else _depth(image)
    traits = set() if depth is None else {DEEP}
    rows = max(1, BAND // image.width)
    if rows >= image.height:
        flat, is_transparent = _flat(image, rawmode, depth, rules)
    else:
        flat, is_transparent = Image.new("RGB", image.size), False
        for top in range(0, image.height, rows):
            box = (0, top, image.width, min(top + rows, image.height))
            part, has_clear = _flat(image.crop(box), rawmode, depth, rules)
            flat.paste(part, box)
            is_transparent |= has_clear
    return Pixels(flat, frozenset(traits | ({TRANSPARENT} if is_transparent else set())))


def _flat(
    image: Image.Image, rawmode: Any, depth: Depth | None, rules: ImagesSection
) -> tuple[Image.Image, bool]:
    """A picture or a band of one in RGB, and whether any of it is transparent."""
    alpha = _alpha(image, rawmode, rules)
    flat = _opaque(image, depth)
    if alpha is None or alpha.getextrema() == (255, 255):
        return flat, False
    if rules.alpha == "published":
        return flat, True
    white = Image.new("RGB", image.size, "white")
    white.paste(flat, mask=alpha)
    return white, True


def _opaque(image: Image.Image, depth: Depth | None) -> Image.Image:
    """The colours of a picture without regard to its transparency."""
    if depth is not None:
        return _scaled(image, depth).convert("RGB")
    if image.mode in ("La", "RGBa"):  # multiplied by their alpha
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    if "transparency" in image.info:  # which Pillow would convert as well
        image = image.copy()
        del image.info["transparency"]
    return image.convert("RGB")


def _alpha(image: Image.Image, rawmode: Any, rules: ImagesSection) -> Image.Image | None:
    """How opaque each pixel is, 0 to 255, in mode L; None if it has no transparency."""
    if not image.has_transparency_data:
        return None
    if image.mode == "La":
        image = image.convert("LA")
    if image.mode in ("LA", "PA", "RGBA", "RGBa", "P"):
        return image.convert("RGBA").getchannel("A")
    key = image.info["transparency"]
    if rawmode == "RGB;16B" or np.max(key) > (FULL if image.mode in GRAY16 else 255):
        if rules.alpha == "published":
            return None
        raise SampleError(
            "image has a transparent color of 16 bits: its pixels are read in 8; save it with an "
            "alpha channel"
        )
    values = np.asarray(image.convert("L") if image.mode == "1" else image)
    is_key = values == np.multiply(key, UNSCALED_KEY.get(rawmode, 1))
    is_clear = is_key.all(axis=-1) if is_key.ndim == 3 else is_key
    return Image.fromarray(np.where(is_clear, 0, 255).astype(np.uint8))


def _depth(image: Image.Image) -> Depth:
    """The range of a decoded picture that has more than 8 bits.

    Where nothing says of how many bits it is, a picture whose values would all fit in 14 bits is
    refused: whether it is dark, or of 8, 10, 12 or 14 bits in the space of 16, nobody can tell.
    """
    tags = image.tag_v2 if isinstance(image, TiffImageFile) else {}
    if image.mode not in GRAY16 and not (image.mode == "I" and image.format == "PPM"):
        kind = "floating point numbers" if image.mode == "F" else "integers"
        raise SampleError(
            f"image has pixels without an agreed range: {kind} of up to 32 bits (Pillow's mode "
            f"{image.mode}); save it with 8 bits"
        )
    full = (1 << tags.get(BITS_PER_SAMPLE, (16,))[0]) - 1
    largest = int(np.asarray(image).max())
    if image.format not in DECLARED and full == FULL and 0 < largest < LEAST:
        raise SampleError(
            f"image has 16 bits and only low values: none is above {largest:,}, so it is dark or "
            f"of fewer bits than it says; scale it to 0 ... {FULL:,}, or save it with 8 bits"
        )
    # Where white is zero, Pillow heeds it up to 8 bits only.
    return Depth(full, is_inverted=tags.get(PHOTOMETRIC) == 0)


def _scaled(image: Image.Image, depth: Depth) -> Image.Image:
    """A gray picture in mode L: its whole range to 0 ... 255, rounded."""
    values = np.asarray(image).astype(np.int64)
    if depth.is_inverted:
        values = depth.full - values
    return Image.fromarray(((values * 255 + depth.full // 2) // depth.full).astype(np.uint8))


def _rawmode(image: Image.Image) -> Any:
    """How the samples lie in a file that is not decoded yet."""
    tiles = getattr(image, "tile", None)
    if not tiles:
        return None
    arguments = tiles[0][3]
    return arguments[0] if isinstance(arguments, tuple) and arguments else arguments


def orientation(image: Image.Image) -> int:
    """How a decoded picture is to be turned, by its EXIF or XMP: 1 to 8, of which 1 is upright.

    Of a TIFF always 1, for Pillow turns it itself. Metadata that cannot be read turn nothing.
    """
    return _told(image, type(image).getexif)


def upright_size(image: Image.Image, data: bytes, rules: ImagesSection) -> tuple[int, int]:
    """Width and height that `to_rgb` will give of a picture that is not decoded yet.

    data  the whole file: a PNG may tell its orientation after its pixels
    """
    width, height = image.size
    if rules.exif == "published":
        return width, height
    # A PNG's own getexif decodes it, to get there.
    is_late = image.format == "PNG" and _tells_late(data)
    turn = _told(image, type(image).getexif if is_late else Image.Image.getexif)
    return (height, width) if turn >= SIDEWAYS else (width, height)


def turned(image: Image.Image, orientation: int) -> Image.Image:
    """A picture as its orientation wants it, which it does not tell any more."""
    if orientation == 1:
        return image
    upright = image.transpose(TURNS[orientation])
    upright.info.clear()
    return upright


def _told(image: Image.Image, getexif: Callable[[Any], Image.Exif]) -> int:
    if isinstance(image, TiffImageFile):
        return 1
    try:
        told = getexif(image).get(ORIENTATION, 1)
    except Exception:  # of damaged EXIF Pillow raises SyntaxError, struct.error, OSError and others
        return 1
    return told if told in TURNS else 1


def _tells_late(data: bytes) -> bool:
    """Whether a PNG has chunks after its pixels that may tell an orientation."""
    place, has_pixels = 8, False
    while place + 8 <= len(data):
        name = data[place + 4 : place + 8]
        if has_pixels and name in LATE_CHUNKS:
            return True
        has_pixels |= name == b"IDAT"
        place += 12 + int.from_bytes(data[place : place + 4], "big")
    return False

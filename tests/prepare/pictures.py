"""Encoded pictures for the hostile zoo (zoo.py), and what must become of a row that shows one.

Whether a file with flipped or missing bytes is a picture is asked of Pillow, in a way as plain as
can be; of all others it is known here.
"""

import struct
import warnings
import zlib
from collections.abc import Iterator
from io import BytesIO
from random import Random
from typing import Any

import numpy as np
from PIL import Image, ImageOps, TiffImagePlugin

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
MAX_PIXELS = 100_000_000
LONGEST = 4 * 56  # pixels of a canvas of the tiny model: what is narrower than 1:224 vanishes
BOMB = 30_000  # pixels each way

GOOD = ""  # the fate of a row that becomes a sample
UNREADABLE = "image cannot be read: "
UNRANGED = "image has "
TOO_LARGE = "image has too many pixels: "
TOO_NARROW = "image is too narrow: "


def size_of(data: bytes) -> tuple[int, int]:
    """Width and height as a picture's header has them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd tags, and of too many pixels
        Image.MAX_IMAGE_PIXELS = None
        return Image.open(BytesIO(data), formats=FORMATS).size


def decoded(data: bytes) -> Image.Image:
    """The first frame in RGB, as a new dataset has it: upright, on white, 16 bits scaled to 8.

    Raises: NoAgreedRange for integers and floats of 32 bits, and for 16 bits with low values only.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = Image.open(BytesIO(data), formats=FORMATS)
        image.load()
        try:
            image = ImageOps.exif_transpose(image)
        except Exception:  # metadata that cannot be read turn nothing
            pass
        if image.mode.startswith(("I", "F")):
            values = np.asarray(image)
            is_wide = values.max() > 16383 or not values.any()
            if image.mode == "F" or (image.mode == "I" and values.max() > 65535) or not is_wide:
                raise NoAgreedRange
            return Image.fromarray(np.rint(values / 257).astype(np.uint8)).convert("RGB")
        if not image.has_transparency_data:
            return image.convert("RGB")
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image.getchannel("A"))
        return white


class NoAgreedRange(Exception):
    """Raised for pixels of which nobody can say what is white."""


def fate_of(data: bytes) -> str:
    """What must become of a row with this picture, by Pillow."""
    try:
        width, height = size_of(data)
        if width * height > MAX_PIXELS:
            return TOO_LARGE
        if max(width, height) > LONGEST * min(width, height):
            return TOO_NARROW
        if sorted(decoded(data).size) != sorted((width, height)):
            return UNREADABLE
    except NoAgreedRange:
        return UNRANGED
    except Exception:  # whatever Pillow thinks of
        return UNREADABLE
    return GOOD


def noise(random: Random, width: int = 0, height: int = 0) -> Image.Image:
    """A picture of noise, of 8 to 24 pixels each way if not said otherwise."""
    size = (width or random.randint(8, 24), height or random.randint(8, 24))
    return Image.frombytes("RGB", size, random.randbytes(3 * size[0] * size[1]))


def pictures(random: Random) -> Iterator[tuple[bytes, str]]:
    """Every kind of picture, good and bad, each once."""
    yield from ((data, GOOD) for data in [*good(random), *odd(random)])
    yield png_of(6000, 6000, bytes(751 * 6000), color=0, depth=1), GOOD  # 36,000,000 pixels, 5 kB
    yield from ((data, UNREADABLE) for data in impostors())
    yield from ((data, UNREADABLE) for data in broken_png(random))
    yield from ((data, TOO_LARGE) for data in bombs(random))
    for size in ((1, 20_000), (20_000, 1), (2, 2 * LONGEST + 2)):
        yield _saved(noise(random, *size), "PNG"), TOO_NARROW


def damages(random: Random) -> Iterator[bytes]:
    """Good pictures that lost their end, had bytes flipped, or a stretch overwritten; no end."""
    whole = [*good(random), *odd(random), _saved(noise(random, 300, 200), "JPEG", quality=80)]
    whole.append(_saved(noise(random, 200, 300), "JPEG", progressive=True))
    while True:
        data = bytearray(random.choice(whole))
        kind = random.random()
        if kind < 0.4:
            del data[random.randrange(len(data)) :]
        elif kind < 0.8:
            for _ in range(random.choice((1, 1, 3, 10))):
                data[random.randrange(len(data))] ^= 1 << random.randrange(8)
        else:
            start = random.randrange(len(data))
            data[start : start + 8] = random.choice((bytes(8), b"\xff" * 8, random.randbytes(8)))
        yield bytes(data)


def good(random: Random) -> list[bytes]:
    """Pictures as programs write them: modes, depths, frames, orientations, compressions."""
    seconds = [noise(random, 12, 9) for _ in range(6)]  # each once: saving leaves traces in them
    frames = ({"save_all": True, "append_images": [image]} for image in seconds)
    turned = Image.Exif()
    turned[0x0112] = 6  # Orientation
    palette = noise(random).quantize(16)
    palette.info["transparency"] = bytes(range(0, 256, 16))
    gray16 = Image.frombytes("I;16", (10, 6), random.randbytes(120))
    made: list[tuple[Any, str, dict[str, Any]]] = [
        (noise(random), "JPEG", {"quality": 95}),
        (noise(random), "JPEG", {"progressive": True, "icc_profile": random.randbytes(300)}),
        (noise(random, 30, 20), "JPEG", {"exif": turned}),
        (noise(random).convert("L"), "JPEG", {}),
        (noise(random).convert("CMYK"), "JPEG", {}),
        (noise(random, 12, 9), "MPO", next(frames)),
        (noise(random), "PNG", {}),
        (noise(random, 30, 20), "PNG", {"exif": turned}),
        (noise(random).convert("1"), "PNG", {}),
        (noise(random).convert("LA"), "PNG", {}),
        (noise(random).convert("RGBA"), "PNG", {}),
        (palette, "PNG", {"transparency": bytes(range(0, 256, 16))}),
        (gray16, "PNG", {}),
        (noise(random, 12, 9), "PNG", next(frames)),
        (palette, "GIF", {"transparency": 3}),
        (noise(random, 12, 9), "GIF", next(frames)),
        (noise(random), "WEBP", {}),
        (noise(random).convert("RGBA"), "WEBP", {"lossless": True, "exif": turned}),
        (noise(random, 12, 9), "WEBP", next(frames)),
        (noise(random), "BMP", {}),
        (noise(random).convert("1"), "BMP", {}),
        (noise(random), "TIFF", {"compression": "tiff_lzw"}),
        (noise(random).convert("1"), "TIFF", {"compression": "group4"}),
        (noise(random).convert("CMYK"), "TIFF", {"compression": "tiff_adobe_deflate"}),
        (noise(random, 30, 20), "TIFF", {"tiffinfo": _strange_tags(random)}),
        (gray16, "TIFF", {}),
        (noise(random, 12, 9), "TIFF", next(frames)),
        (noise(random), "PPM", {}),
        (gray16, "PPM", {}),
        (noise(random), "JPEG2000", {"irreversible": True}),
        (noise(random).convert("RGBA"), "JPEG2000", {}),
        (noise(random), "AVIF", {}),
        (noise(random, 12, 9), "AVIF", next(frames)),
    ]
    return [_saved(image, kind, **options) for image, kind, options in made]


def odd(random: Random) -> list[bytes]:
    """Pictures that no program writes, and that can be read all the same."""
    png, jpeg = (_saved(noise(random), kind) for kind in ("PNG", "JPEG"))
    head, body, end = _parts(random)
    pixels = [bytes(random.randbytes(8)) for _ in range(8)]
    passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2)]
    passes += [(0, 1, 2, 2), (1, 0, 2, 1)]  # first row, first column, their steps: Adam7
    rows = [b"\0" + row[x::dx] for y, x, dy, dx in passes for row in pixels[y::dy]]
    interlaced = png_of(8, 8, b"".join(rows), color=0, interlace=1)
    comments = b"".join(chunk(b"tEXt", b"k\0v") for _ in range(5000))
    return [
        interlaced,
        head + body[:-1] + bytes([body[-1] ^ 1]) + end,  # Pillow does not look at its checksum,
        head + struct.pack(">I", 1 << 31) + body[4:] + end,  # nor beyond the end of its pixels
        png + random.randbytes(5000),
        png + b"<html></html>",
        jpeg + random.randbytes(5000),
        png[:33] + comments + png[33:],
        jpeg[:2] + b"\xff\xfe\xff\xff" + bytes(65533) + jpeg[2:],  # the longest comment
        b"P3\n# \xff\n2 1\n255\n255 0 0 0 0 255\n",
    ]


def impostors() -> list[bytes]:
    """What is no picture, or one of a kind that is not read, under a picture's name."""
    return [
        b"",
        b"\0",
        bytes(5000),
        b"\xff\xd8\xff",
        b"<!DOCTYPE html><html><body>404</body></html>",
        b'{"error": "not found"}',
        b"Just some text.\n" * 100,
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"%PDF-1.7\n",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nquit\n",
        b"PK\3\4" + bytes(30),
        b"\x7fELF" + bytes(60),
        b"8BPS\0\1" + bytes(40),
        b"\0\0\1\0\1\0\x10\x10" + bytes(40),  # ICO
        b"RIFF\x10\0\0\0WEBPVP8 ",
        b"\0\0\0\x18ftypavif" + bytes(12),
        b"GIF89a" + bytes(7),  # 0 x 0
        b"P6 0 9 255\n",
        b"P6 9 9 0\n" + bytes(243),
        b"BM" + bytes(60),
        b"II*\0\x08\0\0\0\xff\xff",
        b"\x89PNG\r\n\x1a\n",
    ]


def broken_png(random: Random) -> list[bytes]:
    """PNGs that are wrong in one place each."""
    head, body, end = _parts(random)
    return [
        head[:-1] + b"?" + body + end,  # the header's checksum
        head + chunk(b"tEXt", b"k\0v")[:-4] + b"CRC?" + body + end,
        head[:8] + b"\0\0\0\x05" + head[12:] + body + end,
        head + end,
        head[:8] + body + end,
        head + chunk(b"IDAT", b"no zlib") + end,
        head + chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(1 << 26))) + body + end,
        png_of(0, 9, b"", color=2),
        png_of(9, 9, bytes(252), color=5),
        png_of(9, 9, bytes(20), color=2),  # too few lines
        png_of(9000, 9000, bytes(9), color=2),
    ]


def bombs(random: Random) -> list[bytes]:
    """Small files that say they hold 30,000 x 30,000 pixels (WebP: its most, 16,384)."""
    small = noise(random, 16, 16)
    kinds = ("GIF", "BMP", "JPEG", "JPEG2000")
    gif, bmp, jpeg, jp2 = (bytearray(_saved(small, kind)) for kind in kinds)
    gif[6:10] = struct.pack("<HH", BOMB, BOMB)
    bmp[18:26] = struct.pack("<ii", BOMB, BOMB)
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", BOMB, BOMB)
    for mark in (jp2.index(b"ihdr") + 4, jp2.index(b"\xff\x51") + 6):
        jp2[mark : mark + 8] = struct.pack(">II", BOMB, BOMB)
    webp = bytearray(_saved(small, "WEBP", lossless=True))
    start = webp.index(b"VP8L") + 9
    webp[start : start + 4] = struct.pack("<I", 0x0FFFFFFF)  # twice 14 bits
    tags = [(256, 4, 1, BOMB), (257, 4, 1, BOMB), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1)]
    tags += [(273, 4, 1, 8), (277, 3, 1, 1), (278, 4, 1, BOMB), (279, 4, 1, 9)]
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    tiff = b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + bytes(4)
    ppm = f"P6 {BOMB} {BOMB} 255\n".encode()
    png = png_of(BOMB, BOMB, bytes(1 << 20), color=2)
    return [png, ppm, tiff, *(bytes(data) for data in (gif, bmp, jpeg, jp2, webp))]


def png_of(
    width: int, height: int, lines: bytes, color: int, depth: int = 8, interlace: int = 0
) -> bytes:
    """A PNG of these filtered lines, whatever its header says."""
    head = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, interlace)
    body = chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + body


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _parts(random: Random) -> tuple[bytes, bytes, bytes]:
    """A PNG up to its header, its pixels, its end."""
    lines = b"".join(b"\0" + random.randbytes(27) for _ in range(9))
    data = png_of(9, 9, lines, color=2)
    return data[:33], data[33:-12], data[-12:]


def _strange_tags(random: Random) -> TiffImagePlugin.ImageFileDirectory_v2:
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[274] = 6  # Orientation, which Pillow follows in a TIFF
    tags[65000] = random.randbytes(50)
    tags[270] = "\x07 \u202e description" * 50
    tags[305] = "x" * 5000
    return tags


def _saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()

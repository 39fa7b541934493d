"""Small files that ask their decoder for gigabytes or hours, made by code: one of every kind.

    for name, data in bombs():
        ...

What a decoder would take for it is said of each; none of them says so in its header.
"""

import struct
from collections.abc import Iterator
from io import BytesIO

from PIL import Image

from tests.prepare.pictures import chunk, png_of

SIDE = 10_000  # pixels; 100,000,000 are allowed


def bombs() -> Iterator[tuple[str, bytes]]:
    """Every bomb, with its name; each must be refused."""
    yield "precincts of JPEG 2000", precincts(4000)
    yield "tiles of JPEG 2000", precincts(SIDE, tile=1)
    yield "tile of a TIFF", tile(64, 36_000)
    yield "strips of a TIFF", strips(4_000_000)
    yield "scans of a JPEG", scans(SIDE, 200)
    yield (
        "segments of a JPEG",
        _saved("JPEG").replace(b"\xff\xd8", b"\xff\xd8" + COMMENT * 10**6, 1),
    )
    yield "comments of a PPM", b"P6\n" + b"#\n" * 12_000_000 + b"2 2 255\n" + bytes(12)
    yield "chunks of a PNG", _chunks(3_000_000)
    yield "canvas of a WebP", _webp_canvas(SIDE, SIDE - 1)


COMMENT = b"\xff\xfe\0\2"  # of a JPEG, empty


def precincts(side: int, tile: int | None = None) -> bytes:
    """JPEG 2000 with a precinct for every pixel, 82 bytes: 0.6 kB of memory for each of them."""
    tile = tile or side
    size = struct.pack(">H8IH3B", 0, side, side, 0, 0, tile, tile, 0, 0, 1, 7, 1, 1)
    style = struct.pack(">2BHB5BB", 1, 0, 1, 0, 0, 0, 0, 0, 1, 0)  # the last: precincts of 2^0
    parts = [b"\xff\x4f", _marked(0xFF51, size), _marked(0xFF52, style)]
    parts += [_marked(0xFF5C, b"\x40\x40"), _marked(0xFF90, struct.pack(">HIBB", 0, 14, 0, 1))]
    return b"".join([*parts, b"\xff\x93\xff\xd9"])


def tile(side: int, of: int) -> bytes:
    """A TIFF of a few pixels that lie in one tile of many: as many bytes as that has pixels."""
    tags = [(256, side), (257, side), (258, 8), (259, 8), (262, 1), (277, 1), (322, of), (323, of)]
    return _tiff([*((tag, 1, value) for tag, value in tags), (324, 1, 8), (325, 1, 99)])


def strips(number: int) -> bytes:
    """A TIFF of very many strips, all of them the same: seconds for each million."""
    place = 10 + 12 * 9 + 4
    plain = [(256, 1, 1000), (257, 1, 1000), (258, 1, 8), (259, 1, 1), (262, 1, 1)]
    entries = [*plain, (273, number, place), (277, 1, 1), (278, 1, 1), (279, number, place)]
    return _tiff(entries) + struct.pack("<I", 8) * number


def scans(side: int, number: int) -> bytes:
    """A progressive JPEG whose scans refine nothing, each over all pixels: 0.1 s a scan."""
    blocks = ((side + 7) // 8) ** 2
    tables = b"".join(_marked(0xFFC4, bytes([k, 1, *[0] * 15, v])) for k, v in ((0, 0), (16, 0xE0)))
    parts = [b"\xff\xd8", _marked(0xFFDB, b"\0" + b"\1" * 64)]
    parts += [_marked(0xFFC2, struct.pack(">BHHB", 8, side, side, 1) + b"\1\x11\0"), tables]
    parts += [_marked(0xFFDA, b"\1\1\0\0\0\0"), bytes((blocks + 7) // 8)]
    runs = ("0" + "1" * 14) * -(-blocks // 32767)  # of blocks that end at once
    bits = runs + "1" * (-len(runs) % 8)
    body = int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\0")
    parts.append(_marked(0xFFDA, b"\1\1\0\1\x3f\1") + body)
    parts += [_marked(0xFFDA, b"\1\1\0\1\x3f\x10") + body] * number
    return b"".join([*parts, b"\xff\xd9"])


def _chunks(number: int) -> bytes:
    """A PNG with very many empty texts."""
    whole = png_of(2, 2, b"\0\0\0" * 2, color=0)
    return whole[:33] + chunk(b"tEXt", b"") * number + whole[33:]


def _webp_canvas(width: int, height: int) -> bytes:
    """An animation of 16 x 16 pixels on a large canvas: 16 bytes for each pixel of that."""
    data = bytearray(_saved("WEBP", save_all=True, append_images=[Image.new("RGB", (16, 16))]))
    place = data.index(b"VP8X") + 12
    data[place : place + 3] = (width - 1).to_bytes(3, "little")
    data[place + 3 : place + 6] = (height - 1).to_bytes(3, "little")
    return bytes(data)


def _saved(kind: str, **options: object) -> bytes:
    buffer = BytesIO()
    Image.new("RGB", (16, 16), (9, 90, 200)).save(buffer, kind, **options)
    return buffer.getvalue()


def _marked(marker: int, body: bytes) -> bytes:
    return struct.pack(">HH", marker, len(body) + 2) + body


def _tiff(entries: list[tuple[int, int, int]]) -> bytes:
    """A TIFF of tags, each a number, a count and a value (or where the values are) of 32 bits."""
    lines = b"".join(struct.pack("<HHII", tag, 4, count, value) for tag, count, value in entries)
    return struct.pack("<2sHIH", b"II", 42, 8, len(entries)) + lines + bytes(4)

"""A picture is called plain only if its markers bound what decoding it takes."""

import struct
import time
from io import BytesIO
from random import Random
from typing import Any

import pytest
from PIL import Image

from phi3v.processing.structure import is_endless, is_plain, webp_size
from tests.prepare.bombs import bombs, scans
from tests.prepare.pictures import chunk, good, noise, png_of

RANDOM = Random(0)


def saved(kind: str, image: Image.Image | None = None, **options: Any) -> bytes:
    buffer = BytesIO()
    (image or noise(Random(0), 60, 40)).save(buffer, kind, **options)
    return buffer.getvalue()


JPEG, PNG = saved("JPEG"), saved("PNG")


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("JPEG", {"icc_profile": bytes(500_000), "comment": "x" * 60_000}),
        ("JPEG", {"exif": b"Exif\0\0" + bytes(60_000)}),
        ("MPO", {"save_all": True, "append_images": [noise(Random(1), 60, 40)]}),
        ("PNG", {"icc_profile": bytes(500_000)}),
        ("PNG", {"compress_level": 0}),
    ],
)
def test_pictures_of_cameras_and_programs_are_plain(kind: str, options: dict[str, Any]) -> None:
    data = saved(kind, **options)
    assert is_plain(data) and not is_endless(data)
    assert is_plain(data + RANDOM.randbytes(5000))


def test_every_good_jpeg_and_png_of_the_zoo_is_plain_but_animations() -> None:
    plain = [is_plain(data) for data in good(RANDOM) if data.startswith((b"\xff\xd8", b"\x89PNG"))]
    assert plain.count(False) == 1 and len(plain) > 10


@pytest.mark.parametrize("name", [name for name, _ in bombs()])
def test_no_bomb_is_plain(name: str) -> None:
    data = dict(bombs())[name]
    before = time.process_time()
    assert not is_plain(data)
    assert is_endless(data) == name.endswith(" of a JPEG")
    assert time.process_time() - before < 1


def frame(marker: int, width: int = 60, height: int = 40, components: int = 3) -> bytes:
    """A JPEG of this frame, the rest of it as saved."""
    start = JPEG.index(b"\xff\xc0")
    data = bytearray(JPEG)
    data[start + 1] = marker
    data[start + 5 : start + 10] = struct.pack(">HHB", height, width, components)
    return bytes(data)


def test_what_is_large_or_strange_is_not_plain() -> None:
    assert is_plain(frame(0xC0, 5000, 4000)) and not is_plain(frame(0xC0, 5001, 4000))
    lossless, arithmetic = frame(0xC3), frame(0xC9)
    assert not is_plain(lossless) and not is_plain(arithmetic)
    exif = b"\xff\xe1\0\x08Exif\0\0"
    assert is_plain(JPEG[:2] + exif + JPEG[2:]) and not is_plain(JPEG[:2] + exif * 2 + JPEG[2:])
    comment = b"\xff\xfe\xff\xff" + bytes(65533)
    assert is_plain(JPEG[:2] + comment + JPEG[2:])
    assert not is_plain(JPEG[:2] + comment * 17 + JPEG[2:])
    assert not is_plain(JPEG[:2] + b"\xff\xfe\0\2" * 201 + JPEG[2:])
    assert not is_plain(JPEG[:20] + b"\0" + JPEG[20:])
    twice = JPEG.index(b"\xff\xc0")
    assert not is_plain(JPEG[:twice] + JPEG[twice : twice + 19] + JPEG[twice:])
    assert not is_plain(JPEG[:100]) and not is_plain(b"\xff\xd8\xff") and not is_plain(b"")
    assert is_plain(scans(8, 17)) and not is_plain(scans(8, 19))


def test_a_png_with_large_or_many_other_chunks_is_not_plain() -> None:
    def having(*chunks: bytes) -> bytes:
        return PNG[:33] + b"".join(chunks) + PNG[33:]

    assert is_plain(having(chunk(b"eXIf", bytes(1 << 16))))
    assert not is_plain(having(chunk(b"eXIf", bytes((1 << 16) + 1))))
    assert is_plain(having(*[chunk(b"tEXt", b"k\0v")] * 60))
    assert not is_plain(having(*[chunk(b"tEXt", b"k\0v")] * 65))
    assert not is_plain(having(*[chunk(b"tEXt", bytes(1 << 18))] * 5))
    assert not is_plain(having(*[chunk(b"IDAT", b"")] * 200))
    assert not is_plain(PNG[:-12] + chunk(b"eXIf", bytes(1 << 17)) + PNG[-12:])
    assert not is_plain(having(chunk(b"acTL", bytes(8))))
    assert is_plain(png_of(5000, 4000, b"", color=2))
    assert not is_plain(png_of(5001, 4000, b"", color=2))
    assert not is_plain(PNG[:12] + b"IDAT" + PNG[16:])


def test_a_jpeg_is_looked_through_in_time_that_its_length_bounds() -> None:
    before = time.process_time()
    for filler in (b"\xff", b"\xff\0", b"\0", b"\xff\xd0"):
        body = frame(0xC2)
        assert not is_endless(body[:-2] + filler * 8_000_000 + body[-2:])
    assert time.process_time() - before < 4


@pytest.mark.parametrize(
    "options",
    [{}, {"lossless": True}, {"save_all": True, "append_images": [noise(Random(1), 301, 7)]}],
)
def test_a_webp_says_its_size_before_it_is_opened(options: dict[str, Any]) -> None:
    assert webp_size(saved("WEBP", noise(Random(0), 301, 7), **options)) == (301, 7)
    assert webp_size(JPEG) is None and webp_size(b"RIFF") is None


def test_a_png_with_a_second_header_whose_size_pillow_takes_is_not_plain() -> None:
    """The first may say 4 x 4 pixels, the second 10,000 x 10,000."""
    small, large = (png_of(side, side, b"\0" * 4, color=0) for side in (2, 10_000))
    assert is_plain(small) and not is_plain(small[:33] + large[8:33] + small[33:])


def test_a_jpeg_with_a_long_run_of_filling_bytes_is_not_plain() -> None:
    buffer = BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "JPEG")
    data = buffer.getvalue()
    assert is_plain(data[:-2] + b"\xff" * 100 + data[-2:])
    assert not is_plain(data[:-2] + b"\xff" * 5000 + data[-2:])

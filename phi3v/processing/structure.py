"""What the markers of a picture file tell of the work in it, read before a decoder sees the file.

    is_plain(data)   # a JPEG or PNG as cameras and programs write them, of moderate size
    is_endless(data)  # a JPEG that goes over its pixels again and again

A plain picture takes at most about 0.3 GB and half a second, whatever its bytes are. Nothing is
said of any other, which may be as good: it is decoded where it can do no harm (bounded.py).
"""

import re
from collections.abc import Iterator

PLAIN_PIXELS = 20_000_000
PLAIN_SCANS = 20
"""Of a JPEG; programs write 10 at most, or 13."""
MOST_SCANS = 50  # each is a pass over all pixels, and takes 82 bytes or more
ENDLESS = 5_000  # segments; a profile takes 255 of them at most
MOST_SEGMENTS = 200
MOST_EXTRA = 1 << 20  # bytes that are not of the pixels, such as a profile
MOST_EXIF = 1 << 16  # bytes; each of its tags may repeat them all
MOST_CHUNKS = 64  # of a PNG, that are not of its pixels
LEAST_CHUNK = 1024  # bytes of pixels in a chunk, on average

JPEG, PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
MARKER = re.compile(rb"\xff([^\x00\xff\xd0-\xd7])")  # not within what is coded
BASELINE, EXTENDED, PROGRESSIVE = 0xC0, 0xC1, 0xC2
FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
START, END, SCAN, APP1 = 0xD8, 0xD9, 0xDA, 0xE1
BARE = (START, 0x01)  # markers without a length

FILLED = b"\xff" * 1024
"""Bytes that may stand before a marker in any number, and that Pillow feeds again with each block:
57 MB of them take 39 s."""

Segment = tuple[int, int, int]
"""A marker's second byte, where the marker starts, where what belongs to it ends."""


def is_plain(data: bytes) -> bool:
    """Whether the cost of decoding a picture is known to be moderate."""
    if data.startswith(JPEG):
        return _is_plain_jpeg(data)
    return data.startswith(PNG) and _is_plain_png(data)


def is_endless(data: bytes) -> bool:
    """Whether a picture is a JPEG of more than MOST_SCANS scans, or of ENDLESS segments."""
    return data.startswith(JPEG) and _num_scans(data) > MOST_SCANS


def _num_scans(data: bytes) -> int:
    """How many scans a JPEG has, counted to one more than MOST_SCANS."""
    found = 0
    for number, (code, _, _) in enumerate(_segments(data)):
        found += code == SCAN
        if found > MOST_SCANS or number > ENDLESS:
            return MOST_SCANS + 1
    return found


def webp_size(data: bytes) -> tuple[int, int] | None:
    """Width and height of a WebP, for whose canvas its decoder takes memory when it is opened.

    Source: RFC 9649, sections 2.5 to 2.7.
    """
    if not (data.startswith(b"RIFF") and data[8:15] == b"WEBPVP8"):
        return None
    kind, head = data[15:16], data[20:30]
    if kind == b"X":
        return 1 + int.from_bytes(head[4:7], "little"), 1 + int.from_bytes(head[7:10], "little")
    if kind == b"L":
        bits = int.from_bytes(head[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    width, height = (int.from_bytes(head[k : k + 2], "little") & 0x3FFF for k in (6, 8))
    return width, height


def _segments(data: bytes) -> Iterator[Segment]:
    """The segments of a JPEG up to its end, as libjpeg finds them: it passes over bytes between."""
    place = 0
    while found := MARKER.search(data, place):
        code = found[1][0]
        place = found.end()
        if code not in BARE:
            place += int.from_bytes(data[place : place + 2], "big")
        yield code, found.start(), place
        if code == END:
            return


def _is_plain_jpeg(data: bytes) -> bool:
    if FILLED in data:
        return False
    place = num_exif = 0
    frame = None
    for number, (code, start, end) in enumerate(_segments(data)):
        if start != place or number > MOST_SEGMENTS or end > MOST_EXTRA:
            return False
        place = end
        body = data[start + 4 : end]
        num_exif += code == APP1 and body.startswith(b"Exif")
        if code in FRAMES:
            if frame is not None or code > PROGRESSIVE or len(body) < 6:
                return False
            frame = code, body
        elif code == SCAN:
            return frame is not None and num_exif < 2 and _is_moderate(data, *frame, body)
        elif code == END:
            return False
    return False


def _is_moderate(data: bytes, code: int, frame: bytes, scan: bytes) -> bool:
    """Whether a JPEG of this frame, whose first scan this is, is small and has few scans."""
    height, width = (int.from_bytes(frame[k : k + 2], "big") for k in (1, 3))
    if width * height > PLAIN_PIXELS:
        return False
    if code != PROGRESSIVE and scan[:1] == frame[5:6]:  # all its components are in the one scan
        return True
    return _num_scans(data) <= PLAIN_SCANS


def _is_plain_png(data: bytes) -> bool:
    if data[12:16] != b"IHDR":
        return False
    width, height = (int.from_bytes(data[k : k + 4], "big") for k in (16, 20))
    if width * height > PLAIN_PIXELS:
        return False
    place, of_pixels, others, extra = len(PNG), 0, 0, 0
    while place + 8 <= len(data):
        length, name = int.from_bytes(data[place : place + 4], "big"), data[place + 4 : place + 8]
        place += 12 + length
        if name == b"IEND":
            break
        if name == b"IHDR" and others:
            return False  # Pillow takes the last one's word for width and height
        if name == b"IDAT":
            of_pixels += 1
        elif name == b"acTL" or (name == b"eXIf" and length > MOST_EXIF):
            return False
        else:
            others, extra = others + 1, extra + length
        is_many = of_pixels > MOST_CHUNKS + len(data) // LEAST_CHUNK
        if is_many or others > MOST_CHUNKS or extra > MOST_EXTRA:
            return False
    return True

"""An image reference of a row to a picture: found, its header read, decoded when its turn comes.

    loader = ImageLoader(root, 100_000_000, ImageCache(folder, cfg.fetch), cfg.images)
    loader.prefetch(references)  # those at http(s) addresses, at once
    picture = loader.picture("images/a1.jpg")
    picture.width, picture.height, picture.decode().image

What its pixels are is decided in `phi3v.processing.pixels`, by the recipe's `images`.
"""

import base64
import binascii
import hashlib
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import unquote, unquote_to_bytes

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

from phi3v.config.dataset import ImagesSection
from phi3v.errors import SampleError
from phi3v.files import HEAD, disguise_of
from phi3v.places import find_file, local_path, nearby
from phi3v.prepare.fetch import ImageCache
from phi3v.prepare.web import has_image_signature, shown_reference, shown_url
from phi3v.processing.pixels import (
    FORMATS,
    Pixels,
    flatten,
    orientation,
    to_rgb,
    turned,
    upright_size,
)

SIGNATURE_BYTES = 16
STDERR = 2
LONG = 300  # characters of a reference that are shown; it may be a whole image in base64
SCHEME = re.compile(r"data:|[a-z][a-z0-9+.-]*://", re.IGNORECASE)
INNER = ("bytes", "path", "url", "image_url")  # of a `datasets` Image, or of a chat's message


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

        Raises: SampleError if it is damaged, or its pixels have no agreed meaning.
        """
        with _pillow(self.name, self.data), _open(self.data) as image:
            with _named(self.name):
                pixels = to_rgb(image, self.rules)
        found = pixels.image
        if found.size != (self.width, self.height):
            raise SampleError(
                f"image cannot be read: {self.name}, {found.width}x{found.height} pixels where "
                f"its header says {self.width}x{self.height}"
            )
        return Pixels(found, pixels.traits | self.known)

    def thumbnail(self, side: int) -> np.ndarray:
        """Shrink the first frame to gray, for comparison with others.

        A JPEG is decoded at up to an eighth of its size, one of 1344 x 1008 in 2 ms instead of 12.

        returns  uint8 (side, side)
        Raises: SampleError if it is damaged.
        """
        with _pillow(self.name, self.data), _open(self.data) as image:
            drafted = image.draft("L", (side, side))
            box = drafted[1] if drafted else None  # of the smaller picture, without padding
            with _named(self.name):
                gray = flatten(image, self.rules).image.convert("L")
            small = gray.resize((side, side), Image.Resampling.BILINEAR, box)
            turn = orientation(image) if self.rules.exif == "apply" else 1
            return np.asarray(turned(small, turn))


def open_picture(data: bytes, name: str, max_pixels: int, rules: ImagesSection) -> Picture:
    """Read the header of an encoded image.

    Raises: SampleError if it is none, or has more pixels than `max_pixels`.
    """
    if not data:
        raise SampleError(f"image cannot be read: {name}, it has 0 bytes")
    with _pillow(name, data), _open(data) as image:
        _check_size(*image.size, name, max_pixels)
        width, height = upright_size(image, data, rules)
    return Picture(data, name, width, height, rules)


class ImageLoader:
    """Opens the images of one source.

    root        where relative paths start
    max_pixels  width x height of a picture at most
    cache       fetches what is at an http(s) address; None: such images are rejected
    rules       of their pixels
    """

    def __init__(
        self, root: Path, max_pixels: int, cache: ImageCache | None, rules: ImagesSection
    ) -> None:
        self.root, self.max_pixels, self.cache, self.rules = root, max_pixels, cache, rules

    def prefetch(self, references: Sequence[Any]) -> None:
        """Fetch all that have an http(s) address, many at once; `picture` raises what failed."""
        inner = (_inner(reference) for reference in references)
        if self.cache is not None:
            self.cache.prefetch([text for text in inner if isinstance(text, str) and _is_web(text)])

    def picture(self, reference: Any) -> Picture:
        """Find an image and read its header.

        reference  a path, an http(s) or data: URL, base64, encoded bytes, a Pillow image; or a
                   mapping that holds one of these under bytes, path, url or image_url
        Raises: SampleError if it is not there, is no image or too large a one.
        """
        reference = _inner(reference)
        if isinstance(reference, bytes | bytearray | memoryview):
            data = bytes(reference)
            return self._open(data, f"{len(data):,} bytes")
        if isinstance(reference, Image.Image):
            return self._encoded(reference)
        if isinstance(reference, str):
            return self._open(self._read(reference), _shortened(shown_reference(reference)))
        raise SampleError(f"image reference of type {type(reference).__name__} is no path or bytes")

    def _open(self, data: bytes, name: str) -> Picture:
        return open_picture(data, name, self.max_pixels, self.rules)

    def _read(self, text: str) -> bytes:
        if _is_web(text):
            return self._fetched(text)
        if scheme := SCHEME.match(text):
            if scheme[0].lower() == "data:":
                return _data_url(text)
            if scheme[0].lower() == "file://":
                return self._read(str(local_path(text)))
            raise SampleError(
                "image is at an address of another kind than http(s): "
                f"{_shortened(shown_reference(text))}; bring the file and name its path"
            )
        if path := find_file(self.root, text):
            return _file(path, text)
        data = _base64(text)
        if data is None or not has_image_signature(data):
            close = nearby(self.root / text) if len(text) < LONG else None
            there = f"; there is {close}" if close else ""
            name = _shortened(shown_reference(text))
            raise SampleError(f"image does not exist: {self.root / name}{there}")
        return data

    def _fetched(self, url: str) -> bytes:
        if self.cache is None:
            shown = _shortened(shown_url(url))
            raise SampleError(f"image is a URL: {shown}; download it and name the file")
        return self.cache.get(url)

    def _encoded(self, image: Image.Image) -> Picture:
        """Encode an image that was decoded elsewhere.

        To BMP: as exact as PNG, and 14 ms instead of 220 for 1344 x 1008 pixels.
        """
        name = f"a decoded image of {image.width}x{image.height} pixels"
        _check_size(image.width, image.height, name, self.max_pixels)
        buffer = BytesIO()
        with _pillow(name), _named(name):
            pixels = to_rgb(image, self.rules)
            pixels.image.save(buffer, "BMP")
        width, height = pixels.image.size
        return Picture(buffer.getvalue(), name, width, height, self.rules, pixels.traits)


def _check_size(width: int, height: int, name: str, max_pixels: int) -> None:
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
def _pillow(name: str, data: bytes = b"") -> Iterator[None]:
    """Turn whatever Pillow raises into a SampleError.

    Its warnings are of odd tags in files that it then reads, or raises an error for.
    """
    with warnings.catch_warnings(), _quiet(data):
        warnings.simplefilter("ignore")
        try:
            yield
        except SampleError:
            raise
        except UnidentifiedImageError as error:  # its text holds an address in memory
            what = f"cannot identify image file, it starts with {data[:16]!r}"
            raise SampleError(f"image cannot be read: {name}, {what}") from error
        except Exception as error:  # seen: OSError, SyntaxError, ValueError, RuntimeError, KeyError
            what = str(error) or type(error).__name__
            raise SampleError(f"image cannot be read: {name}, {what}") from error


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Say which picture it is whose pixels have no agreed meaning."""
    try:
        yield
    except SampleError as error:
        raise SampleError(f"{error} ({name})") from error


@contextmanager
def _quiet(data: bytes) -> Iterator[None]:
    """Keep off stderr what libtiff writes there of a damaged TIFF, past Python and its warnings."""
    if not data.startswith((b"II", b"MM")):
        yield
        return
    with open(os.devnull, "wb") as nowhere:
        stderr = os.dup(STDERR)
        os.dup2(nowhere.fileno(), STDERR)
        try:
            yield
        finally:
            os.dup2(stderr, STDERR)
            os.close(stderr)


def _inner(reference: Any) -> Any:
    """What a mapping holds: {"bytes": None, "path": "a.png"} -> "a.png"; others as they are."""
    while isinstance(reference, dict):
        values = (reference.get(key) for key in INNER)
        reference = next((v for v in values if not (v is None or _empty(v))), None)
    return reference


def _empty(value: Any) -> bool:
    return isinstance(value, str | bytes) and not value


def _is_web(text: str) -> bool:
    return text[:8].lower().startswith(("http://", "https://"))


def _shortened(text: str) -> str:
    return text if len(text) <= LONG else f"{text[:LONG]}..."


def _file(path: str, name: str) -> bytes:
    try:
        with open(path, "rb") as file:
            head = file.read(SIGNATURE_BYTES)  # not the 200 GB of an archive
            if has_image_signature(head):
                return head + file.read()
            if cause := disguise_of(head + file.read(HEAD)):
                raise SampleError(f"image cannot be read: {name}, it is {cause}")
            return head
    except OSError as error:
        raise SampleError(f"image cannot be read: {name}, {error.strerror}") from error


def _data_url(url: str) -> bytes:
    """data:image/png;base64,iVBORw0... -> bytes."""
    head, _, body = url.partition(",")
    is_base64 = head.lower().endswith(";base64")
    plain = body.encode(errors="surrogatepass")  # JSON may have given half of a surrogate pair
    data = _base64(unquote(body)) if is_base64 else unquote_to_bytes(plain)
    if data is None:
        raise SampleError(f"image cannot be read: {_shortened(url)}, it is no valid base64")
    return data


def _base64(text: str) -> bytes | None:
    """Decode base64 of either alphabet, with line breaks or without padding; None if it is none."""
    text = "".join(text.split()).translate(str.maketrans("-_", "+/")).rstrip("=")
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError):  # ValueError: a character beyond ASCII
        return None

"""An image reference of a row to a picture: found, and its header read.

    loader = ImageLoader(root, 100_000_000, ImageCache(folder, cfg.fetch), cfg.images)
    loader.prefetch(references)  # those at http(s) addresses, at once
    picture = loader.picture("images/a1.jpg")
    picture.width, picture.height, picture.decode().image

What is done with an encoded picture is in `phi3v.processing.decoding`.
"""

import base64
import binascii
import re
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import unquote, unquote_to_bytes

from PIL import Image

from phi3v.config.dataset import ImagesSection
from phi3v.errors import SampleError
from phi3v.files import HEAD, disguise_of
from phi3v.places import find_file, local_path, nearby
from phi3v.prepare.fetch import ImageCache
from phi3v.prepare.web import has_image_signature, shown_url
from phi3v.processing.decoding import Picture, check_size, named, open_picture, reading
from phi3v.processing.pixels import to_rgb

SIGNATURE_BYTES = 16
LONG = 300  # characters of a reference that are shown; it may be a whole image in base64
SCHEME = re.compile(r"data:|[a-z][a-z0-9+.-]*://", re.IGNORECASE)
INNER = ("bytes", "path", "url", "image_url")  # of a `datasets` Image, or of a chat's message


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
            name = shown_url(reference) if _is_web(reference) else reference
            return self._open(self._read(reference), _shortened(name))
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
                f"image is at an address of another kind than http(s): {_shortened(text)}; bring "
                "the file and name its path"
            )
        if path := find_file(self.root, text):
            return _file(path, text)
        data = _base64(text)
        if data is None or not has_image_signature(data):
            close = nearby(self.root / text) if len(text) < LONG else None
            there = f"; there is {close}" if close else ""
            raise SampleError(f"image does not exist: {self.root / _shortened(text)}{there}")
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
        check_size(image.width, image.height, name, self.max_pixels)
        buffer = BytesIO()
        with reading(name), named(name):
            pixels = to_rgb(image, self.rules)
            pixels.image.save(buffer, "BMP")
        width, height = pixels.image.size
        return Picture(buffer.getvalue(), name, width, height, self.rules, pixels.traits)


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

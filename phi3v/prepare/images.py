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

from phi3v.addresses import shown_reference, shown_url
from phi3v.config.dataset import MAX_ROW_BYTES, ImagesSection
from phi3v.content import has_image_signature
from phi3v.errors import SampleError
from phi3v.places import local_path, missing_image, read_image, shortened
from phi3v.prepare.fetch import ImageCache
from phi3v.processing.decoding import Picture, check_size, named, open_picture, reading
from phi3v.processing.pixels import to_rgb
from phi3v.reading import Reach

SCHEME = re.compile(r"data:|[a-z][a-z0-9+.-]*://", re.IGNORECASE)
INNER = ("bytes", "path", "url", "image_url")  # of a `datasets` Image, or of a chat's message


class ImageLoader:
    """Opens the images of one source.

    root        where relative paths start
    max_pixels  width x height of a picture at most
    cache       fetches what is at an http(s) address; None: such images are rejected
    rules       of their pixels
    reach       where their files may lie; default: in `root`
    max_bytes   of a file at most
    """

    def __init__(
        self,
        root: Path,
        max_pixels: int,
        cache: ImageCache | None,
        rules: ImagesSection,
        reach: Reach | None = None,
        max_bytes: int = MAX_ROW_BYTES,
    ) -> None:
        self.root, self.max_pixels, self.cache, self.rules = root, max_pixels, cache, rules
        self.reach, self.max_bytes = reach or Reach.of(root), max_bytes

    def prefetch(self, references: Sequence[Any]) -> None:
        """Fetch all that have an http(s) address, many at once; `picture` raises what failed."""
        inner = (_inner(reference) for reference in references)
        if self.cache is not None:
            self.cache.prefetch([text for text in inner if isinstance(text, str) and _is_web(text)])

    def picture(self, reference: Any) -> Picture:
        """Find an image and read its header.

        reference  a path, an http(s) or data: URL, base64, encoded bytes, a Pillow image; or a
                   mapping that holds one of these under bytes, path, url or image_url
        Raises: SampleError if it is not there, lies where it may not, is no image or too large a
        one; MachineError if the machine cannot read it.
        """
        reference = _inner(reference)
        if isinstance(reference, bytes | bytearray | memoryview):
            data = bytes(reference)
            return self._open(data, f"{len(data):,} bytes")
        if isinstance(reference, Image.Image):
            return self._encoded(reference)
        if isinstance(reference, str):
            return self._open(self._read(reference), shortened(shown_reference(reference)))
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
                f"{shortened(shown_reference(text))}; bring the file and name its path"
            )
        data = read_image(self.root, text, self.reach, self.max_bytes)
        if data is not None:
            return data
        data = _base64(text)
        if data is None or not has_image_signature(data):
            raise missing_image(self.root, text, self.reach)
        return data

    def _fetched(self, url: str) -> bytes:
        if self.cache is None:
            shown = shortened(shown_url(url))
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


def _data_url(url: str) -> bytes:
    """data:image/png;base64,iVBORw0... -> bytes."""
    head, _, body = url.partition(",")
    is_base64 = head.lower().endswith(";base64")
    plain = body.encode(errors="surrogatepass")  # JSON may have given half of a surrogate pair
    data = _base64(unquote(body)) if is_base64 else unquote_to_bytes(plain)
    if data is None:
        raise SampleError(f"image cannot be read: {shortened(url)}, it is no valid base64")
    return data


def _base64(text: str) -> bytes | None:
    """Decode base64 of either alphabet, with line breaks or without padding; None if it is none."""
    text = "".join(text.split()).translate(str.maketrans("-_", "+/")).rstrip("=")
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError):  # ValueError: a character beyond ASCII
        return None

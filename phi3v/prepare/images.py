"""An image reference of a row to a decoded picture."""

import os.path
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from phi3v.errors import SampleError

URLS = ("http://", "https://", "s3://", "gs://", "data:")
LONG = 300  # characters of a reference that are shown; it may be a whole image in base64


def load_image(reference: Any, root: Path) -> Image.Image:
    """Open and decode a picture.

    reference  a path (relative ones start at `root`), encoded bytes, or the {"bytes", "path"} of a
               `datasets` Image column
    returns    in RGB, as the published processor takes it: alpha is dropped
    Raises: SampleError if it is not there or cannot be decoded.
    """
    if isinstance(reference, dict):
        reference = reference.get("bytes") or reference.get("path")
    if isinstance(reference, str):
        return _decode(_path(reference, root), reference)
    if isinstance(reference, bytes):
        return _decode(BytesIO(reference), f"{len(reference):,} bytes")
    raise SampleError(f"image reference of type {type(reference).__name__} is no path or bytes")


def _path(reference: str, root: Path) -> Path:
    shown = reference if len(reference) < LONG else f"{reference[:LONG]}..."
    if reference.startswith(URLS):
        raise SampleError(f"image is a URL: {shown}; download it and name the file")
    if not os.path.isfile(root / reference):  # of any text, Path.is_file raises for a long one
        raise SampleError(f"image does not exist: {root / shown}")
    return root / reference


def _decode(file: Path | BytesIO, name: str) -> Image.Image:
    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    except Exception as error:  # Pillow's decoders: OSError, SyntaxError, RuntimeError and others
        raise SampleError(f"image cannot be read: {name}, {error}") from error

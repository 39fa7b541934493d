"""An image reference of a row to a decoded picture."""

from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from phi3v.errors import SampleError


def load_image(reference: Any, root: Path) -> Image.Image:
    """Open and decode a picture.

    reference  a path (relative ones start at `root`), encoded bytes, or the {"bytes", "path"} of a
               `datasets` Image column
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
    if reference.startswith(("http://", "https://")):
        raise SampleError(f"image {reference} is a URL; download it and name the file")
    path = root / reference
    if not path.is_file():
        raise SampleError(f"image {path} does not exist")
    return path


def _decode(file: Path | BytesIO, name: str) -> Image.Image:
    try:
        image = Image.open(file)
        image.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise SampleError(f"image {name} cannot be read: {error}") from error
    return image

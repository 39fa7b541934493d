"""How the pixels of a canvas lie in a shard: raw, or encoded as zstd, png or jpeg.

raw is a canvas's bytes. zstd is made of each row's differences from the row above (modulo 256,
the first row as it is), which takes half of what zstd of the pixels takes. png and jpeg are whole
image files. What each costs is measured by benchmarks/codecs.py; for a canvas of 1344 x 1008:

    zstd  a quarter to a half of raw, exact, 9 ms to decode
    png   a little larger, exact, 35 ms to decode, 80 ms to encode
    jpeg  a tenth at quality 95, lossy, 7 ms to decode
"""

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
from PIL import Image

from phi3v.errors import ShardError

CodecName = Literal["raw", "zstd", "png", "jpeg"]
NAMES: tuple[CodecName, ...] = get_args(CodecName)

ZSTD_LEVEL = 1  # of row differences 3 is no smaller, and half as fast or less
PNG_LEVEL = 1  # 6 is 15 % smaller and takes four times as long to encode
DAMAGE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)  # Pillow's words for it


@dataclass(frozen=True)
class Codec:
    """One way of storing pixels; `quality` (1 to 100) is jpeg's, whose chroma stays whole."""

    name: CodecName = "raw"
    quality: int = 95

    @classmethod
    def from_manifest(cls, manifest: Mapping[str, Any]) -> "Codec":
        """The codec of a dataset folder.

        Raises: ShardError if this program does not know it.
        """
        entry = manifest.get("pixels") or {}
        name = entry.get("codec")
        if name not in NAMES:
            raise ShardError(
                f"the manifest names pixels.codec {name!r}, this program reads {', '.join(NAMES)}; "
                "use the program that prepared the dataset, or prepare it again"
            )
        return cls(name, entry.get("quality") or cls.quality)

    def to_manifest(self) -> dict[str, Any]:
        """What a manifest says under `pixels`."""
        is_lossy = self.name == "jpeg"
        quality = self.quality if is_lossy else None
        return {"codec": self.name, "quality": quality, "is_lossy": is_lossy}

    def encode(self, canvas: np.ndarray) -> pa.Buffer:
        """Encode a canvas, uint8 (height, width, 3); raw copies nothing."""
        canvas = np.ascontiguousarray(canvas)
        if self.name == "raw":
            return pa.py_buffer(canvas)
        if self.name == "zstd":
            return _zstd().compress(pa.py_buffer(_differences(canvas)))
        return self._encode_image(Image.fromarray(canvas))

    def _encode_image(self, image: Image.Image) -> pa.Buffer:
        file = io.BytesIO()
        if self.name == "png":
            image.save(file, "PNG", compress_level=PNG_LEVEL)
        else:
            image.save(file, "JPEG", quality=self.quality, subsampling="4:4:4")
        return pa.py_buffer(file.getvalue())

    def decode(self, data: memoryview, height: int, width: int) -> np.ndarray:
        """Decode a canvas of height x width pixels; raw gives a view of `data`.

        returns  uint8 (height, width, 3)
        Raises: ValueError if the data is damaged, or of a canvas of another size.
        """
        shape = (height, width, 3)
        if min(shape) < 1:
            raise ValueError(f"an image has {height} x {width} pixels")
        if self.name == "raw":
            return np.frombuffer(data, np.uint8).reshape(shape)
        try:
            return self._decode(data, shape)
        except DAMAGE as error:
            raise ValueError(
                f"{len(data):,} bytes of {self.name} are not an image of {height} x {width} pixels"
            ) from error

    def _decode(self, data: memoryview, shape: tuple[int, int, int]) -> np.ndarray:
        if self.name == "zstd":  # refuses any other number of bytes
            size = shape[0] * shape[1] * shape[2]
            flat = _zstd().decompress(pa.py_buffer(data), decompressed_size=size)
            rows = np.frombuffer(flat, np.uint8).reshape(shape)
            return np.add.accumulate(rows, axis=0, dtype=np.uint8)
        with Image.open(io.BytesIO(data), formats=[self.name]) as image:
            if (image.height, image.width, len(image.getbands())) != shape:
                raise ValueError("of another size")
            return np.asarray(image)


def _differences(canvas: np.ndarray) -> np.ndarray:
    rows = canvas.copy()
    rows[1:] -= canvas[:-1]
    return rows


def _zstd() -> pa.Codec:
    return pa.Codec("zstd", compression_level=ZSTD_LEVEL)

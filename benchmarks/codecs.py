"""What each pixel codec costs: bytes of a canvas, and milliseconds to encode and decode it.

    python benchmarks/codecs.py

Canvases of 1344 x 1008 pixels, made to compress as photos do: as large as their pictures (sharp),
and of pictures of half the size, as the HD transform enlarges them (enlarged).
"""

import argparse
import os
from collections.abc import Sequence
from functools import partial

import numpy as np
import pyarrow as pa
from PIL import Image
from timing import describe_machine, measure

from phi3v.data.codecs import NAMES, Codec

HEIGHT, WIDTH = 1344, 1008
CODECS = [*(Codec(name) for name in NAMES if name != "jpeg"), Codec("jpeg", 85), Codec("jpeg", 95)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--images", type=int, default=4, help="of each kind")
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    print(f"{describe_machine()}; load {os.getloadavg()[0]:.1f}")
    print(f"an image: mean size, median (quartiles) of {arguments.repeats}")
    for kind, scale in (("sharp", 1), ("enlarged", 2)):
        photos = [photo(seed, HEIGHT // scale, WIDTH // scale) for seed in range(arguments.images)]
        size = (WIDTH, HEIGHT)
        canvases = [np.asarray(p.resize(size, Image.Resampling.BILINEAR)) for p in photos]
        compare(kind, canvases, arguments.repeats)


def compare(kind: str, canvases: Sequence[np.ndarray], repeats: int) -> None:
    """Print a line for each codec."""
    stored = {codec: [codec.encode(canvas) for canvas in canvases] for codec in CODECS}
    encodes = measure({_name(c): partial(_encode, c, canvases) for c in CODECS}, repeats)
    decodes = measure({_name(c): partial(_decode, c, stored[c]) for c in CODECS}, repeats)
    for codec, parts in stored.items():
        name, raw = _name(codec), canvases[0].nbytes
        size = sum(part.size for part in parts) / len(parts)
        encode, decode = (times[name] / len(parts) for times in (encodes, decodes))
        rate = raw / float(np.median(decode.wall)) / 1e6
        print(f"{kind:8} {name:7} {size / 1e6:5.2f} MB, {size / raw:.2f} of raw")
        if codec.name != "raw":  # whose canvases are views
            print(f"    encode {encode}\n    decode {decode}, {rate:,.0f} MB/s", flush=True)


def _name(codec: Codec) -> str:
    return f"jpeg {codec.quality}" if codec.name == "jpeg" else codec.name


def _encode(codec: Codec, canvases: Sequence[np.ndarray]) -> None:
    for canvas in canvases:
        codec.encode(canvas)


def _decode(codec: Codec, parts: Sequence[pa.Buffer]) -> None:
    for part in parts:
        codec.decode(memoryview(part), HEIGHT, WIDTH)


def photo(seed: int, height: int, width: int) -> Image.Image:
    """Soft colours of several scales, forty rectangles with hard edges, and grain."""
    random = np.random.default_rng(seed)
    pixels = 128 + random.normal(0, 2, (height, width, 3))
    for cells, strength in ((4, 90), (16, 45), (64, 20), (200, 8)):
        spots = random.normal(0, strength, (cells, cells, 3)).astype(np.float32)
        for channel in range(3):
            spot = Image.fromarray(spots[..., channel] + spots.mean(2))
            pixels[..., channel] += np.asarray(
                spot.resize((width, height), Image.Resampling.BICUBIC)
            )
    for _ in range(40):
        top, left = random.integers(0, height), random.integers(0, width)
        bottom, right = (
            top + random.integers(20, height // 3),
            left + random.integers(20, width // 3),
        )
        part = pixels[top:bottom, left:right]
        part[:] = 0.3 * part + random.normal(90, 60, 3)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


if __name__ == "__main__":
    main()

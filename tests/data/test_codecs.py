"""Exact codecs give back every bit, jpeg the same bits each time; damage is a ValueError."""

import io
import struct

import numpy as np
import pytest
from PIL import Image

from phi3v.config.dataset import PixelsSection
from phi3v.data.codecs import NAMES, Codec, CodecName
from phi3v.errors import ShardError

RANDOM = np.random.default_rng(0)
ROWS = np.arange(256, dtype=np.uint8)[:, None, None]
CANVASES = {
    "noise": RANDOM.integers(0, 256, (56, 84, 3), dtype=np.uint8),
    "one pixel": np.array([[[255, 0, 7]]], np.uint8),
    "one row": RANDOM.integers(0, 256, (1, 300, 3), dtype=np.uint8),
    "one column": RANDOM.integers(0, 256, (300, 1, 3), dtype=np.uint8),
    "white": np.full((28, 28, 3), 255, np.uint8),
    "black": np.zeros((28, 28, 3), np.uint8),
    "leaps": np.tile(np.array([[[0]], [[255]]], np.uint8), (14, 28, 3)),
    "slope": np.broadcast_to(ROWS, (256, 28, 3)),
    "turned": RANDOM.integers(0, 256, (84, 56, 3), dtype=np.uint8).transpose(1, 0, 2),
    "one crop": RANDOM.integers(0, 256, (336, 336, 3), dtype=np.uint8),
}


def decoded(codec: Codec, canvas: np.ndarray) -> np.ndarray:
    return codec.decode(memoryview(codec.encode(canvas)), canvas.shape[0], canvas.shape[1])


@pytest.mark.parametrize("canvas", CANVASES.values(), ids=CANVASES)
@pytest.mark.parametrize("name", ["raw", "zstd", "png"])
def test_exact_codecs_give_back_every_bit(name: CodecName, canvas: np.ndarray) -> None:
    before = canvas.copy()
    found = decoded(Codec(name), canvas)
    assert found.dtype == np.uint8
    assert np.array_equal(found, canvas)
    assert np.array_equal(canvas, before), "the canvas itself was changed"


@pytest.mark.parametrize("canvas", CANVASES.values(), ids=CANVASES)
@pytest.mark.parametrize("name", NAMES)
def test_the_same_canvas_gives_the_same_bytes(name: CodecName, canvas: np.ndarray) -> None:
    codec = Codec(name)
    assert codec.encode(canvas).equals(codec.encode(canvas.copy()))
    assert np.array_equal(decoded(codec, canvas), decoded(codec, canvas.copy()))


def test_raw_copies_nothing() -> None:
    canvas = CANVASES["noise"]
    data = Codec("raw").encode(canvas)
    assert np.shares_memory(np.frombuffer(data, np.uint8), canvas)
    assert np.shares_memory(decoded(Codec("raw"), canvas), canvas)


def test_jpeg_is_near_by_its_quality_and_keeps_chroma_whole() -> None:
    """Measured mean errors at qualities 95 and 50: 1.1 and 5.1; with 4:2:0 chroma 95 gives 11."""
    stripes = np.zeros((56, 56, 3), np.uint8)
    stripes[:, ::2, 0] = 200
    stripes[:, 1::2, 2] = 200
    found = {quality: decoded(Codec("jpeg", quality), stripes) for quality in (50, 95)}
    errors = {q: np.abs(pixels - stripes.astype(int)).mean() for q, pixels in found.items()}
    assert errors[95] < 2 < errors[50]


def test_every_codec_is_smaller_than_raw_on_a_smooth_picture() -> None:
    small = Image.fromarray(RANDOM.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    canvas = np.asarray(small.resize((336, 336), Image.Resampling.BICUBIC))
    sizes = {name: Codec(name).encode(canvas).size for name in NAMES}
    assert sizes["raw"] == canvas.nbytes
    assert sizes["zstd"] < 0.3 * sizes["raw"], "the differences of rows are not what is compressed"
    assert sizes["jpeg"] < sizes["png"] < 0.5 * sizes["raw"]


@pytest.mark.parametrize("size", [(55, 84), (57, 84), (56, 83), (84, 56), (0, 84), (-1, 84)])
@pytest.mark.parametrize("name", NAMES)
def test_a_canvas_of_another_size_is_refused(name: CodecName, size: tuple[int, int]) -> None:
    data = memoryview(Codec(name).encode(CANVASES["noise"]))
    if size == (84, 56) and name in ("raw", "zstd"):
        return  # whose bytes do not say which side is which
    with pytest.raises(ValueError):
        Codec(name).decode(data, *size)


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.9])
@pytest.mark.parametrize("name", ["zstd", "png", "jpeg"])
def test_data_that_is_cut_short_is_refused_with_its_size(name: CodecName, share: float) -> None:
    whole = memoryview(Codec(name).encode(CANVASES["noise"]))
    data = whole[: int(share * len(whole))]
    with pytest.raises(ValueError) as caught:
        Codec(name).decode(data, 56, 84)
    assert str(caught.value) == f"{len(data):,} bytes of {name} are not an image of 56 x 84 pixels"


def test_a_picture_of_another_mode_is_refused() -> None:
    file = io.BytesIO()
    Image.new("L", (84, 56)).save(file, "PNG")
    with pytest.raises(ValueError, match="bytes of png are not an image of 56 x 84 pixels"):
        Codec("png").decode(memoryview(file.getvalue()), 56, 84)


def test_a_head_that_promises_four_billion_pixels_is_refused_undecoded() -> None:
    data = bytearray(Codec("jpeg").encode(CANVASES["noise"]))
    place = data.index(struct.pack(">HH", 56, 84))
    data[place : place + 4] = b"\xff\xff\xff\xff"
    with pytest.raises(ValueError, match="bytes of jpeg are not an image of 56 x 84 pixels"):
        Codec("jpeg").decode(memoryview(data), 56, 84)


def test_the_manifest_says_which_codec_it_is_and_whether_it_is_lossy() -> None:
    for name in NAMES:
        codec = Codec(name, 80) if name == "jpeg" else Codec(name)
        entry = codec.to_manifest()
        assert Codec.from_manifest({"pixels": entry}) == codec
        assert entry["is_lossy"] == (name == "jpeg")
    assert Codec("jpeg", 80).to_manifest() == {"codec": "jpeg", "quality": 80, "is_lossy": True}
    assert Codec("png", 80).to_manifest() == {"codec": "png", "quality": None, "is_lossy": False}


def test_every_codec_of_the_recipe_is_one() -> None:
    for name in NAMES:
        pixels = PixelsSection(codec=name)
        assert Codec(pixels.codec, pixels.quality).name == name
    assert Codec() == Codec(PixelsSection().codec, PixelsSection().quality)


def test_a_manifest_without_a_codec_is_refused() -> None:
    with pytest.raises(ShardError, match="names pixels.codec None, this program reads raw, zstd"):
        Codec.from_manifest({})

"""Whatever a picture file holds becomes the RGB of a stated rule, or is refused by name."""

import io
import struct
import zlib
from random import Random
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps, TiffImagePlugin

from phi3v.config.dataset import ImagesSection
from phi3v.errors import SampleError
from phi3v.pictures import PUBLISHED
from phi3v.processing import pixels
from phi3v.processing.canvas import hd_canvas
from phi3v.processing.pixels import TURNS, to_rgb, upright_size
from tests.prepare.pictures import good

NEW = ImagesSection()
RED, CLEAR, HALF = (200, 30, 30, 255), (10, 20, 30, 0), (0, 0, 0, 128)


def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def read(data: bytes, rules: ImagesSection = NEW) -> np.ndarray:
    return np.asarray(to_rgb(Image.open(io.BytesIO(data)), rules).image)


def traits(data: bytes) -> set[str]:
    return set(to_rgb(Image.open(io.BytesIO(data)), NEW).traits)


def noise(width: int = 60, height: int = 40, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def three() -> Image.Image:
    """An opaque, a clear and a half clear pixel."""
    image = Image.new("RGBA", (3, 1))
    for place, color in enumerate((RED, CLEAR, HALF)):
        image.putpixel((place, 0), color)
    return image


ON_WHITE = [[200, 30, 30], [255, 255, 255], [127, 127, 127]]
DROPPED = [[200, 30, 30], [10, 20, 30], [0, 0, 0]]


def palette(transparency: bytes | int) -> bytes:
    image = Image.new("P", (3, 1))
    image.putpalette([200, 30, 30, 10, 20, 30, 0, 0, 0])
    for place in range(3):
        image.putpixel((place, 0), place)
    return encode(image, transparency=transparency)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_transparency_lies_on_white_or_is_dropped_as_published(kind: str) -> None:
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    data = encode(three(), kind, **options)
    assert read(data).tolist() == [ON_WHITE]
    assert read(data, PUBLISHED).tolist() == [DROPPED]
    assert traits(data) == {"transparent"}


def test_a_palette_with_an_alpha_for_each_entry_lies_on_white() -> None:
    data = palette(bytes([255, 0, 128]))
    assert read(data).tolist() == [ON_WHITE]
    assert read(data, PUBLISHED).tolist() == [DROPPED]


def test_one_transparent_entry_of_a_palette_lies_on_white() -> None:
    data = palette(1)
    assert read(data)[0, :2].tolist() == ON_WHITE[:2] and traits(data) == {"transparent"}


def test_a_transparent_color_lies_on_white_in_gray_and_in_color() -> None:
    color = Image.fromarray(np.array([[[9, 9, 9], [9, 9, 8]]], np.uint8))
    assert read(encode(color, transparency=(9, 9, 9))).tolist() == [[[255] * 3, [9, 9, 8]]]
    gray = Image.fromarray(np.array([[9, 8]], np.uint8))
    assert read(encode(gray, transparency=9))[0, :, 0].tolist() == [255, 8]
    deep = Image.fromarray(np.array([[100, 65535, 32896]], np.uint16))
    data = encode(deep, transparency=100)
    assert read(data)[0, :, 0].tolist() == [255, 255, 128]
    assert traits(data) == {"transparent", "deep"}
    assert read(data, PUBLISHED)[0, :, 0].tolist() == [0, 255, 128]
    bits = Image.new("1", (2, 1))
    bits.putpixel((1, 0), 1)
    assert read(encode(bits, transparency=0))[0, :, 0].tolist() == [255, 255]


@pytest.mark.parametrize(("bits", "packed"), [(2, 0b00011011), (4, 0x05)])
def test_a_transparent_gray_of_few_bits_is_scaled_as_its_pixels_are(bits: int, packed: int) -> None:
    """Pillow scales the samples alone, and would find no pixel of that colour."""

    def chunk(name: bytes, body: bytes) -> bytes:
        end = struct.pack(">I", zlib.crc32(name + body))
        return struct.pack(">I", len(body)) + name + body + end

    width, clear = 8 // bits, 1 if bits == 2 else 5
    header = struct.pack(">IIBBBBB", width, 1, bits, 0, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"tRNS", struct.pack(">H", clear))
    data += chunk(b"IDAT", zlib.compress(bytes([0, packed]))) + chunk(b"IEND", b"")
    expected = {2: [0, 255, 170, 255], 4: [0, 255]}[bits]
    assert read(data)[0, :, 0].tolist() == expected


def test_a_transparent_color_of_16_bits_is_refused() -> None:
    image = Image.new("RGB", (1, 1))
    image.info["transparency"] = (60000, 0, 0)
    with pytest.raises(SampleError, match="a transparent color of 16 bits: .* save it with an alp"):
        to_rgb(image, NEW)
    assert to_rgb(image, PUBLISHED).image.getpixel((0, 0)) == (0, 0, 0)


@pytest.mark.parametrize("mode", ["LA", "La", "PA", "RGBa"])
def test_gray_palette_and_premultiplied_alpha_lie_on_white(mode: str) -> None:
    image = Image.merge("LA", (Image.new("L", (2, 2), 0), Image.new("L", (2, 2), 0)))
    image.putpixel((0, 0), (60, 255))
    source = image.convert("RGBA").convert("RGBa") if mode == "RGBa" else image
    if mode == "PA":
        flat = Image.new("P", (2, 2), 0)
        flat.putpalette([60, 60, 60])
        source = flat.convert("PA")
        source.putalpha(image.getchannel("A"))
    if mode == "La":
        source = image.convert("La")
    assert source.mode == mode
    found = np.asarray(to_rgb(source, NEW).image)[..., 0]
    assert found.tolist() == [[60, 255], [255, 255]]


def test_opaque_alpha_is_no_transparency_and_changes_nothing() -> None:
    data = encode(noise(mode="RGBA"))
    assert traits(data) == set()
    assert np.array_equal(read(data), read(data, PUBLISHED))


@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "AVIF", "TIFF"])
def test_a_photo_is_turned_as_its_camera_says(kind: str, turn: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = turn
    data = encode(noise(), kind, exif=exif)
    with Image.open(io.BytesIO(data)) as image:
        size = upright_size(image, data, NEW)
        upright = ImageOps.exif_transpose(image).convert("RGB")
    assert size == upright.size == ((40, 60) if turn >= 5 else (60, 40))
    assert np.array_equal(read(data), np.asarray(upright))
    if kind != "TIFF":  # which Pillow itself turns
        assert traits(data) == {"turned"}
        assert read(data, PUBLISHED).shape == (40, 60, 3)


def test_a_png_may_tell_its_orientation_behind_its_pixels() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    plain = encode(noise())
    body = exif.tobytes()[6:] if exif.tobytes().startswith(b"Exif") else exif.tobytes()
    crc = struct.pack(">I", zlib.crc32(b"eXIf" + body))
    late = plain[:-12] + struct.pack(">I", len(body)) + b"eXIf" + body + crc + plain[-12:]
    with Image.open(io.BytesIO(late)) as image:
        assert upright_size(image, late, NEW) == (40, 60)
    assert read(late).shape == (60, 40, 3)


def test_the_size_of_a_png_is_known_without_decoding_it() -> None:
    data = encode(noise())
    with Image.open(io.BytesIO(data)) as image:
        assert upright_size(image, data[:-20], NEW) == (60, 40)
        assert image.tile  # not decoded


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("bad", [b"Exif\0\0nonsense", b"Exif\0\0II*\0\xff\xff\xff\xff"])
def test_metadata_that_cannot_be_read_turn_nothing(bad: bytes) -> None:
    assert read(encode(noise(), "JPEG", exif=bad)).shape == (40, 60, 3)


def test_what_the_rule_has_made_it_leaves_as_it_is() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    for data in (encode(noise(), "JPEG", exif=exif), encode(three()), palette(1)):
        once = to_rgb(Image.open(io.BytesIO(data)), NEW).image
        again = to_rgb(once, NEW)
        assert again.image is once or np.array_equal(np.asarray(again.image), np.asarray(once))
        assert not again.traits


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM", "JPEG2000"])
def test_gray_of_16_bits_is_scaled_from_its_whole_range(kind: str) -> None:
    values = np.array([[0, 128, 129, 255, 32896, 65535]], np.uint16)
    data = encode(Image.fromarray(values), kind)
    for rules in (NEW, PUBLISHED):
        assert read(data, rules)[0, :, 0].tolist() == [0, 0, 1, 1, 128, 255]
    assert traits(data) == {"deep"}


def test_a_tiff_of_12_bits_says_so_and_is_scaled_by_them() -> None:
    tags = [(256, 3, 1, 2), (257, 3, 1, 1), (258, 3, 1, 12), (259, 3, 1, 1), (262, 3, 1, 1)]
    tags += [(273, 4, 1, 122), (277, 3, 1, 1), (278, 3, 1, 1), (279, 4, 1, 3)]
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    data = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)
    data = data.ljust(122, b"\0") + bytes([0x80, 0x0F, 0xFF])  # 0x800, 0xFFF
    assert read(data)[0, :, 0].tolist() == [128, 255]


def test_a_tiff_of_16_bits_whose_white_is_zero_is_turned_over() -> None:
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[262] = 0
    values = np.array([[0, 65535]], np.uint16)
    data = bytearray(encode(Image.fromarray(values), "TIFF"))
    place = data.index(struct.pack("<HHI", 262, 3, 1))
    data[place + 8 : place + 10] = b"\0\0"
    assert read(bytes(data))[0, :, 0].tolist() == [255, 0]


@pytest.mark.parametrize("largest", [1, 255, 4095, 16383])
def test_low_values_in_16_bits_are_refused_for_nobody_knows_their_range(largest: int) -> None:
    data = encode(Image.fromarray(np.array([[0, largest]], np.uint16)))
    with pytest.raises(SampleError, match=f"only low values: none is above {largest:,}, so it"):
        read(data)


@pytest.mark.parametrize(
    ("dtype", "kind"), [(np.int32, "integers"), (np.float32, "floating point numbers")]
)
def test_32_bits_are_refused_by_name(dtype: Any, kind: str) -> None:
    data = encode(Image.fromarray(np.array([[0, 200]], dtype)), "TIFF")
    for rules in (NEW, PUBLISHED):
        with pytest.raises(SampleError, match=f"without an agreed range: {kind} of up to 32 bits"):
            read(data, rules)


def test_cmyk_is_read_as_inks_and_an_adobe_jpeg_of_inverted_inks_too() -> None:
    inks = Image.new("CMYK", (16, 16), (255, 0, 0, 0))  # cyan
    for kind in ("TIFF", "JPEG"):  # Pillow writes a JPEG as Adobe does
        data = encode(inks, kind)
        assert (b"Adobe" in data) == (kind == "JPEG")
        red, green, blue = read(data)[8, 8].tolist()
        assert red < 10 and green > 245 and blue > 245, kind


def test_an_icc_profile_changes_no_pixel() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    assert np.array_equal(read(encode(noise(), icc_profile=profile)), read(encode(noise())))


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_an_animation_is_its_first_frame_on_white(kind: str) -> None:
    first, second = Image.new("RGBA", (8, 6), CLEAR), Image.new("RGBA", (8, 6), (0, 0, 255, 255))
    first.paste(RED, (0, 0, 4, 6))
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encode(first, kind, save_all=True, append_images=[second], **options)
    assert read(data)[0, 7].tolist() == [255, 255, 255]
    assert abs(read(data)[0, 0].astype(int) - RED[:3]).max() < 12


def test_a_canvas_follows_the_rule_it_is_given() -> None:
    clear = Image.new("RGBA", (28, 28), CLEAR)
    assert (hd_canvas(clear, 1, 28, rules=NEW) == 255).all()
    assert (hd_canvas(clear, 1, 28) == [10, 20, 30]).all()


@pytest.mark.parametrize("rules", [NEW, PUBLISHED])
def test_a_picture_in_bands_is_the_same_picture(
    monkeypatch: pytest.MonkeyPatch, rules: ImagesSection
) -> None:
    """Large pictures are changed band by band, so that their memory is bounded."""
    first_clear = noise(mode="RGBA")
    first_clear.putpixel((0, 0), CLEAR)
    pictures = [*good(Random(0)), encode(first_clear)]
    whole = [to_rgb(Image.open(io.BytesIO(data)), rules) for data in pictures]
    monkeypatch.setattr(pixels, "BAND", 40)  # two to five rows of these
    for data, expected in zip(pictures, whole, strict=True):
        banded = to_rgb(Image.open(io.BytesIO(data)), rules)
        assert np.array_equal(banded.image, expected.image)
        assert banded.traits == expected.traits

"""Whatever a row refers to becomes the picture that the published processor sees, or a reason."""

import base64
import hashlib
import io
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile

from phi3v.config.dataset import FetchSection, ImagesSection
from phi3v.errors import SampleError
from phi3v.pictures import PUBLISHED
from phi3v.prepare.fetch import ImageCache
from phi3v.prepare.images import ImageLoader
from phi3v.processing.decoding import Picture
from phi3v.processing.pixels import FORMATS
from phi3v.reading import Reach
from tests.prepare.hosts import Host
from tests.tiny import write_picture

LIMIT = 100_000_000  # pixels


def noise(width: int = 60, height: int = 40, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encode(picture: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that says it is this large, and holds nothing."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def read(data: Any, max_pixels: int = LIMIT, rules: ImagesSection = PUBLISHED) -> Picture:
    return ImageLoader(Path(), max_pixels, None, rules).picture(data)


def refusal(reference: Any, root: Path = Path(), max_pixels: int = LIMIT) -> str:
    with pytest.raises(SampleError) as caught:
        picture = ImageLoader(root, max_pixels, None, PUBLISHED).picture(reference)
        picture.decode()
    return str(caught.value)


def same(picture: Picture, other: Image.Image) -> bool:
    return np.array_equal(np.asarray(picture.decode().image), np.asarray(other.convert("RGB")))


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        (lambda data: "a.png", "a.png"),
        (lambda data: {"bytes": None, "path": "a.png"}, "a.png"),
        (lambda data: {"bytes": b"", "path": "a.png"}, "a.png"),
        (lambda data: data, "SIZE bytes"),
        (lambda data: bytearray(data), "SIZE bytes"),
        (lambda data: memoryview(data), "SIZE bytes"),
        (lambda data: {"bytes": data, "path": "gone.png"}, "SIZE bytes"),
        (lambda data: {"bytes": data, "path": None}, "SIZE bytes"),
        (lambda data: base64.b64encode(data).decode(), "iVBORw0KGgo"),
        (lambda data: base64.encodebytes(data).decode(), "iVBORw0KGgo"),
        (lambda data: base64.urlsafe_b64encode(data).decode().rstrip("="), "iVBORw0KGgo"),
        (lambda data: data_url(data), "data:image/png;base64,iVBO"),
        (lambda data: "DATA:;BASE64," + base64.b64encode(data).decode(), "DATA:;BASE64,iVBO"),
        (lambda data: {"url": data_url(data)}, "data:image/png;base64,iVBO"),
        (lambda data: {"type": "image_url", "image_url": {"url": data_url(data)}}, "data:image"),
        (lambda data: Image.open(io.BytesIO(data)), "a decoded image of 60x40 pixels"),
    ],
)
def test_every_kind_of_reference_gives_the_same_pixels(
    tmp_path: Path, reference: Callable[[bytes], Any], expected: str
) -> None:
    write_picture(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    picture = ImageLoader(tmp_path, LIMIT, None, PUBLISHED).picture(reference(data))
    assert picture.name.startswith(expected.replace("SIZE", f"{len(data):,}"))
    assert len(picture.name) <= 303
    assert (picture.width, picture.height) == (60, 40)
    assert same(picture, noise())
    assert picture.digest == hashlib.sha256(picture.data).digest()[:16]


def data_url(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def test_a_file_comes_before_base64(tmp_path: Path) -> None:
    name = base64.b64encode(encode(Image.new("1", (1, 1)), "PPM")).decode().rstrip("=")
    write_picture(tmp_path / f"{name}.png", 3, 4).rename(tmp_path / name)
    assert ImageLoader(tmp_path, LIMIT, None, PUBLISHED).picture(name).width == 3
    assert read(name).width == 1


def test_an_absolute_path_starts_at_no_root(tmp_path: Path) -> None:
    path = write_picture(tmp_path / "a.png")
    reach = Reach.of(tmp_path)
    loader = ImageLoader(tmp_path / "elsewhere", LIMIT, None, PUBLISHED, reach)
    assert loader.picture(str(path)).width == 60


@pytest.mark.parametrize(
    ("reference", "reason"),
    [
        (None, "image reference of type NoneType is no path or bytes"),
        (7, "image reference of type int is no path or bytes"),
        ({}, "image reference of type NoneType is no path or bytes"),
        ({"path": 7}, "image reference of type int is no path or bytes"),
        ({"image_url": {"url": None}}, "image reference of type NoneType is no path or bytes"),
        (["a.png"], "image reference of type list is no path or bytes"),
        ("gone.png", "image does not exist: ROOT/gone.png"),
        ("", "image does not exist: ROOT"),
        ("caf\u00e9", "image does not exist: ROOT/caf\u00e9"),
        ("\ud83d", "image does not exist: ROOT/\ud83d"),
        ("a\0b", "image does not exist: ROOT/a\0b"),
        ("abcdefgh", "image does not exist: ROOT/abcdefgh"),  # base64, of no image
        ("x" * 5000, f"image does not exist: ROOT/{'x' * 300}..."),
        (
            "s3://shop/a.png",
            "image is at an address of another kind than http(s): s3://shop/a.png;",
        ),
        (
            "gs://shop/a.png",
            "image is at an address of another kind than http(s): gs://shop/a.png;",
        ),
        ("file:///nowhere/a.png", "image does not exist: /nowhere/a.png"),
        ("http://x.org/a.png?k=1", "image is a URL: http://x.org/a.png?...; download it and name"),
        ("data:image/png;base64,iVBO", "image cannot be read: data:image/png;base64,iVBO, cannot"),
        (
            "data:image/png;base64,=!",
            "image cannot be read: data:image/png;base64,=!, it is no val",
        ),
        (
            "data:,Hello%20you",
            "image cannot be read: data:,Hello%20you, cannot identify image file",
        ),
        ("data:", "image cannot be read: data:, it has 0 bytes"),
        (b"", "image cannot be read: 0 bytes, it has 0 bytes"),
        (
            b"<html>404</html>",
            "image cannot be read: 16 bytes, cannot identify image file, it is a web page",
        ),
        (
            b"%PDF-1.7\n",
            "image cannot be read: 9 bytes, cannot identify image file, it is a PDF",
        ),
        (b"\xff\xd8\xff", "image cannot be read: 3 bytes, cannot identify image file, it is of no"),
        (b"\x89PNG\r\n\x1a\n\0\0", "image cannot be read: 10 bytes, "),
        (Image.new("RGB", (0, 5)), "image cannot be read: a decoded image of 0x5 pixels, 0x5 pix"),
    ],
)
def test_what_is_no_image_says_why(tmp_path: Path, reference: Any, reason: str) -> None:
    said = refusal(reference, tmp_path)
    assert said.startswith(reason.replace("ROOT", str(tmp_path))), said
    assert " object at 0x" not in said


@pytest.mark.parametrize("kind", ["EPS", "TGA", "ICO", "PCX", "SGI", "MSP"])
def test_formats_that_few_use_or_other_programs_draw_are_no_images(kind: str) -> None:
    picture = noise().convert("1") if kind == "MSP" else noise()
    assert "cannot identify image file" in refusal(encode(picture, kind))


@pytest.mark.parametrize("size", [(30_000, 30_000), (100_000, 1_001), (2**31 - 1, 2**31 - 1)])
def test_a_bomb_is_rejected_by_its_header_without_a_warning(size: tuple[int, int]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        said = refusal(png_header(*size))
    assert said == (
        f"image has too many pixels: {size[0]}x{size[1]}, 57 bytes; max_pixels is 100,000,000"
    )


@pytest.mark.parametrize("kind", FORMATS)
def test_too_many_pixels_are_seen_before_any_is_decoded(kind: str) -> None:
    data = encode(noise(200, 100), kind)
    for reference in (data, noise(200, 100)):
        with pytest.raises(SampleError, match="image has too many pixels: 200x100, .* is 19,999"):
            read(reference, max_pixels=19_999)


def test_the_limit_is_the_recipes_not_pillows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    data = encode(noise(60, 40))
    assert same(read(data, max_pixels=2400), noise(60, 40))
    assert refusal(data, max_pixels=2399) == (
        f"image has too many pixels: 60x40, {len(data):,} bytes; max_pixels is 2,399"
    )


def animation(kind: str) -> bytes:
    frames = [Image.new("RGB", (8, 6), color) for color in ("red", "blue")]
    return encode(frames[0], kind, save_all=True, append_images=frames[1:])


def with_exif(kind: str) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    return encode(noise(8, 6), kind, exif=exif)


def palette_with_alpha() -> bytes:
    picture = noise(8, 6).quantize(4)
    return encode(picture, transparency=bytes([0, 128, 255, 255]))


ZOO: dict[str, bytes] = {
    "gray": encode(noise().convert("L"), "JPEG"),
    "bits": encode(noise().convert("1")),
    "alpha": encode(Image.merge("RGBA", (*noise().split(), noise(seed=1).convert("L")))),
    "gray and alpha": encode(noise().convert("LA")),
    "palette": encode(noise().quantize(16)),
    "palette with alpha": palette_with_alpha(),
    "CMYK JPEG": encode(noise().convert("CMYK"), "JPEG"),
    "CMYK TIFF": encode(noise().convert("CMYK"), "TIFF"),
    "LAB TIFF": encode(Image.merge("LAB", noise().split()), "TIFF"),
    "animated GIF": animation("GIF"),
    "animated WebP": animation("WEBP"),
    "animated PNG": animation("PNG"),
    "two pictures in a JPEG": animation("MPO"),
    "turned JPEG": with_exif("JPEG"),
    "turned PNG": with_exif("PNG"),
    "turned TIFF": with_exif("TIFF"),
    "progressive": encode(noise(), "JPEG", progressive=True),
    "one line": encode(noise(1, 2000)),
    **{kind: encode(noise(), kind) for kind in FORMATS},
}


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")  # of the bare Pillow here
@pytest.mark.parametrize("name", ZOO)
def test_published_pixels_are_those_of_convert_rgb_and_the_header_gives_their_size(
    name: str,
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        picture = read(ZOO[name])
        decoded = picture.decode().image
    assert (decoded.mode, decoded.size) == ("RGB", (picture.width, picture.height))
    assert same(picture, Image.open(io.BytesIO(ZOO[name])))
    thumbnail = picture.thumbnail(8)
    assert (thumbnail.shape, thumbnail.dtype) == ((8, 8), np.uint8)


def test_the_first_frame_is_taken_and_alpha_dropped() -> None:
    for kind in ("GIF", "PNG", "WEBP"):
        red, green, _ = read(animation(kind)).decode().image.getpixel((0, 0))  # type: ignore[misc]
        assert red > 200 and green < 50, kind
    clear = Image.new("RGBA", (2, 2), (10, 20, 30, 0))
    assert read(encode(clear)).decode().image.getpixel((0, 0)) == (10, 20, 30)


def test_exif_turns_nothing() -> None:
    assert (read(with_exif("JPEG")).width, read(with_exif("PNG")).width) == (8, 8)
    assert read(with_exif("TIFF")).width == 6  # Pillow itself turns it


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF"])
def test_half_a_file_is_found_by_decoding_and_by_its_thumbnail(kind: str) -> None:
    data = encode(noise(200, 200), kind)
    picture = Picture(data[: len(data) // 2], "half", 200, 200, PUBLISHED)
    for read_all in (picture.decode, lambda: picture.thumbnail(8)):
        with pytest.raises(SampleError, match="image cannot be read: half, "):
            read_all()


def test_a_header_that_lies_is_found_by_decoding() -> None:
    with pytest.raises(SampleError) as caught:
        Picture(encode(noise()), "a.png", 40, 60, PUBLISHED).decode()
    assert str(caught.value) == (
        "image cannot be read: a.png, 60x40 pixels where its header says 40x60"
    )


def test_a_thumbnail_looks_like_its_picture_in_any_format_and_size() -> None:
    large = Image.fromarray(np.add.outer(np.arange(600) / 5, np.arange(800) / 6).astype(np.uint8))
    expected = np.add.outer(np.arange(8) + 0.5, (np.arange(8) + 0.5) * 10 / 9) * 15
    for picture in (large, large.resize((200, 150)), large.resize((30, 40))):
        for data in (encode(picture), encode(picture, "JPEG"), encode(picture, "WEBP")):
            difference = read(data).thumbnail(8) - expected
            assert np.abs(difference).max() < 8


@pytest.mark.parametrize("kind", FORMATS)
def test_a_damaged_picture_is_a_sample_error_whatever_pillow_raises(kind: str) -> None:
    random = np.random.default_rng(0)
    whole = encode(noise(11, 9), kind)
    refused = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(60):
            data = bytearray(whole)
            for position in random.integers(0, len(data), 4):
                data[position] = random.integers(256)
            try:
                picture = read(bytes(data[: random.integers(len(data) // 2, len(data))]))
                picture.thumbnail(8)
                picture.decode()
            except SampleError as error:
                kinds = ("image cannot be read: ", "image has too many pixels: ")
                assert str(error).startswith(kinds)
                assert " object at 0x" not in str(error)
                refused += 1
    assert refused > 5


@pytest.mark.parametrize("error", [RuntimeError, struct.error, EOFError, KeyError])
def test_what_pillow_does_not_promise_to_raise_is_a_rejection_too(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    """Seen: RuntimeError from a damaged AVIF."""

    def fail(*_: object) -> None:
        raise error

    picture = read(encode(noise()))
    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    with pytest.raises(SampleError, match=f"image cannot be read: .* bytes, {error.__name__}"):
        picture.decode()


def test_images_at_addresses_are_fetched_together_and_once(tmp_path: Path) -> None:
    with Host() as host:
        settings = FetchSection(allow_private=True, timeout=10, retries=0, concurrency=4)
        loader = ImageLoader(tmp_path, LIMIT, ImageCache(tmp_path, settings), PUBLISHED)
        urls = [host.url(f"/slow/{number}") for number in range(8)]
        web = [*urls[:6], {"url": urls[6]}, {"bytes": None, "path": urls[7]}]
        torn, gone = host.url("/torn.jpg?key=1"), host.url("/missing.jpg")
        loader.prefetch([*web, torn, {"path": gone}, "a.png", b"x", None, 7])
        assert host.at_once > 1
        assert [loader.picture(reference).name for reference in web] == urls
        with pytest.raises(SampleError, match="image URL answered with an error: 404"):
            loader.picture(gone)
        picture = loader.picture(torn.replace("http", "HTTP"))
        with pytest.raises(SampleError, match=r"image cannot be read: HTTP:.*/torn.jpg\?\.\.\., "):
            picture.decode()
        assert sum(host.asked.values()) == 11

"""Any picture can be asked for its pixels: it gives them, or is refused, within a budget."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile

from phi3v.config.dataset import ImagesSection
from phi3v.errors import Phi3VError, SampleError
from phi3v.processing import decoding
from phi3v.processing.bounded import Overspent
from phi3v.processing.decoding import Picture, canvas_of, open_picture, rgb_array
from phi3v.processing.pixels import FORMATS
from tests.prepare.bombs import bombs, precincts, scans

ROOT = Path(__file__).parents[2]
RULES = ImagesSection()
MOST_PIXELS = 100_000_000
MOST_BYTES = 1_000_000_000  # of a process that decodes; 0.95 GB were measured
MOST_SECONDS = 8.0  # of processor time for all that is asked of one bomb; 4.3 were measured


def saved(kind: str, width: int = 90, height: int = 70, **options: Any) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", FORMATS)
def test_pixels_do_not_depend_on_where_they_are_decoded(kind: str) -> None:
    data = saved(kind)
    picture = open_picture(data, "a", MOST_PIXELS, RULES)
    assert (picture.width, picture.height) == (90, 70)
    array, traits = rgb_array(data, "a", RULES, (90, 70))
    assert np.array_equal(picture.decode().image, array) and picture.decode().traits == traits
    expected, _ = canvas_of(data, "a", RULES, (90, 70), 4, 56, False)
    assert np.array_equal(picture.canvas(4, 56, False)[0], expected)


def test_jpeg_and_png_are_decoded_here_and_all_others_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: Any, seconds: float) -> None:
        raise Overspent("is sent away")

    monkeypatch.setattr(decoding, "bounded", refuse)
    for kind in FORMATS:
        if kind in ("JPEG", "PNG"):
            open_picture(saved(kind), "a", MOST_PIXELS, RULES).decode()
        else:
            with pytest.raises(SampleError, match="^image takes too much to decode: a, it is sent"):
                open_picture(saved(kind), "a", MOST_PIXELS, RULES)


@pytest.mark.slow
def test_every_bomb_is_refused_within_its_budget() -> None:
    """In a process of its own, for the memory of this one is counted to its children."""
    for name, reason, seconds, peak in _exploded():
        assert reason.startswith(("image takes too much to decode", "image cannot be read")), name
        assert seconds < MOST_SECONDS and peak < MOST_BYTES, (name, seconds, peak)


def _exploded() -> list[Any]:
    run = subprocess.run(
        [sys.executable, "-c", "import tests.processing.test_decoding as t; t.explode()"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0 and not run.stderr, run.stderr
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(lines) == 9
    return lines


def explode() -> None:
    """Ask all that a prepare asks of every bomb, and print what that took."""
    import resource

    from phi3v.processing import bounded

    before = 0.0
    for name, data in bombs():
        reason = ""
        try:
            picture = open_picture(data, name, MOST_PIXELS, RULES)
            picture.thumbnail(8)
            picture.canvas(16, 336, False)
        except SampleError as error:
            reason = str(error)
        bounded._stop()  # so that it is counted
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        taken = used.ru_utime + used.ru_stime
        print(json.dumps([name, reason, taken - before, used.ru_maxrss * 1024]), flush=True)
        before = taken


def test_scans_are_counted_before_any_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    monkeypatch.setattr(decoding, "bounded", fail)
    with pytest.raises(SampleError) as caught:
        open_picture(scans(1000, 60), "a.jpg", MOST_PIXELS, RULES)
    assert str(caught.value) == (
        "image takes too much to decode: a.jpg, a JPEG of more than 50 scans or 5,000 segments"
    )


def test_a_picture_is_what_it_is_after_bombs_too() -> None:
    data = saved("WEBP", lossless=True)
    before = open_picture(data, "a", MOST_PIXELS, RULES).canvas(4, 56, False)[0]
    for _ in range(3):
        with pytest.raises(SampleError):
            open_picture(precincts(4000), "bomb", MOST_PIXELS, RULES).decode()
        after = open_picture(data, "a", MOST_PIXELS, RULES).canvas(4, 56, False)[0]
        assert np.array_equal(before, after)


def test_time_is_granted_by_pixels_and_says_how_much_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert decoding.most_seconds(0) == 2 and decoding.most_seconds(MOST_PIXELS) == 20
    monkeypatch.setattr(decoding, "most_seconds", lambda pixels: 0.05)
    data = b"P6\n" + b"#\n" * 2_000_000 + b"2 2 255\n" + bytes(12)
    with pytest.raises(SampleError) as caught:
        open_picture(data, "a.ppm", MOST_PIXELS, RULES)
    assert str(caught.value) == (
        "image takes too much to decode: a.ppm, it takes more than 0.1 seconds of processor time"
    )


def test_what_a_decoder_cannot_have_is_memory_and_not_damage() -> None:
    data = io.BytesIO()
    Image.new("L", (9, 9)).save(data, "TIFF", tiffinfo={322: 36_000, 323: 36_000})
    picture = Picture(dict(bombs())["tile of a TIFF"], "a.tif", 64, 64, RULES)
    with pytest.raises(SampleError) as caught:
        picture.decode()
    assert str(caught.value) == (
        "image takes too much to decode: a.tif, it takes more than 900 MB of memory"
    )


def test_want_of_memory_here_is_the_machines_and_stops_the_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    picture = open_picture(saved("PNG"), "a.png", MOST_PIXELS, RULES)
    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    with pytest.raises(Phi3VError, match=r"^memory ran out at a\.png, which needs little; start"):
        picture.decode()

"""A page as headless Chromium draws it: where its elements lie, and its pixels."""

import json
import shutil
import subprocess
from dataclasses import dataclass
from html import escape, unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

CHROMIUM = shutil.which("chromium")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --hide-scrollbars "
    "--disable-background-networking --disable-component-update --disable-sync "
    "--force-device-scale-factor=1 --force-color-profile=srgb"
).split()
TIMEOUT = 120  # seconds; a page here takes about 2

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")

# The page stands unchanged in a frame, whose width may be less than a window's least.
WRAPPER = """<!DOCTYPE html><style>body {{ margin: 0 }}</style>
<iframe style="border: 0; display: block"
 width="{width}" height="{height}" srcdoc="{page}"></iframe><pre hidden></pre><script>
onload = () => {{
  const page = document.querySelector("iframe").contentDocument, found = {{}};
  for (const name of {selectors}) found[name] = [...page.querySelectorAll(name)].map(e => {{
    const b = e.getBoundingClientRect();
    return {{text: e.textContent, x: b.x, y: b.y, width: b.width, height: b.height}}; }});
  const all = page.documentElement;
  found.page = [{{text: "", x: 0, y: 0, width: all.scrollWidth, height: all.scrollHeight}}];
  document.querySelector("pre").textContent = JSON.stringify(found); }}
</script>"""


@dataclass(frozen=True)
class Box:
    """An element's text, and its place in CSS pixels."""

    text: str
    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True)
class Drawn:
    """Elements by selector ("page": the whole, what sticks out included), and uint8 pixels."""

    boxes: dict[str, list[Box]]
    pixels: np.ndarray

    def pixel(self, x: float, y: float) -> tuple[int, ...]:
        return tuple(self.pixels[int(y), int(x)].tolist())

    def colours(self, box: Box) -> set[tuple[int, ...]]:
        """All colours within a box."""
        rows = slice(int(box.y), int(box.y + box.height) + 1)
        columns = slice(int(box.x), int(box.x + box.width) + 1)
        return {tuple(c) for c in self.pixels[rows, columns].reshape(-1, 3).tolist()}


def draw(
    page: Path, folder: Path, selectors: list[str], width: int = 1280, is_dark: bool = False
) -> Drawn:
    """Draw a page `width` pixels wide, all of its height."""
    assert CHROMIUM is not None
    wrapper = folder / "wrapper.html"
    text = escape(page.read_text(encoding="utf-8"))
    height = 500
    for _ in range(2):  # the second time as high as the first has found it
        filled = WRAPPER.format(
            width=width, height=height, page=text, selectors=json.dumps(selectors)
        )
        wrapper.write_text(filled, encoding="utf-8")
        found = json.loads(_written(_run(folder, wrapper, "--dump-dom")))
        height = int(found["page"][0]["height"])
    image = folder / "page.png"
    window = f"--window-size={max(width, 600)},{height}"
    _run(folder, wrapper, f"--screenshot={image}", window, *["--force-dark-mode"] * is_dark)
    boxes = {name: [Box(**box) for box in places] for name, places in found.items()}
    return Drawn(boxes, np.asarray(Image.open(image).convert("RGB")))


def _run(folder: Path, page: Path, *flags: str) -> str:
    profile = folder / "profile"
    command: list[Any] = [CHROMIUM, *FLAGS, *flags, f"--user-data-dir={profile}", page.as_uri()]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=True)
    finally:
        shutil.rmtree(profile, ignore_errors=True)
    assert "Content Security Policy" not in done.stderr, done.stderr
    return done.stdout


def _written(dom: str) -> str:
    return unescape(dom.partition('<pre hidden="">')[2].partition("</pre>")[0])

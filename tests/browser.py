"""One headless Chromium for many pages: what they draw, ask for and complain about.

Chromium is driven through a pipe by its own protocol, so one start (a second) serves a session.

Source: https://chromedevtools.github.io/devtools-protocol (--remote-debugging-pipe).
"""

import base64
import io
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
from PIL import Image

CHROMIUM = shutil.which("chromium")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --hide-scrollbars "
    "--disable-background-networking --disable-component-update --disable-sync "
    "--force-color-profile=srgb --remote-debugging-pipe"
).split()

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")


PLACES = """(names => Object.fromEntries(names.map(name => [name,
  [...document.querySelectorAll(name)].map(e => {
    const b = e.getBoundingClientRect();
    return {text: e.textContent, x: b.x, y: b.y, width: b.width, height: b.height}; })])))"""


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
    """Elements by selector, the width of the whole (what sticks out included), uint8 pixels."""

    boxes: dict[str, list[Box]]
    width: int
    pixels: np.ndarray

    def pixel(self, x: float, y: float) -> tuple[int, ...]:
        return tuple(self.pixels[int(y), int(x)].tolist())

    def colours(self, box: Box) -> set[tuple[int, ...]]:
        """All colours within a box."""
        rows = slice(int(box.y), int(box.y + box.height) + 1)
        columns = slice(int(box.x), int(box.x + box.width) + 1)
        return {tuple(c) for c in self.pixels[rows, columns].reshape(-1, 3).tolist()}


@dataclass
class Browser:
    """Commands go to `commands`, answers and events come from `answers`, each ended by a NUL.

    requests    addresses that pages asked for beyond themselves
    complaints  what was written to a page's console or log
    """

    commands: IO[bytes]
    answers: IO[bytes]
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)
    _number: int = 0
    _page: str | None = None
    _loaded: bool = False

    def call(self, method: str, **values: Any) -> dict[str, Any]:
        """Run a method of the protocol and return what it gives."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": values}
        if self._page:
            message["sessionId"] = self._page
        self.commands.write(json.dumps(message).encode() + b"\0")
        self.commands.flush()
        while (answer := self._next()).get("id") != self._number:
            pass
        assert "error" not in answer, answer
        result: dict[str, Any] = answer["result"]
        return result

    def open(self, path: Path, width: int, is_dark: bool = False, media: str = "screen") -> None:
        """Load a file in a window of that many CSS pixels, 800 high."""
        if self._page is None:
            target = self.call("Target.createTarget", url="about:blank")["targetId"]
            session = self.call("Target.attachToTarget", targetId=target, flatten=True)
            self._page = session["sessionId"]
            for domain in ("Page", "Runtime", "Log", "Network"):
                self.call(f"{domain}.enable")
        scheme = {"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}
        self.call("Emulation.setEmulatedMedia", media=media, features=[scheme])
        size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self._loaded = False
        self.call("Page.navigate", url=path.as_uri())
        while not self._loaded:
            self._next()

    def draw(
        self, path: Path, selectors: list[str], width: int = 1280, is_dark: bool = False
    ) -> Drawn:
        """Draw a page of that width, all of its height."""
        self.open(path, width, is_dark)
        found = self.run(f"{PLACES}({json.dumps(selectors)})")
        boxes = {name: [Box(**box) for box in places] for name, places in found.items()}
        whole = self.run("document.documentElement.scrollWidth")
        return Drawn(boxes, whole, self.picture())

    def run(self, script: str) -> Any:
        """The value of an expression in the page."""
        done = self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def picture(self) -> np.ndarray:
        """The whole page as drawn, uint8 (height, width, 3)."""
        png = self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB"))

    def pdf(self) -> bytes:
        """The page as it is printed on A4."""
        data = self.call("Page.printToPDF", printBackground=False, paperWidth=8.27)["data"]
        return base64.b64decode(data)

    def _next(self) -> dict[str, Any]:
        text = bytearray()
        while (byte := self.answers.read(1)) != b"\0":
            assert byte, "chromium ended"
            text += byte
        message: dict[str, Any] = json.loads(text)
        self._note(message.get("method"), message.get("params", {}))
        return message

    def _note(self, event: str | None, values: dict[str, Any]) -> None:
        if event == "Page.loadEventFired":
            self._loaded = True
        elif event == "Network.requestWillBeSent":
            url = values["request"]["url"]
            if not url.startswith("data:") and url != values["documentURL"]:
                self.requests.append(url)
        elif event in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
            self.complaints.append(json.dumps(values))


@contextmanager
def started() -> Iterator[Browser]:
    """A Chromium with a profile of its own, which ends with the block."""
    assert CHROMIUM is not None
    (in_read, in_write), (out_read, out_write) = os.pipe(), os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}"]
        # Chromium reads its commands from descriptor 3 and answers on 4.
        shell = ["bash", "-c", f'exec "$@" 3<&{in_read} 4>&{out_write}', "bash", *command]
        process = subprocess.Popen(shell, pass_fds=(in_read, out_write), stderr=subprocess.DEVNULL)
        os.close(in_read)
        os.close(out_write)
        try:
            with open(in_write, "wb") as commands, open(out_read, "rb") as answers:
                browser = Browser(commands, answers)
                yield browser
                browser._page = None
                browser.call("Browser.close")
                process.wait(30)
        finally:
            process.kill()
            process.wait()

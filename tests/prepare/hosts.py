"""A real HTTP server on 127.0.0.1 that behaves as hosts of images do: well, slowly, or badly.

    with Host() as host:
        host.url("/good.jpg")        # http://127.0.0.1:41234/good.jpg
        host.asked["/good.jpg"]      # how often it was asked for

What a path does is the method of `_Answers` that has its name.
"""

import io
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
from PIL import Image

PAGE = b"<html>Please sign in</html>"


def jpeg(width: int = 60, height: int = 40, seed: int = 0) -> bytes:
    """An encoded picture of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


class Host:
    """The server, while it is entered as a context."""

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()
        self.at_once = 0  # answers of /slow in the making, at most
        self.headers: list[dict[str, str]] = []
        self.connections: set[Any] = set()  # addresses of clients
        self.robots: tuple[int, bytes] = (404, PAGE)  # what /robots.txt gives
        self.image = jpeg()
        self.ended = threading.Event()
        self.server = _Server(("127.0.0.1", 0), _Answers)
        self.server.host = self

    def url(self, path: str, name: str = "127.0.0.1") -> str:
        return f"http://{name}:{self.server.server_port}{path}"

    def __enter__(self) -> "Host":
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.ended.set()
        self.server.shutdown()
        self.server.server_close()


class _Server(ThreadingHTTPServer):
    host: Host
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, *_: Any) -> None:
        """Clients that go away are what the tests are about."""


class _Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server
    working = 0
    lock = threading.Lock()

    def log_message(self, *_: Any) -> None:
        """Nothing on stderr."""

    def do_GET(self) -> None:  # noqa: N802
        host = self.server.host
        path = self.path.partition("?")[0]
        with self.lock:
            host.asked[self.path] += 1
            host.headers.append(dict(self.headers))
            host.connections.add(self.client_address)
        name = path.strip("/").partition("/")[0].partition(".")[0]
        answer: Callable[[], None] = getattr(self, name, self.missing)
        answer()

    def send(
        self, body: bytes, status: int = 200, length: int | None = None, **headers: str
    ) -> None:
        self.send_response(status)
        headers = {"Content_Type": "image/jpeg", **headers}
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)

    def lead_to(self, place: str, status: int = 302) -> None:
        self.send(b"", status, Location=place)

    def first(self, times: int) -> bool:
        return self.server.host.asked[self.path] <= times

    def good(self) -> None:
        self.send(self.server.host.image)

    def numbered(self) -> None:
        """/numbered/7: a picture of its own for each number."""
        self.send(jpeg(seed=int(self.path.rpartition("/")[2])))

    def missing(self) -> None:
        self.send(PAGE, 404)

    def forbidden(self) -> None:
        self.send(PAGE, 403)

    def failing(self) -> None:
        self.send(PAGE, 503)

    def shaky(self) -> None:
        """Two errors, then the picture."""
        self.send(PAGE, 500) if self.first(2) else self.good()

    def busy(self) -> None:
        self.send(PAGE, 429, Retry_After="0") if self.first(1) else self.good()

    def tired(self) -> None:
        """Too many requests, for an hour."""
        self.send(PAGE, 429, Retry_After="3600")

    def robots(self) -> None:
        status, body = self.server.host.robots
        self.send(body, status, Content_Type="text/plain")

    def robotic(self) -> None:
        """Leads to the picture."""
        self.lead_to("/good.jpg")

    def patient(self) -> None:
        self.send(PAGE, 429, Retry_After="1") if self.first(1) else self.good()

    def drip(self) -> None:
        """The picture, a byte every tenth of a second."""
        self.send(b"", length=1000)
        self._drip(self.server.host.image)

    def headers_drip(self) -> None:
        self._drip(b"HTTP/1.1 200 OK\r\nX: " + b"x" * 500)

    def _drip(self, data: bytes) -> None:
        for position in range(len(data)):
            if self.server.host.ended.wait(0.1):
                return
            self.wfile.write(data[position : position + 1])
            self.wfile.flush()

    def hang(self) -> None:
        self.server.host.ended.wait(30)

    def slow(self) -> None:
        """The picture of `numbered` after a tenth of a second; counts how many wait at once."""
        with self.lock:
            type(self).working += 1
            self.server.host.at_once = max(self.server.host.at_once, self.working)
        time.sleep(0.1)
        with self.lock:
            type(self).working -= 1
        self.numbered()

    def together(self) -> None:
        """The picture of `numbered`, when it was asked for twice."""
        while self.server.host.asked[self.path] < 2:
            if self.server.host.ended.wait(0.01):
                return
        self.numbered()

    def endless(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "image/jpeg")
        self.end_headers()
        self.wfile.write(self.server.host.image)
        while not self.server.host.ended.is_set():
            self.wfile.write(bytes(1 << 16))

    def boast(self) -> None:
        """A length of a terabyte."""
        self.send(self.server.host.image, length=1 << 40)

    def short(self) -> None:
        """Half of the bytes that the length promises."""
        image = self.server.host.image
        self.send(image[: len(image) // 2], length=len(image))
        self.close_connection = True

    def modest(self) -> None:
        """More bytes than the length says."""
        self.send(self.server.host.image, length=100)
        self.close_connection = True

    def reset(self) -> None:
        """The connection is cut in the middle."""
        self.send(self.server.host.image[:50], length=1000)
        linger = struct.pack("ii", 1, 0)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.close_connection = True
        self.connection.close()

    def garbage(self) -> None:
        self.wfile.write(b"220 smtp.example.org ready\r\n\r\n")
        self.close_connection = True

    def page(self) -> None:
        """A page that calls itself a picture."""
        self.send(PAGE)

    def plain(self) -> None:
        self.send(PAGE, Content_Type="text/html; charset=utf-8")

    def empty(self) -> None:
        self.send(b"")

    def torn(self) -> None:
        """A picture of which only the first half was ever there."""
        image = self.server.host.image
        self.send(image[: len(image) // 2])

    def moved(self) -> None:
        self.lead_to("/good.jpg", 301)

    def loop(self) -> None:
        self.lead_to("/pool" if self.path == "/loop" else "/loop")

    pool = loop

    def chain(self) -> None:
        """/chain/3 leads to /chain/2 and so on, /chain/0 is the picture."""
        number = int(self.path.rpartition("/")[2])
        self.lead_to(f"/chain/{number - 1}") if number else self.good()

    def inward(self) -> None:
        """To another address of this machine, where the same server does not listen."""
        self.lead_to("http://127.0.0.2:1/secret.jpg")

    def away(self) -> None:
        self.lead_to("ftp://example.org/a.jpg")

    def nowhere(self) -> None:
        self.lead_to("http://[::1/a.jpg")

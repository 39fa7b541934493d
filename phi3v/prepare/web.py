"""One image from one http(s) address: bounded in seconds, bytes, redirects and tries.

    data, content_type = Client(cfg.fetch).fetch("https://example.org/a.jpg")

Nothing that a host says is trusted: neither how long its answer is, nor that it is an image, nor
where it sends us. What may get better is tried again: no connection, too slow an answer or one cut
short, 429, 5xx.
"""

import base64
import errno
import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from urllib.parse import quote, unquote, urljoin, urlsplit

import httpcore

from phi3v.config.dataset import FetchSection
from phi3v.content import has_image_signature
from phi3v.errors import SampleError
from phi3v.prepare.network import Network, Refused, is_public
from phi3v.reading import machine_error

MAX_REDIRECTS = 5
KEEP_SECONDS = 10.0  # for which an idle connection stays open
FIRST_PAUSE, MAX_PAUSE = 0.5, 60.0  # seconds between tries
REDIRECTS = {301, 302, 303, 307, 308}
OVERLOADED = {408, 425, 429}  # like 5xx, worth another try
OWN_WANT = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS}  # of this machine, not a host
HEADERS = (("User-Agent", "phi3v dataset preparation"), ("Accept", "image/*"))
QUOTED = "/%:@!$&'()*+,;=~?-._[]"  # stay as they are in a path or query
HOST = re.compile(r"[\w.:%-]+", re.ASCII)


def shown_url(url: str) -> str:
    """An address without what may be secret: https://me:pw@x.org/a?key=1 -> https://x.org/a?..."""
    address, query, _ = url.partition("#")[0].partition("?")
    address = re.sub(r"^([^:/]+://)[^/]*@", r"\1", address)
    return f"{address}?..." if query else address


class _Again(Exception):
    """A try failed and the next may not; `pause` is what the host asks for, in seconds."""

    def __init__(self, message: str, pause: float | None = None) -> None:
        super().__init__(message)
        self.pause = pause


class Client:
    """Fetches images, from any number of threads; keeps connections to hosts that it meets again.

    is_allowed  says of an IP address whether it may be connected to; default: `is_public`, or any
                with `fetch.allow_private`
    """

    def __init__(
        self, settings: FetchSection, is_allowed: Callable[[str], bool] | None = None
    ) -> None:
        if is_allowed is None:
            is_allowed = (lambda _: True) if settings.allow_private else is_public
        self.settings = settings
        self.network = Network(is_allowed)
        self.pool = httpcore.ConnectionPool(
            ssl_context=httpcore.default_ssl_context(),
            max_connections=None,
            max_keepalive_connections=settings.concurrency,
            keepalive_expiry=KEEP_SECONDS,
            network_backend=self.network,
        )

    def fetch(self, url: str) -> tuple[bytes, str]:
        """Give the bytes at an address, which start like an image, and their content type.

        Raises: SampleError naming what is wrong with the address or its host.
        """
        tries = 0
        while True:
            try:
                return self._try(url)
            except _Again as failure:
                tries += 1
                if tries > self.settings.retries:
                    raise SampleError(f"{failure}; tries: {tries}") from failure
                time.sleep(_pause(tries) if failure.pause is None else failure.pause)

    def _try(self, url: str) -> tuple[bytes, str]:
        self.network.start_clock(self.settings.timeout)
        shown = shown_url(url)
        targets = [url]
        with _explained(shown, self.settings.timeout):
            while True:
                address, headers = _request(targets[-1])
                with self.pool.stream("GET", address, headers=headers) as response:
                    location = _header(response, "location")
                    if response.status not in REDIRECTS or not location:
                        _check_status(response, shown)
                        return self._body(response, shown), _content_type(response)
                targets.append(_next_target(targets, location, shown))

    def _body(self, response: httpcore.Response, shown: str) -> bytes:
        """Read an answer that is not too large and starts like an image."""
        limit = self.settings.max_bytes
        too_many = f"image URL gave too many bytes: {shown}, fetch.max_bytes is {limit:,}"
        if int(_header(response, "content-length") or 0) > limit:
            raise SampleError(too_many)
        body = bytearray()
        for chunk in response.iter_stream():
            body += chunk
            if len(body) > limit:
                raise SampleError(too_many)
        if not has_image_signature(body):
            raise SampleError(
                f"image URL gave no image: {shown}, {len(body):,} bytes of "
                f"{_content_type(response)} that start with {bytes(body[:16])!r}"
            )
        return bytes(body)


@contextmanager
def _explained(shown: str, timeout: float) -> Iterator[None]:
    """Say of an error below HTTP what it means for the image, and whether to try again."""
    try:
        yield
    except Refused as error:
        reason, particulars = error.args
        raise SampleError(f"{reason}: {shown}, {particulars}") from error
    except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
        cause = error.args[0] if error.args else None
        if isinstance(cause, OSError) and cause.errno in OWN_WANT:
            raise machine_error(cause, f"image at {shown}") from error
        raise _Again(f"image URL cannot be reached: {shown}, {error}") from error
    except httpcore.TimeoutException as error:
        raise _Again(f"image URL took too long: {shown}, more than {timeout:g} s") from error
    except (httpcore.NetworkError, httpcore.RemoteProtocolError) as error:
        raise _Again(f"image URL gave no whole answer: {shown}, {error}") from error
    except (ValueError, httpcore.LocalProtocolError) as error:
        raise SampleError(f"image URL is not valid: {shown}, {error}") from error


def _request(url: str) -> tuple[httpcore.URL, list[tuple[str, str]]]:
    """An address in the form it is sent in, ASCII only, and the headers.

    Raises: ValueError if it is no address of http or https.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("it is no http(s) address of a host")
    host = parts.hostname.encode("idna").decode()
    if not HOST.fullmatch(host):
        raise ValueError(f"'{host}' is no name of a host")
    name = f"[{host}]" if ":" in host else host
    headers = [*HEADERS, ("Host", name if parts.port is None else f"{name}:{parts.port}")]
    if parts.username is not None:
        pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        headers.append(("Authorization", f"Basic {base64.b64encode(pair.encode()).decode()}"))
    target = quote(parts.path or "/", safe=QUOTED)
    if parts.query:
        target += f"?{quote(parts.query, safe=QUOTED)}"
    address = httpcore.URL(
        scheme=parts.scheme.encode(), host=host.encode(), port=parts.port, target=target.encode()
    )
    return address, headers


def _next_target(targets: Sequence[str], location: str, shown: str) -> str:
    """Where a redirect leads, after those in `targets`."""
    target = urljoin(targets[-1], location)
    if target in targets:
        what = f"in a circle of {len(targets) - targets.index(target)}"
    elif len(targets) > MAX_REDIRECTS:
        what = f"more than {MAX_REDIRECTS} times"
    else:
        return target
    raise SampleError(f"image URL redirects too often: {shown}, {what}")


def _check_status(response: httpcore.Response, shown: str) -> None:
    if response.status == 200:
        return
    message = f"image URL answered with an error: {response.status}, {shown}"
    if response.status in OVERLOADED or response.status >= 500:
        raise _Again(message, _retry_after(response))
    raise SampleError(message)


def _header(response: httpcore.Response, name: str) -> str:
    """A header of an answer, empty if it has none."""
    values = (value for key, value in response.headers if key.lower() == name.encode())
    return next(values, b"").decode(errors="replace")


def _content_type(response: httpcore.Response) -> str:
    return _header(response, "content-type").partition(";")[0][:60] or "no content type"


def _retry_after(response: httpcore.Response) -> float | None:
    """Seconds to wait as the host says, in seconds or as a date; MAX_PAUSE at most."""
    text = _header(response, "retry-after")
    try:
        seconds = float(text) if text.isdecimal() else _seconds_until(text)
    except (ValueError, TypeError):  # TypeError: a date without a zone
        return None
    return min(MAX_PAUSE, max(0.0, seconds))


def _seconds_until(date: str) -> float:
    return (parsedate_to_datetime(date) - datetime.now(timezone.utc)).total_seconds()


def _pause(tries: int) -> float:
    """Seconds before the next try: doubled each time, spread lest clients fall in step."""
    return min(MAX_PAUSE, FIRST_PAUSE * 2 ** (tries - 1)) * random.uniform(0.5, 1.0)

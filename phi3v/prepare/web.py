"""One image from one http(s) address: bounded in seconds, bytes, redirects and tries.

    data, content_type = Client(cfg.fetch).fetch("https://example.org/a.jpg")

Nothing that a host says is trusted: neither how long its answer is, nor that it is an image, nor
where it sends us. What may get better is tried again: no connection, too slow an answer or one cut
short, 429, 5xx. Every host is asked by few at once and left alone when it asks for it (`hosts.py`);
what an address waits for that is bounded by `fetch.wait`, its turns among others of ours are not.

No reason quotes an address as it was given, nor what a parser says of it: either may hold a
password.
"""

import base64
import errno
import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from mimetypes import common_types, types_map
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote, unquote, urljoin, urlsplit

import httpcore

from phi3v.addresses import shown_url
from phi3v.config.dataset import FetchSection
from phi3v.content import HEAD, content_kind, has_image_signature, unquoted
from phi3v.errors import SampleError
from phi3v.prepare.hosts import Hosts
from phi3v.prepare.network import Network, Refused, is_public
from phi3v.prepare.robots import MOST_BYTES, Robots
from phi3v.reading import machine_error

MAX_REDIRECTS = 5
KEEP_SECONDS = 10.0  # for which an idle connection stays open
FIRST_PAUSE, MAX_PAUSE = 0.5, 60.0  # seconds between tries
REDIRECTS = {301, 302, 303, 307, 308}
OVERLOADED = {408, 425, 429}  # like 5xx, worth another try
OWN_WANT = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS}  # of this machine, not a host
TOO_MANY, UNAVAILABLE = 429, 503  # answers for the whole host, the latter if it says for how long
AGENT = "phi3v dataset preparation"
CONTENT_TYPES = frozenset({*types_map.values(), *common_types.values(), "image/jpg"})
UNSENDABLE = "it has characters that cannot be sent"
QUOTED = "/%:@!$&'()*+,;=~?-._[]"  # stay as they are in a path or query
HOST = re.compile(r"[\w.:%-]+", re.ASCII)

Taken = TypeVar("Taken")


class _Again(Exception):
    """A try failed and the next may not.

    pause  seconds that the host asks for, if it does
    host   the one that is to be left alone by all for so long, if it is
    """

    def __init__(self, message: str, pause: float | None = None, host: str | None = None) -> None:
        super().__init__(message)
        self.pause, self.host = pause, host


class _Patience:
    """Seconds of `fetch.wait` that one address has left."""

    def __init__(self, seconds: float) -> None:
        self.left = seconds

    def wait(self, seconds: float, too_long: str) -> None:
        """Sleep for so long.

        Raises: SampleError, at once and with `too_long`, if that is more than is left.
        """
        if seconds > self.left:
            raise SampleError(too_long)
        self.left -= seconds
        time.sleep(seconds)


@dataclass(frozen=True)
class _Target:
    """Where a request goes: the address in the form it is sent in, its headers, and the host."""

    address: httpcore.URL
    headers: list[tuple[str, str]]
    host: str


class Client:
    """Fetches images, from any number of threads; keeps connections to hosts that it meets again.

    is_allowed  says of an IP address whether it may be connected to; default: `is_public`, or any
                with `fetch.allow_private`
    hosts       folder through which processes share the turns and rests of hosts; None: this
                process alone
    """

    def __init__(
        self,
        settings: FetchSection,
        is_allowed: Callable[[str], bool] | None = None,
        hosts: Path | None = None,
    ) -> None:
        if is_allowed is None:
            is_allowed = (lambda _: True) if settings.allow_private else is_public
        self.settings = settings
        self.network = Network(is_allowed)
        self.hosts = Hosts(hosts, settings.per_host)
        agent = f"{AGENT} ({settings.contact})" if settings.contact else AGENT
        self.headers = [("User-Agent", agent), ("Accept", "image/*")]
        self.robots = Robots(self._robots_txt) if settings.robots == "obey" else None
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
        tries, patience = 0, _Patience(self.settings.wait)
        while True:
            try:
                return self._follow(url, patience, self._image, self.robots)
            except _Again as failure:
                tries += 1
                pause = _pause(tries) if failure.pause is None else failure.pause
                if failure.host:
                    self.hosts.rest(failure.host, pause)
                if tries > self.settings.retries:
                    raise SampleError(f"{failure}; tries: {tries}") from failure
                if not failure.host:  # else whoever asks next waits
                    patience.wait(pause, f"{failure}; tries: {tries}, and fetch.wait is over")

    def _follow(
        self,
        url: str,
        patience: _Patience,
        take: Callable[[httpcore.Response, str, str], Taken],
        rules: Robots | None = None,
    ) -> Taken:
        """Ask for an address, and for where it leads; `take` makes something of the answer."""
        self.network.start_clock(self.settings.timeout)
        shown = shown_url(url)
        targets = [url]
        with _explained(shown, self.settings.timeout):
            while True:
                target = _target(targets[-1])
                if rules:
                    self._ask(rules, targets[-1], shown)
                headers = self.headers + target.headers
                with (
                    self._turn(target.host, patience, shown),
                    self.pool.stream("GET", target.address, headers=headers) as response,
                ):
                    location = _header(response, "location")
                    if response.status not in REDIRECTS or not location:
                        return take(response, shown, target.host)
                targets.append(_next_target(targets, location, shown))

    @contextmanager
    def _turn(self, host: str, patience: _Patience, shown: str) -> Iterator[None]:
        """Hold a turn of a host that does not rest; the try's clock stands still meanwhile."""
        left = self.network.seconds_left()
        while True:
            if rest := self.hosts.seconds_left(host):
                patience.wait(
                    rest,
                    f"image URL must wait too long: {shown}, its host asks to be left alone for "
                    f"{rest:,.0f} s, fetch.wait leaves {patience.left:,.0f} s",
                )
            with self.hosts.turn(host):
                if self.hosts.seconds_left(host):
                    continue  # it came while this one waited for its turn
                self.network.start_clock(left)
                yield
                return

    def _ask(self, rules: Robots, url: str, shown: str) -> None:
        left = self.network.seconds_left()
        if not rules.allow(url):
            raise SampleError(
                f"image URL is closed to programs: {shown}, by its host's robots.txt; fetch.robots "
                "says whether that counts"
            )
        self.network.start_clock(left)

    def _robots_txt(self, address: str) -> tuple[int, bytes]:
        return self._follow(address, _Patience(self.settings.wait), _rules)

    def _image(self, response: httpcore.Response, shown: str, host: str) -> tuple[bytes, str]:
        _check_status(response, shown, host)
        return self._body(response, shown), _content_type(response)

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
            what = f"{len(body):,} bytes of {_content_type(response)}"
            kind = f", which are {content_kind(bytes(body[:HEAD]))}" if body else ""
            raise SampleError(f"image URL gave no image: {shown}, {what}{kind}")
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
        raise _Again(f"image URL gave no whole answer: {shown}, {unquoted(error)}") from error
    except _Invalid as error:
        raise SampleError(f"image URL is not valid: {shown}, {error}") from None
    except httpcore.LocalProtocolError:  # whose text may quote the header with the password
        raise SampleError(f"image URL is not valid: {shown}, {UNSENDABLE}") from None
    except ValueError as error:  # seen: a length of 5,000 digits
        what = "its headers cannot be read"
        raise SampleError(f"image URL gave no whole answer: {shown}, {what}") from error


class _Invalid(Exception):
    """An address is not one that can be asked; the message quotes none of it."""


def _rules(response: httpcore.Response, shown: str, host: str) -> tuple[int, bytes]:
    """Status and body of a robots.txt; as long as its host is in trouble everything is closed."""
    if response.status in OVERLOADED or response.status >= 500:
        _check_status(response, shown, host)
    body = bytearray()
    for chunk in response.iter_stream():
        body += chunk
        if len(body) >= MOST_BYTES:
            break
    return response.status, bytes(body[:MOST_BYTES])


def _target(url: str) -> _Target:
    """Where to ask for an address, all in ASCII.

    Raises: _Invalid if it is no address of http or https.
    """
    try:
        parts = urlsplit(url)
        name, port = parts.hostname, parts.port
    except ValueError:
        raise _Invalid("its host or port cannot be read") from None
    if parts.scheme not in ("http", "https") or not name:
        raise _Invalid("it is no http(s) address of a host")
    try:
        host = name.encode("idna").decode().lower()
    except UnicodeError:
        host = ""
    if not HOST.fullmatch(host):
        raise _Invalid("what should be the name of its host is none")
    name = f"[{host}]" if ":" in host else host
    headers = [("Host", name if port is None else f"{name}:{port}")]
    try:
        if parts.username is not None:
            pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
            headers.append(("Authorization", f"Basic {base64.b64encode(pair.encode()).decode()}"))
        path = quote(parts.path or "/", safe=QUOTED)
        if parts.query:
            path += f"?{quote(parts.query, safe=QUOTED)}"
    except UnicodeError:  # half of a surrogate pair
        raise _Invalid(UNSENDABLE) from None
    address = httpcore.URL(
        scheme=parts.scheme.encode(), host=host.encode(), port=port, target=path.encode()
    )
    return _Target(address, headers, host)


def _next_target(targets: Sequence[str], location: str, shown: str) -> str:
    """Where a redirect leads, after those in `targets`."""
    try:
        target = urljoin(targets[-1], location)
    except ValueError:
        raise _Invalid("it leads to an address that cannot be read") from None
    if target in targets:
        what = f"in a circle of {len(targets) - targets.index(target)}"
    elif len(targets) > MAX_REDIRECTS:
        what = f"more than {MAX_REDIRECTS} times"
    else:
        return target
    raise SampleError(f"image URL redirects too often: {shown}, {what}")


def _check_status(response: httpcore.Response, shown: str, host: str) -> None:
    if response.status == 200:
        return
    message = f"image URL answered with an error: {response.status}, {shown}"
    if response.status in OVERLOADED or response.status >= 500:
        pause = _retry_after(response)
        is_host = response.status == TOO_MANY or response.status == UNAVAILABLE and pause
        raise _Again(message, pause, host if is_host else None)
    raise SampleError(message)


def _header(response: httpcore.Response, name: str) -> str:
    """A header of an answer, empty if it has none."""
    values = (value for key, value in response.headers if key.lower() == name.encode())
    return next(values, b"").decode(errors="replace")


def _content_type(response: httpcore.Response) -> str:
    """What a host says that its answer is, in words of ours: its own could be anything."""
    said = _header(response, "content-type").partition(";")[0].strip().lower()
    if not said:
        return "no content type"
    return said if said in CONTENT_TYPES else "a content type that is not known"


def _retry_after(response: httpcore.Response) -> float | None:
    """Seconds to wait as the host says, in seconds or as a date; None if it does not."""
    text = _header(response, "retry-after")
    try:
        seconds = float(text) if text.isdecimal() else _seconds_until(text)
    except (ValueError, TypeError, OverflowError):  # TypeError: a date without a zone
        return None
    return max(0.0, seconds)


def _seconds_until(date: str) -> float:
    return (parsedate_to_datetime(date) - datetime.now(timezone.utc)).total_seconds()


def _pause(tries: int) -> float:
    """Seconds before the next try: doubled each time, spread lest clients fall in step."""
    return min(MAX_PAUSE, FIRST_PAUSE * 2 ** (tries - 1)) * random.uniform(0.5, 1.0)

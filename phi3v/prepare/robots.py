"""What a host's robots.txt closes to programs (RFC 9309), asked for once an origin and process
if it answers.

    rules = Robots(answer)  # answer("https://example.org/robots.txt") gives status and body
    rules.allow("https://example.org/private/a.jpg")

An answer of 4xx closes nothing. Crawl-delay is not of the RFC and is not read: how fast a host is
asked is `fetch.per_host`'s and its Retry-After's.
"""

import threading
from collections.abc import Callable
from urllib.parse import urlsplit
from urllib.robotparser import RobotFileParser

AGENT = "phi3v"  # the name to which a robots.txt may speak
FIELDS = ("user-agent", "allow", "disallow", "")  # the last: an empty line ends a group
MOST_BYTES = 500 * 1024  # of which RFC 9309 says that they must be read


class Robots:
    """The rules of every host that was asked.

    answer  gives status and body of an address; what it raises is raised
    """

    def __init__(self, answer: Callable[[str], tuple[int, bytes]]) -> None:
        self._answer = answer
        self._rules: dict[str, RobotFileParser] = {}
        self._asked: set[str] = set()
        self._asking: dict[str, threading.Lock] = {}
        self._lock = threading.Lock()

    def allow(self, url: str) -> bool:
        """Whether programs may ask for this address."""
        parts = urlsplit(url)
        origin = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
        with self._lock:
            asking = self._asking.setdefault(origin, threading.Lock())
        with asking:  # the others of this origin wait for the first; where it fails, they ask too
            is_first = origin not in self._asked
            self._asked.add(origin)
            if is_first:
                self._rules[origin] = self._read(f"{origin}/robots.txt")
        if origin not in self._rules:
            self._rules[origin] = self._read(f"{origin}/robots.txt")
        return self._rules[origin].can_fetch(AGENT, url)

    def _read(self, address: str) -> RobotFileParser:
        status, body = self._answer(address)
        rules = RobotFileParser()
        lines = body.decode("utf-8-sig", "replace").splitlines() if status == 200 else []
        rules.parse(list(filter(_is_of_rules, lines)))
        return rules


def _is_of_rules(line: str) -> bool:
    """Whether a line has a part in rules; Python's parser raises ValueError at some that have none:
    of an address that is none, or of an odd number in a Crawl-delay.
    """
    field, _, value = line.partition("#")[0].partition(":")
    if field.strip().lower() not in FIELDS:
        return False
    try:
        urlsplit(value.strip())
    except ValueError:
        return False
    return True

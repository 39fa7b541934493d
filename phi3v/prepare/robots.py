"""What a host's robots.txt closes to programs (RFC 9309), asked for once an origin and process
if it answers.

    rules = Robots(answer)  # answer("https://example.org/robots.txt") gives status and body
    rules.allow("https://example.org/private/a.jpg")

An answer of 4xx closes nothing. Crawl-delay is not of the RFC and is not read: how fast a host is
asked is `fetch.per_host`'s and its Retry-After's.
"""

import threading
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit
from urllib.robotparser import RobotFileParser

AGENT = "phi3v"  # the name to which a robots.txt may speak
FIELDS = ("user-agent", "allow", "disallow", "")  # the last: an empty line ends a group
MOST_ORIGINS, MOST_RULES = 1_000, 100_000  # in memory at once; those used last stay
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
            asking = self._asking.pop(origin, None) or threading.Lock()
            self._asking[origin] = asking  # as the last
            self._forget(origin)
        with asking:  # the others of this origin wait for the first; where it fails, they ask too
            is_first = origin not in self._asked
            self._asked.add(origin)
            if is_first:
                self._rules[origin] = self._read(f"{origin}/robots.txt")
            rules = self._rules.get(origin)
        if rules is None:
            rules = self._rules[origin] = self._read(f"{origin}/robots.txt")
        return rules.can_fetch(AGENT, url)

    def _forget(self, origin: str) -> None:
        """Let go of what is too much, but for this origin's; who comes back there asks again."""
        while len(self._asking) > 1 and (
            len(self._asking) > MOST_ORIGINS or self._num_rules() > MOST_RULES
        ):
            oldest = next(iter(self._asking))
            del self._asking[oldest]
            self._asked.discard(oldest)
            self._rules.pop(oldest, None)

    def _num_rules(self) -> int:
        entries = [entry for rules in list(self._rules.values()) for entry in _entries(rules)]
        return sum(len(entry.rulelines) + len(entry.useragents) for entry in entries)

    def _read(self, address: str) -> RobotFileParser:
        status, body = self._answer(address)
        rules = RobotFileParser()
        lines = body.decode("utf-8-sig", "replace").splitlines() if status == 200 else []
        rules.parse(list(filter(_is_of_rules, lines)))
        return rules


def _entries(rules: RobotFileParser) -> list[Any]:
    default = rules.default_entry  # type: ignore[attr-defined]
    return [*rules.entries, *([default] if default else [])]  # type: ignore[attr-defined]


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

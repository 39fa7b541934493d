"""Progress bars: lively on a terminal, a line now and then in a log."""

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

from phi3v.printing import printable

LOG_SECONDS = 10.0  # between lines where nobody watches a bar move


def progress(
    items: Iterable[Any] | None, name: str, unit: str, total: int | None = None, **kwargs: Any
) -> "tqdm[Any]":
    """Wrap an iterable (or nothing, for updates by hand) in a bar on stderr.

    What takes less than LOG_SECONDS leaves no line in a log. Close the bar (`with`) where an error
    may end it early: the error's message then has a line of its own.
    """
    seconds, delay = (0.1, 0.0) if sys.stderr.isatty() else (LOG_SECONDS, LOG_SECONDS)
    settings = {"mininterval": seconds, "delay": delay} | kwargs
    return tqdm(items, desc=printable(name), unit=unit, total=total, **settings)

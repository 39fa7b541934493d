"""Progress bars: lively on a terminal, a line now and then in a log."""

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

LOG_SECONDS = 10.0  # between lines where nobody watches a bar move


def progress(
    items: Iterable[Any] | None, name: str, unit: str, total: int | None = None, **kwargs: Any
) -> "tqdm[Any]":
    """Wrap an iterable (or nothing, for updates by hand) in a bar on stderr."""
    seconds = 0.1 if sys.stderr.isatty() else LOG_SECONDS
    return tqdm(items, desc=name, unit=unit, total=total, mininterval=seconds, **kwargs)

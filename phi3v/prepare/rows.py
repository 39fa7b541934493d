"""A raw row, and what any kind of source can do with its rows."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class Row:
    """One row of a source: its number from 0, its values by column, or why it cannot be read."""

    number: int
    values: dict[str, Any] = field(default_factory=dict)
    fault: str | None = None


class Rows(Protocol):
    """Rows of one kind of file, any range of which can be read at about the cost of that range."""

    @property
    def num_rows(self) -> int:
        """Rows there are."""

    def read(self, start: int, stop: int) -> Iterator[Row]:
        """Read the rows `start` to `stop`, 0 <= start <= stop <= num_rows."""

    def state(self) -> dict[str, Any]:
        """What is to be known, as JSON, to open the rows again without a pass over all of them."""


def is_empty(value: Any) -> bool:
    """Whether a field holds nothing: None, NaN, white space, or an empty list."""
    is_nan = isinstance(value, float) and value != value
    return value is None or is_nan or value == [] or (isinstance(value, str) and not value.strip())

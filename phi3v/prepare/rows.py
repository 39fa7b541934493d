"""A raw row, and what any kind of source can do with its rows."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol


class ClassName(str):
    """The name of a class, which its file holds as a number, `id`."""

    id: int

    def __new__(cls, name: str, number: int) -> "ClassName":
        made = super().__new__(cls, name)
        made.id = number
        return made


@dataclass(frozen=True)
class Row:
    """One row of a source: its number from 0, its values by column, or why it cannot be read.

    line         of a text file, where it starts, from 1
    is_left_out  the recipe's function gave nothing for it
    """

    number: int
    values: dict[str, Any] = field(default_factory=dict)
    fault: str | None = None
    line: int | None = None
    is_left_out: bool = False


class Rows(Protocol):
    """Rows of one kind of file, any range of which can be read at about the cost of that range."""

    @property
    def num_rows(self) -> int:
        """Rows there are."""

    def read(self, start: int, stop: int) -> Iterator[Row]:
        """Read the rows `start` to `stop`, 0 <= start <= stop <= num_rows."""

    def state(self) -> dict[str, Any]:
        """What is to be known, as JSON, to open the rows again without a pass over all of them."""

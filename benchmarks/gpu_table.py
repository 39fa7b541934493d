"""The table of gpu.py: a row for each thing that was looked at, on the disk as soon as it is known.

A section runs in a process of its own and hands its rows over through `Findings`; gpu.py reads them
as they come, stamps their seconds, and keeps the `Table`.
"""

import time
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from phi3v.files import write_json, write_text
from phi3v.lines import append_line

TRUE, FALSE, MEASURED, SKIPPED, NOT_RUN = "true", "FALSE", "measured", "skipped", "not run"


@dataclass(frozen=True)
class Row:
    """One line; `seconds` passed since the line before, whatever they were spent on."""

    section: str
    check: str
    expected: str
    seen: str
    verdict: str
    seconds: float = 0.0

    def __str__(self) -> str:
        wanted = f" (expected: {self.expected})" if self.expected else ""
        began = f"{self.section:9} {self.verdict:8} {self.seconds:6.1f} s"
        return f"{began}  {self.check}: {self.seen}{wanted}"


class Findings:
    """Where a section says what it found; only the first rank is heard.

    Nothing here ends the section: gpu.py does, which reads of the falsehood.
    """

    def __init__(self, path: Path, section: str, is_first: bool, judges_times: bool) -> None:
        self._path, self._section = path, section
        self._is_first, self._judges_times = is_first, judges_times

    def check(self, name: str, is_true: bool, expected: str, seen: str) -> None:
        """Something that must be so."""
        self._add(name, expected, seen, TRUE if is_true else FALSE)

    def check_time(self, name: str, is_true: bool, expected: str, seen: str) -> None:
        """The same of seconds or speed, which at toy size on a CPU are only shown."""
        if self._judges_times:
            self.check(name, is_true, expected, seen)
        else:
            self.measured(name, seen, expected)

    def measured(self, name: str, seen: str, expected: str = "") -> None:
        """A number that is not judged; `expected` is what stands beside it."""
        self._add(name, expected, seen, MEASURED)

    def skipped(self, name: str, why: str) -> None:
        """Something that this machine cannot show."""
        self._add(name, "", why, SKIPPED)

    def _add(self, check: str, expected: str, seen: str, verdict: str) -> None:
        if self._is_first:
            append_line(self._path, asdict(Row(self._section, check, expected, seen, verdict)))


@dataclass
class Table:
    """All rows of a run, and what it ran on.

    lacks_something  a section was left out that this machine could have shown
    """

    folder: Path
    machine: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    lacks_something: bool = False

    def __post_init__(self) -> None:
        self._last = time.monotonic()

    def add(self, row: Row) -> None:
        """Stamp a row, print it, and write the table."""
        now = time.monotonic()
        row, self._last = replace(row, seconds=round(now - self._last, 2)), now
        self.lacks_something |= row.verdict == NOT_RUN
        self.rows.append(row)
        print(row, flush=True)
        self.write()

    def write(self) -> None:
        """The table as table.json and as table.txt."""
        content = {"machine": self.machine, "rows": [asdict(row) for row in self.rows]}
        write_json(self.folder / "table.json", content)
        lines = [*(f"{name}: {value}" for name, value in self.machine.items()), ""]
        lines += [*map(str, self.rows), "", self.summary]
        write_text(self.folder / "table.txt", "\n".join(lines) + "\n")

    @property
    def falsehoods(self) -> list[Row]:
        return [row for row in self.rows if row.verdict == FALSE]

    @property
    def summary(self) -> str:
        """How many rows of each verdict there are, in one line."""
        counts = Counter(row.verdict for row in self.rows)
        seconds = sum(row.seconds for row in self.rows)
        verdicts = (TRUE, FALSE, MEASURED, SKIPPED, NOT_RUN)
        return f"{', '.join(f'{counts[name]} {name}' for name in verdicts)}; {seconds:.0f} s"

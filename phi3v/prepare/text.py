"""Rows of text files: CSV, TSV, JSON Lines, and a JSON list.

One pass over the file counts its rows and marks the place of every 256th; any range is then read
from the mark before it. Neither holds more of the file than a row and a block of it, and a row has
ROW_BYTES at most.
"""

import codecs
import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Protocol

from phi3v.errors import ConfigError
from phi3v.lines import MOST_VALUES, ROW_BYTES, next_line, size_fault
from phi3v.prepare.rows import Row
from phi3v.processing.keys import repeated, unique

DELIMITERS = (",", ";", "\t", "|")  # that a first line may tell
MARK = 256  # rows from one marked place to the next
BLOCK = 1 << 20  # bytes of a JSON list read at once
LOOKAHEAD = 16  # characters: none of JSON's words and numbers cut by a block's end shows further in
DEEPEST = 100  # lists and objects in each other
TOO_DEEP = "is not valid JSON: it is nested too deeply"
WHITE = re.compile(r"[ \t\n\r]*")
LIST = re.compile(rb"(?:\xef\xbb\xbf)?\s*\[\s*(?:\{|\Z)")
DECODER = json.JSONDecoder(object_pairs_hook=unique)

Place = Sequence[int]
"""Where a record starts: what its file's `seek` takes, and the lines before it."""


class Records(Protocol):
    """The records of a file from some place on."""

    def __next__(self) -> Any:
        """The next record; StopIteration behind the last."""

    def tell(self) -> Place:
        """The place of the next record."""

    def close(self) -> None:
        """Close the file."""


@dataclass(frozen=True)
class TextRows:
    """Rows of a text file that was passed over once."""

    path: Path
    num_rows: int
    places: Sequence[Place]
    """Of rows 0, 256, 512, ..."""

    header: Sequence[str] = ()
    """Names of the columns of a CSV."""

    delimiter: str = ","
    """What separates the columns of a CSV."""

    def read(self, start: int, stop: int) -> Iterator[Row]:
        """Read a range of rows.

        Raises: ConfigError if the file is no longer the one that was passed over.
        """
        if start >= stop:
            return
        _, to_row = KINDS[self.path.suffix.lower()]
        first = start - start % MARK
        place = self.places[first // MARK]
        with closing(_open_records(self.path, place, self.delimiter)) as records:
            for number in range(first, stop):
                record = next(records, None)
                if record is None:
                    raise ConfigError(
                        f"source.path {self.path} ends before row {number}, it had "
                        f"{self.num_rows:,} rows; leave it as it is while rows are prepared"
                    )
                if number >= start:
                    yield to_row(number, record, self.header)

    def state(self) -> dict[str, Any]:
        """Row count, marks, header and delimiter."""
        places = [list(place) for place in self.places]
        header = {"header": list(self.header), "delimiter": self.delimiter}
        return {"num_rows": self.num_rows, "places": places, **header}


def open_text(
    path: Path,
    max_rows: int | None,
    state: dict[str, Any] | None = None,
    delimiter: str | None = None,
) -> TextRows:
    """Pass over a text file, or take what `state` says of it.

    delimiter  of a CSV; None: what its first line tells

    Raises: ConfigError if the file cannot be cut into rows.
    """
    if state is not None:
        return TextRows(path, **state)
    if delimiter is None:
        delimiter = _tell_delimiter(path) if _is_csv(path) else ","
    with closing(_open_records(path, (0, 0), delimiter)) as records:
        header = _read_header(path, records) if isinstance(records, CsvRecords) else ()
        return TextRows(path, *_mark(records, max_rows), header, delimiter)


def usual_delimiter(path: Path) -> str:
    """What separates the columns of a CSV of this name."""
    return "\t" if path.suffix.lower() == ".tsv" else ","


def _tell_delimiter(path: Path) -> str:
    """The usual delimiter, unless the first line has none of it between quotes' ends, and another
    makes columns of it.
    """
    usual = usual_delimiter(path)
    counts = {}
    for delimiter in dict.fromkeys((usual, *DELIMITERS)):
        with closing(CsvRecords(path, (0, 0), delimiter)) as records:
            _, fields, fault = next(records, (1, [], None))
            counts[delimiter] = len(fields) if not fault else 0
    best = max(counts, key=lambda each: counts[each])
    return best if counts[usual] < 2 <= counts[best] else usual


def _is_csv(path: Path) -> bool:
    return KINDS[path.suffix.lower()][0] is CsvRecords


def _open_records(path: Path, place: Place, delimiter: str) -> "Records":
    if _is_csv(path):
        return CsvRecords(path, place, delimiter)
    return KINDS[path.suffix.lower()][0](path, place)


def _mark(records: Records, max_rows: int | None) -> tuple[int, list[Place]]:
    """Rows up to `max_rows`, and the place of every 256th."""
    count, places = 0, []
    while max_rows is None or count < max_rows:
        place = records.tell() if count % MARK == 0 else None
        if next(records, None) is None:
            break
        if place is not None:
            places.append(place)
        count += 1
    return count, places


class CsvRecords:
    """The line a record starts on, its fields, or what is wrong with it; empty lines are none."""

    def __init__(self, path: Path, place: Place, delimiter: str = ",") -> None:
        csv.field_size_limit(ROW_BYTES)  # a field may be a whole image in base64
        self.path = path
        self.file = path.open(encoding="utf-8-sig", newline="")
        self.file.seek(place[0])
        self.lines = place[1]
        self.delimiter = delimiter
        self.size = 0  # characters of the record
        self.reader = csv.reader(self._lines(), delimiter=delimiter, strict=True)

    def tell(self) -> Place:
        return self.file.tell(), self.lines + self.reader.line_num

    def close(self) -> None:
        self.file.close()

    def __next__(self) -> tuple[int, list[str], str | None]:
        """Raises: ConfigError if misplaced quotes made one record of several lines, for who knows
        how many rows they are.
        """
        while True:
            self.size = 0
            line, fields, fault = self.lines + self.reader.line_num + 1, [], None
            try:
                fields = next(self.reader)
            except csv.Error as error:
                fault = f"cannot be read as CSV: line {line}, {error}"
                if (last := self.lines + self.reader.line_num) > line:
                    raise ConfigError(
                        f"source.path {self.path} cannot be cut into rows from line {line} to "
                        f"{last}: {error}; mend the quotes there"
                    ) from error
            except UnicodeDecodeError as error:
                _refuse_encoding(self.path, error)
            if fields or fault:
                return line, fields, fault

    def _lines(self) -> Iterator[str]:
        """Unlike iter(file), this leaves `tell` in working.

        Raises: ConfigError where a record is too large.
        """
        while line := self.file.readline(ROW_BYTES + 1):
            self.size += len(line) if line.isascii() else 2 * len(line)  # or 4 bytes each, twice
            if self.size > ROW_BYTES or line.count(self.delimiter) > MOST_VALUES:
                raise ConfigError(
                    f"source.path {self.path} cannot be cut into rows: at line "
                    f"{self.lines + self.reader.line_num + 1:,} one has more than {ROW_BYTES:,} "
                    f"characters, half of that beyond ASCII, or {MOST_VALUES:,} fields; mend it"
                )
            yield line


def _read_header(path: Path, records: CsvRecords) -> Sequence[str]:
    _, header, broken = next(records, (1, [], None))
    twice = repeated(header)
    if broken or twice is not None:
        problem = f"'s header {broken}" if twice is None else f"has two columns named '{twice}'"
        raise ConfigError(f"source.path {path} {problem}; mend its first line")
    return header


def _csv_row(number: int, record: Any, header: Sequence[str]) -> Row:
    line, fields, fault = record
    if not fault and len(fields) != len(header):
        many = "more" if len(fields) > len(header) else "fewer"
        counts = f"line {line}, {len(fields)} for {len(header)}"
        fault = f"has {many} fields than the header: {counts}"
    values = {} if fault else dict(zip(header, fields, strict=True))
    return Row(number, values, fault, line)


class LineRecords:
    """Lines that are not blank."""

    def __init__(self, path: Path, place: Place) -> None:
        self.file = path.open("rb")
        if LIST.match(self.file.readline(BLOCK)):
            raise ConfigError(
                f"source.path {path} starts with a list of rows, where one row per line belongs; "
                f"name it {path.with_suffix('.json').name}"
            )
        self.file.seek(place[0])
        self.lines = place[1]  # before the next

    def tell(self) -> Place:
        return self.file.tell(), self.lines

    def close(self) -> None:
        self.file.close()

    def __next__(self) -> tuple[int, bytes]:
        """The number of a line, from 1, and the line."""
        while text := next_line(self.file):
            self.lines += 1
            if text.strip():
                return self.lines, text
        raise StopIteration


def _line_row(number: int, record: tuple[int, bytes], _: Sequence[str]) -> Row:
    line, text = record
    if fault := size_fault(text):
        return Row(number, fault=fault, line=line)
    try:
        return _object_row(number, json.loads(text, object_pairs_hook=unique), line)
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError
        return Row(number, fault=f"is not valid JSON: {error}", line=line)
    except RecursionError:
        return Row(number, fault=TOO_DEEP, line=line)


def _object_row(number: int, values: Any, line: int | None = None) -> Row:
    if _is_too_deep(values):
        return Row(number, fault=TOO_DEEP, line=line)
    if isinstance(values, dict):
        return Row(number, values, line=line)
    kind = type(values).__name__
    return Row(number, fault=f"is a {kind}, not an object with named fields", line=line)


def _is_too_deep(value: Any) -> bool:
    """Whether lists and objects stand in each other more than DEEPEST times.

    Where Python's parser gives up depends on its caller's stack: one worker might read what another
    cannot.
    """
    level = [value]
    for _ in range(DEEPEST + 1):
        level = [inner for outer in level for inner in _inside(outer)]
        if not level:
            return False
    return True


def _inside(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


class ListRecords:
    """The values of a JSON list, of which no more is held than a block and a value."""

    def __init__(self, path: Path, place: Place) -> None:
        self.path = path
        self.file = path.open("rb")
        self.file.seek(place[0])
        self.decoder = codecs.getincrementaldecoder("utf-8")()
        self.begin, self.lines = place  # byte and line where `text` starts
        self.text, self.position = "", 0
        self.is_over = False
        if not place[0]:
            self._enter()

    def tell(self) -> Place:
        self._drop()
        return self.begin, self.lines

    def close(self) -> None:
        self.file.close()

    def __next__(self) -> tuple[Any]:
        """A value, in a tuple: it may be None."""
        if self.is_over:
            raise StopIteration
        value = self._value()
        if self._peek() == ",":
            self.position += 1
        else:
            self._leave()
        return (value,)

    def _enter(self) -> None:
        if self.file.read(3) != codecs.BOM_UTF8:
            self.file.seek(0)
        self.begin = self.file.tell()
        first = self._peek()
        if first not in ("[", ""):
            raise ConfigError(
                f"source.path {self.path} starts with {first!r}, not with the '[' of a list of "
                "rows; write [row, row, ...] or one row per line as .jsonl"
            )
        self.position += 1
        if self._peek() in ("]", ""):
            self._leave()

    def _leave(self) -> None:
        """Go past the list's end, behind which nothing may follow."""
        if (char := self._peek()) != "]":
            found = repr(char) if char else "the file's end"
            self._refuse(f"',' or ']' expected, {found} found")
        self.position += 1
        if char := self._peek():
            self._refuse(f"{char!r} found behind the end of the list")
        self.is_over = True

    def _value(self) -> Any:
        while True:
            self._peek()
            try:
                value, end = DECODER.raw_decode(self.text, self.position)
            except json.JSONDecodeError as error:
                is_cut = error.msg.startswith("Unterminated string")
                if (is_cut or self._is_near_end(error.pos)) and self._read_on():
                    continue
                self.position = error.pos
                self._refuse(error.msg)
            except ValueError as error:  # a key is there twice, or a number has 4,300 digits
                is_long = str(error).startswith("Exceeds the limit")
                self._refuse("a number has too many digits" if is_long else str(error))
            except RecursionError:
                self._refuse("a row is nested too deeply")
            if self._is_near_end(end) and self._read_on():
                continue  # 12 may have been the start of 12.5
            self.position = end
            return value

    def _is_near_end(self, position: int) -> bool:
        return position > len(self.text) - LOOKAHEAD

    def _peek(self) -> str:
        """Go past white space; the character that follows, or "" at the file's end."""
        while True:
            self.position = WHITE.match(self.text, self.position).end()  # type: ignore[union-attr]
            if self.position < len(self.text):
                return self.text[self.position]
            if not self._read_on():
                return ""

    def _read_on(self) -> bool:
        """Read as much again as is held, so that a long value is not parsed too often."""
        held = len(self.text) - self.position
        if held > ROW_BYTES or (held > MOST_VALUES and self._num_values() > MOST_VALUES):
            self._refuse(f"a row has more than {ROW_BYTES:,} characters or {MOST_VALUES:,} values")
        block = self.file.read(max(BLOCK, held))
        try:
            text = self.decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            _refuse_encoding(self.path, error)
        if block:
            self._drop()
            self.text += text
        return bool(block)

    def _num_values(self) -> int:
        return sum(self.text.count(each, self.position) for each in ",[{")

    def _drop(self) -> None:
        passed = self.text[: self.position]
        self.begin += len(passed.encode())
        self.lines += passed.count("\n")
        self.text, self.position = self.text[self.position :], 0

    def _refuse(self, problem: str) -> NoReturn:
        self._drop()
        raise ConfigError(
            f"source.path {self.path} is not valid JSON: {problem}, line {self.lines + 1}; mend "
            "the file"
        )


def _list_row(number: int, record: tuple[Any], _: Sequence[str]) -> Row:
    return _object_row(number, record[0])


def _refuse_encoding(path: Path, error: UnicodeDecodeError) -> NoReturn:
    line = next(_other_lines(path), 0)
    raise ConfigError(
        f"source.path {path} is not UTF-8 (line {line}: {error.reason}); save it as UTF-8"
    ) from error


def _other_lines(path: Path) -> Iterator[int]:
    """Numbers of the lines, from 1, that are not UTF-8."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode()
            except UnicodeDecodeError:
                yield number


KINDS: dict[str, tuple[Callable[..., Records], Callable[..., Row]]] = {
    ".csv": (CsvRecords, _csv_row),
    ".tsv": (CsvRecords, _csv_row),
    ".jsonl": (LineRecords, _line_row),
    ".ndjson": (LineRecords, _line_row),
    ".json": (ListRecords, _list_row),
}
"""By suffix: what cuts the file into records, and what makes a row of one."""

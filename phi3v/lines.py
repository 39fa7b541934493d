"""Files of JSON lines: one writer and one reader for all of them.

    append_line(path, {"step": 7})      # one more; a torn end is cut off first
    write_lines(path, entries)          # all of them, atomically
    read_lines(path)                    # the records, without a torn end

"\\n" alone ends a line. A crash or a full disk leaves the last one torn, or full of NULs where the
file had grown and its bytes had not come to the disk: such an end is no record, readers leave it
out, and the next append cuts it off. Any other line that is no record is refused by its number.

What users typed may hold U+2028, U+2029 and U+0085, which other programs take for the end of a
line, and halves of surrogate pairs, which UTF-8 does not have: they are written as \\u escapes.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from phi3v.errors import CheckpointError, Phi3VError, naming
from phi3v.files import replacing
from phi3v.output import say
from phi3v.shapes import Kind, fault_of

BLOCK = 1 << 16  # bytes of a file's end that are looked at before an append
ROW_BYTES = 1 << 27
"""Of one row of any file, at most: whoever writes one may have 100 pictures in it."""
MOST_VALUES = 4_000_000
"""Of one row of JSON: `[],` has three bytes, and takes 64 as an object."""
ENDS = {ord(end): f"\\u{ord(end):04x}" for end in "\u0085\u2028\u2029"}  # for str.splitlines
Parse = Callable[[str], Any]


def line_of(value: Mapping[str, Any]) -> bytes:
    """A record as a line of valid JSON, its end included.

    Raises: ValueError for what JSON cannot say, as a NaN.
    """
    text = json.dumps(value, allow_nan=False, ensure_ascii=False).translate(ENDS)
    return text.encode(errors="backslashreplace") + b"\n"  # \ud800 is JSON's escape as well


def parse_line(line: bytes, parse: Parse = json.loads) -> dict[str, Any]:
    """The record of a line.

    Raises: ValueError saying why it is none.
    """
    if fault := size_fault(line):
        raise ValueError(fault)
    try:
        value = parse(line.rstrip().decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8: byte {error.start + 1}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON: {error.msg}, column {error.colno}") from error
    except (ValueError, RecursionError) as error:  # 5,000 digits, a list in a list in a list ...
        raise ValueError(f"is not JSON that can be read: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"is a {type(value).__name__}, not an object of JSON")
    return value


def read_record(line: bytes, kind: Kind) -> dict[str, Any]:
    """The record of a line, if it holds what it must.

    Raises: ValueError saying why it does not.
    """
    record = parse_line(line)
    if fault := fault_of(record, kind):
        raise ValueError(fault)
    return record


def write_lines(path: Path, values: Iterable[Mapping[str, Any]]) -> None:
    """Write a file of records atomically."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.writelines(map(line_of, values))


def append_line(path: Path, value: Mapping[str, Any]) -> None:
    """Add a record to a file of which this process is the only writer; all of it or nothing.

    Raises: ValueError as `line_of`; OSError naming the file.
    """
    line = line_of(value)
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW  # it may be anybody's
    with naming(path):
        handle = os.open(path, flags, 0o666)
        try:
            size = _cut_end(handle, path)
            try:
                _write(handle, line)
            except OSError:
                with suppress(OSError):
                    os.ftruncate(handle, size)
                raise
        finally:
            os.close(handle)


def read_lines(
    path: Path, error: type[Phi3VError] = CheckpointError, kind: Kind = object
) -> list[dict[str, Any]]:
    """The records of a file that may be missing, without an end that is torn.

    kind  what each must hold

    Raises: `error` naming the first line that is no record and is not the file's end.
    """
    if not path.is_file():
        return []
    with naming(path):
        data = path.read_bytes()
    lines = _split(data[: _whole_end(data)])
    return [_record(path, number, line, error, kind) for number, line in lines]


def numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a file that hold something, with their numbers from 1, one held at a time.

    Each as `next_line` gives it.
    """
    with naming(path), path.open("rb") as file:
        lines = enumerate(iter(partial(next_line, file), b""), 1)
        yield from ((number, line) for number, line in lines if line.strip())


def next_line(file: BinaryIO) -> bytes:
    """The next line of a file, b"" after the last; of a longer one the first ROW_BYTES + 1 bytes.

    A file of no size on the disk can be one line of 40 GB.
    """
    line = rest = file.readline(ROW_BYTES + 1)
    while len(line) > ROW_BYTES and rest and not rest.endswith(b"\n"):
        rest = file.readline(BLOCK)
    return line


def size_fault(line: bytes) -> str | None:
    """Why a line is not parsed: it would take a multiple of ROW_BYTES of memory."""
    most = ROW_BYTES if line.isascii() else ROW_BYTES // 2  # one emoji, and all take 4 bytes
    if len(line) > most:
        return f"is too large: more than {most:,} bytes"
    if len(line) > MOST_VALUES and sum(map(line.count, (b",", b"[", b"{"))) > MOST_VALUES:
        return f"is too large: more than {MOST_VALUES:,} values"
    return None


def _record(
    path: Path, number: int, line: bytes, error: type[Phi3VError], kind: Kind
) -> dict[str, Any]:
    try:
        return read_record(line, kind)
    except ValueError as reason:
        raise error(
            f"{path} is damaged: line {number:,} {reason}; bring the file back from a copy, or "
            "remove that line"
        ) from None


def _split(data: bytes) -> Iterator[tuple[int, bytes]]:
    lines = enumerate(data.split(b"\n"), 1)
    return ((number, line) for number, line in lines if line.strip())


def _whole_end(data: bytes) -> int:
    """Bytes up to the end of the last line that is whole: it ends with "\\n" and has no NUL."""
    end = data.rfind(b"\n") + 1
    while end:
        start = data.rfind(b"\n", 0, end - 1) + 1
        if b"\0" not in data[start:end]:
            break
        end = start
    return end


def _cut_end(handle: int, path: Path) -> int:
    """Cut a torn end off a file, and say so; returns the bytes that are left."""
    size = os.fstat(handle).st_size
    end = os.pread(handle, BLOCK, max(0, size - BLOCK))
    if not end or (end.endswith(b"\n") and b"\0" not in end):
        return size
    whole = _whole_end(path.read_bytes())
    if whole < size:
        os.ftruncate(handle, whole)
        say(
            f"{path}: its last {size - whole:,} bytes are no whole line, as a crash or a full disk "
            "leaves one, and are cut off"
        )
    return whole


def _write(handle: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(handle, rest) :]

"""What a command prints where nobody may hear it any more.

    keep_printing(sys.stdout)   # at a command's start: from here on no print to it fails
    say("step 7 is skipped")    # one line on stderr, above the live one

A run outlives its log: the terminal is closed (EIO), `tee` is killed (EPIPE), the disk of the log
is full (ENOSPC), a descriptor was closed (EBADF). Nothing that is printed is worth a run, so what
cannot be printed is dropped; what comes once there is room again is printed.

Surprising: a command that was started with a closed stdout or stderr (`2>&-`) would give its number
to the next file that it opens, and what libraries print would land in a checkpoint. Such a number
is given to /dev/null first.
"""

import io
import os
import sys
from contextlib import suppress
from typing import Any, TextIO

from tqdm import tqdm

from phi3v.printing import LINES, printable

STDOUT, STDERR = 1, 2  # the descriptors: sys.stdout and sys.stderr may have been replaced


class _Lasting(io.FileIO):
    """A descriptor that takes all that is written to it, whether it gets anywhere or not."""

    def write(self, data: Any) -> int:
        rest = memoryview(data)
        with suppress(OSError):
            while rest and (written := super().write(rest)):
                rest = rest[written:]
        return len(data)


def fill_closed() -> None:
    """Open /dev/null in the place of a stdout or stderr that was closed when the process began."""
    for name, number in (("stdout", STDOUT), ("stderr", STDERR)):
        if getattr(sys, name) is None:
            setattr(sys, name, _null(number))


def _null(number: int) -> TextIO:
    try:
        os.fstat(number)
    except OSError:
        opened = os.open(os.devnull, os.O_WRONLY)
        if opened != number:
            os.dup2(opened, number)
            os.close(opened)
        return open(number, "w", encoding="utf-8", closefd=False)
    return open(os.devnull, "w", encoding="utf-8")  # a library has taken the number


def keep_printing(stream: TextIO) -> TextIO:
    """A stream to the same descriptor on which no print fails.

    What is not the interpreter's own, as where a test looks at what is printed, stays as it is.
    """
    is_own = stream in (sys.__stdout__, sys.__stderr__)
    if not is_own or not isinstance(stream, io.TextIOWrapper):
        return stream
    with suppress(OSError):
        stream.flush()
    raw = _Lasting(stream.fileno(), "w", closefd=False)
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering or stream.write_through,  # PYTHONUNBUFFERED's
    )


def say(line: str) -> None:
    """Print a line on stderr, above a live one; it is dropped where it cannot be printed."""
    if sys.stderr is None:
        return
    with suppress(OSError, ValueError):  # the latter of a stream that was closed
        tqdm.write(printable(line, LINES), file=sys.stderr)
        sys.stderr.flush()


def is_watched() -> bool:
    """Whether stderr is a terminal, on which a line may live."""
    return sys.stderr is not None and not sys.stderr.closed and sys.stderr.isatty()


def shout(line: str) -> None:
    """Write a line past all buffers, where locks may be held: in a signal's handler, at the end."""
    with suppress(OSError):
        os.write(STDERR, f"{printable(line, LINES)}\n".encode())

"""Files that hold one value: what a run, a checkpoint, a dataset or a model says of itself.

    read_object(run / "data.json", needs={"fingerprint": str})    # or one line that says why not

Each may be another person's, or what a crash or a failing disk has left. So what it is comes first:
a pipe that nobody writes to has no end to wait for, nor has a link to /dev/zero one to read up to;
then its size, then what the parser says of it, then whether the keys that are needed are there.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from phi3v.errors import CheckpointError, Phi3VError, naming
from phi3v.reading import HIDDEN, PLAIN, kind_at, retried

MOST_BYTES = 1 << 26
"""Of such a file: a checkpoint of 1,024 ranks has a manifest of half a MB."""
AGAIN = "bring it back from a copy"


def read_bytes(path: Path) -> bytes:
    """The bytes of a file that is one, and of a size that such a file can have.

    Raises: ValueError saying what it is instead; OSError where it cannot be read; MachineError.
    """
    kind = kind_at(path)
    if kind is not None and kind not in (PLAIN, HIDDEN):
        raise ValueError(f"is {kind}, not a file")
    with naming(path), path.open("rb") as file:
        data = file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise ValueError(f"is too large: more than {MOST_BYTES:,} bytes")
    return data


def parse_file(path: Path, parse: Callable[[str], Any] = json.loads) -> dict[str, Any]:
    """The object that a file of JSON holds.

    Raises: ValueError saying why it holds none; OSError where it cannot be read; MachineError.
    """
    value = _parse(path, parse)
    if not isinstance(value, dict):
        raise ValueError(f"is a {type(value).__name__}, not an object of JSON")
    return value


def read_list(
    path: Path, error: type[Phi3VError] = CheckpointError, advice: str = AGAIN
) -> list[Any]:
    """The list that a file of JSON holds.

    Raises: `error` naming the file and what is wrong with it; MachineError.
    """
    with _refusing(path, error, advice):
        value = _parse(path, json.loads)
        if not isinstance(value, list):
            raise ValueError(f"is a {type(value).__name__}, not a list of JSON")
        return value


def _parse(path: Path, parse: Callable[[str], Any]) -> Any:
    data = retried(lambda: read_bytes(path), str(path))
    try:
        return parse(data.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"is not valid JSON: byte {error.start + 1} is not UTF-8") from error
    except json.JSONDecodeError as error:
        if not data.strip(b"\0 \r\n\t"):
            raise ValueError(f"is not valid JSON: its {len(data):,} bytes say nothing") from error
        raise ValueError(f"is not valid JSON at line {error.lineno}: {error.msg}") from error
    except (ValueError, RecursionError) as error:  # 5,000 digits, a list in a list in a list ...
        raise ValueError(f"is not JSON that can be read: {error}") from error


@contextmanager
def _refusing(path: Path, error: type[Phi3VError], advice: str) -> Iterator[None]:
    try:
        yield
    except ValueError as reason:
        raise error(f"{path} {reason}; {advice}") from None
    except OSError as reason:
        raise error(f"{path} cannot be read ({reason.strerror}); {advice}") from None


def read_object(
    path: Path,
    error: type[Phi3VError] = CheckpointError,
    needs: Mapping[str, type] | None = None,
    advice: str = AGAIN,
) -> dict[str, Any]:
    """The object that a file of JSON holds, with keys whose values have these types.

    Raises: `error` naming the file and what is wrong with it; MachineError.
    """
    with _refusing(path, error, advice):
        found = parse_file(path)
    for key, kind in (needs or {}).items():
        if type(found.get(key)) is not kind:
            has = f"a {type(found[key]).__name__}" if key in found else "none"
            raise error(f"{path} must have {key!r}, a {kind.__name__}, and has {has}; {advice}")
    return found

"""A function of the user's that makes a row of each row, for what no template says.

    def convert(row):  # rows.py
        return {"question": row["q"].strip(), "answer": row["a"][0]} if row["a"] else None

    source: {path: raw.jsonl, convert: "rows:convert", user: "{question}", assistant: "{answer}"}

It is called in every worker, twice for each row (once for each pass), so it must give the same each
time. Its source is part of what the dataset is made of: the manifest holds its SHA-256.
"""

import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from phi3v.errors import ConfigError
from phi3v.files import sha256
from phi3v.functions import find_function
from phi3v.prepare.rows import Row

Convert = Callable[[dict[str, Any]], dict[str, Any] | None]


def converted(rows: Iterable[Row], name: str) -> Iterator[Row]:
    """Convert rows; one that the function fails for, or gives something else for, is a fault.

    Raises: ConfigError if there is no such function.
    """
    function = find_convert(name)
    for row in rows:
        yield row if row.fault else _converted(row, name, function)


def _converted(row: Row, name: str, function: Convert) -> Row:
    try:
        values = function(dict(row.values))
    except Exception as error:  # whatever the user's function raises
        problem = f"{type(error).__name__}, {error}"
        return replace(row, fault=f"cannot be converted: {name} raised {problem}")
    if values is None:
        return replace(row, is_left_out=True)
    if not isinstance(values, dict):
        kind = type(values).__name__
        return replace(row, fault=f"cannot be converted: {name} gave a {kind}, not a dict")
    if strange := [key for key in values if not isinstance(key, str)]:
        return replace(
            row, fault=f"cannot be converted: {name} gave the key {strange[0]!r}, no text"
        )
    return replace(row, values=values)


def find_convert(name: str) -> Convert:
    """The function.

    Raises: ConfigError as `find_function`.
    """
    advice = "write one that takes a row and gives a row or None"
    return find_function(name, "source.convert", advice)


def convert_digest(name: str) -> str:
    """The SHA-256 of the function's module.

    Raises: ConfigError as `find_convert`, or if the module has no file.
    """
    find_convert(name)
    file = getattr(sys.modules[name.rpartition(":")[0]], "__file__", None)
    if file is None:
        raise ConfigError(f"source.convert {name} is of no file; write a module of Python for it")
    return sha256(Path(file))

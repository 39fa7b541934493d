"""What a record of JSON must hold: its keys, and of what kind the value of each is.

    STEP = {"step": COUNT, "loss": (NUMBER, None), "lr?": {"*": NUMBER}}
    fault_of(record, STEP)    # None, or "has no 'step'", or "has a str as 'loss', not a number"

Whoever can write to a run folder can write any JSON into its files. Their readers count, compare
and draw what they find there, so each says once what that is, and looks at it where it is read.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

COUNT: Final = "a whole number from 0"
NUMBER: Final = "a finite number"
LARGEST = 2**53  # whole numbers up to here are the same in every program that reads JSON
"""A kind is COUNT, NUMBER, None, a class, a `Custom`, a tuple of kinds of which one must fit, a
list of the kind of all elements, or a mapping: of the kinds of keys; `key?` may be absent, and "*"
stands for all further keys, with () for none."""
Kind = Any


@dataclass(frozen=True)
class Custom:
    """A kind of one's own; `name` says in a message what its values are."""

    name: str
    fits: Callable[[Any], bool]


def fault_of(value: Any, kind: Kind, place: str = "") -> str | None:
    """Why a value is not of a kind, None if it is; `place` is the key of which it is the value."""
    if isinstance(kind, Mapping) and isinstance(value, dict):
        return _fault_of_keys(value, kind, f"{place}." if place else "")
    if isinstance(kind, list) and isinstance(value, list):
        found = (fault_of(element, kind[0], place) for element in value)
        return next((fault for fault in found if fault), None)
    if isinstance(kind, tuple):
        faults = [fault_of(value, one, place) for one in kind]
        return None if None in faults else next(iter(faults), f"has {place!r}, which is not known")
    return None if _fits(value, kind) else f"has {_shown(value)} as {place!r}, not {_named(kind)}"


def _fault_of_keys(found: Mapping[str, Any], kinds: Mapping[str, Kind], prefix: str) -> str | None:
    known = {key.removesuffix("?"): kind for key, kind in kinds.items() if key != "*"}
    for key in kinds:
        if not key.endswith("?") and key != "*" and key not in found:
            return f"has no {prefix + key!r}"
    for key, value in found.items():
        kind = known.get(key, kinds.get("*", object))
        if fault := fault_of(value, kind, prefix + key):
            return fault
    return None


def _fits(value: Any, kind: Kind) -> bool:
    if kind is None:
        return value is None
    if isinstance(kind, Custom):
        return kind.fits(value)
    if isinstance(kind, type):
        return isinstance(value, kind)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    if kind == COUNT:
        return isinstance(value, int) and 0 <= value <= LARGEST
    return kind == NUMBER and abs(value) <= sys.float_info.max  # of a NaN no comparison is true


def _shown(value: Any) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{value:.4g}" if _fits(value, NUMBER) else "a number that is too large, or none"
    return "null" if value is None else f"a {type(value).__name__}"


def _named(kind: Kind) -> str:
    if isinstance(kind, Mapping | list):
        return "an object" if isinstance(kind, Mapping) else "a list"
    if isinstance(kind, Custom):
        return kind.name
    return "null" if kind is None else getattr(kind, "__name__", str(kind))

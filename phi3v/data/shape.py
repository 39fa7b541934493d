"""What a dataset's manifest must be for whoever reads it: its keys, and the kind of each value.

    fault_of(manifest)  # "splits.train.samples must be a whole number from 0, it is a str", or None

A manifest may be somebody else's, or a disk's: what is indexed and summed is looked at once, here.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

SHOWN = 100  # characters of a key in a message


@dataclass(frozen=True)
class Kind:
    """Values that fulfil a test; `name` says in a message what they must be."""

    name: str
    fits: Callable[[Any], bool]


def _whole(least: int, most: int, name: str) -> Kind:
    return Kind(name, lambda value: type(value) is int and least <= value <= most)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and abs(value) < 1e9


def _is_plain_name(value: Any) -> bool:
    return isinstance(value, str) and value not in ("", ".", "..") and not {*"/\0"} & {*value}


COUNT = _whole(0, 2**62, "a whole number from 0")
SIDE = _whole(1, 2048, "a whole number from 1 to 2,048")
NUMBER = Kind("a number", _is_number)
POSITIVE = Kind("a number above 0", lambda value: _is_number(value) and value > 0)
TEXT = Kind("a text", lambda value: isinstance(value, str))
OBJECT = Kind("an object", lambda value: isinstance(value, dict))
FILE = Kind("the name of a file in the folder", _is_plain_name)
ID = Kind("an id", lambda value: isinstance(value, str))

# A key that ends in "?" may be missing, and * stands for any. A list has any number of what is in
# it, a tuple as many as it has.
LISTED = {"file": FILE, "bytes": COUNT, "sha256": TEXT}
EXTREME = [{"id": ID, "tokens": COUNT, "label_tokens": COUNT}]
BINS = [(COUNT, COUNT)]
TOTALS = {name: COUNT for name in ("samples", "tokens", "image_tokens", "label_tokens")}
AUDIT = {
    **TOTALS,
    "answers?": {"trained": COUNT, "excluded": COUNT, "unrecorded_samples": COUNT},
    "pictures?": {"*": COUNT},
    "histograms": {"tokens": BINS, "label_tokens": BINS},
    "longest": EXTREME,
    "shortest": EXTREME,
    "suspicious": {"*": {"count": COUNT, "examples": [ID]}},
}
SPLIT = {
    **TOTALS,
    "views": COUNT,
    "shards": [LISTED | {"samples": COUNT}],
    "index": LISTED,
    "audit?": AUDIT,
}
SHAPE = {
    "fingerprint?": TEXT,
    "recipe?": OBJECT,
    "crop_size?": SIDE,
    "image_side?": SIDE,
    "image_mean?": [NUMBER],
    "image_std?": [POSITIVE],
    "num_crops?": SIDE,
    "pictures?": [{"source": TEXT}],
    "tokenizer?": TEXT,
    "pixels?": OBJECT,
    "splits": {"*": SPLIT},
    "rows?": COUNT,
    "left_out?": COUNT,
    "saved_tokens?": COUNT,
    "shared_ids?": COUNT,
    "near_duplicates?": {"*": COUNT},
    "rejected?": {"count": COUNT, "by_reason": {"*": COUNT}},
    "licenses?": [{"source": TEXT, "license": TEXT}],
    "hub?": [TEXT],
}


def fault_of(manifest: Mapping[str, Any]) -> str | None:
    """The first thing that a manifest says otherwise than SHAPE; None if there is none."""
    return _fault(manifest, SHAPE, "")


def _fault(value: Any, shape: Any, name: str) -> str | None:
    if isinstance(shape, Kind):
        return None if shape.fits(value) else _must_be(name, shape.name, value)
    if isinstance(shape, dict):
        return _fault_of_object(value, shape, name)
    if not isinstance(value, list):
        return _must_be(name, "a list", value)
    if isinstance(shape, tuple) and len(value) != len(shape):
        return f"{name} must be {len(shape)} values, it is {len(value):,}"
    inner = shape if isinstance(shape, tuple) else shape * len(value)
    found = (_fault(v, s, f"{name}.{k}") for k, (v, s) in enumerate(zip(value, inner, strict=True)))
    return next(filter(None, found), None)


def _fault_of_object(value: Any, shape: Mapping[str, Any], name: str) -> str | None:
    if not isinstance(value, dict):
        return _must_be(name, "an object", value)
    for wanted, inner in shape.items():
        key = wanted.removesuffix("?")
        for each in value if key == "*" else [key]:
            inside = f"{name}.{each[:SHOWN]}".lstrip(".")
            if each not in value:
                if key == wanted:
                    return f"{inside} is missing"
            elif fault := _fault(value[each], inner, inside):
                return fault
    return None


def _must_be(name: str, kind: str, value: Any) -> str:
    return f"{name} must be {kind}, it is a {type(value).__name__}"

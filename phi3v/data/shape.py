"""What a dataset's manifest must hold, for whoever reads it.

A manifest may be somebody else's, or a disk's: what is indexed and summed is looked at once, where
it is read (shapes.py).
"""

from typing import Any

from phi3v.shapes import COUNT, NUMBER, Custom


def _is_plain_name(value: Any) -> bool:
    return isinstance(value, str) and value not in ("", ".", "..") and not {*"/\0"} & {*value}


def _is_side(value: Any) -> bool:
    return type(value) is int and 1 <= value <= 2048


SIDE = Custom("a whole number from 1 to 2,048", _is_side)
POSITIVE = Custom("a number above 0", lambda value: type(value) in (int, float) and 0 < value < 1e9)
FILE = Custom("the name of a file in the folder", _is_plain_name)

LISTED = {"file": FILE, "bytes": COUNT, "sha256": str}
EXTREME = [{"id": str, "tokens": COUNT, "label_tokens": COUNT}]
BINS = [[COUNT]]
TOTALS = {name: COUNT for name in ("samples", "tokens", "image_tokens", "label_tokens")}
AUDIT = {
    **TOTALS,
    "answers?": {"trained": COUNT, "excluded": COUNT, "unrecorded_samples": COUNT},
    "pictures?": {"*": COUNT},
    "histograms": {"tokens": BINS, "label_tokens": BINS},
    "longest": EXTREME,
    "shortest": EXTREME,
    "suspicious": {"*": {"count": COUNT, "examples": [str]}},
}
SPLIT = {
    **TOTALS,
    "views": COUNT,
    "shards": [LISTED | {"samples": COUNT}],
    "index": LISTED,
    "audit?": AUDIT,
}
SHAPE = {
    "fingerprint?": str,
    "recipe?": dict,
    "crop_size?": SIDE,
    "image_side?": SIDE,
    "image_mean?": [NUMBER],
    "image_std?": [POSITIVE],
    "num_crops?": SIDE,
    "pictures?": [{"source": str}],
    "tokenizer?": str,
    "pixels?": dict,
    "splits": {"*": SPLIT},
    "rows?": COUNT,
    "left_out?": COUNT,
    "saved_tokens?": COUNT,
    "shared_ids?": COUNT,
    "near_duplicates?": {"*": COUNT},
    "rejected?": {"count": COUNT, "by_reason": {"*": COUNT}},
    "licenses?": [{"source": str, "license": str}],
    "hub?": [str],
}

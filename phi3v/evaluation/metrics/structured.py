"""Answers that are JSON, compared with the reference's JSON field by field.

A field is a leaf of the tree, named by the keys that lead to it: {"total": {"net": 5}, "items":
[{"name": "cap"}, {"name": "bag"}]} has total.net and twice items[].name. Where in a list a field
stands does not count, how often it is there does.

    field_f1('{"total": 5, "tax": 1}', '{"total": 5, "tip": 1}')    # 0.5

JSON is an object or a list, alone or within ``` or ```json. Text around it, a key that an object
has twice, NaN, Infinity and numbers that no float holds are no JSON. Numbers are equal by value (5
is 5.0), and never equal to a text or to true; null is only null, and not the same as a key that is
missing; texts are compared as in `text.accuracy`, in `exact_match` letter by letter but for white
space around them. An empty object or list is a field, equal to another one.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from phi3v.evaluation.metrics.text import normalise

_FENCED = re.compile(r"```(?:json)?\s*\n(.*)\n\s*```", re.DOTALL | re.IGNORECASE)

Place = tuple[str | None, ...]
"""The keys that lead to a value; None for an item of a list."""
Field = tuple[Place, Hashable]


@dataclass(frozen=True)
class Tree:
    """A JSON value: `whole` equals another's if all is the same; `fields` are its leaves."""

    whole: Hashable
    fields: Counter[Field]

    @property
    def paths(self) -> dict[str, Counter[Hashable]]:
        """The values of each field, by its dotted name."""
        found: dict[str, Counter[Hashable]] = {}
        for (place, value), count in self.fields.items():
            found.setdefault(_dotted(place), Counter())[value] += count
        return found


@lru_cache(maxsize=65_536)
def read_tree(text: str) -> Tree | None:
    """Read the JSON of an answer; None for any other text."""
    fenced = _FENCED.fullmatch(text.strip())
    try:
        value = json.loads(
            fenced[1] if fenced else text,
            object_pairs_hook=_object,
            parse_float=_finite,
            parse_constant=_refuse,
        )
        if not isinstance(value, dict | list):
            return None
        return Tree(_frozen(value), Counter(_leaves(value, ())))
    except (ValueError, RecursionError):
        return None


def parse_rate(prediction: str, reference: str) -> float:
    """Return 1 for an answer that is JSON."""
    return float(read_tree(prediction) is not None)


def exact_match(prediction: str, reference: str) -> float:
    """Return 1 for the same JSON: keys in any order, lists in the same."""
    said, wanted = read_tree(prediction), _read_reference(reference)
    return float(said is not None and said.whole == wanted.whole)


def field_accuracy(prediction: str, reference: str) -> float:
    """Return the share of the reference's fields that the answer has with the same value."""
    said, wanted = read_tree(prediction), _read_reference(reference)
    return 0.0 if said is None else _num_common(said, wanted) / wanted.fields.total()


def field_f1(prediction: str, reference: str) -> float:
    """Return 2 * fields with the same value / (fields of the answer + fields of the reference).

    Source: the field-level F1 of document parsing, Kim et al., OCR-free Document Understanding
    Transformer, ECCV 2022, section 4.1.2; there texts are compared letter by letter.
    """
    said, wanted = read_tree(prediction), _read_reference(reference)
    if said is None:
        return 0.0
    return 2 * _num_common(said, wanted) / (said.fields.total() + wanted.fields.total())


def path_accuracy(prediction: str, reference: str, path: str) -> float | None:
    """Return 1 if the values of one field are right, in any order; None where there are none.

    path  "total.net", "items[].name"
    """
    wanted = _read_reference(reference).paths.get(path)
    if wanted is None:
        return None
    said = read_tree(prediction)
    return float(said is not None and said.paths.get(path) == wanted)


def json_paths(text: str) -> list[str]:
    """The names of the fields of a text that is JSON."""
    tree = read_tree(text)
    return list(tree.paths) if tree else []


def path_values(text: str, path: str) -> Hashable:
    """What one field of a text holds, to be compared with another's; None where it has none."""
    tree = read_tree(text)
    values = tree.paths.get(path) if tree else None
    return None if values is None else frozenset(values.items())


def _read_reference(text: str) -> Tree:
    tree = read_tree(text)
    assert tree is not None, "`read_rows` refuses references that are no JSON"
    return tree


def _num_common(said: Tree, wanted: Tree) -> int:
    return (said.fields & wanted.fields).total()


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("an object has a key twice")
    return found


def _finite(number: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise ValueError("a number is larger than a float")
    return value


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _frozen(value: Any) -> Hashable:
    """A value that equals another's if it is the same JSON, and texts the same letters."""
    if isinstance(value, dict):
        return "object", frozenset((key, _frozen(item)) for key, item in value.items())
    if isinstance(value, list):
        return "list", tuple(map(_frozen, value))
    return _leaf(value.strip() if isinstance(value, str) else value)


def _leaves(value: Any, place: Place) -> Iterator[Field]:
    items: list[tuple[Place, Any]] = []
    if isinstance(value, dict):
        items = [((*place, key), item) for key, item in value.items()]
    elif isinstance(value, list):
        items = [((*place, None), item) for item in value]
    for inner, item in items:
        yield from _leaves(item, inner)
    if not items:
        is_empty = isinstance(value, dict | list)
        yield place, _frozen(value) if is_empty else _leaf(_alike(value))


def _alike(value: Any) -> Any:
    return normalise(value) if isinstance(value, str) else value


def _leaf(value: Any) -> Hashable:
    """A leaf with its type, for True equals 1."""
    kind = "number" if type(value) in (int, float) else type(value).__name__
    return kind, value


def _dotted(place: Place) -> str:
    """("items", None, "name") is items[].name; of a list at the root it is [].name."""
    return ".".join("[]" if key is None else key for key in place).replace(".[]", "[]")

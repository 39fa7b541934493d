"""Values of a table by the type of their column, as texts should have them.

    Typed(batch.schema).to_pylist(batch)

`to_pylist` alone widens a float32 of 19.99 to 19.989999771118164, and gives the number of a class
where `datasets` has written its name into the schema. Both are mended here, in lists and structs
too. A table with neither takes no longer than before.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from phi3v.prepare.rows import ClassName

FEATURES = b"huggingface"  # key of a schema's metadata
LISTS = ("Sequence", "List", "LargeList")

Mend = Callable[[Any], Any]
"""Makes a plain value of a column what it should be; None stays None."""


class Typed:
    """What is to be done with the columns of a schema."""

    def __init__(self, schema: pa.Schema) -> None:
        self.schema = schema
        features = _features(schema)
        self._floats = [k for k, field in enumerate(schema) if _holds_floats(field.type)]
        mends = [(f.name, m) for f in schema if (m := _halves(f.type))]
        mends += [(name, m) for name in schema.names if (m := _classes(features.get(name)))]
        self._mends = mends

    def to_pylist(self, batch: pa.RecordBatch) -> list[dict[str, Any]]:
        """The rows of a batch of this schema.

        Raises: ValueError for a class that has no name.
        """
        for place in self._floats:
            batch = batch.set_column(place, batch.schema.names[place], _shortest(batch[place]))
        rows: list[dict[str, Any]] = batch.to_pylist()
        for name, mend in self._mends:
            for row in rows:
                row[name] = mend(row[name])
        return rows


def _holds_floats(kind: pa.DataType) -> bool:
    """Whether a type is or holds float32."""
    if _is_odd(kind):
        return False
    return kind == pa.float32() or any(
        _holds_floats(kind.field(k).type) for k in range(kind.num_fields)
    )


def _shortest(column: pa.Array) -> pa.Array:
    """A column with each float32 as the float64 that is written alike, by way of its text.

    0.5 us a number, where Python would take 1 us and more.
    """
    texts = column.cast(_with_floats_as(column.type, pa.string()))
    return texts.cast(_with_floats_as(column.type, pa.float64()))


def _with_floats_as(kind: pa.DataType, leaf: pa.DataType) -> pa.DataType:
    if kind == pa.float32():
        return leaf
    if pa.types.is_struct(kind):
        fields = [kind.field(k) for k in range(kind.num_fields)]
        return pa.struct([field.with_type(_with_floats_as(field.type, leaf)) for field in fields])
    if pa.types.is_map(kind):
        return pa.map_(_with_floats_as(kind.key_type, leaf), _with_floats_as(kind.item_type, leaf))
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(_with_floats_as(kind.value_type, leaf), kind.list_size)
    if pa.types.is_large_list(kind):
        return pa.large_list(_with_floats_as(kind.value_type, leaf))
    return pa.list_(_with_floats_as(kind.value_type, leaf)) if pa.types.is_list(kind) else kind


def _is_odd(kind: pa.DataType) -> bool:
    """Whether Arrow casts no texts to and from a type: an Array2D of `datasets`, a dictionary."""
    return (
        isinstance(kind, pa.BaseExtensionType)
        or pa.types.is_dictionary(kind)
        or pa.types.is_run_end_encoded(kind)
        or pa.types.is_list_view(kind)
        or pa.types.is_large_list_view(kind)
    )


def _halves(kind: pa.DataType, is_odd: bool = False) -> Mend | None:
    """What shortens the float16 in values of a type, whose texts Arrow does not shorten, and the
    float32 in types that it does not cast.
    """
    is_odd = is_odd or _is_odd(kind)
    if isinstance(kind, pa.BaseExtensionType):
        return _halves(kind.storage_type, is_odd)
    if pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind):
        return _halves(kind.value_type, is_odd)
    if kind == pa.float16():
        return lambda value: None if value is None else float(str(np.float16(value)))
    if kind == pa.float32() and is_odd:
        return lambda value: None if value is None else float(str(np.float32(value)))
    if pa.types.is_struct(kind):
        return _of_members({f.name: m for f in kind.fields if (m := _halves(f.type, is_odd))})
    if pa.types.is_map(kind):
        return _of_pairs(_halves(kind.key_type, is_odd), _halves(kind.item_type, is_odd))
    if kind.num_fields == 1 and (inner := _halves(kind.field(0).type, is_odd)):
        return _of_items(inner)
    return None


def _features(schema: pa.Schema) -> dict[str, Any]:
    """What `datasets` says of the columns."""
    try:
        found = json.loads((schema.metadata or {}).get(FEATURES, b"{}"))["info"]["features"]
    except (ValueError, KeyError, TypeError, RecursionError):  # other tools may write there
        return {}
    return found if isinstance(found, dict) else {}


def _classes(feature: Any) -> Mend | None:
    """What names the classes in values of a feature; None where there are none.

    A Sequence of named features is stored as a struct of lists, so a class's mend takes lists too.
    """
    if isinstance(feature, list):
        return _of_items(_classes(feature[0])) if feature else None
    if not isinstance(feature, dict):
        return None
    kind = feature.get("_type")
    if kind == "ClassLabel" and (names := feature.get("names")):
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            return None  # not as `datasets` writes them
        return lambda value: _named(value, names)
    if kind in LISTS:
        return _of_items(_classes(feature.get("feature")))
    if isinstance(kind, str):
        return None
    return _of_members({name: m for name, inner in feature.items() if (m := _classes(inner))})


def _named(value: Any, names: Sequence[str]) -> Any:
    """A class's name by its number; -1 is none, as in a test split without answers."""
    if isinstance(value, list):
        return [_named(item, names) for item in value]
    if value is None or value == -1:
        return None
    if not isinstance(value, int):
        raise ValueError(f"a class is a {type(value).__name__}, not a number")
    if not 0 <= value < len(names):
        raise ValueError(f"class {value} is none of the {len(names)} that have a name")
    return ClassName(names[value], value)


def _of_items(mend: Mend | None) -> Mend | None:
    if mend is None:
        return None
    return lambda value: [mend(item) for item in value] if isinstance(value, list) else mend(value)


def _of_pairs(of_key: Mend | None, of_item: Mend | None) -> Mend | None:
    """Of a map, whose values are pairs."""
    if of_key is None and of_item is None:
        return None
    key, item = of_key or _kept, of_item or _kept
    return lambda value: value and [(key(k), item(v)) for k, v in value]


def _kept(value: Any) -> Any:
    return value


def _of_members(mends: dict[str, Mend]) -> Mend | None:
    def mended(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {k: mends[k](item) if k in mends else item for k, item in value.items()}

    return mended if mends else None

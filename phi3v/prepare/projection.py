"""Which columns of a table a recipe needs, and how much of the others must be seen.

    needs = needs_of(section, names, also=[cfg.split.by])
    needs.use_of(schema.field("score"))  # READ, LOOKED_AT or PASSED

A row is rejected for a picture that its recipe passes over, and for a key that is not understood;
both are told by a column's name and by whether, or with what, its cells begin. Only of columns that
may be such is anything read, and only CELL characters of a cell; what cannot be (a number, a time,
whatever its zone is called) and what `source.ignore` names is not decoded at all.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import Enum, auto

import pyarrow as pa
import pyarrow.compute as pc

from phi3v.config.dataset import SourceSection
from phi3v.prepare.chats import COLUMN_OF
from phi3v.prepare.conversations import chat_format, is_columns, named_fields
from phi3v.prepare.templates import columns_of, head_of
from phi3v.processing.keys import FORMATS, PROVENANCE, names_media

CELL = 8192  # characters or bytes of a cell that is looked at; a path has 4,096 at most
types = pa.types


class Use(Enum):
    """What is done with a column."""

    READ = auto()
    LOOKED_AT = auto()
    PASSED = auto()


@dataclass(frozen=True)
class Needs:
    """What a recipe needs of the columns of a table.

    read         columns that make the sample
    passed       columns of which it does not matter what they hold
    names_matter whether every other column with a value rejects its row, as in chats
    """

    read: frozenset[str]
    passed: frozenset[str]
    names_matter: bool

    def use_of(self, field: pa.Field) -> Use:
        """What is done with a column."""
        if field.name in self.read:
            return Use.READ
        if field.name in self.passed:
            return Use.PASSED
        is_told = self.names_matter or names_media(field.name) or _may_show(field.type)
        return Use.LOOKED_AT if is_told else Use.PASSED


def needs_of(
    section: SourceSection, names: Sequence[str], also: Collection[str | None] = ()
) -> Needs | None:
    """What a recipe needs of a table with columns of these names; None if it is all of them.

    also  columns that the recipe names elsewhere, to split by
    """
    if section.convert is not None:
        return None
    others = {name for name in (section.id, *also) if name}
    read = {"id", *others, *(head_of(name, names) for name in others)}
    ignored = frozenset(section.ignore or ())
    if is_columns(section):
        for name in named_fields(section):
            read |= {name, *columns_of(name, names)}
        return Needs(frozenset(read), ignored - read, names_matter=False)
    name = chat_format(section, names)
    known = FORMATS[name].row.keys() - {*PROVENANCE, *ignored}
    read |= {COLUMN_OF[name], *known}
    return Needs(frozenset(read), frozenset({*PROVENANCE, *ignored} - read), names_matter=True)


def _may_show(kind: pa.DataType) -> bool:
    """Whether a cell of a type may hold a picture, film or sound, or the path of one."""
    if isinstance(kind, pa.BaseExtensionType):
        return _may_show(kind.storage_type)
    if types.is_dictionary(kind) or types.is_run_end_encoded(kind):
        return _may_show(kind.value_type)
    if types.is_struct(kind):
        names = {kind.field(k).name for k in range(kind.num_fields)}
        return "bytes" in names and names <= {"bytes", "path"}
    if is_list(kind):
        return _may_show(kind.value_type)
    return is_text(kind)


def is_text(kind: pa.DataType) -> bool:
    """Whether a type is of texts or bytes."""
    return (
        types.is_string(kind)
        or types.is_large_string(kind)
        or types.is_string_view(kind)
        or types.is_binary(kind)
        or types.is_large_binary(kind)
        or types.is_binary_view(kind)
        or types.is_fixed_size_binary(kind)
    )


def is_list(kind: pa.DataType) -> bool:
    """Whether a type is of lists of any kind."""
    return (
        types.is_list(kind)
        or types.is_large_list(kind)
        or types.is_fixed_size_list(kind)
        or types.is_list_view(kind)
        or types.is_large_list_view(kind)
    )


def used(schema: pa.Schema, needs: Needs | None, *uses: Use) -> list[pa.Field]:
    """The columns of a schema of which something of this kind is done."""
    return [f for f in schema if (Use.READ if needs is None else needs.use_of(f)) in uses]


def projected(batch: pa.RecordBatch, schema: pa.Schema, needs: Needs | None) -> pa.RecordBatch:
    """The columns of a whole schema, of which a batch has those that are not passed.

    A column that is passed holds nothing in every row, and one that is looked at the beginnings of
    its cells; of times whether there is one.
    """
    if needs is None:
        return batch
    left = iter(batch.columns)
    columns = []
    for field in schema:
        use = needs.use_of(field)
        if use is Use.PASSED:
            columns.append(pa.nulls(batch.num_rows))
        else:
            column = next(left)
            columns.append(column if use is Use.READ else _beginnings(column))
    fields = [pa.field(f.name, c.type) for f, c in zip(schema, columns, strict=True)]
    return pa.RecordBatch.from_arrays(columns, schema=pa.schema(fields, schema.metadata))


def _beginnings(column: pa.Array) -> pa.Array:
    kind = column.type
    if types.is_dictionary(kind):
        return pa.DictionaryArray.from_arrays(column.indices, _beginnings(column.dictionary))
    if types.is_string(kind) or types.is_large_string(kind):
        return pc.utf8_slice_codeunits(column, 0, CELL)
    if types.is_binary(kind) or types.is_large_binary(kind):
        return pc.binary_slice(column, 0, CELL)
    if types.is_temporal(kind):
        return pc.if_else(column.is_valid(), True, None)
    return column

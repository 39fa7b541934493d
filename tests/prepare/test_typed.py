"""Values of tables become the texts that their writer meant."""

import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from phi3v.config.dataset import SourceSection
from phi3v.prepare.rows import ClassName
from phi3v.prepare.sources import open_source, read_rows
from phi3v.prepare.templates import fill
from phi3v.prepare.typed import Typed

FRUIT = ["lemon", "pear", "plum"]
CLASS = datasets.ClassLabel(names=FRUIT)


def plain(**columns: pa.Array) -> list[dict[str, Any]]:
    batch = pa.RecordBatch.from_pydict(columns)
    return Typed(batch.schema).to_pylist(batch)


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_a_float32_is_written_as_numpy_writes_it(value: float) -> None:
    for column in (pa.array([value], pa.float32()), pa.array([[value]], pa.list_(pa.float32()))):
        (row,) = plain(x=column)
        found = row["x"][0] if isinstance(row["x"], list) else row["x"]
        assert found == float(str(np.float32(value)))


@given(st.floats(width=16, allow_nan=False, allow_infinity=False))
def test_a_float16_is_written_as_numpy_writes_it(value: float) -> None:
    half = np.float16(value)
    (row,) = plain(
        x=pa.array([half], pa.float16()), y=pa.array([[half, None]], pa.list_(pa.float16()))
    )
    assert row == {"x": float(str(half)), "y": [float(str(half)), None]}


def test_numbers_in_structs_and_lists_of_any_kind_are_short() -> None:
    inner = pa.struct([("a", pa.float32()), ("b", pa.int8()), ("h", pa.float16())])
    value = {"a": 0.3, "b": 1, "h": np.float16(19.98)}
    short = {"a": 0.3, "b": 1, "h": 19.98}
    (first, second) = plain(
        struct=pa.array([value, None], inner),
        many=pa.array([[value], None], pa.list_(inner)),
        large=pa.array([[0.1], []], pa.large_list(pa.float32())),
        fixed=pa.array([[0.1, 0.2], None], pa.list_(pa.float32(), 2)),
        mapped=pa.array([[("k", 0.1)], None], pa.map_(pa.string(), pa.float32())),
        whole=pa.array([0.1, 19.989999771118164]),
    )
    assert first == {
        "struct": short,
        "many": [short],
        "large": [0.1],
        "fixed": [0.1, 0.2],
        "mapped": [("k", 0.1)],
        "whole": 0.1,
    }
    assert second["struct"] is None and second["large"] == []
    assert second["whole"] == 19.989999771118164


SHORT = [19.99, None, 0.1]


@pytest.mark.parametrize("kind", [pa.float32(), pa.float16()])
def test_floats_are_short_in_types_that_arrow_does_not_cast(kind: pa.DataType) -> None:
    short = [None if x is None else float(str(kind.to_pandas_dtype()(x))) for x in SHORT]
    numbers = pa.array(short, kind)
    lists = pa.array([short] * 3, pa.list_view(kind))
    pairs = pa.array([[("k", short[0])]] * 3, pa.map_(pa.string(), kind))
    struct = pa.StructArray.from_arrays([lists], ["inner"])
    columns = {"view": lists, "struct": struct, "pairs": pairs}
    if kind == pa.float32():  # Arrow makes no dictionary of float16
        columns["coded"] = numbers.dictionary_encode()
    rows = plain(**columns)
    assert [row["view"] for row in rows] == [short] * 3
    assert [row["struct"] for row in rows] == [{"inner": short}] * 3
    assert [row["pairs"] for row in rows] == [[("k", short[0])]] * 3
    assert [row.get("coded", x) for row, x in zip(rows, short, strict=True)] == short


def test_an_array_of_datasets_has_short_numbers(tmp_path: Path) -> None:
    features = datasets.Features({"box": datasets.Array2D((1, 2), "float32")})
    file = tmp_path / "a.parquet"
    datasets.Dataset.from_dict({"box": [[[19.99, 0.1]]]}, features=features).to_parquet(file)
    (row,) = read_rows(file)
    assert fill("{box[0][0]} {box[0][1]}", row.values) == "19.99 0.1"


def test_other_types_are_written_by_the_rules_of_the_page() -> None:
    (row,) = plain(
        decimal=pa.array([Decimal("12.50")], pa.decimal128(10, 2)),
        small=pa.array([Decimal("0.00000001")], pa.decimal128(10, 8)),
        day=pa.array([datetime.date(2024, 5, 1)]),
        time=pa.array([datetime.datetime(2024, 5, 1, 12)]),
        yes=pa.array([True]),
        integer=pa.array([12]),
    )
    template = "{decimal}|{small}|{day}|{time}|{yes}|{integer}"
    assert fill(template, row) == "12.50|0.00000001|2024-05-01|2024-05-01 12:00:00|True|12"


def labelled() -> datasets.Dataset:
    features = datasets.Features(
        {
            "label": CLASS,
            "several": datasets.Sequence(CLASS),
            "boxes": datasets.List({"kind": CLASS, "x": datasets.Value("float32")}),
            "one": {"kind": CLASS},
        }
    )
    rows = {
        "label": [2, -1],
        "several": [[0, 1], []],
        "boxes": [[{"kind": 1, "x": 0.1}], []],
        "one": [{"kind": 0}, {"kind": 2}],
    }
    return datasets.Dataset.from_dict(rows, features=features)


@pytest.mark.parametrize("kind", ["parquet", "saved", "streamed"])
def test_classes_have_their_names_wherever_they_stand(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "rows"
    if kind == "saved":
        labelled().save_to_disk(path)
    else:
        path.mkdir()
        labelled().to_parquet(path / "rows.parquet")
    if kind == "parquet":
        path = path / "rows.parquet"
    section = SourceSection(path=str(path), streaming=kind == "streamed")
    source = open_source(section, tmp_path / "work")
    first, second = (row.values for row in source.read(0, 2))
    assert first["label"] == "plum" and first["label"].id == 2
    assert first["several"] == ["lemon", "pear"]
    assert first["boxes"] == [{"kind": "pear", "x": 0.1}]
    assert first["one"] == {"kind": "lemon"} and second["one"] == {"kind": "plum"}
    assert second["label"] is None, "-1 is no class"
    assert fill("{label} {label.id} {boxes[0].kind}", first) == "plum 2 pear"


def test_a_class_without_a_name_is_a_fault_of_its_row(tmp_path: Path) -> None:
    table = labelled().data.table
    broken = table.set_column(0, table.schema.field(0), pa.array([2, 7]))
    pq.write_table(broken, tmp_path / "rows.parquet")
    first, second = read_rows(tmp_path / "rows.parquet")
    assert first.values["label"] == ClassName("plum", 2)
    assert second.fault is not None and "class 7 is none of the 3" in second.fault

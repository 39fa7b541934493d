"""Rows and files that ask for far more than they hold: each is refused by name, soon."""

import gc
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from phi3v.config.dataset import SourceSection
from phi3v.errors import ConfigError, SampleError
from phi3v.prepare import inputs, prepare, scan, tables
from phi3v.prepare.chats import MOST_TURNS
from phi3v.prepare.conversations import read_conversation
from phi3v.prepare.rows import Row
from phi3v.prepare.scan import reason_of
from phi3v.prepare.sources import open_source
from phi3v.processing.keys import unique
from tests.tiny import recipe, turn, write_jsonl

MANY = 60_000


@contextmanager
def soon() -> Iterator[None]:
    """Fails what takes the square of its input in steps, which is many seconds."""
    start = time.process_time()
    yield
    assert time.process_time() - start < 2


def test_a_key_that_comes_twice_after_many_others_is_found_at_once() -> None:
    pairs = [(str(k), k) for k in range(MANY)]
    with soon(), pytest.raises(ValueError, match="the key '59999' twice"):
        unique([*pairs, pairs[-1]])


def test_a_header_of_many_columns_is_read_at_once(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(",".join(map(str, range(MANY))))
    with soon():
        assert open_source(SourceSection(path=str(path)), tmp_path).num_rows == 0


@pytest.mark.parametrize("text", ["://:" * MANY, "a" * 10 * MANY, "://" * MANY + "@"])
def test_a_reason_of_any_length_is_shown_at_once(text: str) -> None:
    with soon():
        assert len(reason_of(SampleError(f"role is none: {text}"))) <= 503


@pytest.mark.parametrize("column", ["messages", "conversations", "texts"])
def test_a_row_of_too_many_turns_is_rejected_before_they_are_read(column: str) -> None:
    row = Row(0, {column: [None] * (MOST_TURNS + 1)})
    section = SourceSection(path="x", format="llava" if column == "conversations" else "auto")
    if column == "texts":
        section = SourceSection(path="x", format="texts")
    with pytest.raises(SampleError, match="too many turns: 10,001, 10,000 at most"):
        read_conversation(row, section)


def test_an_id_or_a_reference_of_any_length_rejects_its_row_and_is_not_repeated(
    tmp_path: Path, tiny_model: Path
) -> None:
    rows = [turn("Hi", "A."), turn("Hi", "A.", id="i" * 20_000)]
    rows.append(turn("Hi", "A.", id="r", references=["r" * 600_000] * 2))
    source = {"path": str(write_jsonl(tmp_path / "rows.jsonl", rows))}
    prepare(recipe(tiny_model, tmp_path / "out", source, max_rejected=1.0, workers=1))
    lines = (tmp_path / "out" / "rejected.jsonl").read_text(encoding="utf-8").splitlines()
    assert [(line["id"], line["reason"]) for line in map(json.loads, lines)] == [
        ("i" * 10_000, "an id is too long: 20,000 characters, 10,000 at most"),
        ("r", "too much text: 1,200,004 characters, max_characters is 1,000,000"),
    ]


def test_few_rows_of_long_texts_are_held_at_once(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[int] = []
    monkeypatch.setattr(inputs, "BATCH_BYTES", 1000)
    monkeypatch.setattr(inputs, "_fetched", lambda _, batch: fetched.append(len(batch)) or batch)
    rows = [{"q": "Q" * 600, "a": "A."} for _ in range(8)]
    source = {"path": str(write_jsonl(tmp_path / "rows.jsonl", rows))}
    source |= {"user": "{q}", "assistant": "{a}"}
    prepare(recipe(tiny_model, tmp_path / "out", source, workers=1))
    assert set(fetched) == {0, 2}


def test_a_rejected_row_is_let_go_of_at_once() -> None:
    row, error = Row(0, {"text": "x" * 1000}), SampleError("too much text")
    count, was_on = sys.getrefcount(row), gc.isenabled()
    gc.disable()
    try:
        for _ in range(3):
            with suppress(SampleError):
                scan._scan(SimpleNamespace(cfg=None), None, row, error)  # type: ignore[arg-type]
        assert sys.getrefcount(row) == count
    finally:
        if was_on:
            gc.enable()


# Tables


@pytest.mark.parametrize("suffix", ["parquet", "arrow", "arrows"])
@pytest.mark.parametrize("is_inner", [False, True])
def test_a_table_of_very_many_columns_is_refused(
    tmp_path: Path, suffix: str, is_inner: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "MOST_COLUMNS", 10)
    values = {f"c{k}": ["a"] for k in range(10)}
    inner = pa.StructArray.from_arrays([pa.array(v) for v in values.values()], list(values))
    few = pa.table({"s": inner} if is_inner else values)
    path = tmp_path / f"a.{suffix.removesuffix('s')}"
    for table in (few, few.append_column("more", pa.array(["a"]))):
        if suffix == "parquet":
            pq.write_table(table, path)
        else:
            new = pa.ipc.new_file if suffix == "arrow" else pa.ipc.new_stream
            with new(path, table.schema) as writer:
                writer.write_table(table)
        if table is few:
            assert tables.open_table(path).num_rows == 1
    with pytest.raises(ConfigError, match=r"a\.\w+ has more than 10 columns"):
        tables.open_table(path)


def lists(values: pa.Array) -> pa.Array:
    """One list of all these values."""
    return pa.LargeListArray.from_arrays(pa.array([0, len(values)], pa.int64()), values)


FLAGS = pa.array(np.zeros(5_000_000, bool))
PAIRS = pa.MapArray.from_arrays(pa.array([0, len(FLAGS)], pa.int32()), FLAGS, FLAGS)


@pytest.mark.parametrize(
    "column",
    [
        lists(pa.nulls(400_000_000)),
        lists(pa.StructArray.from_arrays([FLAGS], ["x"])),
        lists(lists(pa.nulls(400_000_000))),
        PAIRS,
    ],
    ids=["nulls", "objects", "nested", "pairs"],
)
def test_a_cell_of_many_values_without_bytes_is_refused_before_they_are_made(
    column: pa.Array, tmp_path: Path
) -> None:
    path = tmp_path / "rows.arrow"
    made = pa.table({"q": column, "a": ["A."]})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, made.schema) as out:
        out.write_table(made)
    section = SourceSection(path=str(path), user="{q[0]}", assistant="{a}")
    with soon():
        (row,) = open_source(section, tmp_path, also=()).read(0, 1)
    assert row.fault and row.fault.startswith("is too large: ")


@pytest.mark.parametrize(
    ("feature", "values", "fault"),
    [
        ({"_type": "ClassLabel", "names": 5}, [0], None),
        ({"_type": "ClassLabel", "names": {"x": 1}}, [0], None),
        ({"_type": "ClassLabel", "names": [None]}, [0], None),
        ({"_type": "ClassLabel", "names": ["x"]}, ["0"], "a class is a str, not a number"),
    ],
)
def test_classes_that_datasets_would_not_write_end_no_pass(
    feature: Any, values: list[Any], fault: str | None, tmp_path: Path
) -> None:
    said = json.dumps({"info": {"features": {"q": feature}}})
    row = read_table(tmp_path, values, said.encode())
    assert row.values == {"q": values[0]} if fault is None else fault in str(row.fault)


def test_metadata_that_are_nested_too_deeply_say_nothing(tmp_path: Path) -> None:
    assert read_table(tmp_path, ["x"], b"[" * 100_000).values == {"q": "x"}


def read_table(folder: Path, values: list[Any], said: bytes) -> Row:
    made = pa.table({"q": values}).replace_schema_metadata({b"huggingface": said})
    pq.write_table(made, folder / "rows.parquet")
    section = SourceSection(path=str(folder / "rows.parquet"), user="{q}", assistant="{q}")
    (row,) = open_source(section, folder, also=()).read(0, 1)
    return row


def test_a_type_of_datasets_that_cannot_be_made_of_its_metadata_is_refused(tmp_path: Path) -> None:
    told = {
        b"ARROW:extension:name": b"datasets.features.features.Array2DExtensionType",
        b"ARROW:extension:metadata": b"none",
    }
    field = pa.field("q", pa.list_(pa.list_(pa.int64())), metadata=told)
    made = pa.table([pa.array([[[1]]])], schema=pa.schema([field]))
    path = tmp_path / "rows.arrow"
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, made.schema) as out:
        out.write_table(made)
    with pytest.raises(ConfigError, match="cannot be read as arrow: "):
        open_source(SourceSection(path=str(path), user="{q}", assistant="{q}"), tmp_path, also=())


@pytest.mark.parametrize(
    "name", ["README.md", ".huggingface.yaml", "dataset_dict.json", "dataset_infos.json"]
)
def test_a_page_of_gigabytes_about_a_folder_is_refused_by_its_size(
    name: str, tmp_path: Path
) -> None:
    write_jsonl(tmp_path / "train.jsonl", [turn("Hi", "A.")])
    with (tmp_path / name).open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ConfigError, match=f"{name} is too large: 1,099,511,627,776 bytes"):
        open_source(SourceSection(path=str(tmp_path)), tmp_path)

"""No row takes more than its share: pictures, bytes, text, and the columns that it does not use."""

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from phi3v.config.dataset import SourceSection
from phi3v.data import Dataset
from phi3v.errors import ConfigError
from phi3v.lines import MOST_VALUES, ROW_BYTES
from phi3v.prepare import prepare, tables
from phi3v.prepare.images import ImageLoader
from phi3v.prepare.recipe import resolved_recipe
from phi3v.prepare.rows import Row
from phi3v.prepare.sources import open_source
from phi3v.prepare.tables import BATCH_BYTES, FEW
from tests.prepare.bombs import precincts
from tests.tiny import recipe, turn, write_jsonl, write_picture

CANVAS = 3 * 4 * 56 * 56  # bytes of a picture of the tiny model
MANY = "".join(f"<|image_{k}|>" for k in range(1, 9))


def rejections(folder: Path) -> dict[str, str]:
    lines = (folder / "rejected.jsonl").read_text(encoding="utf-8").splitlines()
    return {line["id"]: line["reason"] for line in map(json.loads, lines)}


def test_a_row_with_too_many_images_is_rejected_before_any_is_opened(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [turn("Hi", "A.", id="good"), turn(MANY, "A.", id="many", images=["gone.png"] * 8)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    monkeypatch.setattr(ImageLoader, "prefetch", lambda self, references: _none(references))
    monkeypatch.setattr(ImageLoader, "picture", None)
    values = {"max_rejected": 1.0, "workers": 1}
    prepare(recipe(tiny_model, tmp_path / "out", {"path": str(path)}, max_images=7, **values))
    assert rejections(tmp_path / "out") == {"many": "too many images: 8, max_images is 7"}


def _none(references: Any) -> None:
    assert not references


def test_files_and_canvases_of_a_row_have_a_limit_together(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = write_picture(tmp_path / "a.png").stat().st_size
    rows = [turn("<|image_1|>", "A.", id="one", images=["a.png"])]
    rows.append(turn(MANY, "A.", id="many", images=["a.png"] * 8))
    source = {"path": str(write_jsonl(tmp_path / "rows.jsonl", rows))}
    limit = 3 * (CANVAS + size)
    values = {"max_rejected": 1.0, "workers": 1}
    prepare(recipe(tiny_model, tmp_path / "out", source, max_row_bytes=limit, **values))
    taken = 4 * (CANVAS + size)
    assert rejections(tmp_path / "out") == {
        "many": f"images take too many bytes: {taken:,} for 4 of 8 images, files and canvases; "
        f"max_row_bytes is {limit:,}"
    }
    prepare(recipe(tiny_model, tmp_path / "all", source, max_row_bytes=2 * taken, **values))
    assert len(Dataset(tmp_path / "all", "train")) == 2


def test_a_long_text_is_rejected_before_it_is_tokenised(tmp_path: Path, tiny_model: Path) -> None:
    rows = [turn("Hi", "A.", id="good"), turn("Hi " * 400, "A.", id="long")]
    source = {"path": str(write_jsonl(tmp_path / "rows.jsonl", rows))}
    prepare(recipe(tiny_model, tmp_path / "out", source, max_characters=1000, max_rejected=1.0))
    assert rejections(tmp_path / "out") == {
        "long": "too much text: 1,202 characters, max_characters is 1,000"
    }


@pytest.mark.parametrize("key", ["max_images", "max_row_bytes", "max_characters"])
def test_limits_as_by_default_change_no_fingerprint_and_others_do(
    key: str, tmp_path: Path, tiny_model: Path
) -> None:
    source = {"path": str(write_jsonl(tmp_path / "rows.jsonl", [turn("Hi", "A.")]))}
    default = recipe(tiny_model, tmp_path / "out", source)
    assert key not in resolved_recipe(default)
    other = recipe(tiny_model, tmp_path / "out", source, **{key: getattr(default, key) + 1})
    assert resolved_recipe(other)[key] == getattr(default, key) + 1
    with pytest.raises(ConfigError, match=f"{key} must be at least 1"):
        recipe(tiny_model, tmp_path / "out", source, **{key: 0})


@pytest.mark.parametrize("validation", [0.0, 0.4])
def test_a_bomb_is_rejected_by_name_and_the_bytes_are_the_same_each_time(
    tmp_path: Path, tiny_model: Path, validation: float
) -> None:
    """Of a split the scan has looked at the picture, of none the write has."""
    (tmp_path / "bomb.jp2").write_bytes(precincts(4000))
    rows = [turn("Hi", f"A {k}.", id=f"r{k}") for k in range(20)]
    rows.append(turn("<|image_1|>", "A.", id="bomb", images=["bomb.jp2"]))
    source = {"path": str(write_jsonl(tmp_path / "rows.jsonl", rows))}
    for name in ("out", "again"):
        cfg = recipe(tiny_model, tmp_path / name, source, split={"validation": validation})
        prepare(cfg)
        ((row, reason),) = rejections(tmp_path / name).items()
        assert row == "bomb" and reason.startswith("image cannot be read: bomb.jp2, ")
    first, second = (
        {file.name: file.read_bytes() for file in (tmp_path / name).iterdir()}
        for name in ("out", "again")
    )
    assert first == second


# Columns


def table(path: Path, **columns: Any) -> Path:
    """Rows with a question and an answer, and other columns."""
    number = len(next(iter(columns.values())))
    rows = {"q": [f"Q {k}" for k in range(number)], "a": ["A."] * number}
    made = pa.table({**rows, **columns})
    if path.suffix == ".parquet":
        pq.write_table(made, path, compression="zstd")
    else:
        options = pa.ipc.IpcWriteOptions(compression="zstd")
        with (
            pa.OSFile(str(path), "wb") as file,
            pa.ipc.new_file(file, made.schema, options=options) as out,
        ):
            out.write_table(made)
    return path


POOLS: list[pa.MemoryPool] = []  # Arrow keeps no hold of the pools that its buffers are of


def read(path: Path, **section: Any) -> tuple[list[Row], int]:
    """The rows as a recipe reads them, and the most bytes that Arrow had for them."""
    said = {"user": "{q}", "assistant": "{a}"} if "format" not in section else {}
    pool, before = pa.proxy_memory_pool(pa.system_memory_pool()), pa.default_memory_pool()
    POOLS.append(pool)
    pa.set_memory_pool(pool)
    try:
        source = open_source(SourceSection(path=str(path), **said, **section), path.parent, also=())
        rows = list(source.read(0, source.num_rows))
    finally:
        pa.set_memory_pool(before)
    return rows, pool.max_memory()


FILES = ["a.parquet", "a.arrow"]


@pytest.mark.parametrize("name", FILES)
def test_numbers_and_ignored_columns_are_not_read_at_all(tmp_path: Path, name: str) -> None:
    wide = pa.array([bytes(1 << 20)] * 40, pa.binary())
    number = pa.FixedSizeListArray.from_arrays(pa.nulls(40_000_000, pa.int8()), 1_000_000)
    rows, most = read(table(tmp_path / name, wide=wide, number=number), ignore=("wide",))
    assert [row.values["wide"] for row in rows] == [row.values["number"] for row in rows]
    assert rows[3].values == {"q": "Q 3", "a": "A.", "wide": None, "number": None}
    assert most < 1 << 22


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", [pa.string(), pa.binary()])
def test_a_value_in_many_cells_of_an_unused_column_is_there_once_and_cut(
    tmp_path: Path, name: str, kind: pa.DataType
) -> None:
    """10 MB, 300 times."""
    value = pa.array(["x" * 10_000_000], kind)
    cells = pa.DictionaryArray.from_arrays(pa.array([0] * 300, pa.int32()), value)
    path = table(tmp_path / name, unused=cells)
    assert path.stat().st_size < 50_000
    rows, most = read(path)
    assert most < 8 * 10_000_000 and len(rows) == 300
    assert len(rows[0].values["unused"]) == 8192


def test_rows_are_read_by_bytes_where_the_recipe_needs_them(tmp_path: Path) -> None:
    """2 MB, 64 times: not all at once."""
    cells = pa.array(["x" * 2_000_000] * FEW)
    path = table(tmp_path / "a.parquet", used=cells)
    source = open_source(
        SourceSection(path=str(path), user="{used}", assistant="{a}"), tmp_path, also=()
    )
    rows = source.read(0, FEW)
    for number, row in enumerate(rows):
        assert row.number == number and len(row.values["used"]) == 2_000_000
        held = sum(b.nbytes for b in [source.rows._open.batch])  # type: ignore[attr-defined]
        assert held <= BATCH_BYTES


@pytest.mark.parametrize("name", FILES)
def test_a_row_of_too_many_bytes_is_a_fault_that_names_them(tmp_path: Path, name: str) -> None:
    cells = pa.array(
        [["x"] * 3, ["y" * 1_000_000] * (1 + ROW_BYTES // 1_000_000)], pa.list_(pa.string())
    )
    path = table(tmp_path / name, tags=cells)
    section = SourceSection(path=str(path), user="{q} {tags:commas}", assistant="{a}")
    first, second = open_source(section, tmp_path, also=()).read(0, 2)
    assert first.fault is None and not second.values
    assert second.fault is not None and second.fault.startswith("is too large: 135,")
    assert second.fault.endswith(" bytes of values, 134,217,728 at most")


BOMB = """
import sys
import pyarrow as pa, pyarrow.parquet as pq
cells = pa.table({"q": ["Q", "x" * 200_000_000], "a": ["A", "A"]})
if sys.argv[1].endswith("parquet"):
    pq.write_table(cells, sys.argv[1], compression="zstd", use_dictionary=False)
else:
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.OSFile(sys.argv[1], "wb") as file:
        with pa.ipc.new_file(file, cells.schema, options=options) as writer:
            writer.write_table(cells)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_what_unpacks_to_gigabytes_is_refused_before_it_is_there(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cell of 200 MB of one letter; made elsewhere, so that no memory for it is at hand."""
    path = tmp_path / name
    subprocess.run([sys.executable, "-c", BOMB, str(path)], check=True)
    assert path.stat().st_size < 100_000
    monkeypatch.setattr(tables, "UNPACKED_BYTES", 1 << 26)
    section = SourceSection(path=str(path), user="{q}", assistant="{a}")
    before = resource.getrlimit(resource.RLIMIT_DATA)
    with pytest.raises(ConfigError, match="some page or batch of it unpacks to more than 64 MiB"):
        list(open_source(section, tmp_path, also=()).read(0, 2))
    assert resource.getrlimit(resource.RLIMIT_DATA) == before


LARGE = {
    "a.jsonl": (b'{"q": "', b'"}\n', None),
    "a.json": (
        b'[{"q": "',
        b'"}]',
        "is not valid JSON: a row has more than 134,217,728 characters",
    ),
    "a.csv": (
        b"q,a\n",
        b",A\n",
        "cannot be cut into rows: at line 2 one has more than 134,217,728",
    ),
}


SHORT = ["a.csv", "a.jsonl"]


@pytest.mark.parametrize("name", LARGE)
def test_a_row_of_text_of_too_many_bytes_is_never_held(tmp_path: Path, name: str) -> None:
    start, end, refusal = LARGE[name]
    path = tmp_path / name
    with path.open("wb") as file:
        file.write(start)
        for _ in range(300):
            file.write(b"x" * 1_000_000)
        file.write(end)
        if refusal is None:
            file.write(b'{"q": "Q", "a": "A"}\n')
    section = SourceSection(path=str(path), user="{q}", assistant="{a}")
    if refusal is not None:
        with pytest.raises(ConfigError, match=refusal):
            open_source(section, tmp_path, also=())
        return
    first, second = open_source(section, tmp_path, also=()).read(0, 2)
    assert first.fault == "is too large: more than 134,217,728 bytes"
    assert second.values == {"q": "Q", "a": "A"} and second.line == 2


@pytest.mark.parametrize("name", [*SHORT, pytest.param("a.json", marks=pytest.mark.slow)])
def test_a_row_of_too_many_values_is_not_made(tmp_path: Path, name: str) -> None:
    """As objects of Python they would take 20 times the bytes that they have in the file."""
    path = tmp_path / name
    inner = {"a.csv": b"q,a\n%s\n", "a.json": b'[{"q": [%s1]}]', "a.jsonl": b'{"q": [%s1]}\n'}
    each = b"," if name == "a.csv" else b"[],"
    path.write_bytes(inner[name] % (each * (MOST_VALUES + 1)))
    section = SourceSection(path=str(path), user="{q}", assistant="{a}")
    if name == "a.jsonl":
        [row] = open_source(section, tmp_path, also=()).read(0, 1)
        assert row.fault == "is too large: more than 4,000,000 values"
        return
    with pytest.raises(ConfigError, match=r"more than 134,217,728 characters,? (half|or)"):
        open_source(section, tmp_path, also=())


@pytest.mark.parametrize("name", FILES)
def test_an_unused_column_of_an_unknown_time_zone_rejects_nothing(
    tmp_path: Path, name: str, tiny_model: Path
) -> None:
    when = pa.array([10**15] * 3, pa.timestamp("us", "Nowhere/Nothing"))
    path = table(tmp_path / name, when=when)
    source = {"path": str(path), "user": "{q}", "assistant": "{a}"}
    assert prepare(recipe(tiny_model, tmp_path / "out", source))["rows"] == 3
    assert len(Dataset(tmp_path / "out", "train")) == 3


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    ("column", "cells", "key"),
    [
        ("image", pa.array([7, None, 8]), "image"),
        ("video", pa.array([10**15, None, 1], pa.timestamp("us", "Nowhere/Nothing")), "video"),
        ("x", pa.array(["a b", None, "clips/a.mp4?" + "k" * 100_000]), "x"),
        ("x", pa.array([b"a", None, b"\x89PNG\r\n\x1a\n" + bytes(100_000)]), "x"),
        ("x", pa.array([["a"], None, ["b", "a.png"]]), "x"),
        ("x", pa.array([None, None, {"bytes": b"x", "path": None}]), "x"),
    ],
)
def test_a_picture_that_is_passed_over_is_seen_as_ever(
    tmp_path: Path, tiny_model: Path, name: str, column: str, cells: pa.Array, key: str
) -> None:
    source = {"path": str(table(tmp_path / name, **{column: cells})), "user": "{q}"}
    cfg = recipe(tiny_model, tmp_path / "out", {**source, "assistant": "{a}"}, max_rejected=0.9)
    manifest = prepare(cfg)
    reasons = (tmp_path / "out/rejected.jsonl").read_text(encoding="utf-8").splitlines()
    assert manifest["rejected"]["count"] == len(reasons) == (2 if column != "x" else 1)
    assert all(f"a column is passed over: '{key}'" in reason for reason in reasons)


@pytest.mark.parametrize("name", FILES)
def test_a_key_of_a_chat_that_is_not_understood_rejects_whatever_its_type(
    tmp_path: Path, tiny_model: Path, name: str
) -> None:
    chats = [turn(f"Q {k}", "A.")["messages"] for k in range(4)]
    score = pa.array([None, 1, None, None])
    when = pa.array([None, None, 10**15, None], pa.timestamp("us", "Nowhere/Nothing"))
    blank = pa.array([" ", "", None, " " * 9])
    columns = {"messages": chats, "score": score, "when": when, "blank": blank}
    made = pa.table({**columns, "meta": [{"a": 1}] * 4, "width": [1.5] * 4})
    path = tmp_path / name
    if path.suffix == ".parquet":
        pq.write_table(made, path)
    else:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, made.schema) as out:
            out.write_table(made)
    prepare(recipe(tiny_model, tmp_path / "out", {"path": str(path)}, max_rejected=0.9))
    lines = (tmp_path / "out/rejected.jsonl").read_text(encoding="utf-8").splitlines()
    found = {line["row"]: line["reason"] for line in map(json.loads, lines)}
    assert found.keys() == {1, 2}
    assert found[1].startswith("a key is not understood: 'score' of the row")
    assert found[2].startswith("a key is not understood: 'when' of the row")


def test_columns_of_a_split_and_of_a_function_are_read(tmp_path: Path, tiny_model: Path) -> None:
    cells = {"shop": [k // 2 for k in range(20)], "kind": [k % 2 for k in range(20)]}
    path = table(tmp_path / "a.parquet", **cells)
    source = {"path": str(path), "user": "{q}", "assistant": "{a}"}
    split = {"validation": 0.5, "by": "shop", "stratify": "kind"}
    manifest = prepare(recipe(tiny_model, tmp_path / "out", source, split=split))
    assert not manifest["rejected"]["count"] and len(manifest["splits"]) == 2
    section = SourceSection(**source, convert="rows:convert")
    (row,) = open_source(section, tmp_path, also=()).rows.read(3, 4)
    assert row.values["kind"] == 1

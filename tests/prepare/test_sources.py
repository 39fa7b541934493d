"""The same rows give the same samples, whatever file they lie in."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from phi3v.config.dataset import SourceSection
from phi3v.data import Dataset
from phi3v.errors import ConfigError
from phi3v.prepare import prepare
from phi3v.prepare.sources import open_source, read_rows
from phi3v.sample import Sample
from tests.tiny import assert_same, recipe, turn, write_jsonl, write_picture

Rows = list[dict[str, Any]]
ROWS: Rows = [
    {"id": "r0", "title": "Red cap", "code": "007", "picture": "pictures/0.png"},
    {"id": "r1", "title": 'A "blue", wide\nshirt', "code": "1e5", "picture": "pictures/1.png"},
    {"id": "r2", "title": "gr\u00fcn \U0001f600", "code": "NA", "picture": "pictures/2.png"},
    *({"id": f"r{k}", "title": "x", "code": str(k), "picture": "0.png"} for k in range(3, 150)),
]
TEMPLATES = {
    "user": "<|image_1|>\nWhat is {code}?",
    "assistant": "{title} ({code})",
    "images": ["picture"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four pictures."""
    folder = tmp_path_factory.mktemp("source")
    for k in range(3):
        write_picture(folder / f"pictures/{k}.png", 40 + 60 * k, 50, seed=k)
    write_picture(folder / "0.png", 8, 8)
    return folder


def write_csv(path: Path, rows: Rows) -> None:
    with path.open("w", encoding="utf-8-sig", newline="") as file:  # the BOM that Excel writes
        delimiter = "\t" if path.suffix == ".tsv" else ","
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


def write_json(path: Path, rows: Rows) -> None:
    path.write_text(json.dumps(rows), encoding="utf-8")


def write_parquet(path: Path, rows: Rows) -> None:
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=40)


def write_arrow(path: Path, rows: Rows) -> None:
    table = pa.Table.from_pylist(rows)
    opened = pa.ipc.new_file if "file" in path.name else pa.ipc.new_stream
    with pa.OSFile(str(path), "wb") as sink, opened(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=100)


def with_images(rows: Rows, root: Path) -> datasets.Dataset:
    rows = [row | {"picture": str(root / row["picture"])} for row in rows]
    return datasets.Dataset.from_list(rows).cast_column("picture", datasets.Image())


def write_saved(path: Path, rows: Rows) -> None:
    with_images(rows, path.parent).save_to_disk(path)


def write_image_parquet(path: Path, rows: Rows) -> None:
    with_images(rows, path.parent).to_parquet(path)


FORMATS: dict[str, Callable[[Path, Rows], Any]] = {
    "rows.csv": write_csv,
    "rows.tsv": write_csv,
    "rows.jsonl": write_jsonl,
    "rows.json": write_json,
    "rows.parquet": write_parquet,
    "images.parquet": write_image_parquet,
    "stream.arrow": write_arrow,
    "file.arrow": write_arrow,
    "saved": write_saved,
}


def prepared(model: Path, out: Path, source: dict[str, Any], **values: Any) -> list[Sample]:
    prepare(recipe(model, out, source, **values))
    return list(Dataset(out, "train"))


def without_source(sample: Sample) -> Sample:
    meta = {key: value for key, value in sample.meta.items() if key != "source"}
    return Sample(sample.id, sample.input_ids, sample.labels, sample.images, meta)


@pytest.fixture(scope="module")
def expected(folder: Path, tiny_model: Path) -> list[Sample]:
    """The samples of ROWS, by way of `messages`, which has no template and no column."""
    rows = [
        turn(
            f"<|image_1|>\nWhat is {row['code']}?",
            f"{row['title']} ({row['code']})",
            id=row["id"],
            images=[row["picture"]],
        )
        for row in ROWS
    ]
    write_jsonl(folder / "messages.jsonl", rows)
    source = {"path": str(folder / "messages.jsonl"), "format": "messages"}
    return prepared(tiny_model, folder / "expected", source)


@pytest.mark.parametrize("name", FORMATS)
def test_every_kind_of_file_gives_the_same_samples(
    name: str, folder: Path, expected: list[Sample], tiny_model: Path
) -> None:
    FORMATS[name](folder / name, ROWS)
    source = {"path": str(folder / name), **TEMPLATES}
    samples = prepared(tiny_model, folder / f"out-{name}", source)
    assert len(samples) == len(ROWS)
    for sample, wanted in zip(samples, expected, strict=True):
        assert sample.meta["source"] == str(folder / name)
        assert_same(without_source(sample), without_source(wanted))


def test_messages_with_several_images_come_from_parquet_as_from_json(
    folder: Path, tiny_model: Path
) -> None:
    images = ["pictures/0.png", "pictures/1.png"]
    rows = [turn("<|image_1|> or <|image_2|>?", "Both.", id="a", images=images)]
    rows.append(turn("And now?", "None.", id="b", images=[]))
    write_jsonl(folder / "several.jsonl", rows)
    write_parquet(folder / "several.parquet", rows)
    one, other = (
        prepared(tiny_model, folder / f"several-{kind}", {"path": str(folder / f"several.{kind}")})
        for kind in ("jsonl", "parquet")
    )
    assert [len(sample.images) for sample in one] == [2, 0]
    for left, right in zip(one, other, strict=True):
        assert_same(without_source(left), without_source(right))


def test_a_column_of_image_bytes_is_read(folder: Path, tiny_model: Path) -> None:
    rows = [ROWS[0] | {"picture": (folder / "pictures/0.png").read_bytes()}]
    write_parquet(folder / "bytes.parquet", rows)
    source = {"path": str(folder / "bytes.parquet"), **TEMPLATES}
    (sample,) = prepared(tiny_model, folder / "bytes", source)
    assert sample.images[0].size == (112, 112)


def test_image_root_is_where_relative_paths_start(folder: Path, tiny_model: Path) -> None:
    source = {"path": str(write_jsonl(folder / "root.jsonl", ROWS[3:4])), **TEMPLATES}
    (outer,) = prepared(tiny_model, folder / "outer", source)
    source["image_root"] = str(folder / "pictures")
    (inner,) = prepared(tiny_model, folder / "inner", source)
    assert not np.array_equal(outer.images[0].pixels, inner.images[0].pixels)


def test_a_number_of_a_csv_stays_as_it_is_written(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("code,price\n007,1.50\nNA,\n")
    rows = list(read_rows(tmp_path / "a.csv"))
    assert [row.values for row in rows] == [
        {"code": "007", "price": "1.50"},
        {"code": "NA", "price": ""},
    ]


def test_the_index_column_that_pandas_writes_is_a_column_without_a_name(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(",title\n0,cap\n1,hat\n")
    assert [row.values for row in read_rows(tmp_path / "a.csv")] == [
        {"": "0", "title": "cap"},
        {"": "1", "title": "hat"},
    ]


def test_lines_that_are_no_rows_are_faults_in_their_place(tmp_path: Path) -> None:
    text = 'a,b\n1,2\n\n3\n4,5,6\n"7"8,9\n"10\n11",12\n'
    (tmp_path / "a.csv").write_text(text)
    rows = list(read_rows(tmp_path / "a.csv"))
    assert [row.number for row in rows] == [0, 1, 2, 3, 4]
    assert [row.fault for row in rows] == [
        None,
        "has fewer fields than the header: line 4, 1 for 2",
        "has more fields than the header: line 5, 3 for 2",
        "cannot be read as CSV: line 6, ',' expected after '\"'",
        None,
    ]
    assert rows[4].values == {"a": "10\n11", "b": "12"}


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_what_other_programs_take_for_a_lines_end_parts_no_row(tmp_path: Path, suffix: str) -> None:
    rows = [
        {"id": f"r{k}", "text": f"a{end}b"} for k, end in enumerate("\u2028\u2029\u0085\x0c\x1e")
    ]
    path = tmp_path / f"rows{suffix}"
    texts = [json.dumps(row, ensure_ascii=False) for row in rows]
    if suffix == ".jsonl":
        path.write_text("\n".join(texts), encoding="utf-8")
    elif suffix == ".json":
        path.write_text(f"[{', '.join(texts)}]", encoding="utf-8")
    else:
        write_csv(path, rows)
    assert [row.values for row in read_rows(path)] == rows


def test_lines_of_jsonl_that_are_no_rows_are_faults_in_their_place(tmp_path: Path) -> None:
    lines = [
        b'\xef\xbb\xbf{"a": 1}',
        b"",
        b'{"a": ',
        b"[1]",
        b'{"a": "\xff"}',
        b'{"a": "\xc3\xbc"}',
        b'{"a": ' + b"[" * 100_000,
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\r\n".join(lines))
    rows = list(read_rows(tmp_path / "a.jsonl"))
    assert [row.number for row in rows] == [0, 1, 2, 3, 4, 5]
    assert [row.values for row in rows] == [{"a": 1}, {}, {}, {}, {"a": "\u00fc"}, {}]
    faults = [(row.fault or "").partition(":")[0] for row in rows]
    broken = "is not valid JSON"
    assert faults == ["", broken, "is a list, not an object with named fields", broken, "", broken]


def refusal(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        list(read_rows(path))
    return str(caught.value)


def test_a_quote_that_is_never_closed_does_not_swallow_rows(tmp_path: Path) -> None:
    """Read as CSV usually is, 98 rows would be one long field of row 2."""
    path = tmp_path / "a.csv"
    path.write_text("a,b\n1,2\n" + '3,"4\n' + "5,6\n" * 97)
    assert refusal(path) == (
        f"source.path {path} cannot be cut into rows from line 3 to 100: "
        "unexpected end of data; mend the quotes there"
    )


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.csv", b"a,b,a\n1,2,3\n", "has two columns named 'a'; mend its first line"),
        ("a.csv", b'a,"b"c\n1,2\n', "'s header cannot be read as CSV: line 1, ',' expected"),
        (
            "a.csv",
            "a\n\u00fc\n".encode("latin-1"),
            "is not UTF-8 (line 2: invalid start byte); save it",
        ),
        ("a.json", b'[{"a": 1}', "is not valid JSON: "),
        ("a.json", b'[{"a": 1},\n{"a": tru}]', "is not valid JSON: Expecting value, line 2; mend"),
        ("a.json", b'[{"a": 1} {"a": 2}]', "is not valid JSON: ',' or ']' expected, '{' found, "),
        ("a.json", b'[{"a": 1}] x', "is not valid JSON: 'x' found behind the end of the list, "),
        ("a.json", b'[{"a": 1},]', "is not valid JSON: Expecting value, line 1; mend the file"),
        ("a.json", b'[{"a": "\xff"}]', "is not UTF-8 (line 1: invalid start byte); save it"),
        ("a.json", b"[" * 100_000, "is not valid JSON: a row is nested too deeply, line 1"),
        ("a.json", b"", "is not valid JSON: ',' or ']' expected, the file's end found, line 1"),
        ("a.json", b'{"a": 1}', "starts with '{', not with the '[' of a list of rows; write [row,"),
        ("a.parquet", b"PAR1 no more", "cannot be read as parquet: "),
        ("a.arrow", b"ARROW1 no more", "cannot be read as arrow: "),
        ("a.arrow", b"", "cannot be read as arrow: "),
        (
            "a.xlsx",
            b"",
            "ends in '.xlsx'; use one of .csv, .tsv, .jsonl, .ndjson, .json, .parquet, .arrow, ",
        ),
        ("a", b"", "ends in ''; use one of "),
    ],
)
def test_a_file_that_holds_no_rows_we_can_read_is_refused(
    tmp_path: Path, name: str, data: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(data)
    assert refusal(tmp_path / name).startswith(f"source.path {tmp_path / name}")
    assert message in refusal(tmp_path / name)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path / "a.csv") == (
        f"source.path {tmp_path}/a.csv does not exist; check the path in the recipe"
    )


def test_values_of_a_table_that_cannot_be_read_are_faults_in_their_place(tmp_path: Path) -> None:
    text = pa.array([b"ok", b"\xff", b"ok"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"a": text}), tmp_path / "a.parquet")
    rows = list(read_rows(tmp_path / "a.parquet"))
    assert [row.number for row in rows] == [0, 1, 2]
    assert [row.values for row in rows] == [{"a": "ok"}, {}, {"a": "ok"}]
    assert (rows[1].fault or "").startswith("holds a value that cannot be read: 'utf-8' codec")


def test_a_field_of_a_csv_may_be_a_whole_image_in_base64(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("a\n" + "A" * 1_000_000 + "\n")
    (row,) = read_rows(tmp_path / "a.csv")
    assert len(row.values["a"]) == 1_000_000


def test_an_object_that_has_a_key_twice_is_refused(tmp_path: Path) -> None:
    line = '{"q": "x", "image": "a.png", "deep": {"image": 1, "image": 2}}'
    (tmp_path / "a.jsonl").write_text('{"q": "x"}\n' + line)
    (tmp_path / "a.json").write_text(f'[{{"q": "x"}},\n{line}]')
    first, second = read_rows(tmp_path / "a.jsonl")
    assert first.values == {"q": "x"}
    assert second.fault == "is not valid JSON: an object has the key 'image' twice"
    said = "is not valid JSON: an object has the key 'image' twice, line 2; mend the file"
    assert refusal(tmp_path / "a.json").endswith(said)


@pytest.mark.parametrize("text", ['[\n{"a": 1}\n]', '[{"a": 1}, {"a": 2}]', '\ufeff [{"a": 1}]'])
def test_a_list_of_rows_is_not_a_row_per_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.jsonl").write_text(text, encoding="utf-8")
    assert refusal(tmp_path / "a.jsonl") == (
        f"source.path {tmp_path / 'a.jsonl'} starts with a list of rows, where one row per line "
        "belongs; name it a.json"
    )


def test_a_comma_in_the_quotes_of_a_header_does_not_separate_columns(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('"name, full";price\n"a, b";1,5\n')
    (row,) = read_rows(tmp_path / "a.csv")
    assert row.values == {"name, full": "a, b", "price": "1,5"}


def test_columns_of_objects_are_those_of_the_first_rows(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"q": "a"}\n{"t": "c", "q": "b"}\n')
    section = SourceSection(path=str(tmp_path / "a.jsonl"))
    assert open_source(section, tmp_path).columns == ("q", "t")

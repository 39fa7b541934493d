"""Any range of a source's rows can be read, again and again, at about the cost of that range."""

import json
import time
import tracemalloc
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from phi3v.config.dataset import SourceSection
from phi3v.errors import ConfigError
from phi3v.prepare import text
from phi3v.prepare.sources import Source, open_source, source_digest

Rows = list[dict[str, Any]]
NAMES = [
    "a.csv",
    "mac.csv",
    "a.tsv",
    "a.jsonl",
    "a.json",
    "a.parquet",
    "file.arrow",
    "stream.arrow",
]


def make_rows(count: int) -> Rows:
    """Rows of very different lengths, some with line breaks, quotes and wide characters."""
    random = Random(0)
    words = ["", "x", 'a "quoted", word', "two\nlines", "\u00fc\U0001f600" * 9, "y" * 3000]
    return [{"id": f"r{k}", "text": f"{k} {random.choice(words)}"} for k in range(count)]


def write(path: Path, rows: Rows) -> Path:
    """Rows in the kind of file that the name says, with blank lines where those mean nothing."""
    table = pa.Table.from_pylist(rows)
    if path.suffix == ".parquet":
        is_one_group = path.stem.endswith("whole")
        pq.write_table(table, path, row_group_size=len(rows) if is_one_group else 300)
    elif path.suffix == ".arrow":
        opened = pa.ipc.new_file if path.stem == "file" else pa.ipc.new_stream
        with pa.OSFile(str(path), "wb") as sink, opened(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=190)
    else:
        path.write_bytes(b"\xef\xbb\xbf" + as_text(path, rows).encode())
    return path


def as_text(path: Path, rows: Rows) -> str:
    if path.suffix == ".json":
        return json.dumps(rows, indent=1, ensure_ascii=False)
    if path.suffix == ".jsonl":
        return "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    separator = "\t" if path.suffix == ".tsv" else ","
    quoted = [['"' + value.replace('"', '""') + '"' for value in row.values()] for row in rows]
    lines = [separator.join(line) + "\n" * (1 + (k % 5 == 0)) for k, line in enumerate(quoted)]
    everything = separator.join(rows[0]) + "\n" + "".join(lines)
    return everything.replace("\n", "\r") if path.stem == "mac" else everything


def opened(path: Path, state: dict[str, Any] | None = None, **values: Any) -> Source:
    return open_source(SourceSection(path=str(path), **values), path.parent / "work", state)


def values(source: Source, start: int, stop: int) -> Rows:
    rows = list(source.read(start, stop))
    assert [row.number for row in rows] == list(range(start, min(stop, source.num_rows)))
    assert not any(row.fault for row in rows)
    return [row.values for row in rows]


@pytest.mark.parametrize("name", NAMES)
def test_ranges_in_any_order_are_those_of_the_whole(name: str, tmp_path: Path) -> None:
    rows = make_rows(1100)
    path = write(tmp_path / name, rows)
    if path.stem == "mac":
        rows = [row | {"text": row["text"].replace("\n", "\r")} for row in rows]
    first = opened(path)
    assert (first.path, first.num_rows, first.columns) == (str(path), 1100, ("id", "text"))
    again = opened(path, json.loads(json.dumps(first.state())))
    assert values(again, 0, 2000) == rows
    random = Random(1)
    for _ in range(60):
        start = random.randrange(1100)
        stop = start + random.choice([0, 1, 64, 256, 700])
        assert values(again, start, stop) == rows[start:stop]


@pytest.mark.parametrize("block", [1, 5, 64])
def test_a_json_list_may_be_cut_anywhere_by_the_blocks_it_is_read_in(
    block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "BLOCK", block)
    rows: list[Any] = [
        {"a": [1.5e10, -3, None, True], "b": {}},
        {"c": "\u00fc\U0001f600\\ \\n"},
    ] * 200
    (tmp_path / "a.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    assert values(opened(tmp_path / "a.json"), 0, 400) == rows
    (tmp_path / "a.json").write_text("[12.5e+10, 12, true]")
    faults = [row.fault for row in opened(tmp_path / "a.json").read(0, 3)]
    assert [str(fault).split()[2] for fault in faults] == ["float,", "int,", "bool,"]


@pytest.mark.parametrize("data", ["[]", " [ ] ", "\n[\n]\n"])
def test_an_empty_list_holds_no_rows(data: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(data)
    assert opened(tmp_path / "a.json").num_rows == 0


@pytest.mark.parametrize("name", NAMES)
def test_max_rows_are_the_first(name: str, tmp_path: Path) -> None:
    source = opened(write(tmp_path / name, make_rows(700)), max_rows=300)
    assert source.num_rows == 300
    assert [row["id"] for row in values(source, 290, 700)] == [f"r{k}" for k in range(290, 300)]


def test_what_lies_behind_max_rows_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('a\n1\n2\n"3\n4\n')
    assert values(opened(tmp_path / "a.csv", max_rows=2), 0, 2) == [{"a": "1"}, {"a": "2"}]


def test_line_numbers_of_faults_do_not_depend_on_the_range(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("a,b\n" + '"two\nlines",2\n\n' * 400 + "3\n")
    source = opened(path)
    (row,) = source.read(400, 401)
    assert row.fault == "has fewer fields than the header: line 1202, 1 for 2"


def test_columns_are_those_of_the_first_row_that_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{\n\n{"b": 1}\n')
    assert opened(tmp_path / "a.jsonl").columns == ("b",)
    (tmp_path / "b.jsonl").write_text("{\n")
    assert opened(tmp_path / "b.jsonl").columns is None


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.json", "stream.arrow"])
def test_a_file_that_became_shorter_is_refused(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / name, make_rows(600))
    state = opened(path).state()
    write(path, make_rows(550))
    with pytest.raises(ConfigError, match="ends before row 550, it had 600 rows"):
        list(opened(path, state).read(540, 600))


def test_the_digest_is_of_the_rows_as_they_are_now(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", make_rows(3))
    before = source_digest(opened(path).section)
    assert source_digest(opened(path).section) == before
    write(path, make_rows(4))
    assert source_digest(opened(path).section) != before


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.json", "whole.parquet", "stream.arrow"])
@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(name: str, tmp_path: Path) -> None:
    """13 or 51 MB of rows of 50 kB."""
    peaks = []
    for count in (256, 1024):
        path = write(tmp_path / f"{count}-{name}", [{"text": "x" * 50_000}] * count)
        tracemalloc.start()
        source = opened(path)
        seen = arrow = 0
        for start in range(0, count, 256):
            for row in source.read(start, start + 256):
                seen += len(row.values["text"])
                arrow = max(arrow, pa.total_allocated_bytes())
        peaks.append(tracemalloc.get_traced_memory()[1] + arrow)
        tracemalloc.stop()
        assert seen == count * 50_000
    assert peaks[1] < peaks[0] + 8_000_000


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.json", "a.parquet", "file.arrow"])
@pytest.mark.slow
def test_the_last_rows_of_a_file_cost_no_more_than_the_first(name: str, tmp_path: Path) -> None:
    """40 MB of rows of 1 kB; reading all of them takes a hundred times as long as one range."""
    rows = [{"text": f"{k}" * 300} for k in range(40_000)]
    path = write(tmp_path / name, rows)
    state = opened(path).state()
    best = []
    for start in (0, 39_700):
        taken = []
        for _ in range(5):
            source = opened(path, state)
            began = time.process_time()
            assert len(list(source.read(start, start + 64))) == 64
            taken.append(time.process_time() - began)
        best.append(min(taken))
    assert best[1] < 4 * best[0] + 0.01


def test_a_row_group_is_decoded_once_by_whoever_reads_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opening = []
    iter_batches = pq.ParquetFile.iter_batches

    def counted(self: pq.ParquetFile, *args: Any, **kwargs: Any) -> Any:
        opening.append(kwargs["row_groups"])
        return iter_batches(self, *args, **kwargs)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", counted)
    source = opened(write(tmp_path / "a.parquet", make_rows(900)))
    for start in range(0, 900, 50):
        values(source, start, start + 50)
    assert opening == [[0], [1], [2]]
    values(source, 310, 320)
    assert opening == [[0], [1], [2], [1]]

"""Text files of a folder are read as they are when they are named themselves."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from phi3v.config.dataset import SourceSection
from phi3v.errors import ConfigError
from phi3v.prepare.sources import Source, open_source
from tests.tiny import write_picture

CODES = "code,price,size\n007,1.50,NA\n010,2.00,L\n"
READ = [
    {"code": "007", "price": "1.50", "size": "NA"},
    {"code": "010", "price": "2.00", "size": "L"},
]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    return folder


def opened(path: Path, state: Any = None, **section: Any) -> Source:
    return open_source(SourceSection(path=str(path), **section), path.parent / "work", state)


def rows_of(source: Source, start: int = 0, stop: int = 10_000) -> list[dict[str, Any]]:
    rows = list(source.read(start, stop))
    assert [row.number for row in rows] == list(range(start, min(stop, source.num_rows)))
    return [row.values for row in rows]


def refusal(path: Path, **section: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        opened(path, **section)
    return str(caught.value)


def test_values_of_a_folder_of_csv_stay_the_text_that_stands_there(folder: Path) -> None:
    (folder / "a.csv").write_text(CODES)
    (folder / "b.csv").write_text("code;price\n011;1,5\n")
    source = opened(folder)
    assert rows_of(source) == [*READ, {"code": "011", "price": "1,5"}]
    assert rows_of(source, 1, 3) == [READ[1], {"code": "011", "price": "1,5"}]
    assert rows_of(opened(folder, json.loads(json.dumps(source.state())))) == rows_of(source)
    assert rows_of(opened(folder, max_rows=2)) == READ
    (said,) = source.remarks
    assert said.startswith(f"source.path {folder / 'b.csv'}: its first line is read as 2 columns")


def test_texts_and_numbers_of_a_folder_of_json_stay_what_they_are(folder: Path) -> None:
    rows = [{"day": "2024-05-01", "n": 1}, {"day": "2024-05-02", "n": 1.5, "only": True}]
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = opened(folder)
    assert rows_of(source) == rows
    assert source.columns == ("day", "n", "only")


def test_a_split_of_a_folder_is_read_alone_and_what_is_in_none_is_said(folder: Path) -> None:
    (folder / "train.csv").write_text(CODES)
    (folder / "validation.csv").write_text("code\n1\n")
    (folder / "extra.csv").write_text("code\n2\n")
    (folder / "README.md").write_text("# Codes")
    assert rows_of(opened(folder)) == READ
    assert rows_of(opened(folder, split="validation")) == [{"code": "1"}]
    (said,) = opened(folder).remarks
    assert said.endswith("1 of its files are in no split and not read, such as extra.csv")
    assert "source.split 'train[:1]' is a part of text files" in refusal(folder, split="train[:1]")
    assert "cannot be read by datasets" in refusal(folder, split="test")


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_metadata_of_a_folder_of_pictures_stay_texts(folder: Path, kind: str) -> None:
    for name in ("a.png", "b.png"):
        write_picture(folder / name)
    named = [{"file_name": f"{name}.png", **row} for name, row in zip("ab", READ, strict=True)]
    lines = [",".join(named[0]), *(",".join(row.values()) for row in named)]
    texts = lines if kind == "csv" else map(json.dumps, named)
    (folder / f"metadata.{kind}").write_text("\n".join(texts))
    expected = [{"image": str(folder / f"{n}.png"), **r} for n, r in zip("ab", READ, strict=True)]
    assert rows_of(opened(folder)) == expected
    assert not opened(folder).remarks


def test_names_of_several_pictures_are_found_as_datasets_does(folder: Path) -> None:
    write_picture(folder / "a.png")
    row = {"left_file_name": "a.png", "file_names": ["a.png", None], "text": "Hi"}
    (folder / "metadata.jsonl").write_text(json.dumps(row))
    a = str(folder / "a.png")
    assert rows_of(opened(folder)) == [{"left": a, "images": [a, None], "text": "Hi"}]


def test_metadata_of_two_kinds_are_refused(folder: Path) -> None:
    write_picture(folder / "a.png")
    (folder / "metadata.csv").write_text("file_name,x\na.png,1\n")
    (folder / "metadata.jsonl").write_text('{"file_name": "a.png", "x": 2}\n')
    assert "has metadata of two kinds: " in refusal(folder)


def test_a_picture_that_is_not_read_is_said(folder: Path) -> None:
    write_picture(folder / "pear/a.png")
    (folder / "pear/b.heic").write_bytes(b"...")
    (folder / "pear/.hidden.heic").write_bytes(b"...")
    (said,) = opened(folder).remarks
    assert said.endswith("1 of its files are in no split and not read, such as pear/b.heic")


def test_a_dataset_saved_as_one_split_has_no_other(folder: Path) -> None:
    datasets.Dataset.from_list(READ).save_to_disk(folder)
    assert rows_of(opened(folder)) == READ
    assert "was saved as one split, so it has no 'validation'" in refusal(
        folder, split="validation"
    )


@pytest.mark.parametrize(
    "said", [{"split": "validation"}, {"config": "c"}, {"revision": "r"}, {"streaming": True}]
)
def test_what_a_file_does_not_have_is_refused(folder: Path, said: dict[str, Any]) -> None:
    (folder / "a.csv").write_text(CODES)
    ((key, value),) = said.items()
    assert refusal(folder / "a.csv", **said).startswith(
        f"source.{key} {value!r} has no meaning for {folder / 'a.csv'}, a '.csv' file"
    )


def test_a_delimiter_is_of_a_csv(folder: Path) -> None:
    (folder / "a.jsonl").write_text('{"a": 1}\n')
    assert refusal(folder / "a.jsonl", delimiter=";").startswith("source.delimiter ';' has no")

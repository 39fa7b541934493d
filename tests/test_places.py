"""Paths as other systems write them find their file, or what is near is named."""

import os
import unicodedata
from pathlib import Path

import pytest

from phi3v.config.dataset import SourceSection
from phi3v.errors import ConfigError
from phi3v.places import find_file, local_path, nearby
from phi3v.prepare import prepare
from phi3v.prepare.sources import check_source, open_source, read_rows
from tests.tiny import recipe, write_jsonl, write_picture

ACCENT = "p\u00eache \u00e9t\u00e9.png"


@pytest.mark.parametrize(
    ("there", "written"),
    [
        ("img/a.png", "img\\a.png"),
        ("img/a.png", ".\\img\\a.png"),
        ("img/red pear.png", "img/red%20pear.png"),
        ("img/red pear.png", "img\\red%20pear.png"),
        (f"img/{unicodedata.normalize('NFD', ACCENT)}", f"img/{ACCENT}"),
        (f"img/{ACCENT}", f"img/{unicodedata.normalize('NFD', ACCENT)}"),
        (f"img/{ACCENT}", "img/p%C3%AAche%20%C3%A9t%C3%A9.png"),
    ],
)
def test_other_spellings_find_the_file(tmp_path: Path, there: str, written: str) -> None:
    write_picture(tmp_path / there)
    assert find_file(tmp_path, written) is not None
    assert os.path.samefile(str(find_file(tmp_path, written)), tmp_path / there)


def test_a_path_as_it_is_written_comes_first(tmp_path: Path) -> None:
    for name in ("a%20b.png", "a b.png", "c\\d.png"):
        write_picture(tmp_path / name)
    write_picture(tmp_path / "c/d.png")
    for name in ("a%20b.png", "c\\d.png"):
        assert find_file(tmp_path, name) == str(tmp_path / name)
    assert find_file(tmp_path, "x\0y") is None and find_file(tmp_path, "x" * 9999) is None


def test_a_name_that_differs_in_case_or_suffix_is_named(tmp_path: Path) -> None:
    write_picture(tmp_path / "Hat.PNG")
    assert nearby(tmp_path / "hat.png") == tmp_path / "Hat.PNG"
    assert nearby(tmp_path / "Hat.jpg") == tmp_path / "Hat.PNG"
    assert nearby(tmp_path / "cap.png") is None
    assert nearby(tmp_path / "gone/cap.png") is None


def test_a_missing_source_names_what_is_near(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "Rows.jsonl", [])
    with pytest.raises(ConfigError) as caught:
        check_source(tmp_path / "rows.jsonl")
    assert str(caught.value) == (
        f"source.path {tmp_path}/rows.jsonl does not exist, there is {tmp_path}/Rows.jsonl; check "
        "the path in the recipe"
    )


def test_files_may_be_named_by_address_and_in_capitals(tmp_path: Path) -> None:
    (tmp_path / "MY ROWS.CSV").write_text("a,b\n1,2\n")
    (tmp_path / "rows.ndjson").write_text('{"a": 1}\n')
    address = f"file://{tmp_path}/MY%20ROWS.CSV"
    source = open_source(SourceSection(path=address), tmp_path)
    assert [row.values for row in source.read(0, 1)] == [{"a": "1", "b": "2"}]
    assert [row.values for row in read_rows(tmp_path / "rows.ndjson")] == [{"a": 1}]
    assert local_path("file:///a/b%20c") == local_path("file://localhost/a/b%20c") == Path("/a/b c")


@pytest.mark.parametrize("name", ["imagefolder", "json", "csv", "parquet"])
def test_a_folder_called_as_a_loader_of_datasets_is_that_folder(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=f"source.path {name} does not exist; check the path"):
        check_source(name)
    write_picture(Path("strange.png"))
    write_picture(Path(name, "a.png"), seed=1)
    Path(name, "metadata.csv").write_text("file_name,text\na.png,pear\n")
    source = {"path": name, "user": "<image>\nWhich?", "assistant": "{text}", "images": ["image"]}
    manifest = prepare(recipe(tiny_model, tmp_path / "out", source))
    assert (manifest["rows"], manifest["rejected"]["count"]) == (1, 0)


@pytest.mark.parametrize(
    ("delimiter", "text"), [(";", "a;b\n1,5;x\n"), ("\t", "a\tb\n1,5\tx\n"), ("|", "a|b\n1,5|x\n")]
)
def test_another_delimiter_is_guessed_and_said_or_told(
    tmp_path: Path, tiny_model: Path, delimiter: str, text: str
) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(text)
    source = {"path": str(path), "user": "{a}", "assistant": "{b}"}
    said: list[str] = []
    prepare(recipe(tiny_model, tmp_path / "out", source), said.append)
    assert said == [
        f"source.path {path}: its first line is read as 2 columns separated by {delimiter!r}; "
        "source.delimiter says otherwise"
    ]
    told = open_source(SourceSection(path=str(path), delimiter=delimiter), tmp_path)
    assert [row.values for row in told.read(0, 1)] == [{"a": "1,5", "b": "x"}]
    assert not told.remarks
    again = open_source(SourceSection(path=str(path)), tmp_path, told.state())
    assert [row.values for row in again.read(0, 1)] == [{"a": "1,5", "b": "x"}]


def test_a_delimiter_of_several_characters_is_refused() -> None:
    with pytest.raises(ConfigError, match="source.delimiter must be one character, got 'tab'; "):
        SourceSection(path="a.csv", delimiter="tab")


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345678\n"


@pytest.mark.parametrize("name", ["a.parquet", "a.csv", "a.jsonl", "a.json", "a.arrow"])
@pytest.mark.parametrize(
    ("text", "said"),
    [(POINTER, "a pointer of git-lfs, not"), ("\n<!DOCTYPE html>", "a web page, not the file")],
)
def test_a_source_that_is_no_file_of_its_kind_says_what_it_is(
    tmp_path: Path, name: str, text: str, said: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError) as caught:
        check_source(tmp_path / name)
    assert str(caught.value).startswith(f"source.path {tmp_path / name} is {said}")


def test_a_picture_that_is_a_pointer_says_so(tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "a.png").write_text(POINTER)
    path = write_jsonl(tmp_path / "rows.jsonl", [{"q": "What?", "photo": "a.png"}])
    source = {"path": str(path), "user": "<image>", "assistant": "{q}", "images": ["photo"]}
    said = "image cannot be read: a.png, it is a pointer of git-lfs, not the file itself; bring"
    with pytest.raises(ConfigError, match=said):
        prepare(recipe(tiny_model, tmp_path / "out", source))


def test_a_file_of_a_folder_that_is_a_pointer_is_named(tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows/train.parquet").write_text(POINTER)
    with pytest.raises(ConfigError) as caught:
        open_source(SourceSection(path=str(tmp_path / "rows")), tmp_path)
    assert str(caught.value).startswith(
        f"source.path {tmp_path}/rows: {tmp_path}/rows/train.parquet is a pointer of git-lfs, not"
    )

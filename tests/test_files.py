"""Files are whole or absent, whatever happens while they are written."""

import errno
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from phi3v import stored
from phi3v.content import disguise
from phi3v.files import publish, sha256, write_json, write_text


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", refuse)


def test_text_is_written_as_utf8_and_replaces_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "a much longer text than the next")
    write_text(path, "z\u00fcrich \U0001f600\n")
    assert path.read_bytes() == "z\u00fcrich \U0001f600\n".encode()
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_json_that_no_other_program_reads_is_not_written(tmp_path: Path, number: float) -> None:
    with pytest.raises(ValueError):
        write_json(tmp_path / "a.json", {"loss": number})
    assert not list(tmp_path.iterdir())


def test_a_write_that_fails_leaves_the_file_of_before_and_nothing_else(
    tmp_path: Path, full_disk: None
) -> None:
    (tmp_path / "a.txt").write_text("before")
    with pytest.raises(OSError, match="disk full"):
        write_text(tmp_path / "a.txt", "after")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["before"]


def test_a_published_folder_replaces_the_one_of_before(tmp_path: Path) -> None:
    for name in ("partial/sub", "final"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "partial/sub/fresh").write_text("1")
    (tmp_path / "final/stale").write_text("2")
    publish(tmp_path / "partial", tmp_path / "final")
    assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*"))] == [
        "final",
        "final/sub",
        "final/sub/fresh",
    ]


def test_a_folder_is_on_the_disk_before_it_gets_its_name(tmp_path: Path, full_disk: None) -> None:
    (tmp_path / "partial").mkdir()
    (tmp_path / "partial/file").write_text("1")
    with pytest.raises(OSError, match="disk full"):
        publish(tmp_path / "partial", tmp_path / "final")
    assert not (tmp_path / "final").exists()


def test_a_digest_is_that_of_all_bytes(tmp_path: Path) -> None:
    data = bytes(range(256)) * 5000  # more than one block of 1 MiB
    (tmp_path / "a").write_bytes(data)
    assert sha256(tmp_path / "a") == hashlib.sha256(data).hexdigest()


class Failing(type(Path())):  # type: ignore[misc]
    """A file that can be opened, and whose disk then fails."""

    def open(self, *_: object, **__: object) -> Any:
        return open("/proc/self/mem", "rb")  # reading at 0 is an input/output error


@pytest.mark.parametrize("read", [sha256, disguise, stored.read_bytes])
def test_a_disk_that_fails_is_told_with_the_file(read: Callable[[Path], object]) -> None:
    path = Failing("pears.csv")
    with pytest.raises(OSError) as failed:
        read(path)
    assert (failed.value.errno, failed.value.filename) == (errno.EIO, "pears.csv")

"""A file that a row names is read if it is plain, small enough and where it may be; else a reason
says why not, and where the machine fails no file is blamed."""

import errno
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from phi3v import reading
from phi3v.content import HEAD, content_kind, has_image_signature
from phi3v.errors import MachineError, SampleError
from phi3v.reading import EVERYWHERE, Reach, is_of_machine, kind_at
from tests.tiny import write_picture

LIMIT = 1 << 20
OF_MACHINE = ["EIO", "ESTALE", "EMFILE", "ENFILE", "ENOMEM", "ETIMEDOUT", "ENOTCONN", "EHOSTDOWN"]
OF_FILE = ["ENOENT", "ENOTDIR", "EISDIR", "EACCES", "ELOOP", "ENAMETOOLONG"]


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "PAUSES", (0.0, 0.0))


def refusal(path: Path, reach: Reach = EVERYWHERE) -> str:
    with pytest.raises(SampleError) as caught:
        reach.read(str(path), path.name, LIMIT)
    return str(caught.value)


def failing(name: str, times: int, function: Callable[..., Any], of: Path) -> Callable[..., Any]:
    """A function of `os` that fails so often for one file."""
    left = [times]

    def call(path: Any, *arguments: Any, **named: Any) -> Any:
        if str(path) == str(of) and left[0]:
            left[0] -= 1
            number = getattr(errno, name)
            raise OSError(number, os.strerror(number), str(path))
        return function(path, *arguments, **named)

    return call


# --- what is there ---


@pytest.mark.parametrize("is_linked", [False, True])
@pytest.mark.parametrize(
    ("kind", "make"),
    [
        ("a folder", lambda path: path.mkdir()),
        ("a pipe", os.mkfifo),
        ("a socket", lambda path: socket.socket(socket.AF_UNIX).bind(str(path))),
        ("a device", lambda path: path.symlink_to("/dev/zero")),
        ("the system's own", lambda path: path.symlink_to("/proc/self/environ")),
    ],
)
def test_what_is_no_plain_file_is_refused_by_its_kind_unopened(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    make: Callable[[Path], None],
    is_linked: bool,
) -> None:
    monkeypatch.setattr(os, "open", None)
    monkeypatch.chdir(tmp_path)  # a socket's path must be short
    make(Path("odd.png"))
    path = Path("odd.png")
    if is_linked:
        path = Path("link.png")
        path.symlink_to(tmp_path / "odd.png")
    assert refusal(path) == f"image is not a plain file: {path.name}, it is {kind}"


def test_a_pipe_that_comes_in_the_place_of_a_file_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, path = write_picture(tmp_path / "a.png"), tmp_path / "b.png"
    os.mkfifo(path)
    monkeypatch.setattr(os, "lstat", lambda _, **__: os.stat(plain))
    assert refusal(path).endswith("it is a pipe")


def test_a_sparse_file_of_40_gb_is_refused_by_its_size(tmp_path: Path) -> None:
    path = tmp_path / "big.bmp"
    path.write_bytes(b"BM" + bytes(60))
    os.truncate(path, 40 << 30)
    assert refusal(path) == (
        "image has too many bytes: 42,949,672,960, big.bmp; max_row_bytes is 1,048,576"
    )


def test_of_a_file_that_is_no_picture_the_first_bytes_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"PK\x03\x04" + bytes(60))
    os.truncate(path, 40 << 30)
    assert len(EVERYWHERE.read(str(path), "a.png", LIMIT)) == HEAD


def test_kinds_are_told_without_a_byte_of_the_file() -> None:
    secret = b"hf_SECRETsecret"
    told = {
        secret: "a text",
        b"%PDF-1.7" + secret: "a PDF",
        b"PK\x03\x04" + secret: "a ZIP archive",
        b"\0\0\0\x18ftypheic" + secret: "a HEIC picture",
        b"\0\0\0\x18ftypisom" + secret: "a film",
        b"\0\1\2" + secret: "of no format that is known",
        ("x" * (HEAD - 1) + "\u00e9").encode()[:HEAD]: "a text",
        b"\xff" * HEAD: "of no format that is known",
        b"": "of no format that is known",
    }
    for head, kind in told.items():
        assert content_kind(head) == kind and not has_image_signature(head)


# --- where it is ---


def test_a_file_is_read_from_the_folders_alone_once_links_are_followed(tmp_path: Path) -> None:
    home, photos = tmp_path / "home", tmp_path / "photos"
    for path in (home / "a.png", photos / "a.png", tmp_path / "photos2/a.png"):
        write_picture(path)
    (photos / "in.png").symlink_to("a.png")
    (photos / "out.png").symlink_to("../home/a.png")
    (photos / "folder").symlink_to(home)
    (tmp_path / "named").symlink_to(photos)
    reach = Reach.of(tmp_path / "named")
    for inside in ("named/a.png", "photos/a.png", "photos/in.png", "photos2/../named/a.png"):
        assert reach.read(str(tmp_path / inside), "a.png", LIMIT)
    for outside in ("home/a.png", "named/out.png", "named/folder/a.png", "named/../home/a.png"):
        path = tmp_path / outside
        where = path if path == home / "a.png" else f"x.png is {home / 'a.png'}"
        with pytest.raises(SampleError) as caught:
            reach.read(str(path), "x.png" if where != path else str(path), LIMIT)
        assert str(caught.value) == (
            f"image lies outside of the folders that may be read: {where}; to allow it, name its "
            "folder in source.image_folders"
        )
    assert "outside" in refusal(tmp_path / "photos2/a.png", reach)  # not by its name's start
    assert Reach.of(photos, home).read(str(photos / "out.png"), "out.png", LIMIT)


def snapshot(folder: Path) -> Path:
    """A dataset in the hub's cache: a folder of links to the files' contents."""
    files = folder / "snapshots/3f2a"
    (files / "images").mkdir(parents=True)
    write_picture(folder / "blobs/90c1.png").rename(folder / "blobs/90c1")
    (files / "images/a.png").symlink_to("../../../blobs/90c1")
    return files


def test_a_snapshot_of_the_hubs_cache_is_read_by_its_links(tmp_path: Path) -> None:
    files = snapshot(tmp_path / "datasets--me--pets")
    for root in (files, files / "images"):
        assert Reach.of(root).read(str(files / "images/a.png"), "a.png", LIMIT)


@pytest.mark.parametrize("name", ["pets", "datasets--me--pets"])
def test_blobs_are_of_a_snapshot_only_where_they_are_the_caches_own(
    tmp_path: Path, name: str
) -> None:
    files = snapshot(tmp_path / name)
    if name != "pets":  # a stranger's folder has a link for its blobs
        (tmp_path / name / "blobs").rename(tmp_path / "private")
        (tmp_path / name / "blobs").symlink_to(tmp_path / "private")
    assert "image lies outside" in refusal(files / "images/a.png", Reach.of(files))


# --- whose fault it is ---


@pytest.mark.parametrize("place", ["open", "lstat", "stat"])
@pytest.mark.parametrize("name", OF_MACHINE)
def test_what_the_machine_fails_at_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, place: str
) -> None:
    path = write_picture(tmp_path / "a.png")

    def read() -> bytes:
        assert kind_at(path) == reading.PLAIN
        return EVERYWHERE.read(str(path), "a.png", LIMIT)

    whole, function = read(), getattr(os, place)
    monkeypatch.setattr(os, place, failing(name, 2, function, path))
    assert read() == whole
    monkeypatch.setattr(os, place, failing(name, 3, function, path))
    with pytest.raises(MachineError) as caught:
        read()
    said = os.strerror(getattr(errno, name))
    assert f"{path} cannot be read ({said}, 3 times), which is the machine's" in str(caught.value)
    assert ("ulimit -n" in str(caught.value)) == (name == "EMFILE")


@pytest.mark.parametrize("name", OF_FILE)
def test_what_is_wrong_with_the_file_rejects_it_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path = write_picture(tmp_path / "a.png")
    monkeypatch.setattr(os, "open", failing(name, 1, os.open, path))
    said = os.strerror(getattr(errno, name))
    assert refusal(path) == f"image cannot be read: a.png, {said}"


def test_an_error_that_nobody_thought_of_is_not_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_picture(tmp_path / "a.png")
    monkeypatch.setattr(os, "open", failing("EXFULL", 1, os.open, path))
    monkeypatch.setattr(os, "stat", failing("EXFULL", 1, os.stat, path))
    for ask in (lambda: EVERYWHERE.read(str(path), "a.png", LIMIT), lambda: kind_at(path)):
        with pytest.raises(MachineError, match="Exchange full"):
            ask()


def test_a_full_disk_and_a_librarys_words_are_none_of_the_machine() -> None:
    assert is_of_machine(MemoryError()) and is_of_machine(OSError(errno.EIO, "x"))
    others = (OSError("truncated"), OSError(errno.ENOSPC, "x"), ValueError(), FileNotFoundError())
    assert not any(map(is_of_machine, others))


def test_a_path_that_cannot_be_one_is_nothing(tmp_path: Path) -> None:
    for text in ("a\0b", "\ud83d", "x" * 5000, "none", "a.png/b"):
        assert kind_at(tmp_path / text) is None


def test_a_folder_that_becomes_a_link_once_it_was_looked_at_leads_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("data/sub", "private"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "a.png").write_bytes(b"\x89PNG" + name.encode())
    look = os.path.realpath

    def looked(path: str, **options: bool) -> str:
        real = look(path, **options)
        (tmp_path / "data/sub").rename(tmp_path / "data/was")
        (tmp_path / "data/sub").symlink_to(tmp_path / "private")
        return real

    reach = Reach.of(tmp_path / "data")
    monkeypatch.setattr(os.path, "realpath", looked)
    with pytest.raises(SampleError, match="image lies outside of the folders"):
        reach.read(str(tmp_path / "data/sub/a.png"), "a.png", 100)

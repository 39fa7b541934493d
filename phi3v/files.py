"""Files that are whole or absent: temporary name, fsync, rename."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from phi3v.reading import HEAD


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary name to write to; what was written gets the file's own name at the end.

    Where that fails, nothing is left beside what was there.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with _naming(path):
        try:
            yield temporary
            sync(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write valid JSON atomically; NaN and Infinity are defects of the caller."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False) + "\n")


def append_json(path: Path, value: Any) -> None:
    """Add a line of valid JSON to a file; a crash may cut it off, see `read_lines`."""
    with _naming(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(value, allow_nan=False, ensure_ascii=False) + "\n")


def read_lines(path: Path) -> list[Any]:
    """The JSON lines of a file that may be missing; the end of one that was cut off is none."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Have an error of writing name the file, which the system's own does not."""
    try:
        yield
    except OSError as error:
        if error.errno and not error.filename:
            error.filename = str(path)
        raise


def sync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Flush every file below a folder, then the folder."""
    for path in sorted(folder.rglob("*")):
        sync(path)
    sync(folder)


def publish(partial: Path, final: Path) -> None:
    """Give a finished folder its name, replacing what stood there."""
    sync_tree(partial)
    if final.exists():
        shutil.rmtree(final)
    partial.replace(final)
    sync(final.parent)


def sha256(path: Path, told: Callable[[int], object] = lambda size: None) -> str:
    """SHA-256 of a file's bytes, in hexadecimal; `told` hears of the bytes of each block."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            told(len(block))
    return digest.hexdigest()


LFS = b"version https://git-lfs"
SIGNATURES = {
    b"%PDF": "a PDF",
    b"%!PS": "PostScript",
    b"\xc5\xd0\xd3\xc6": "PostScript",
    b"PK\x03\x04": "a ZIP archive",
    b"\x1f\x8b": "a gzip archive",
    b"7z\xbc\xaf": "a 7z archive",
    b"Rar!": "a RAR archive",
    b"\x7fELF": "a program",
    b"8BPS": "a Photoshop file",
    b"\x00\x00\x01\x00": "an icon",
    b"\x1a\x45\xdf\xa3": "a film",
    b"\x93NUMPY": "an array of numpy",
    b"PAR1": "a Parquet file",
    b"ARROW1": "an Arrow file",
    b"SQLite format 3": "a database of SQLite",
    b"\x89HDF": "an HDF5 file",
    b"<?xml": "XML",
    b"<svg": "an SVG",
}
BRANDS = {b"heic": "a HEIC picture", b"heix": "a HEIC picture", b"mif1": "a HEIF picture"}
"""What else than a film a file of ISO's boxes may be, by bytes 8 to 12."""


def disguise(path: Path) -> str | None:
    """What a file is instead of what its name says, and the way out: a git-lfs pointer, a web page.

    None for a file that may be what it should.
    """
    with path.open("rb") as file:
        return disguise_of(file.read(HEAD))


def content_kind(head: bytes) -> str:
    """What a file is by its first bytes, none of which are quoted: they may be a secret."""
    if head[4:8] == b"ftyp":
        return BRANDS.get(head[8:12], "a film")
    for signature, kind in SIGNATURES.items():
        if head.startswith(signature):
            return kind
    try:
        text = head.decode("utf-8-sig", errors="ignore" if len(head) == HEAD else "strict")
    except UnicodeDecodeError:
        return "of no format that is known"
    is_text = bool(text) and all(c.isprintable() or c.isspace() for c in text)
    return "a text" if is_text else "of no format that is known"


def disguise_of(head: bytes) -> str | None:
    """The same, of the first bytes of a file."""
    if head.startswith(LFS):
        return "a pointer of git-lfs, not the file itself; bring the files by `git lfs pull`"
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"<!doctype html", b"<html")):
        return "a web page, not the file itself; download it again, signed in where it asks"
    return None

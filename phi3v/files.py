"""Files that are whole or absent: temporary name, fsync, rename."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from phi3v.errors import naming


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary name to write to; what was written gets the file's own name at the end.

    Where that fails, nothing is left beside what was there.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with naming(path):
        temporary.unlink(missing_ok=True)  # a link that somebody has put there is not followed
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
    with naming(path), path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            told(len(block))
    return digest.hexdigest()

"""How rows of the hostile zoo (zoo.py) name their images: files, addresses, bytes, and nonsense."""

import base64
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any
from urllib.parse import quote

from tests.prepare.pictures import GOOD, UNREADABLE

ABSENT = "image does not exist: "
OUTSIDE = "image lies outside of the folders that may be read: "
NOT_PLAIN = "image is not a plain file: "
PRIVATE = "image URL leads to a private address: "
NO_URL = "image URL is not valid: "
NO_HTTP = "image is at an address of another kind than http(s): "
NO_PATH = "image reference of type "

FILES = ("new\nline", "\u202egpj", "a b%20c", "'\"\\`$(x)", "\u00e9e\u0301", "http:", "x" * 250)
HERE = "http://127.0.0.1:9/a HTTP://localhost/ http://[::1]/ http://0/ http://u:p@127.1/ http://0x7f.1/"
INVALID = (
    'http:// http:///a.png https://[::1 http://127.0.0.1:99999/ http://a..b/ http://a"b/ http://*/'
)
HOSTS = ("\ud83d", "x" * 5000, "a b", "\u202e", "\0", "<|end|>")
OTHERS = "s3://shop/a.png ftp://x/y javascript://%0a x+y-z.1://"


@dataclass(frozen=True)
class Reference:
    """What names an image in a row, what becomes of the row, and the bytes to be found there."""

    value: Any
    fate: str = GOOD
    data: bytes = b""


def references(folder: Path, kept: Reference) -> list[Reference]:
    """All ways to name an image but by the name of a common file, as `kept` does."""
    found = (_files(folder, kept), _nowhere(folder, kept), _addresses(), _encoded(kept.data))
    return [*chain(*found), *_nothing()]


def _files(folder: Path, kept: Reference) -> Iterator[Reference]:
    """Names of files; `huge` says that it has 4 TiB."""
    for name in (*FILES, "locked", "huge"):
        (folder / name).write_bytes(kept.data)
    (folder / "link").symlink_to(kept.value)
    (folder / "locked").chmod(0)
    (folder / "huge").write_bytes(b"no picture")
    os.truncate(folder / "huge", 1 << 42)
    for name in (*FILES, "link", f"kept/../{kept.value}", str(folder / kept.value)):
        yield Reference(name, GOOD, kept.data)
    may_read = os.access(folder / "locked", os.R_OK)  # root may
    yield Reference("locked", GOOD if may_read else UNREADABLE, kept.data)
    yield Reference("huge", UNREADABLE)


def _nowhere(folder: Path, kept: Reference) -> Iterator[Reference]:
    """Names of what is no file, or nobody's of the dataset: folders, a pipe, links in a circle."""
    (folder / "loop").symlink_to("pool")
    (folder / "pool").symlink_to("loop")
    (folder / "gone").symlink_to("nowhere")
    os.mkfifo(folder / "pipe")
    names = ["loop", "gone", ".", "..", "kept", "/", "~", "", " ", "a\0b"]
    names += [f"{kept.value}/x", "x" * 5000, "../" * 3000, "\ud83d", "\n\r\t", "*", "-"]
    yield from (Reference(name, ABSENT) for name in names)
    yield from (Reference(name, NOT_PLAIN) for name in ("pipe", "/proc/self/mem"))
    yield from (Reference(name, OUTSIDE) for name in ("/dev/zero", "/etc/passwd"))


def _addresses() -> Iterator[Reference]:
    """Addresses, none of which leads out of this machine."""
    yield from (Reference(url, PRIVATE) for url in HERE.split(" "))
    yield from (Reference(url, NO_URL) for url in INVALID.split(" "))
    yield from (Reference(f"http://{host}/a.png", NO_URL) for host in HOSTS)
    yield from (Reference(url, NO_HTTP) for url in OTHERS.split(" "))
    yield from (
        Reference(f"file://{url}", OUTSIDE) for url in ("/etc/passwd", "localhost/etc/passwd")
    )
    yield Reference("file:///nowhere/at%20all.png", ABSENT)


def _encoded(data: bytes) -> Iterator[Reference]:
    """Images that stand in the row, well encoded and badly."""
    plain = base64.b64encode(data).decode()
    url = f"data:image/png;base64,{plain}"
    good = [plain, f"{plain[:76]}\n{plain[76:]}\n", url, url.replace("data:", "DATA:")]
    good += [base64.urlsafe_b64encode(data).decode().rstrip("="), f"data:,{quote(data)}"]
    good += [f"data:;base64,{quote(plain)}", {"bytes": plain}, {"image_url": {"url": url}}]
    good += [{"bytes": None, "path": plain}, {"path": {"path": {"path": plain}}}]
    yield from (Reference(value, GOOD, data) for value in good)
    text = base64.b64encode(b"This is no picture at all.").decode()
    bodies = [";base64,!!!!", ",", ";base64,", "", f";base64,{text}", "text/html,<html>", ",\ud83d"]
    yield from (Reference(f"data:{body}", UNREADABLE) for body in bodies)
    bad = [text, plain[1:], f"{plain}!", "\u0660" * 40]
    yield from (Reference(value, ABSENT) for value in bad)


def _nothing() -> Iterator[Reference]:
    """Values of no type that could name an image."""
    values = [None, 0, 7, 1.5, True, [], ["a.png"], {}, {"path": None}, {"bytes": []}]
    yield from (Reference(value, NO_PATH) for value in values)
    yield Reference({"a": "b"}, "a key is not understood: 'a' of an image; ")

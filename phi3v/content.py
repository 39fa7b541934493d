"""What a file is by its first bytes, whatever its name says.

None of the bytes are ever shown: a row may name a file that holds a secret.
"""

import re
from codecs import getincrementaldecoder
from pathlib import Path

from phi3v.errors import naming

HEAD = 512  # bytes that tell what a file is
PICTURES = re.compile(
    rb"\xff\xd8\xff|\x89PNG|GIF8|RIFF....WEBP|BM|II[*+]\0|MM\0[*+]|....ftyp(?:avi[fs]|m[is]f1)"
    rb"|\0\0\0\x0cjP  |\xff\x4f\xff\x51|P[1-7f]\s",
    re.DOTALL,
)
WEB_PAGE = (b"<!doctype html", b"<html")
LFS = b"version https://git-lfs"
OTHERS = {
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


def has_image_signature(data: bytes | bytearray) -> bool:
    """Whether bytes start like an image of some kind; a page of HTML does not."""
    return PICTURES.match(data) is not None


def disguise(path: Path) -> str | None:
    """What a file is instead of what its name says, and the way out: a git-lfs pointer, a web page.

    None for a file that may be what it should.
    """
    with naming(path), path.open("rb") as file:
        return disguise_of(file.read(HEAD))


def disguise_of(head: bytes) -> str | None:
    """The same, of the first bytes of a file."""
    if head.startswith(LFS):
        return "a pointer of git-lfs, not the file itself; bring the files by `git lfs pull`"
    if _is_web_page(head):
        return "a web page, not the file itself; download it again, signed in where it asks"
    return None


def content_kind(head: bytes) -> str:
    """What a file that is no picture is by its first bytes, HEAD of them at most."""
    if head[4:8] == b"ftyp":
        return BRANDS.get(head[8:12], "a film")
    for signature, kind in OTHERS.items():
        if head.startswith(signature):
            return kind
    if _is_web_page(head):
        return "a web page"
    return "a text" if _is_text(head) else "of no format that is known"


def unquoted(error: Exception) -> str:
    """What a library says, without the bytes and numbers that it may quote, after a bracket or a
    colon or as a whole: "broken PNG file (chunk b'hf_S')".
    """
    return re.split(r"[(:]|b['\"]", str(error))[0].strip() or type(error).__name__


def _is_web_page(head: bytes) -> bool:
    return head.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith(WEB_PAGE)


def _is_text(head: bytes) -> bool:
    decoder = getincrementaldecoder("utf-8-sig")()
    try:
        text = decoder.decode(head, final=len(head) < HEAD)  # else a character may be cut
    except UnicodeDecodeError:
        return False
    return bool(text) and all(c.isprintable() or c.isspace() for c in text)

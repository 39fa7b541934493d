"""Paths as other systems and tools write them: where the file they mean is.

    found = find_file(root, "img\\\\red%20pear.png")

Windows separates by backslashes, web tools encode blanks as %20, macOS takes an accent apart
(Unicode NFD) where most texts have it in one piece. A path that exists as it is written comes
first; else the one file that it may mean.
"""

import os
import unicodedata
from collections.abc import Iterator
from functools import lru_cache
from itertools import chain
from pathlib import Path
from urllib.parse import unquote

from phi3v.addresses import shown_reference
from phi3v.errors import SampleError
from phi3v.reading import FOLDER, Reach, kind_at

FOLDERS = 64  # whose names are remembered
LONG = 300  # characters of a path that are shown


def local_path(text: str) -> Path:
    """The path of a text that may be a file:// address."""
    if text[:7].lower() != "file://":
        return Path(text)
    return Path("/" + unquote(text[7:]).removeprefix("localhost").lstrip("/"))


def find_file(root: str | Path, text: str) -> str | None:
    """What a path of a row means, if anything but a folder is there: a file, or what is none.

    root  where a relative path starts

    Raises: MachineError if it cannot be found out.
    """
    path = os.path.join(root, text)
    if kind_at(path) not in (None, FOLDER):
        return path
    if not text.isprintable() or len(text) > os.pathconf("/", "PC_PATH_MAX"):
        return None
    for other in _spellings(text):
        path = os.path.join(root, other)
        if kind_at(path) not in (None, FOLDER):
            return path
    return None


def read_image(root: Path, text: str, reach: Reach, max_bytes: int) -> bytes | None:
    """Read the picture that a path of a row means; None if nothing is there.

    root, reach  where a relative path starts, and where files may lie

    Raises: as `Reach.read`.
    """
    path = find_file(root, text)
    return None if path is None else reach.read(path, shortened(text), max_bytes)


def missing_image(root: Path, text: str, reach: Reach) -> SampleError:
    """Why a path is none of a picture: it is a folder, or nothing is there, but this is near.

    It may be meant as an address, with a password.
    """
    place = root / shortened(text)
    if text and kind_at(place) == FOLDER:
        return SampleError(f"image does not exist: {place}, which is a folder")
    may_look = len(text) < LONG and reach.holds(os.path.realpath(place.parent))
    close = nearby(place) if may_look else None
    there = f"; there is {close}" if close else ""
    return SampleError(f"image does not exist: {root / shortened(shown_reference(text))}{there}")


def shortened(text: str) -> str:
    """A path as messages show it: it may be a whole image in base64."""
    return text if len(text) <= LONG else f"{text[:LONG]}..."


def _spellings(text: str) -> Iterator[str]:
    """Other ways to write a path, the likeliest first."""
    slashes = text.replace("\\", "/")
    decoded = (unquote(slashes, errors="surrogateescape"), slashes)
    forms = (unicodedata.normalize(form, t) for t in decoded for form in ("NFC", "NFD"))
    seen = {text}
    for other in chain((slashes, decoded[0]), forms):
        if other not in seen:
            seen.add(other)
            yield other


def nearby(path: str | Path) -> Path | None:
    """A file of the same folder whose name differs in case, suffix or Unicode form alone."""
    folder, name = os.path.split(str(path).replace("\\", "/"))
    names = _names(folder or ".")
    close = names.get(_folded(name)) or names.get(_folded(os.path.splitext(name)[0]))
    return Path(folder, close) if close else None


@lru_cache(maxsize=FOLDERS)
def _names(folder: str) -> dict[str, str]:
    """The names in a folder by what they are without case, and without their suffix."""
    try:
        names = sorted(os.listdir(folder), reverse=True)
    except (OSError, ValueError):
        return {}
    stems = {_folded(os.path.splitext(name)[0]): name for name in names}
    return stems | {_folded(name): name for name in names}


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()

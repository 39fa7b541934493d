"""What each key of a row says: one table for each way in which a row can hold a chat.

    check_keys(row, FORMATS["messages"].row, ignored=("score",), what="the row")

A key that is not in the table of its place rejects the row by its name, for nobody knows whether it
would have changed the sample; a key that says nothing (null, an empty list) is not there. The
recipe's `source.ignore` names what may be passed over. docs/data.md shows these tables.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from itertools import chain
from numbers import Number
from typing import Any

from phi3v.errors import SampleError

PICTURES = (
    *("images", "image", "image_path", "image_paths", "image_url", "image_urls"),
    *("img", "imgs", "picture", "pictures", "file_name"),
)
"""Keys of a row, one of which holds its pictures: one, or a list of them."""

TRAINED = ("weight", "train", "trainable", "loss", "loss_mask")
"""Keys of a turn that say whether it is trained."""

PART_PICTURES = ("image", "url", "path", "base64", "image_url")
"""Keys of a picture among a content's parts, one of which holds it."""

PROVENANCE = (
    *("source", "dataset", "model", "task", "category", "language", "license"),
    *("width", "height", "meta", "metadata"),
)
"""Keys that say where a row or turn comes from; not read."""

FILMS = ("video", "videos", "video_path", "film", "films")
SOUNDS = ("audio", "audios", "audio_path", "sound", "sounds", "speech")

MEDIA = re.compile(
    r"\S{1,4096}\.(?:(?P<still>png|jpe?g|jfif|webp|gif|bmp|tiff?|avif|heic|svg)"
    r"|mp4|mov|avi|mkv|webm|wav|mp3|flac|ogg|m4a)(?:\?\S*)?",
    re.IGNORECASE,
)
"""The path or address of a picture (`still`), film or sound."""

SIGNATURES = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*")
CODED = ("data:image/", "iVBORw0KGgo", "/9j/4")
"""What files of pictures begin with, as bytes and as text."""


def _folded(key: str) -> str:
    """A key by its letters alone: imgPath, img_path and IMG_PATH2 are imgpath."""
    return re.sub(r"[\W\d_]", "", key.lower())


OTHER_PICTURES = ("photo", "photos", "img_path", "img_url", "image_bytes", "image_file")
STILL = frozenset(map(_folded, (*PICTURES, *OTHER_PICTURES)))
MOVING = frozenset(map(_folded, (*FILMS, *SOUNDS, "video_url", "audio_url", "speech")))

_PREFERENCE = "pairs of better and worse answers are not trained on"
_TOOLS = "tools are not taught"
REASONS: Mapping[str, str] = {
    **dict.fromkeys(FILMS, "films are not read"),
    **dict.fromkeys(SOUNDS, "sounds are not read"),
    **dict.fromkeys(("tools", "functions", "tool_calls", "function_call", "tool_choice"), _TOOLS),
    **dict.fromkeys(("chosen", "rejected", "rejected_response", "rejected_messages"), _PREFERENCE),
    "history": "write its turns before the others",
    **dict.fromkeys(("prompt", "completion"), "fill them in by source.user and source.assistant"),
}
"""Why a key that others know is not understood here."""

_PICTURES = dict.fromkeys(PICTURES, "the pictures: one, or a list; a row has one of these keys")
_PROVENANCE = dict.fromkeys(PROVENANCE, "where the row comes from; not read")
_TRAINED = dict.fromkeys(
    TRAINED, "false or 0: this answer is not trained; true or 1 only of an answer"
)
_ROW = {
    "id": "the row's name",
    **_PICTURES,
    "system": "what the model is told first, where no turn says so",
    "references": "every accepted last answer, a text or a list of texts",
    **_PROVENANCE,
}
_TEXT_PART = {"type": "text, image or image_url", "text": "a text, in a line of its own"}
_PART = {
    **_TEXT_PART,
    **dict.fromkeys(PART_PICTURES, "the picture; without one, the next of the row's"),
    "index": "which of the row's pictures it is, from 0; must be the next",
    "detail": "what OpenAI's service makes of a picture's size; not read",
}


@dataclass(frozen=True)
class Format:
    """What is understood of a row, of one of its turns, and of a part of a turn's content."""

    row: Mapping[str, str]
    turn: Mapping[str, str]
    part: Mapping[str, str]


FORMATS: Mapping[str, Format] = {
    "messages": Format(
        {"messages": "the turns", **_ROW},
        {
            "role": "system, user or assistant",
            "content": "its text, or a list of parts",
            **_TRAINED,
        },
        _PART,
    ),
    "llava": Format(
        {"conversations": "the turns", **_ROW},
        {"from": "human or gpt, or a role of messages", "value": "its text", **_TRAINED},
        {},
    ),
    "texts": Format(
        {"texts": "the turns, each a question and its answer", **_ROW},
        {"user": "the question", "assistant": "the answer", **_TRAINED, **_PROVENANCE},
        {},
    ),
    "prompt": Format(
        {"prompt": "the question", **{key: _ROW[key] for key in _ROW if key != "references"}},
        {},
        {},
    ),
}
"""By the name of the format; `prompt` is a row of `generate.py --jsonl`. Rows of columns are read
by the names in the recipe, and may hold others."""

URL = {"url": "the picture's address", "detail": _PART["detail"]}
"""What an image of a part may hold, where it is an object of its own."""

PICTURE = {
    **dict.fromkeys(("bytes", "path", "url", "image_url"), "the picture; the first of these"),
    "detail": _PART["detail"],
    **_PROVENANCE,
}
"""What a picture may hold that is an object of its own, as an Image of `datasets`."""

ROW_KEYS = frozenset(key for known in FORMATS.values() for key in known.row)
"""The keys of a row that some format reads."""


def tables() -> str:
    """The tables as docs/data.md shows them."""
    lines = ["| format | where | keys | what they say |", "|---|---|---|---|"]
    for name, known in FORMATS.items():
        for where, table in vars(known).items():
            for meaning in dict.fromkeys(table.values()):
                keys = ", ".join(f"`{key}`" for key, said in table.items() if said == meaning)
                lines.append(f"| {name} | {where} | {keys} | {meaning} |")
    return "\n".join(lines)


def unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """The object of JSON that these pairs make; for json's object_pairs_hook, which would let the
    last of two values win.

    Raises: ValueError if a key is there twice.
    """
    values = dict(pairs)
    if len(values) < len(pairs):
        key = repeated(key for key, _ in pairs)
        raise ValueError(f"an object has the key {key!r} twice")
    return values


def repeated(names: Iterable[str]) -> str | None:
    """The first name that is there twice; None if none is."""
    counts = Counter(names)
    return next((name for name, count in counts.items() if count > 1), None)


def is_empty(value: Any) -> bool:
    """Whether a field holds nothing: None, NaN, white space, an empty list, or an object of such
    fields, as tables write a picture that is not there: {"bytes": None, "path": None}.
    """
    if isinstance(value, str):
        return not value.strip()
    if isinstance(value, dict):
        return bool(value) and all(map(is_empty, value.values()))
    if isinstance(value, Number | date):  # NaN and NaT, which numpy and pandas have too
        return bool(value != value)
    return value is None or (isinstance(value, list | bytes) and not value)


def as_list(value: Any) -> list[Any]:
    """What a field holds: one thing, a list of them, or none."""
    if is_empty(value):
        return []
    return value if isinstance(value, list) else [value]


def check_keys(
    values: Mapping[str, Any], table: Mapping[str, str], ignored: Collection[str], what: str
) -> None:
    """Refuse a key that says something and is not in the table; `what` has it: "the row".

    Raises: SampleError naming the key.
    """
    if values.keys() <= table.keys():
        return
    others = [key for key in values if key not in table and key not in ignored]
    others = [key for key in others if not is_empty(values[key]) and values[key] != {}]
    if others:
        reasons = "".join(f"{why}; " for why in dict.fromkeys(map(REASONS.get, others)) if why)
        raise SampleError(
            f"a key is not understood: {', '.join(map(repr, others))} of {what}; {reasons}leave "
            f"out what says nothing about the sample, or source.ignore: [{', '.join(others)}]"
        )


def pictures_of(values: Mapping[str, Any], ignored: Collection[str]) -> tuple[str, Any]:
    """The key that holds a row's pictures, and what it holds; ("images", []) if none does.

    Raises: SampleError if several do.
    """
    given = [key for key in PICTURES if key in values and not is_empty(values[key])]
    given = [key for key in given if key not in ignored]
    if len(given) > 1:
        raise SampleError(
            f"a row has its pictures twice: {' and '.join(map(repr, given))}; leave one, or name "
            "the other in source.ignore"
        )
    return (given[0], values[given[0]]) if given else (PICTURES[0], [])


def names_media(key: str) -> bool:
    """Whether a key is called as pictures, films or sounds are."""
    return _folded(key) in MOVING | STILL


def passed_over(values: Mapping[str, Any], named: Collection[str], shows: bool) -> str | None:
    """The key of a picture, film or sound that a row of columns has and the recipe does not name:
    by its name, as image, Image_2, imgPath, or by what it holds.

    shows  whether the recipe shows pictures; which of them it shows is its own choice
    """
    others = {key: v for key, v in values.items() if key not in named and not is_empty(v)}
    kinds = MOVING if shows else MOVING | STILL
    by_name = (key for key in others if _folded(key) in kinds)
    by_value = (key for key in others if any(_holds(v, shows) for v in as_list(others[key])))
    return next(chain(by_name, by_value), None)


def _holds(value: Any, shows: bool) -> bool:
    """Whether a value is a film or sound; or a picture, where none is shown."""
    if isinstance(value, str):
        name = MEDIA.fullmatch(value)
        is_still = value.startswith(CODED) if name is None else name["still"]
        return not (shows and is_still) and bool(name or is_still)
    if isinstance(value, dict):  # as `datasets` keeps an Image, Audio or Video
        path, data = value.get("path"), value.get("bytes")
        is_file = "bytes" in value and value.keys() <= {"bytes", "path"}
        is_moving = isinstance(path, str) and _holds(path, shows=True)
        return is_file and (is_moving or (not shows and not is_empty(data or path)))
    return not shows and isinstance(value, bytes) and value.startswith(SIGNATURES)

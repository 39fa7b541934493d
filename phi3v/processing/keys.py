"""What each key of a row says: one table for each way in which a row can hold a chat.

    check_keys(row, FORMATS["messages"].row, ignored=("score",), what="the row")

A key that is not in the table of its place rejects the row by its name, for nobody knows whether it
would have changed the sample; a key that says nothing (null, an empty list) is not there. The
recipe's `source.ignore` names what may be passed over. docs/data.md shows these tables.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
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


def is_empty(value: Any) -> bool:
    """Whether a field holds nothing: None, NaN, white space, or an empty list."""
    is_nan = isinstance(value, float) and value != value
    return value is None or is_nan or value == [] or (isinstance(value, str) and not value.strip())


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


def passed_over(values: Mapping[str, Any], named: Collection[str], shows: bool) -> str | None:
    """The key of a picture, film or sound that a row of columns has and the recipe does not name.

    shows  whether the recipe shows pictures; which of them it shows is its own choice
    """
    kinds = (*FILMS, *SOUNDS) if shows else (*FILMS, *SOUNDS, *PICTURES)
    found = (key for key in kinds if key in values and key not in named)
    return next((key for key in found if not is_empty(values[key])), None)

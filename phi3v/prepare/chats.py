"""Rows that are chats already: `messages` as OpenAI writes them, `conversations` as LLaVA does,
`texts` as FineVision and the_cauldron do.

What is understood of them, and where, is in the tables of phi3v/processing/keys.py.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from phi3v.errors import SampleError
from phi3v.processing.keys import (
    FORMATS,
    PART_PICTURES,
    TRAINED,
    URL,
    Format,
    as_list,
    check_keys,
    is_empty,
    pictures_of,
)
from phi3v.processing.prompt import Message, settle_tags

MOST_TURNS = 10_000  # each takes 4 kB of memory before it is tokenised, however short it is
ROLES = ("system", "user", "assistant")
SPEAKERS = {"human": "user", "gpt": "assistant"} | {role: role for role in ROLES}
COLUMN_OF = {"messages": "messages", "llava": "conversations", "texts": "texts"}
"""The column of a format that holds its turns."""


@dataclass(frozen=True)
class Chat:
    """Messages, and the images that their tags <|image_1|>, ... stand for.

    untrained  positions of the answers that the row marks as not to be trained
    """

    messages: list[Message]
    images: list[Any]
    untrained: frozenset[int] = frozenset()


def read_chat(values: Mapping[str, Any], name: str, ignored: Collection[str] = ()) -> Chat:
    """Read a row of a format, messages, llava or texts; `ignored` as the recipe's source.ignore.

    The k-th <image> of a row stands for image k; a row may have numbered tags instead.

    Raises: SampleError if a key or tag is not understood, or there is something else than a chat.
    """
    known = FORMATS[name]
    turns = values.get(COLUMN_OF[name])
    if not isinstance(turns, list) or not turns:
        what = "messages" if name == "messages" else "turns"
        raise SampleError(f"'{COLUMN_OF[name]}' is not a list of {what}")
    if len(turns) > MOST_TURNS:
        raise SampleError(f"too many turns: {len(turns):,}, {MOST_TURNS:,} at most")
    check_keys(values, known.row, ignored, "the row")
    key, held = pictures_of(values, ignored)
    if name == "messages" and key == "images" and not isinstance(held, list):
        raise SampleError(f"'images' is a {type(held).__name__}, not a list of images")
    reader = _Turns(known, ignored, as_list(held))
    messages = [message for turn in turns for message in READERS[name](reader, turn)]
    images = reader.all_images()
    untrained = reader.untrained
    if told := _told(values, messages):
        messages, untrained = [told, *messages], [position + 1 for position in untrained]
    texts = settle_tags([message["content"] for message in messages], as_text=ignored)
    if name == "texts" and not any("<|image_" in text for text in texts):
        texts = _shown_first(messages, texts, len(images))
    settled = [Message(role=m["role"], content=t) for m, t in zip(messages, texts, strict=True)]
    return Chat(settled, images, frozenset(untrained))


def read_messages(values: Mapping[str, Any]) -> tuple[list[Message], list[Any]]:
    """The messages of a row of `messages`, and the images that their tags stand for.

    Raises: as `read_chat`.
    """
    chat = read_chat(values, "messages")
    return chat.messages, chat.images


def _told(values: Mapping[str, Any], messages: list[Message]) -> Message | None:
    """What the row itself says to the model first."""
    system = values.get("system")
    if is_empty(system):
        return None
    if not isinstance(system, str):
        raise SampleError(f"'system' is not a text: a {type(system).__name__}")
    if messages[0]["role"] == "system":
        raise SampleError("a row has its system text twice: 'system' and the first turn")
    return Message(role="system", content=system)


def _shown_first(messages: list[Message], texts: list[str], num_images: int) -> list[str]:
    """Pictures without a tag stand before the first question."""
    first = next(k for k, message in enumerate(messages) if message["role"] == "user")
    tags = "".join(f"<|image_{number}|>\n" for number in range(1, num_images + 1))
    return [*texts[:first], tags + texts[first], *texts[first + 1 :]]


class _Turns:
    """Reads the turns of one row in their order, and deals out its images to their parts."""

    def __init__(self, known: Format, ignored: Collection[str], images: list[Any]) -> None:
        self.known, self.ignored, self.images = known, ignored, images
        self.position = 0  # of the message that is read
        self.untrained: list[int] = []
        self.placed: list[Any] = []
        self.dealt = 0

    def all_images(self) -> list[Any]:
        """The images in the order of their tags.

        Raises: SampleError if parts have used some of the row's images and not all.
        """
        if not self.placed:
            return self.images
        if unused := len(self.images) - self.dealt:
            raise SampleError(
                f"'images' holds more than its parts use: {unused} of {len(self.images)} left"
            )
        return self.placed

    def message(self, turn: Any) -> Iterator[Message]:
        content = turn.get("content") if isinstance(turn, dict) else None
        if isinstance(content, list):
            content = "\n".join(self._part(part) for part in content)
        if not isinstance(content, str):
            raise SampleError("a message has no 'role' and 'content' text")
        if turn.get("role") not in ROLES:
            raise SampleError(f"role is not one of {', '.join(ROLES)}: {turn.get('role')}")
        yield self._said(turn, turn["role"], content)

    def speech(self, turn: Any) -> Iterator[Message]:
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise SampleError("a turn has no 'from' and 'value' text")
        speaker = turn.get("from")
        if not isinstance(speaker, str) or speaker not in SPEAKERS:
            raise SampleError(f"speaker is not one of {', '.join(SPEAKERS)}: {speaker}")
        yield self._said(turn, SPEAKERS[speaker], turn["value"])

    def pair(self, turn: Any) -> Iterator[Message]:
        said = [turn.get(role) if isinstance(turn, dict) else None for role in ROLES[1:]]
        if not all(isinstance(text, str) for text in said):
            raise SampleError("a turn has no 'user' and 'assistant' text")
        yield Message(role="user", content=turn["user"])
        self.position += 1
        yield self._said(turn, "assistant", turn["assistant"])

    def _said(self, turn: Mapping[str, Any], role: str, content: str) -> Message:
        check_keys(turn, self.known.turn, self.ignored, "a turn")
        if self._is_trained(turn, role) is False:
            self.untrained.append(self.position)
        self.position += 1
        return Message(role=role, content=content)

    def _is_trained(self, turn: Mapping[str, Any], role: str) -> bool | None:
        """What a turn says of its training; None if it says nothing."""
        if turn.keys().isdisjoint(TRAINED):
            return None
        said = {key: turn[key] for key in TRAINED if not is_empty(turn.get(key))}
        said = {key: value for key, value in said.items() if key not in self.ignored}
        if not said:
            return None
        for key, value in said.items():
            if not isinstance(value, bool | int | float) or value not in (0, 1):
                raise SampleError(
                    f"a turn is trained or not: {key!r} is neither 0 nor 1, {value!r}"
                )
        if len({bool(value) for value in said.values()}) > 1:
            raise SampleError(f"a turn is trained or not: {', '.join(said)} differ")
        is_trained = any(said.values())
        if is_trained and role != "assistant":
            key = next(iter(said))
            raise SampleError(f"only answers are trained: {key!r} of the {role} asks for more")
        return is_trained

    def _part(self, part: Any) -> str:
        """A text part's text, or the tag of an image part, whose image is placed."""
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        is_text = kind == "text" and isinstance(part.get("text"), str)
        if not is_text and kind not in ("image", "image_url"):
            raise SampleError(f"a content part is neither text nor image: {kind}")
        check_keys(part, self.known.part, self.ignored, "a part")
        held = [part[key] for key in PART_PICTURES if not is_empty(part.get(key))]
        if is_text:
            if held:
                raise SampleError("a text part has a picture: give it a part of its own")
            return str(part["text"])
        if not is_empty(part.get("text")):
            raise SampleError("an image part has a text: give it a part of its own")
        if len(held) > 1:
            raise SampleError("an image part has several images: leave one")
        image = self._own(held[0]) if held else None
        self.placed.append(self._next(part.get("index")) if is_empty(image) else image)
        return f"<|image_{len(self.placed)}|>"

    def _own(self, image: Any) -> Any:
        """The image of a part, which may stand in {"url": ...}."""
        if not isinstance(image, dict) or "url" not in image:
            return image
        check_keys(image, URL, self.ignored, "an image")
        return image["url"]

    def _next(self, index: Any) -> Any:
        """The next of the row's images, for a part that has none of its own."""
        if self.dealt == len(self.images):
            raise SampleError("an image part has no image: there is none left in 'images'")
        if not is_empty(index) and index != self.dealt:
            raise SampleError(f"an image part is out of order: its index is {index}")
        self.dealt += 1
        return self.images[self.dealt - 1]


READERS = {"messages": _Turns.message, "llava": _Turns.speech, "texts": _Turns.pair}


def read_references(value: Any) -> tuple[str, ...]:
    """Read the accepted answers of a field: a text, a list of texts, or none where it is empty.

    Raises: SampleError if there is something else, or an empty text among them.
    """
    for text in as_list(value):
        if not isinstance(text, str):
            raise SampleError(f"a reference is no text: a {type(text).__name__}")
        if not text.strip():
            raise SampleError("a reference is empty: leave it out")
    return tuple(text.strip() for text in as_list(value))

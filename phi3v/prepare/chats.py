"""Rows that are chats already: `messages` as OpenAI writes them, `conversations` as LLaVA does."""

from collections.abc import Iterator, Mapping
from itertools import count
from typing import Any

from phi3v.errors import SampleError
from phi3v.prepare.rows import is_empty
from phi3v.processing.prompt import IMAGE_TAG, Message

ROLES = ("system", "user", "assistant")
SPEAKERS = {"human": "user", "gpt": "assistant"} | {role: role for role in ROLES}
LLAVA_TAG = "<image>"

Chat = tuple[list[Message], list[Any]]
"""Messages, and the images that their tags <|image_1|>, ... stand for."""


def read_messages(values: Mapping[str, Any]) -> Chat:
    """Read {"messages": [{"role", "content"}, ...], "images": [...]}.

    A content is a text, or a list of {"type": "text", "text"} and {"type": "image", "image"} or
    {"type": "image_url", "image_url": {"url"}}, which are put together line by line. A part without
    an image of its own stands for the next of `images`.

    Raises: SampleError if there is something else.
    """
    given = values.get("messages")
    if not isinstance(given, list) or not given:
        raise SampleError("'messages' is not a list of messages")
    images = [] if is_empty(values.get("images")) else values["images"]
    if not isinstance(images, list):
        raise SampleError(f"'images' is a {type(images).__name__}, not a list of images")
    placed: list[Any] = []
    left = iter(images)
    messages = [_message(message, left, placed) for message in given]
    if not placed:
        return messages, images
    if unused := len(list(left)):
        raise SampleError(f"'images' holds more than its parts use: {unused} of {len(images)} left")
    return messages, placed


def _message(message: Any, left: Iterator[Any], placed: list[Any]) -> Message:
    content = message.get("content") if isinstance(message, dict) else None
    if isinstance(content, list):
        content = "\n".join(_part_text(part, left, placed) for part in content)
    if not isinstance(content, str):
        raise SampleError("a message has no 'role' and 'content' text")
    if message.get("role") not in ROLES:
        raise SampleError(f"role is not one of {', '.join(ROLES)}: {message.get('role')}")
    return Message(role=message["role"], content=content)


def _part_text(part: Any, left: Iterator[Any], placed: list[Any]) -> str:
    """A text part's text, or the tag of an image part, whose image is added to `placed`."""
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    if kind == "text" and isinstance(part.get("text"), str):
        return part["text"]
    if kind not in ("image", "image_url"):
        raise SampleError(f"a content part is neither text nor image: {kind}")
    image = part.get(kind)
    if isinstance(image, dict) and "url" in image:
        image = image["url"]
    if is_empty(image):
        image = next(left, None)
    if image is None:
        raise SampleError("an image part has no image: there is none left in 'images'")
    placed.append(image)
    return f"<|image_{len(placed)}|>"


def read_llava(values: Mapping[str, Any]) -> Chat:
    """Read {"conversations": [{"from", "value"}, ...], "image": ...}, one image or a list.

    The k-th <image> of a row stands for image k; a row may have numbered tags instead.

    Raises: SampleError if there is something else.
    """
    given = values.get("conversations")
    if not isinstance(given, list) or not given:
        raise SampleError("'conversations' is not a list of turns")
    messages = [_turn(turn) for turn in given]
    texts = [message["content"] for message in messages]
    if any(IMAGE_TAG.search(text) for text in texts) and any(LLAVA_TAG in text for text in texts):
        raise SampleError(f"image tags are of two kinds: {LLAVA_TAG} and <|image_1|> in one row")
    numbers = count(1)
    for message in messages:
        pieces = message["content"].split(LLAVA_TAG)
        message["content"] = pieces[0] + "".join(
            f"<|image_{next(numbers)}|>{piece}" for piece in pieces[1:]
        )
    fields = (values.get(name) for name in ("image", "images"))
    return messages, [image for field in fields for image in as_list(field)]


def _turn(turn: Any) -> Message:
    if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
        raise SampleError("a turn has no 'from' and 'value' text")
    speaker = turn.get("from")
    if not isinstance(speaker, str) or speaker not in SPEAKERS:
        raise SampleError(f"speaker is not one of {', '.join(SPEAKERS)}: {speaker}")
    return Message(role=SPEAKERS[speaker], content=turn["value"])


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


def as_list(value: Any) -> list[Any]:
    """What a field holds: one thing, a list of them, or none."""
    if is_empty(value):
        return []
    return value if isinstance(value, list) else [value]

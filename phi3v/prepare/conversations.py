"""From a raw row to a conversation: messages, and where their images are."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from phi3v.config.schema import SourceSection
from phi3v.errors import ConfigError, SampleError
from phi3v.prepare.sources import Row
from phi3v.processing.prompt import IMAGE_TAG, Message, image_tags

FIELD = re.compile(r"\{(\w[^{}]*)\}")  # {title}, {Full Price}; not {"title": 1}
HALF_PAIR = re.compile("[\ud800-\udfff]")  # JSON can hold one, UTF-8 cannot
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Conversation:
    """Checked messages, images numbered 1, 2, ... in order of appearance."""

    id: str
    messages: tuple[Message, ...]
    images: tuple[Any, ...]


def needed_columns(source: SourceSection) -> list[str]:
    """Columns that the templates and the images of a `columns` source name."""
    fields = FIELD.findall((source.user or "") + (source.assistant or ""))
    return list(dict.fromkeys([*fields, *source.images]))


def is_columns(source: SourceSection) -> bool:
    """Whether rows are made into messages by templates."""
    return source.format == "columns" or (source.format == "auto" and source.user is not None)


def check_columns(source: SourceSection, by: str | None, values: Mapping[str, Any]) -> None:
    """Refuse a source whose rows lack a column that the recipe names.

    Raises: ConfigError naming the column and those there are.
    """
    columns = needed_columns(source) if is_columns(source) else ["messages"]
    for column in [*columns, *([by] if by else [])]:
        if column not in values:
            hint = "name these in the recipe"
            if column == "messages":
                hint = "set source.user and source.assistant to make messages of these"
            raise ConfigError(
                f"source.path {source.path} has no column '{column}', it has: {', '.join(values)}; "
                f"{hint}"
            )


def read_conversation(row: Row, source: SourceSection) -> Conversation:
    """Turn a row into a conversation.

    Raises: SampleError with the reason if the row cannot be trained on.
    """
    if row.fault:
        raise SampleError(f"the row {row.fault}")
    values = row.values
    if is_columns(source):
        messages = [
            Message(role="user", content=_fill(source.user or "", values)),
            Message(role="assistant", content=_fill(source.assistant or "", values)),
        ]
        images = [_present(values, column) for column in source.images]
    else:
        messages = _read_messages(values.get("messages"))
        images = _read_images(values.get("images"))
    name = str(row.number if is_empty(values.get("id")) else values["id"])
    _check_unicode([name, *(message["content"] for message in messages)])
    messages = [_checked(message, position) for position, message in enumerate(messages)]
    _check_turns(messages)
    return _renumbered(name, messages, images)


def _fill(template: str, values: Mapping[str, Any]) -> str:
    return FIELD.sub(lambda match: str(_present(values, match[1])), template)


def is_empty(value: Any) -> bool:
    """Whether a field holds nothing: None, NaN, or white space."""
    is_nan = isinstance(value, float) and value != value
    return value is None or is_nan or (isinstance(value, str) and not value.strip())


def _present(values: Mapping[str, Any], column: str) -> Any:
    if is_empty(values.get(column)):
        raise SampleError(f"column '{column}' is empty")
    return values[column]


def _read_messages(value: Any) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise SampleError("'messages' is not a list of messages")
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise SampleError("a message has no 'role' and 'content' text")
        if message.get("role") not in ROLES:
            raise SampleError(f"role is not one of {', '.join(ROLES)}: {message.get('role')}")
    return [Message(role=m["role"], content=m["content"]) for m in value]


def _read_images(value: Any) -> list[Any]:
    if not is_empty(value) and not isinstance(value, list):
        raise SampleError(f"'images' is a {type(value).__name__}, not a list of images")
    return [] if is_empty(value) else value


def _check_unicode(texts: Sequence[str]) -> None:
    for text in texts:
        if half := HALF_PAIR.search(text):
            raise SampleError(f"a text holds half of a surrogate pair: {ascii(half[0])}")


def _checked(message: Message, position: int) -> Message:
    """Strip what the model is to say, as generation will see it: no space around an answer."""
    role, content = message["role"], message["content"]
    if role != "assistant":
        return message
    if image_tags(content):
        raise SampleError(f"an answer holds an image tag: message {position}")
    if not content.strip():
        raise SampleError(f"an answer is empty: message {position}")
    return Message(role=role, content=content.strip())


def _check_turns(messages: Sequence[Message]) -> None:
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[0] == "system" else roles
    expected = ["user", "assistant"] * (len(turns) // 2)
    if not turns or turns != expected:
        raise SampleError(f"turns are not user, assistant in alternation: {', '.join(roles)}")


def _renumbered(name: str, messages: Sequence[Message], images: Sequence[Any]) -> Conversation:
    """Number image tags in order of appearance, and put the images in that order.

    The published processor accepts <|image_2|> before <|image_1|>, and the published model then
    swaps the two pictures without a word.
    """
    tags = [tag for message in messages for tag in image_tags(message["content"])]
    if sorted(tags) != list(range(1, len(images) + 1)):
        raise SampleError(
            f"image tags do not name each image once: tags {tags or 'none'}, {len(images)} images"
        )
    number = {tag: position + 1 for position, tag in enumerate(tags)}
    renamed = [
        Message(
            role=m["role"],
            content=IMAGE_TAG.sub(lambda t: f"<|image_{number[int(t[1])]}|>", m["content"]),
        )
        for m in messages
    ]
    return Conversation(name, tuple(renamed), tuple(images[tag - 1] for tag in tags))

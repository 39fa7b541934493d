"""From a raw row to a conversation: messages, and where their images are.

Rows are made into messages by templates (`columns`), or are chats already (chats.py); either way
the result is checked here.
"""

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from phi3v.config.dataset import SourceSection
from phi3v.errors import ConfigError, SampleError
from phi3v.prepare.chats import as_list, read_llava, read_messages, read_references
from phi3v.prepare.rows import Row, is_empty
from phi3v.processing.prompt import IMAGE_TAG, Message, image_tags

FIELD = re.compile(r"\{(\w[^{}]*)\}")  # {title}, {Full Price}; not {"title": 1}
HALF_PAIR = re.compile("[\ud800-\udfff]")  # JSON can hold one, UTF-8 cannot
STEP = re.compile(r"\.([^.\[\]]+)|\[(\d{1,9})\]")
NESTED = re.compile(rf"([^.\[\]]+)(?:{STEP.pattern})+")  # answers[0], query.en, pages[1].text


@dataclass(frozen=True)
class Conversation:
    """Checked messages, images numbered 1, 2, ... in order of appearance.

    references  every accepted last answer, where the row names them
    """

    id: str
    messages: tuple[Message, ...]
    images: tuple[Any, ...]
    references: tuple[str, ...] = ()


def needed_columns(source: SourceSection) -> list[str]:
    """Columns that the templates, images and references of a `columns` source name."""
    fields = FIELD.findall((source.user or "") + (source.assistant or ""))
    references = [source.references] if source.references else []
    return list(dict.fromkeys([*fields, *source.images, *references]))


def is_columns(source: SourceSection) -> bool:
    """Whether rows are made into messages by templates."""
    return source.format == "columns" or (source.format == "auto" and source.user is not None)


def check_columns(source: SourceSection, by: str | None, columns: Collection[str]) -> None:
    """Refuse a source whose rows lack a column that the recipe names.

    Raises: ConfigError naming the column and those there are.
    """
    name_these = "name these in the recipe"
    if is_columns(source):
        needed = dict.fromkeys(needed_columns(source), name_these)
    elif source.format == "auto":
        hint = "set source.user and source.assistant to make messages of these"
        needed = {_chat_column(source, columns): hint}
    else:
        needed = {_chat_column(source, columns): "set source.format to what its rows hold"}
    lacking = [(name, hint) for name, hint in needed.items() if _head(name, columns) not in columns]
    if by is not None and by not in columns:
        lacking.append((by, name_these))
    for column, hint in lacking[:1]:
        raise ConfigError(
            f"source.path {source.path} has no column '{column}', it has: {', '.join(columns)}; "
            f"{hint}"
        )


def read_conversation(row: Row, source: SourceSection) -> Conversation:
    """Turn a row into a conversation.

    Raises: SampleError with the reason if the row cannot be trained on.
    """
    if row.fault:
        raise SampleError(f"the row {row.fault}")
    messages, images = _read_chat(row.values, source)
    references = _references(row.values, source)
    name = str(row.number if is_empty(row.values.get("id")) else row.values["id"])
    _check_unicode([name, *references, *(message["content"] for message in messages)])
    messages = [_checked(message, position) for position, message in enumerate(messages)]
    _check_turns(messages)
    return _renumbered(name, messages, images, references)


def _read_chat(values: Mapping[str, Any], source: SourceSection) -> tuple[list[Message], list[Any]]:
    """Messages as the row has them, and the images that <|image_1|>, ... stand for."""
    if is_columns(source):
        messages = [
            Message(role="user", content=_fill(source.user or "", values)),
            Message(role="assistant", content=_fill(source.assistant or "", values)),
        ]
        images = [_present(values, column) for column in source.images]
        return messages, [each for image in images for each in as_list(image)]
    if _chat_column(source, values) == "conversations":
        return read_llava(values)
    return read_messages(values)


def _references(values: Mapping[str, Any], source: SourceSection) -> tuple[str, ...]:
    """Every accepted answer, where the recipe or a row of messages names them."""
    if is_columns(source):
        return read_references(_find(values, source.references)) if source.references else ()
    is_messages = _chat_column(source, values) == "messages"
    return read_references(values.get("references")) if is_messages else ()


def _chat_column(source: SourceSection, columns: Collection[str]) -> str:
    is_llava = "conversations" in columns and "messages" not in columns
    if source.format == "llava" or (source.format == "auto" and is_llava):
        return "conversations"
    return "messages"


def _fill(template: str, values: Mapping[str, Any]) -> str:
    return FIELD.sub(lambda match: _text(values, match[1]), template)


def _text(values: Mapping[str, Any], column: str) -> str:
    value = _present(values, column)
    if isinstance(value, list | dict | bytes):
        raise SampleError(
            f"column '{column}' is no text: a {type(value).__name__}; a list's first is "
            f"{{{column}[0]}}, a field {{{column}.name}}"
        )
    if isinstance(value, float) and math.isinf(value):
        raise SampleError(f"column '{column}' is not finite: {value}; leave it empty")
    return str(value)


def _present(values: Mapping[str, Any], column: str) -> Any:
    value = _find(values, column)
    if is_empty(value):
        raise SampleError(f"column '{column}' is empty")
    return value


def _find(values: Mapping[str, Any], column: str) -> Any:
    """A column's value, or what stands within it: query.en of {"query": {"en": "Hi"}} is Hi.

    None where there is nothing.
    """
    head = _head(column, values)
    value = values.get(head)
    for name, number in STEP.findall(column[len(head) :]):
        if number and isinstance(value, list):
            value = value[int(number)] if int(number) < len(value) else None
        else:
            value = value.get(name) if name and isinstance(value, dict) else None
    return value


def _head(column: str, columns: Collection[str]) -> str:
    """The column that {answers[0]} or {query.en} starts from; any name, if there is one of it."""
    nested = None if column in columns else NESTED.fullmatch(column)
    return nested[1] if nested else column


def _check_unicode(texts: Sequence[str]) -> None:
    for text in texts:
        if half := HALF_PAIR.search(text):
            raise SampleError(f"a text holds half of a surrogate pair: {ascii(half[0])}")


def _checked(message: Message, position: int) -> Message:
    """Strip what the model is to say, as generation will see it: no space around an answer."""
    role, content = message["role"], message["content"]
    if role == "user" and not content.strip():
        raise SampleError(f"a question is empty: message {position}")
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


def _renumbered(
    name: str, messages: Sequence[Message], images: Sequence[Any], references: tuple[str, ...]
) -> Conversation:
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
    shown = tuple(images[tag - 1] for tag in tags)
    return Conversation(name, tuple(renamed), shown, references)

"""From a raw row to a conversation: messages, and where their images are.

Rows are made into messages by templates (`columns`), or are chats already (chats.py); either way
the result is checked here.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from phi3v.config.dataset import SourceSection
from phi3v.errors import ConfigError, SampleError
from phi3v.prepare.chats import COLUMN_OF, Chat, read_chat, read_references
from phi3v.prepare.rows import Row
from phi3v.prepare.templates import FIELD, columns_of, fill, find, head_of, left_over, parse
from phi3v.processing.keys import PICTURE, as_list, check_keys, is_empty, passed_over
from phi3v.processing.prompt import IMAGE_TAG, Message, image_tags, settle_tags

LONGEST_ID = 10_000  # characters; as many ids as there are rows are in memory together
HALF_PAIR = re.compile("[\ud800-\udfff]")  # JSON can hold one, UTF-8 cannot


@dataclass(frozen=True)
class Conversation:
    """Checked messages, images numbered 1, 2, ... in order of appearance.

    references  every accepted last answer, where the row names them
    untrained   positions of the answers that are not trained
    """

    id: str
    messages: tuple[Message, ...]
    images: tuple[Any, ...]
    references: tuple[str, ...] = ()
    untrained: frozenset[int] = frozenset()

    @property
    def last_trained(self) -> int:
        """The position of the last answer that is trained; of the last message if none is."""
        answers = [k for k, message in enumerate(self.messages) if message["role"] == "assistant"]
        trained = [k for k in answers if k not in self.untrained]
        return trained[-1] if trained else len(self.messages) - 1


def named_fields(source: SourceSection) -> list[str]:
    """What the templates, images and references of a `columns` source name, as it stands there."""
    fields = FIELD.findall((source.user or "") + "\n" + (source.assistant or ""))
    references = [source.references] if source.references else []
    return list(dict.fromkeys([*fields, *source.images, *references]))


def is_columns(source: SourceSection) -> bool:
    """Whether rows are made into messages by templates."""
    return source.format == "columns" or (source.format == "auto" and source.user is not None)


def check_columns(source: SourceSection, by: str | None, columns: Collection[str]) -> None:
    """Refuse a source whose rows lack a column that the recipe names.

    columns  those of the first row

    Raises: ConfigError naming the column, or what looks like one, and those there are.
    """
    name_these = "name these in the recipe"
    needed: dict[str, str] = {}
    if is_columns(source):
        _check_templates(source, columns)
        for name in named_fields(source):
            if not parse(name, columns).is_optional:
                lacks = [column for column in columns_of(name, columns) if column not in columns]
                needed |= {name if len(lacks) == 1 else column: name_these for column in lacks}
    else:
        column = COLUMN_OF[chat_format(source, columns)]
        if source.format == "auto":
            needed[column] = "set source.user and source.assistant to make messages of these"
        else:
            needed[column] = "set source.format to what its rows hold"
    for other in (source.id, by):
        if other is not None and head_of(other, columns) not in columns:
            needed[other] = name_these
    if "label" in needed and "label" not in columns and tuple(columns) == ("image",):
        needed["label"] = (
            "datasets makes it of folders' names only where there are several, one for each class, "
            "and every picture lies equally deep: move the pictures of nested folders up"
        )
    lacking = [(name, hint) for name, hint in needed.items() if name not in columns]
    for column, hint in lacking[:1]:
        raise ConfigError(
            f"source.path {source.path} has no column '{column}', it has: {', '.join(columns)}; "
            f"{hint}"
        )


def _check_templates(source: SourceSection, columns: Collection[str]) -> None:
    """Refuse a template that holds something like a field that no column fills."""
    have = f"; source.path {source.path} has the columns {', '.join(columns)}"
    for key in ("user", "assistant"):
        template = getattr(source, key) or ""
        if (left := left_over(template)) is not None:
            raise ConfigError(
                f"source.{key} holds {left!r}, which no column fills; write {{name}}, without "
                f"blanks or braces in it{have}"
            )
        bare = template.strip(" \t\n<>[]()$%#@.:")
        if bare in columns and not FIELD.search(template):
            raise ConfigError(
                f"source.{key} is {template!r}, a column's name and not its value; write "
                f"{{{bare}}}{have}"
            )
    if not named_fields(source):
        raise ConfigError(
            "source.user, source.assistant and source.images name no column, so all rows would be "
            f"the same; write {{name}} where a column belongs{have}"
        )


def check_hits(source: SourceSection, columns: Collection[str], rows: Iterable[Row]) -> None:
    """Refuse a nested or optional name that nothing in any row answers to.

    columns  those of the first row
    rows     read up to the one that has the last of them

    Raises: ConfigError naming it, and the columns there are.
    """
    names = named_fields(source) if is_columns(source) else []
    names = [name for name in names if name not in columns]
    left = {name: path for name in names if (path := parse(name, columns).path) not in columns}
    if not left:
        return
    for row in rows:
        found = [name for name, path in left.items() if _is_hit(row.values, path)]
        left = {name: path for name, path in left.items() if name not in found}
        if not left:
            return
    raise ConfigError(
        f"source.path {source.path} has nothing in any row that '{next(iter(left))}' of the recipe "
        f"names; its columns are {', '.join(columns)}"
    )


def _is_hit(values: Mapping[str, Any], path: str) -> bool:
    if path in values:
        return True
    return not is_empty(find(values, path))


def row_name(values: Mapping[str, Any], source: SourceSection) -> Any:
    """What a row is called: by the recipe's source.id, else by its `id`; None if by neither."""
    name = find(values, source.id) if source.id else values.get("id")
    return None if is_empty(name) else name


def read_conversation(row: Row, source: SourceSection) -> Conversation:
    """Turn a row into a conversation.

    Raises: SampleError with the reason if the row cannot be trained on.
    """
    if row.fault:
        raise SampleError(f"the row {row.fault}")
    chat = _read_chat(row.values, source)
    for image in chat.images:
        _check_image(image, source.ignore or ())
    references = _references(row.values, source)
    given = row_name(row.values, source)
    if given is None and source.id:
        raise SampleError(f"column '{source.id}', which names the rows, is empty")
    name = str(row.number if given is None else given)
    if len(name) > LONGEST_ID:
        raise SampleError(f"an id is too long: {len(name):,} characters, {LONGEST_ID:,} at most")
    _check_unicode([name, *references, *(message["content"] for message in chat.messages)])
    messages = [_checked(message, position) for position, message in enumerate(chat.messages)]
    _check_turns(messages)
    return _renumbered(name, messages, chat, references)


def _check_image(image: Any, ignored: Collection[str]) -> None:
    """Refuse what an object says of its picture and nobody reads: a page, a crop."""
    while isinstance(image, dict):
        check_keys(image, PICTURE, ignored, "an image")
        image = next((inner for inner in image.values() if isinstance(inner, dict)), None)


def _read_chat(values: Mapping[str, Any], source: SourceSection) -> Chat:
    """Messages as the row has them, and the images that <|image_1|>, ... stand for."""
    if is_columns(source):
        return _read_columns(values, source)
    return read_chat(values, chat_format(source, values), source.ignore or ())


def _read_columns(values: Mapping[str, Any], source: SourceSection) -> Chat:
    if key := passed_over(values, _named(source), bool(source.images)):
        hint = "source.ignore" if source.images else "source.images, or in source.ignore"
        raise SampleError(f"a column is passed over: '{key}'; name it in {hint}")
    templates = source.user or "", source.assistant or ""
    texts = settle_tags([fill(text, values) for text in templates], as_text=source.ignore or ())
    images: list[Any] = []
    lacking = []
    for number, name in enumerate(source.images, 1):
        held = as_list(_image(values, name))
        images += held
        lacking += [] if held else [number]
    if lacking:
        if len(images) + len(lacking) != len(source.images):
            raise SampleError("a column of images holds several, where an optional one is empty")
        texts[0] = _without_tags(texts[0], lacking)
    roles = ("user", "assistant")
    messages = [Message(role=role, content=t) for role, t in zip(roles, texts, strict=True)]
    return Chat(messages, images)


def _image(values: Mapping[str, Any], text: str) -> Any:
    name = parse(text, values)
    value = find(values, name.path)
    if is_empty(value) and not name.is_optional:
        raise SampleError(f"column '{name.path}' is empty")
    return value


def _without_tags(text: str, lacking: Sequence[int]) -> str:
    """Take out the tags of images that a row does not have; a line of its own goes with its tag.

    "<|image_1|>\\nWhat?" without image 1 -> "What?"
    """
    for number in lacking:
        text = re.sub(rf"(?m)^<\|image_{number}\|>[ \t]*\n|<\|image_{number}\|>", "", text)

    def renumbered(tag: re.Match[str]) -> str:
        return f"<|image_{int(tag[1]) - sum(n < int(tag[1]) for n in lacking)}|>"

    return IMAGE_TAG.sub(renumbered, text)


@lru_cache(maxsize=256)
def _named(source: SourceSection) -> frozenset[str]:
    """Every column that a source of columns names, in whatever way."""
    columns = [column for name in named_fields(source) for column in columns_of(name, ())]
    exact = [parse(name, ()).path for name in named_fields(source)]
    return frozenset([*columns, *exact, *named_fields(source), *(source.ignore or ())])


def _references(values: Mapping[str, Any], source: SourceSection) -> tuple[str, ...]:
    """Every accepted answer, where the recipe or a row of a chat names them."""
    if is_columns(source):
        if not source.references:
            return ()
        found = as_list(find(values, parse(source.references, values).path))
        return read_references([item for item in found if item is not None])
    return read_references(values.get("references"))


def chat_format(source: SourceSection, columns: Collection[str]) -> str:
    """Which format the rows have: the recipe's, else what their columns tell."""
    if source.format != "auto":
        return source.format
    return next((name for name, column in COLUMN_OF.items() if column in columns), "messages")


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
    name: str, messages: Sequence[Message], chat: Chat, references: tuple[str, ...]
) -> Conversation:
    """Number image tags in order of appearance, and put the images in that order.

    The published processor accepts <|image_2|> before <|image_1|>, and the published model then
    swaps the two pictures without a word.
    """
    images = chat.images
    tags = [tag for message in messages for tag in image_tags(message["content"])]
    if sorted(tags) != list(range(1, len(images) + 1)):
        advice = "" if tags else "; write <image>, or <|image_1|>, where the picture belongs"
        raise SampleError(
            f"image tags do not name each image once: tags {tags or 'none'}, {len(images)} images"
            f"{advice}"
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
    return Conversation(name, tuple(renamed), shown, references, chat.untrained)

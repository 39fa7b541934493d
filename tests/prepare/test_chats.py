"""Columns, messages and LLaVA's conversations say the same in three ways."""

from typing import Any

import pytest

from phi3v.config.dataset import SourceSection
from phi3v.errors import ConfigError, SampleError
from phi3v.prepare.conversations import check_columns, read_conversation
from phi3v.prepare.rows import Row
from tests.tiny import turn

Told = tuple[list[tuple[str, str]], list[Any]]


def told(values: dict[str, Any], **section: Any) -> Told:
    """Who says what, and the images."""
    conversation = read_conversation(Row(0, values), SourceSection(path="a.json", **section))
    messages = [(message["role"], message["content"]) for message in conversation.messages]
    return messages, list(conversation.images)


def reason(values: dict[str, Any], **section: Any) -> str:
    with pytest.raises(SampleError) as caught:
        told(values, **section)
    return str(caught.value)


def llava(*texts: str, **values: Any) -> dict[str, Any]:
    speakers = ("human", "gpt") * len(texts)
    turns = [{"from": who, "value": text} for who, text in zip(speakers, texts, strict=False)]
    return {"conversations": turns, **values}


def parts(*content: Any, **values: Any) -> dict[str, Any]:
    messages = [
        {"role": "user", "content": list(content)},
        {"role": "assistant", "content": [{"type": "text", "text": "Yes."}]},
    ]
    return {"messages": messages, **values}


@pytest.mark.parametrize(
    "images", [{"image": "a.png"}, {"images": ["a.png"]}, {"image": ["a.png"]}]
)
def test_a_row_of_llava_is_a_chat(images: dict[str, Any]) -> None:
    row = llava("<image>\nWhat?", "A cat.", "Its name?", "Tom.", id="7", **images)
    assert told(row) == (
        [
            ("user", "<|image_1|>\nWhat?"),
            ("assistant", "A cat."),
            ("user", "Its name?"),
            ("assistant", "Tom."),
        ],
        ["a.png"],
    )


def test_the_second_tag_of_llava_is_the_second_image_wherever_it_stands() -> None:
    row = llava("Is it\n<image>", "Yes.", "or <image>?", "No.", image=["a.png", "b.png"])
    messages, images = told(row)
    assert [text for _, text in messages] == [
        "Is it\n<|image_1|>",
        "Yes.",
        "or <|image_2|>?",
        "No.",
    ]
    assert images == ["a.png", "b.png"]


def test_numbered_tags_of_llava_name_their_images() -> None:
    messages, images = told(llava("<|image_2|><|image_1|>", "A.", image=["a.png", "b.png"]))
    assert (messages[0][1], images) == ("<|image_1|><|image_2|>", ["b.png", "a.png"])


def test_llava_has_text_only_rows_system_messages_and_other_names() -> None:
    names = [("system", "Short."), ("user", "Hi"), ("assistant", "Ho")]
    row = {"conversations": [{"from": name, "value": text} for name, text in names], "image": None}
    assert told(row, format="llava") == (names, [])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (llava("What?", "A.", image="a.png"), "image tags do not name each image once: tags none,"),
        (llava("<image> <image>", "A.", image="a.png"), "image tags do not name each image once"),
        (llava("<image>", "A."), "image tags do not name each image once: tags [1], 0 images"),
        (llava("Hi", "<image>", image="a.png"), "an answer holds an image tag: message 1"),
        (llava("Hi", "Ho", "Hm"), "turns are not user, assistant in alternation: "),
    ],
)
def test_llava_is_checked_as_messages_are(row: dict[str, Any], message: str) -> None:
    assert reason(row).startswith(message)


def test_parts_are_lines_and_image_parts_are_tags_in_order() -> None:
    row = parts(
        {"type": "image", "image": {"bytes": b"x", "path": None}},
        {"type": "text", "text": "or"},
        {"type": "image_url", "image_url": {"url": "https://x.org/b.png"}},
        {"type": "image_url", "image_url": "c.png"},
    )
    assert told(row) == (
        [("user", "<|image_1|>\nor\n<|image_2|>\n<|image_3|>"), ("assistant", "Yes.")],
        [{"bytes": b"x", "path": None}, "https://x.org/b.png", "c.png"],
    )


def test_a_part_without_an_image_takes_the_next_of_the_row() -> None:
    row = parts(
        {"type": "image", "text": None, "image": None},
        {"type": "image", "text": None, "image": "b.png"},
        {"type": "image"},
        images=["a.png", "c.png"],
    )
    assert told(row)[1] == ["a.png", "b.png", "c.png"]


def test_text_parts_may_name_the_images_of_the_row() -> None:
    text = {"type": "text", "text": "<|image_1|> What?"}
    assert told(parts(text, images=["a.png"]))[1] == ["a.png"]
    assert reason(parts(text, {"type": "image"}, images=["a.png"])).startswith("image tags do not")


def test_auto_takes_what_the_row_has() -> None:
    assert told(turn("Hi", "Ho")) == told(llava("Hi", "Ho"))
    assert reason(turn("Hi", "Ho") | llava("No", "No")).startswith(
        "a key is not understood: 'conversations' of the row; "
    )
    assert reason(llava("Hi", "Ho"), format="messages") == "'messages' is not a list of messages"
    assert reason(turn("Hi", "Ho"), format="llava") == "'conversations' is not a list of turns"


@pytest.mark.parametrize("values", [{"messages": []}, {"conversations": []}])
def test_a_chat_of_either_kind_is_a_source(values: dict[str, Any]) -> None:
    check_columns(SourceSection(path="a.json"), None, values)
    with pytest.raises(ConfigError, match="has no column 'code', it has: .*; name these in the"):
        check_columns(SourceSection(path="a.json"), "code", values)


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{answers[0]}", "five"),
        ("{answers[1]}", "5"),
        ("{query.en}", "What?"),
        ("{pages[1].words[0].text}", "deep"),
        ("{a.b} {c[0]}", "dot bracket"),
        ("{price} {is_new} {n}", "10.0 True 0"),
    ],
)
def test_templates_reach_into_lists_and_objects(template: str, text: str) -> None:
    values = {
        "answers": ["five", "5"],
        "query": {"en": "What?"},
        "pages": [{}, {"words": [{"text": "deep"}]}],
        "a.b": "dot",
        "c[0]": "bracket",
        "price": 10.0,
        "is_new": True,
        "n": 0,
    }
    section = SourceSection(path="a.json", user="Q?", assistant=template)
    check_columns(section, None, values)
    assert told(values, user="Q?", assistant=template)[0][1] == ("assistant", text)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{answers[2]}", "column 'answers[2]' is empty"),
        ("{answers.en}", "column 'answers.en' is empty"),
        ("{query[0]}", "column 'query[0]' is empty"),
        ("{query.de}", "column 'query.de' is empty"),
        ("{query.en.more}", "column 'query.en.more' is empty"),
        ("{none}", "column 'none' is empty"),
        ("{price}", "column 'price' is empty"),
        ("{answers}", "column 'answers' is no text: a list; a list's first is {answers[0]}, a "),
        ("{query}", "column 'query' is no text: a dict; "),
        ("{data}", "column 'data' is no text: a bytes; "),
    ],
)
def test_what_a_template_does_not_find_is_told(template: str, message: str) -> None:
    values = {
        "answers": ["five", None],
        "query": {"en": "What?"},
        "none": [],
        "price": float("nan"),
        "data": b"x",
    }
    assert reason(values, user="Q?", assistant=template).startswith(message)


def test_a_column_may_hold_several_images() -> None:
    values = {"left": ["a.png", "b.png"], "right": "c.png", "deep": {"image": "d.png"}}
    section = {"images": ("left", "right", "deep.image"), "assistant": "A."}
    user = "<|image_4|> <|image_1|> <|image_2|> <|image_3|>"
    assert told(values, user=user, **section)[1] == ["d.png", "a.png", "b.png", "c.png"]
    assert reason(values | {"left": []}, user=user, **section) == "column 'left' is empty"


def accepted(values: dict[str, Any], **section: Any) -> tuple[str, ...]:
    return read_conversation(Row(0, values), SourceSection(path="a.json", **section)).references


@pytest.mark.parametrize(
    ("given", "read"),
    [
        (["5", " five "], ("5", "five")),
        ("5", ("5",)),
        (None, ()),
        ([], ()),
        (" ", ()),
    ],
)
def test_accepted_answers_are_texts_or_one_text_or_none(given: Any, read: tuple[str, ...]) -> None:
    row = {"q": "How many?", "a": "5 cats", "answers": given, "all": {"en": given}}
    columns = {"user": "{q}", "assistant": "{a}"}
    assert accepted(row, **columns, references="answers") == read
    assert accepted(row, **columns, references="all.en") == read
    assert accepted(turn("How many?", "5 cats", references=given)) == read


def test_accepted_answers_of_columns_are_read_only_where_they_are_asked_for() -> None:
    row = {"q": "How many?", "a": "5", "references": 5}
    assert accepted(row, user="{q}", assistant="{a}") == ()
    assert accepted(llava("How many?", "5", references=["5"])) == ("5",)
    with pytest.raises(ConfigError, match="source.references has no meaning with source.format"):
        SourceSection(path="a.json", format="messages", references="answers")

"""Every key of a row is in the table of its format or rejects the row; so do stray tags."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phi3v.config.dataset import SourceSection
from phi3v.errors import SampleError
from phi3v.prepare.conversations import Conversation, read_conversation
from phi3v.prepare.rows import Row
from phi3v.processing.keys import FILMS, FORMATS, PICTURES, PROVENANCE, SOUNDS, TRAINED, tables
from tests.commands import ROOT
from tests.tiny import turn

Values = dict[str, Any]

PLAIN: dict[str, Values] = {
    "messages": turn("Hi", "Ho"),
    "llava": {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]},
    "texts": {"texts": [{"user": "Hi", "assistant": "Ho"}]},
}
COLUMN = {"messages": "messages", "llava": "conversations", "texts": "texts"}
CHATS = list(PLAIN)
NAMES = st.one_of(
    st.text(min_size=1, max_size=12),
    st.sampled_from(
        [*FILMS, *SOUNDS, *PICTURES, "tools", "history", "chosen", "rejected", "prompt", "name"]
    ),
)
SAYING = st.one_of(
    st.text(min_size=1).filter(str.strip), st.integers(), st.booleans(), st.just(["x"])
)


def read(values: Values, **section: Any) -> Conversation:
    return read_conversation(Row(0, values), SourceSection(path="a.json", **section))


def reason(values: Values, **section: Any) -> str:
    with pytest.raises(SampleError) as caught:
        read(values, **section)
    return str(caught.value)


def with_question(name: str, text: str, **values: Any) -> Values:
    """A row of a format that asks this."""
    if name == "messages":
        return turn(text, "Ho", **values)
    if name == "texts":
        return {"texts": [{"user": text, "assistant": "Ho"}], **values}
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": "Ho"}]
    return {"conversations": turns, **values}


def test_the_page_shows_the_tables_of_the_code() -> None:
    assert tables() in (ROOT / "docs/data.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", CHATS)
@given(key=NAMES, value=SAYING)
def test_a_key_of_a_row_is_in_its_table_or_rejects_the_row(name: str, key: str, value: Any) -> None:
    if key in FORMATS[name].row:
        return
    row = {**PLAIN[name], key: value}
    assert reason(row, format=name).startswith(f"a key is not understood: {key!r} of the row; ")
    assert read(row, format=name, ignore=(key,)) == read(PLAIN[name])
    assert read({**row, key: None}, format=name) == read(PLAIN[name])


@pytest.mark.parametrize("name", CHATS)
@given(key=NAMES, value=SAYING, place=st.integers(0, 1))
def test_a_key_of_a_turn_is_in_its_table_or_rejects_the_row(
    name: str, key: str, value: Any, place: int
) -> None:
    if key in FORMATS[name].turn:
        return
    turns = [dict(turn) for turn in PLAIN[name][COLUMN[name]]]
    turns[place % len(turns)][key] = value
    row = {COLUMN[name]: turns}
    assert reason(row, format=name).startswith(f"a key is not understood: {key!r} of a turn; ")
    assert read(row, format=name, ignore=(key,)) == read(PLAIN[name])


@given(key=NAMES, value=SAYING)
def test_a_key_of_a_part_is_in_its_table_or_rejects_the_row(key: str, value: Any) -> None:
    if key in FORMATS["messages"].part:
        return
    parts = [{"type": "text", "text": "Hi", key: value}]
    row = turn("", "Ho") | {
        "messages": [
            {"role": "user", "content": parts},
            {"role": "assistant", "content": "Ho"},
        ]
    }
    assert reason(row).startswith(f"a key is not understood: {key!r} of a part; ")


def test_all_keys_that_are_not_understood_are_named_at_once() -> None:
    assert "'b', 'a' of the row" in reason(turn("Hi", "Ho", b=1, a=2))
    assert reason(turn("Hi", "Ho", b=1, a=2)).endswith("source.ignore: [b, a]")


@pytest.mark.parametrize("name", CHATS)
def test_where_a_row_comes_from_changes_nothing(name: str) -> None:
    row = {**PLAIN[name], **dict.fromkeys(PROVENANCE, "x")}
    assert read(row, format=name) == read(PLAIN[name])


@pytest.mark.parametrize("name", CHATS)
@pytest.mark.parametrize("key", PICTURES)
@pytest.mark.parametrize("tag", ["<image>", "<|image_1|>"])
def test_a_picture_under_any_of_its_keys_is_shown(name: str, key: str, tag: str) -> None:
    for held in ("a.png", ["a.png"]):
        if (name, key, held) == ("messages", "images", "a.png"):
            continue  # known as a list alone
        shown = read(with_question(name, f"{tag}\nWhat?", **{key: held}), format=name)
        assert shown.images == ("a.png",)
        assert shown.messages[0]["content"] == "<|image_1|>\nWhat?"
    without_tag = with_question(name, "What?", **{key: ["a.png"]})
    if name == "texts":  # FineVision's, whose pictures come first
        assert read(without_tag, format=name).messages[0]["content"] == "<|image_1|>\nWhat?"
    else:
        assert reason(without_tag, format=name).startswith("image tags do not name each image")


@pytest.mark.parametrize("name", CHATS)
def test_pictures_under_two_keys_are_refused(name: str) -> None:
    row = with_question(name, "<image>", image="a.png", img="b.png")
    said = "a row has its pictures twice: 'image' and 'img'; "
    assert reason(row, format=name).startswith(said)
    assert read(row, format=name, ignore=("img",)).images == ("a.png",)


@pytest.mark.parametrize("name", CHATS)
def test_the_system_text_of_a_row_is_told_first(name: str) -> None:
    told = read({**PLAIN[name], "system": "Be brief."}, format=name)
    roles = [(message["role"], message["content"]) for message in told.messages]
    assert roles == [("system", "Be brief."), ("user", "Hi"), ("assistant", "Ho")]
    assert reason({**PLAIN[name], "system": ["Be brief."]}, format=name).startswith(
        "'system' is not a text: a list"
    )


def test_a_system_text_that_is_told_twice_is_refused() -> None:
    row = turn("Hi", "Ho", system="Be brief.")
    row["messages"].insert(0, {"role": "system", "content": "Shout."})
    assert reason(row).startswith("a row has its system text twice: ")


STRAY = [
    *("<video>", "<audio>", "<img>", "<|image|>", "</img>", "<|video_1|>", "<|image_pad|>"),
    *('<img src="a.png">', "<IMAGE>", "<image/>", "<image />", "< image >", "<image id=1>"),
    *("<|Image_1|>", "<|IMAGE_1|>", "<|image 1|>", "<|image1|>", "<| image_1 |>", "<image:1>"),
    *("<start_of_image>", "<|begin_of_image|>", "<IMG_CONTEXT>", "<im_patch>", "<ImageContent>"),
    *("[IMG]", "[IMAGE]", "[image]", "[image_1]", "[IMG_BREAK]", "![a cap](a.png)", "![](a.png)"),
    *('<video src="x.mp4">', "<AUDIO>", "<Picture 1>", "&lt;image&gt;", "\\<image\\>", "<image\n>"),
]
NO_TAG = [
    *("if x < image_width && y > 0", "x<image && y>3", "a[image]", "f([image])", "imgs[img_path]"),
    *(
        "a < image and sound > b",
        "[link](a.html)",
        "<b>image</b>",
        "<div class='image'>",
        "<|end|>",
    ),
    *("<pilgrimage>", "[soundtrack]", "<audience>", "<|im_start|>user", "[Image: a cat]", "<image"),
]


@pytest.mark.parametrize("name", [*CHATS, "columns"])
@pytest.mark.parametrize("tag", STRAY)
def test_a_tag_that_no_picture_answers_to_is_refused_in_every_format(name: str, tag: str) -> None:
    if name == "columns":
        section: dict[str, Any] = {"user": "{q}", "assistant": "Ho"}
        row: Values = {"q": f"{tag} What?"}
    else:
        section, row = {"format": name}, with_question(name, f"{tag} What?")
    shown = tag.removeprefix("\\")
    assert reason(row, **section).startswith(f"a tag stands for nothing: {shown} in message 0")
    as_text = read(row, **section, ignore=(shown,))
    assert as_text.messages[0]["content"] == f"{tag} What?"


@pytest.mark.parametrize("text", NO_TAG)
def test_what_is_no_tag_is_text(text: str) -> None:
    row = turn(f"{text} What?", text)
    assert [message["content"] for message in read(row).messages] == [f"{text} What?", text]


@pytest.mark.parametrize(
    ("tag", "name"),
    [('<IMG src="a.png">', "<img>"), ("![a](b.png)", "![]()"), ("[IMG 2]", "[img]")],
)
def test_a_tag_is_ignored_by_its_name_whatever_is_in_it(tag: str, name: str) -> None:
    assert read(turn(tag, "Ho"), ignore=(name,)).messages[0]["content"] == tag
    assert reason(turn(tag, "Ho"), ignore=("<video>",)).startswith("a tag stands for nothing: ")


def test_plain_tags_of_templates_are_pictures_in_their_order() -> None:
    section = {"user": "<image> or <image>?", "assistant": "{a}", "images": ("left", "right")}
    row = {"left": "l.png", "right": "r.png", "a": "The left."}
    assert read(row, **section).messages[0]["content"] == "<|image_1|> or <|image_2|>?"
    assert read(row, **section).images == ("l.png", "r.png")
    assert reason(row | {"a": "<image>"}, **section).startswith("an answer holds an image tag")
    assert reason({"a": "x", "q": "<image>"}, user="{q}", assistant="{a}").startswith(
        "image tags do not name each image once: tags [1], 0 images"
    )


@pytest.mark.parametrize("key", [*PICTURES, *FILMS, *SOUNDS])
def test_a_picture_or_film_in_a_column_that_nothing_names_is_refused(key: str) -> None:
    row = {"q": "What?", "a": "A hat.", key: "x"}
    section: dict[str, Any] = {"user": "{q}", "assistant": "{a}"}
    assert reason(row, **section).startswith(f"a column is passed over: '{key}'; ")
    assert read(row, **section, ignore=(key,)).images == ()
    row["shown"] = "s.png"
    section |= {"user": "<image>{q}", "images": ("shown",)}
    if key in PICTURES:  # which of several pictures is shown is the recipe's choice
        assert read(row, **section).images == ("s.png",)
    else:
        assert reason(row, **section).startswith(f"a column is passed over: '{key}'; ")


PNG = b"\x89PNG\r\n\x1a\n..."
STILL: list[tuple[str, Any]] = [
    *(("Image", 7), ("IMAGE_2", 7), ("image1", 7), ("imgPath", 7), ("imageUrl", 7), ("photo", 7)),
    *(
        ("x", "a/b.PNG"),
        ("x", "https://a.b/c.jpeg?w=9"),
        ("x", ["a.webp"]),
        ("x", "data:image/png;base64,"),
    ),
    *(("x", PNG), ("x", {"bytes": PNG, "path": None}), ("x", {"bytes": None, "path": "a"})),
]
MOVING: list[tuple[str, Any]] = [
    *(("Video", 7), ("video_url", 7), ("audio2", 7), ("x", "a.mp4"), ("x", "a.wav")),
    ("x", {"bytes": b"..", "path": "a.mp3"}),
]


@pytest.mark.parametrize(("key", "value"), [*STILL, *MOVING])
def test_a_picture_or_film_is_known_by_any_spelling_of_its_name_and_by_what_it_is(
    key: str, value: Any
) -> None:
    row = {"q": "What?", "a": "A hat.", "shown": 7, key: value}
    section: dict[str, Any] = {"user": "{q}", "assistant": "{a}"}
    assert reason(row, **section).startswith(f"a column is passed over: '{key}'; ")
    assert read(row, **section, ignore=(key,)).images == ()
    section |= {"user": "<image>{q}", "images": ("shown",)}
    if (key, value) in STILL:
        assert read(row, **section).images == (7,)
    else:
        assert reason(row, **section).startswith(f"a column is passed over: '{key}'; ")


@pytest.mark.parametrize("value", ["See a.png", "v1.2", "a.txt", 7, {"path": "a"}, b"x", None, ""])
def test_a_column_that_holds_no_picture_may_be_passed_over(value: Any) -> None:
    row = {"q": "What?", "a": "A hat.", "other": value}
    assert read(row, user="{q}", assistant="{a}").images == ()


IN_PART: Values = {"path": "a.png", "page": 2}


@pytest.mark.parametrize(
    "row",
    [
        turn("<image>", "Ho", image=IN_PART),
        turn("<image>", "Ho", images=[{"image_url": IN_PART}]),
        {"messages": [{"role": "user", "content": [{"type": "image", "image": IN_PART}]}]},
        with_question("llava", "<image>", image=IN_PART),
        with_question("texts", "<image>", images=[IN_PART]),
    ],
)
def test_what_a_picture_says_beside_itself_is_refused_by_its_name(row: Values) -> None:
    if len(row.get("messages", ())) == 1:
        row = {"messages": [*row["messages"], {"role": "assistant", "content": "Ho"}]}
    assert reason(row).startswith("a key is not understood: 'page' of an image; ")
    assert read(row, ignore=("page",)).images


def test_a_picture_of_a_column_is_looked_at_too() -> None:
    section: dict[str, Any] = {"user": "<image>", "assistant": "{a}", "images": ("image",)}
    row = {"a": "Ho", "image": {"bytes": PNG, "path": None, "rotation": 90}}
    assert reason(row, **section).startswith("a key is not understood: 'rotation' of an image; ")


def test_an_object_of_nothing_is_nothing_as_tables_write_what_is_not_there() -> None:
    none = {"bytes": None, "path": None}
    text: Values = {"type": "text", "text": "Hi", "image": none, "image_url": {"url": None}}
    row = turn("", "Ho", image=none)
    row["messages"][0]["content"] = [text]
    assert read(row).images == () and read(row).messages[0]["content"] == "Hi"


def of_two(key: str, first: Any, last: Any = None) -> Values:
    row = turn("Hi", "Draft.")
    row["messages"] += turn("Again", "Final.")["messages"]
    row["messages"][1][key], row["messages"][3][key] = first, last
    return row


@pytest.mark.parametrize("key", TRAINED)
def test_a_turn_may_say_that_it_is_not_trained(key: str) -> None:
    for no in (0, 0.0, False):
        assert read(of_two(key, no)).untrained == {1}
        assert read(of_two(key, no)).last_trained == 3
        assert read(of_two(key, True, no)).last_trained == 1
    for yes in (1, 1.0, True, None):
        assert not read(of_two(key, yes, 1)).untrained
    for odd in (0.5, 2, "no", [0], -1):
        assert reason(of_two(key, odd)).startswith(f"a turn is trained or not: {key!r} is neither")
    asked = of_two(key, 1)
    asked["messages"][0][key] = True
    assert reason(asked).startswith(f"only answers are trained: {key!r} of the user")
    asked["messages"][0][key] = False
    assert not read(asked).untrained & {1, 3}


def test_marks_of_training_that_differ_are_refused() -> None:
    row = of_two("weight", 1)
    row["messages"][1]["train"] = False
    assert reason(row) == "a turn is trained or not: weight, train differ"


def test_parts_have_a_picture_or_a_text_and_their_pictures_come_in_order() -> None:
    def row(*parts: Values, **values: Any) -> Values:
        said = [{"role": "user", "content": list(parts)}, {"role": "assistant", "content": "Ho"}]
        return {"messages": said, **values}

    url = {"type": "image_url", "image_url": {"url": "a.png", "detail": "low"}}
    assert read(row(url)).images == ("a.png",)
    for key in ("url", "path", "base64"):
        assert read(row({"type": "image", key: "a.png"}, images=[])).images == ("a.png",)
    places = [{"type": "image", "index": k} for k in (0, 1)]
    assert read(row(*places, images=["a.png", "b.png"])).images == ("a.png", "b.png")
    assert reason(row(*places[::-1], images=["a.png", "b.png"])).startswith(
        "an image part is out of order: its index is 1"
    )
    both = {"type": "text", "text": "Hi", "image": "a.png"}
    assert reason(row(both)).startswith("a text part has a picture: ")
    assert reason(row(both | {"type": "image"})).startswith("an image part has a text: ")
    two = {"type": "image", "image": "a.png", "url": "b.png"}
    assert reason(row(two)).startswith("an image part has several images: ")
    strange = {"type": "image_url", "image_url": {"url": "a.png", "frame": 3}}
    assert reason(row(strange)).startswith("a key is not understood: 'frame' of an image; ")

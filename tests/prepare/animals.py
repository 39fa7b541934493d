"""Rows of chats for the hostile zoo (zoo.py): what they say, in which order, and how it is written.

An animal is a row that knows what must become of it.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations
from random import Random
from typing import Any

from phi3v.processing.keys import FILMS, PICTURES, SOUNDS, TRAINED
from phi3v.processing.prompt import STRAY_TAG
from tests.prepare.pictures import GOOD
from tests.prepare.references import Reference
from tests.tiny import turn

TAG = "<|image_1|>"
TAGS = "image tags do not name each image once: "
NO_TAG = "an answer holds an image tag: "
TURNS = "turns are not user, assistant in alternation: "
ROLE = "role is not one of system, user, assistant: "
PART = "a content part is neither text nor image: "
NO_PART = "an image part has no image: "
HALF = "a text holds half of a surrogate pair: "
LONG = "too many tokens: "
NOT_JSON = "the row is not valid JSON: "
NO_MESSAGES = "'messages' is not a list of messages"
TWICE = "the row is not valid JSON: an object has the key 'messages' twice"
NO_CONTENT = "a message has no 'role' and 'content' text"
KEY = "a key is not understood: "
STRAY = "a tag stands for nothing: "
MARK = "a turn is trained or not: "

# Texts that are nothing but text.
SPOKEN: list[str] = [
    *("".join(map(chr, range(1, 32))) + ".", "a\0b", "\x7f\x80\x85\x9f", "\ufeff\ufffe\U0010ffff"),
    *("\u202eevil\u202c", "\u2066x\u2069", "\u200b", "\u200d\u2060\u00ad", "Z\u0351\u0352" * 50),
    *(
        "\U0001f468\u200d\U0001f469",
        "\u2028\u2029x",
        "\u2581\u2581a",
        "\u0130\u01c5\ufb01",
        "\ue000",
    ),
    *("{title} {0} {}", "%s %n", "\\x00 \\ud83d \\", "</script>", "'; DROP", "=1+1", "x" * 1500),
    *("<|image_1", "<image", "image_1|>", "< i >"),
]
EMPTY = ("", " ", "\n\t\r", "\x1c\x1f", "\u3000\u2003\xa0\x85")
HALVES = ("\ud83d", "a\udc00b", "\udc00\ud83d")
IDS: list[Any] = [
    *(None, "", " ", 0, -7, 1.5, float("nan"), float("inf"), True, [], [1, "a"], {}, {"a": None}),
    *("a", "\n", "\0", "\u202e", "../../x", "x" * 5000, "\U0001f600", 10**40, "<|end|>", "None"),
]
PARTS: list[Any] = [
    *("x", None, 7, [], {}, {"type": "video"}, {"type": ["text"]}, {"type": "text"}),
    *({"type": "text", "text": 7}, {"type": "\n" * 999}),
]


@dataclass(frozen=True)
class Animal:
    """A row as it stands in its file (bytes: the line itself), and what must become of it.

    fate      GOOD, or what the reason of its rejection starts with
    pictures  of a good one: what its images are read from, in order of appearance
    answers   of a good one: what is trained, space around it apart
    untrained of a good one: how many answers are not
    """

    row: Any
    fate: str = GOOD
    pictures: tuple[bytes, ...] = ()
    answers: tuple[str, ...] = ("This.",)
    untrained: int = 0


def shown(image: Reference, row: Any) -> Animal:
    """A row whose one image is this."""
    return Animal(row, image.fate, (image.data,))


def chat(*turns: tuple[Any, Any], **values: Any) -> dict[str, Any]:
    """A row of messages: (role, content)."""
    return {"messages": [{"role": role, "content": text} for role, text in turns], **values}


def texts(tokens: Sequence[str]) -> Iterator[Animal]:
    """What users and assistants say: any text, all added tokens, nothing, too much."""
    for text in SPOKEN:
        yield Animal(turn(f"{text}.", text), answers=(text,))
    for token in tokens:
        if STRAY_TAG.search(token):
            yield Animal(turn(f"{token} x", "This."), STRAY)
            continue
        for text in (token, f" {token}\n{token} x", f"a{token}b", token * 20):
            yield Animal(turn(text, text), answers=(text,))
            yield Animal(chat(("system", text), ("user", "x"), ("assistant", "This.")))
    yield Animal(turn("Hi", " \n\t\x1c\xa0\u3000This. \u2003\n"))
    for half in HALVES:
        yield Animal(turn(half, "This."), HALF)
        yield Animal(turn("Hi", half), HALF)
        yield Animal(turn("Hi", "This.", id=half), HALF)
    for text in ("word " * 20_000, "x" * 100_000, "\U0001f600" * 50_000, "\u202e" * 100_000):
        yield Animal(turn(text, "This."), LONG)
        yield Animal(turn("Hi", text), LONG)
    for text in EMPTY:
        yield Animal(turn("Hi", text), "an answer is empty: ")
        yield Animal(turn(text, "This."), "a question is empty: ")


def orders_of_turns() -> Iterator[Animal]:
    """Roles in every order of up to four turns, and roles that are none."""
    for count in range(1, 5):
        for roles in permutations(["system", "user", "user", "assistant", "assistant"], count):
            turns = roles[roles[0] == "system" :]
            fate = GOOD if turns in (("user", "assistant"), ("user", "assistant") * 2) else TURNS
            answers = ("x",) * roles.count("assistant")
            yield Animal(chat(*((role, "x") for role in roles)), fate, answers=answers)
    yield Animal(chat(*[("user", "x")] * 3000), TURNS)
    for role in ("human", "", None, 7, [], {}, "USER", "\u202e", "x\n" * 3000, "<|user|>"):
        yield Animal(chat((role, "x"), ("assistant", "x")), ROLE)


def no_chats() -> Iterator[Animal]:
    """Rows whose messages or images are of another shape."""
    for messages in (None, [], {}, "x", 7, True, {"role": "user"}):
        yield Animal({"messages": messages}, NO_MESSAGES)
    yield from (Animal(row, NO_MESSAGES) for row in ({}, {"x": 1}, {"Messages": []}))
    for message in (None, "x", [], {}, 7):
        yield Animal({"messages": [message]}, NO_CONTENT)
    for content in (None, 7, 1.5, float("nan"), True, {}, {"text": "x"}):
        yield Animal(chat(("user", content), ("assistant", "x")), NO_CONTENT)
    for part in PARTS:
        yield Animal(chat(("user", [part]), ("assistant", "x")), PART)
    for part in ({"type": "image"}, {"type": "image_url", "image_url": {"url": None}}):
        yield Animal(chat(("user", [part]), ("assistant", "x")), NO_PART)
    for images in ({}, {"path": "x"}, "x.png", 7, True, float("inf")):
        yield Animal(turn("Hi", "This.", images=images), "'images' is a ")
    for images in (None, [], "", float("nan")):
        yield Animal(turn("Hi", "This.", images=images))
    for row in (None, True, 7, 1.5, "x", [], [1], [turn("Hi", "This.")]):
        kind = type(row).__name__
        yield Animal(row, f"the row is a {kind}, not an object with named fields")


def orders_of_images(one: Reference, two: Reference) -> Iterator[Animal]:
    """Tags that name two images, in either order, and tags that do not."""
    images, pair, answer = [one.value, two.value], (one.data, two.data), ("assistant", "This.")
    for first, second in (("1", "2"), ("01", "0002"), ("\u0661", "\u0662")):
        first, second = f"<|image_{first}|>", f"<|image_{second}|>"
        yield Animal(turn(f"{first}{second}", "This.", images=images), GOOD, pair)
        yield Animal(turn(f"x{second} {first}y", "This.", images=images), GOOD, pair[::-1])
        spread = chat(("system", second), ("user", first), answer, images=images)
        yield Animal(spread, GOOD, pair[::-1])
    parts = [
        {"type": "image"},
        {"type": "text", "text": "and"},
        {"type": "image", "image": images[0]},
    ]
    yield Animal(chat(("user", parts), answer, images=images[1:]), GOOD, pair[::-1])
    more = "'images' holds more than its parts use: "
    yield Animal(chat(("user", parts), answer, images=images), more)
    tagged = [TAG, "<|image_2|>", "<|image_3|>", "<|image_0|>", TAG * 2, TAG * 3000]
    tagged += ["<|image_1|><|image_3|>", "<|image_2|><|image_2|>", f"<|image_{'9' * 4000}|>"]
    for text in ("<image><image>", "<image> or\n<image>"):
        yield Animal(turn(f"Hi {text}", "This.", images=images), GOOD, pair)
    for text in (*tagged, "", "<image>", "<image>" * 3):
        yield Animal(turn(f"Hi {text}", "This.", images=images), TAGS)
    for text in tagged:
        yield Animal(turn(text, "This."), TAGS)
        yield Animal(turn("Hi", text, images=images), NO_TAG)
    many = "image tag has too many digits: "
    yield Animal(turn(f"<|image_{'1' * 5000}|>", "This.", images=images), many)


def keys_and_tags(image: Reference) -> Iterator[Animal]:
    """Rows that say more than their messages: by keys, by tags, by marks on their turns."""
    for key in PICTURES:
        held = [image.value] if key == "images" else image.value
        yield shown(image, turn("<image>What?", "This.", **{key: held}))
    two = {"image": image.value, "picture": image.value}
    yield Animal(turn("<image>", "This.", **two), "a row has its pictures twice: ")
    for key in (*FILMS, *SOUNDS, "tools", "history", "chosen", "rejected", "x", "", "\n", "\u202e"):
        yield Animal(turn("Hi", "This.", **{key: ["x"]}), KEY)
        yield Animal(turn("Hi", "This.", **{key: None}))
        named = turn("Hi", "This.")
        named["messages"][1][key] = {"x": 1}
        yield Animal(named, KEY)
    for tag in (
        "<video>",
        "<audio>",
        "<img>",
        "<|image|>",
        "<|video_1|>",
        "<ImageHere>",
        "<|image_|>",
    ):
        yield Animal(turn(f"What? {tag}", "This."), STRAY)
        yield Animal(turn("What?", f"This. {tag}"), STRAY)
    for key in TRAINED:
        chat = turn("Hi", "Not this.")
        chat["messages"] += turn("Again", "This.")["messages"]
        for value, fate in ((0, GOOD), (0.5, MARK), ("0", MARK), ([], GOOD), (-1, MARK)):
            marked = {"messages": [dict(message) for message in chat["messages"]]}
            marked["messages"][1][key] = value
            answers = ("This.",) if value == 0 else ("Not this.", "This.")
            yield Animal(marked, fate, answers=answers, untrained=2 - len(answers))
    yield Animal(turn("Hi", "This.", system="Be brief."))
    yield Animal(turn("Hi", "This.", system={"a": 1}), "'system' is not a text: ")


def lines(random: Random) -> Iterator[Animal]:
    """Lines of a JSONL file: in other encodings, cut off, nested, with what JSON does not know."""
    umlaut = json.dumps(turn("Gr\u00fc\u00dfe", "This."), ensure_ascii=False)
    yield Animal(b"\xef\xbb\xbf" + umlaut.encode())
    for encoding in ("latin-1", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp037"):
        yield Animal(umlaut.encode(encoding), NOT_JSON)
    yield Animal(umlaut.encode().replace(b"\xc3\xbc", b"\xed\xa0\xbd"), HALF)
    yield Animal(umlaut.encode().replace(b"\xc3\xbc", b"\xc0\xaf"), NOT_JSON)
    plain = json.dumps(turn("Hi", "This."))
    yield from (Animal(plain[:end].encode(), NOT_JSON) for end in range(1, len(plain)))
    for value in (_nested(50), "1" * 4000, "1e999", "NaN", "-Infinity", '"\\u0000"'):
        yield Animal(f'{{"meta": {value}, {plain[1:]}'.encode())
    # 1,000 frames are what Python's parser can nest, less those of its callers.
    deep = [_nested(depth) for depth in (200, *range(900, 1000, 9), 10_000)]
    for value in (*deep, '{"a":' * 10_000 + "1" + "}" * 10_000, "1" * 5000, "01", "'a'"):
        yield Animal(f'{{"x": {value}, {plain[1:]}'.encode(), NOT_JSON)
        yield Animal(f'{{"id": {value}, {plain[1:]}'.encode(), NOT_JSON)
    yield Animal(_nested(10_000).encode(), NOT_JSON)
    yield Animal(f'{{"messages": 7, {plain[1:]}'.encode(), TWICE)
    yield Animal(f'{plain[:-1]}, "messages": 7}}'.encode(), TWICE)
    for line in (b"\0" * 9, b"//", b"{},", b"{}{}", b"\xff" * 9, b"\\", b"undefined"):
        yield Animal(line, NOT_JSON)
    for _ in range(200):
        yield Animal(b"\xff" + random.randbytes(40).replace(b"\n", b""), NOT_JSON)


def _nested(depth: int) -> str:
    return "[" * depth + "]" * depth

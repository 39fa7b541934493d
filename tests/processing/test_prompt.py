"""Messages become ids and labels as the published template and processor make them."""

import re
from itertools import chain

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phi3v.errors import SampleError
from phi3v.processing.prompt import Message, encode, image_tags, label, render
from phi3v.sample import IGNORED
from tests.processing.tokens import tokenizer

# Without what would make a control token, and the tokenizer's own sign for a space.
LETTERS = st.characters(blacklist_categories=["Cs"], blacklist_characters="<|>\u2581")
TEXT = st.text(LETTERS, max_size=12)
CHAT: list[Message] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "<|image_1|>\nWhat?"},
    {"role": "assistant", "content": "A cat."},
]
U, A, E, X = 90, 91, 92, IGNORED  # <|user|>, <|assistant|>, <|end|>


@st.composite
def chats(draw: st.DrawFn) -> list[Message]:
    """One to three questions with their answers."""
    roles = ["user", "assistant"] * draw(st.integers(1, 3))
    if draw(st.booleans()):
        roles.insert(0, "system")
    return [{"role": role, "content": draw(TEXT)} for role in roles]


def test_a_chat_is_rendered_turn_by_turn() -> None:
    assert render(CHAT) == (
        "<|system|>\nBe brief.<|end|>\n<|user|>\n<|image_1|>\nWhat?<|end|>\n"
        "<|assistant|>\nA cat.<|end|>\n"
    )
    assert render(CHAT[:2], for_answer=True).endswith("What?<|end|>\n<|assistant|>\n")


@settings(deadline=None)
@given(chats())
def test_a_chat_is_rendered_as_by_the_tokenizers_template(chat: list[Message]) -> None:
    template = tokenizer().apply_chat_template
    assert render(chat) == template(chat, tokenize=False)
    asked = template(chat[:-1], tokenize=False, add_generation_prompt=True)
    assert render(chat[:-1], for_answer=True) == asked


def test_image_tags_are_read_in_order() -> None:
    assert image_tags("<|image_2|> a <|image_10|><|image_1|> <|image_|> <|image|>") == [2, 10, 1]


def test_a_tag_whose_number_python_does_not_read_is_refused() -> None:
    with pytest.raises(SampleError, match="^image tag has too many digits: "):
        image_tags(f"<|image_{'1' * 5000}|>")


@settings(deadline=None)
@given(st.data(), st.lists(TEXT, min_size=1, max_size=4))
def test_every_piece_between_images_is_tokenised_on_its_own(
    data: st.DataObject, pieces: list[str]
) -> None:
    images = len(pieces) - 1
    order = data.draw(st.permutations(range(1, images + 1)))
    counts = data.draw(st.lists(st.integers(1, 9), min_size=images, max_size=images))
    text = pieces[0] + "".join(
        f"<|image_{tag}|>{piece}" for tag, piece in zip(order, pieces[1:], strict=True)
    )
    alone = [tokenizer()(piece)["input_ids"] for piece in pieces]
    fills = [[-tag] * counts[tag - 1] for tag in order]
    expected = list(chain(alone[0], *chain(*zip(fills, alone[1:], strict=True))))
    assert encode(tokenizer(), text, counts) == expected
    assert all(piece[0] == tokenizer().convert_tokens_to_ids("<s>") for piece in alone)


def test_an_image_can_be_shown_twice() -> None:
    """As the published processor; a model needs its pixels twice then."""
    ids = encode(tokenizer(), "<|image_1|> <|image_1|>", [3])
    assert [token for token in ids if token < 0] == [-1] * 6


@pytest.mark.parametrize(
    ("text", "images", "message"),
    [
        (
            "<|image_1|> <|image_2|>",
            1,
            "image tags [1, 2] do not number 1 images; use <|image_1|> ",
        ),
        ("<|image_1|>", 2, "image tags [1] do not number 2 images; use <|image_1|> to <|image_2|>"),
        ("<|image_1|> <|image_3|>", 2, "image tags [1, 3] do not number 2 images"),
        ("<|image_0|> x", 1, "image tags [0] do not number 1 images"),
        ("no tag", 1, "image tags none do not number 1 images"),
        ("<|image_1|>", 0, "image tags [1] do not number 0 images"),
    ],
)
def test_tags_that_do_not_number_the_images_are_refused(
    text: str, images: int, message: str
) -> None:
    with pytest.raises(SampleError, match=re.escape(message)):
        encode(tokenizer(), text, [2] * images)


@pytest.mark.parametrize(
    ("ids", "labels"),
    [
        ([1, U, 5, E, A, 7, 8, E, 6], [X, X, X, X, X, 7, 8, E, X]),
        ([A, E], [X, E]),
        ([A, 7, E, U, 5, E, A, 8, E], [X, 7, E, X, X, X, X, 8, E]),
        ([A, 7, 8], [X, 7, 8]),  # an answer cut off
        ([1, U, -1, -1, 1, 5, E, A, 7, E], [X] * 8 + [7, E]),
        ([1, 5, E, 6, E], [X] * 5),
        ([], []),
    ],
)
def test_only_the_assistants_texts_and_their_ends_are_labelled(
    ids: list[int], labels: list[int]
) -> None:
    assert label(ids, A, E).tolist() == labels


@settings(deadline=None)
@given(chats())
def test_what_is_labelled_reads_as_the_answers(chat: list[Message]) -> None:
    reader = tokenizer()
    assistant, end = reader.convert_tokens_to_ids(["<|assistant|>", "<|end|>"])
    ids = encode(reader, render(chat), [])
    labels = label(ids, assistant, end)
    assert all(target in (IGNORED, token) for token, target in zip(ids, labels, strict=True))
    runs: list[list[int]] = [[]]
    for target in labels:
        if target != IGNORED:
            runs[-1].append(target)
            if target == end:
                runs.append([])
    answers = [turn["content"] for turn in chat if turn["role"] == "assistant"]
    said = [reader.decode(run[:-1]) for run in runs[:-1]]
    # <|assistant|> swallows white space behind it, and a decoded text loses its first space
    assert [text.lstrip() for text in said] == [text.lstrip() for text in answers]
    assert runs[-1] == []

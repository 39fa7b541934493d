"""From messages to token ids and labels, as the published chat template and processor make them.

    [{"role": "user", "content": "<|image_1|>\\nWhat?"}, {"role": "assistant", "content": "A cat."}]
    -> <|user|>\\n<|image_1|>\\nWhat?<|end|>\\n<|assistant|>\\nA cat.<|end|>\\n

The text is cut at the image tags and every piece tokenised on its own with a BOS, so that each
image is followed by token 1: that is what the published model was trained and served with.

A control token that somebody typed in a content, say <|end|>, is text to `encode_messages`; to
`encode`, which reads a rendered chat as published, it is a control token.
"""

import json
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, count
from typing import Any, TypedDict

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from phi3v.errors import SampleError
from phi3v.sample import IGNORED

IMAGE_TAG = re.compile(r"<\|image_(\d+)\|>")
PLAIN_TAG = "<image>"
# What other projects write where a picture, film or sound stands, in any case, with a number or
# attributes: <Image 1>, <|vision_start|>, <img src="a.png">, [IMG], &lt;image&gt;, ![](a.png).
# <|image_1|> is ours.
_WORD = r"(?:image|img|picture|photo|video|audio|sound|speech|vision)"
STRAY_TAG = re.compile(
    rf"(?!(?-i:<\|image_\d+\|>))(?:<|&lt;)[|/]*\s*(?:\w+_|(?:start|begin|end)of)?(?P<word>{_WORD})\w*"
    r"(?:[\s:=-]+\w[\w./-]*|\s+[\w:-]+\s*=[^<>]*)?\s*[|/\\]*(?:>|&gt;)"
    rf"|(?<![\w)(\]])\[/?(?P<square>{_WORD})(?:[\s_-]?\d+|(?-i:_[A-Z]+))?\]"
    r"|<im_(?:start|end|patch)>"
    r"|!\[[^\[\]]*\]\([^()\s]+(?:\s[^()]*)?\)",
    re.IGNORECASE,
)
LONG_TAG = 60  # characters of one that are shown
# What a control token may swallow beside it: white space by Unicode, not by `str.isspace`, which
# adds the separators \x1c to \x1f.
SPACE = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(
    map(chr, range(0x2000, 0x200B))
)


class Message(TypedDict):
    """One turn: who speaks (system, user, assistant) and what."""

    role: str
    content: str


def render(messages: Sequence[Message], for_answer: bool = False) -> str:
    """Render the published chat template; with `for_answer` the assistant's turn is opened.

    Source: `chat_template` of the published tokenizer_config.json.
    """
    return "".join(chain(*_segments(messages, for_answer)))


def _segments(messages: Sequence[Message], for_answer: bool) -> list[tuple[str, str]]:
    """The template's control tokens, each with the text up to the next one."""
    turns = [[(f"<|{m['role']}|>", f"\n{m['content']}"), ("<|end|>", "\n")] for m in messages]
    return [*chain(*turns), *([("<|assistant|>", "\n")] if for_answer else [])]


def image_tags(text: str) -> list[int]:
    """The numbers of the image tags in a text, in order of appearance.

    Raises: SampleError if Python does not read a number, for it has more than 4,300 digits.
    """
    try:
        return [int(number) for number in IMAGE_TAG.findall(text)]
    except ValueError as error:
        raise SampleError("image tag has too many digits: number the images 1, 2, ...") from error


def settle_tags(texts: Sequence[str], first: int = 1, as_text: Collection[str] = ()) -> list[str]:
    """Number the plain tags of a chat: the k-th <image> of all its texts is <|image_k|>.

    first    number of the first
    as_text  tags that are text here; <img> stands for each that is one, <img src="a.png">, too

    ["Is <image>", "or <image>?"] -> ["Is <|image_1|>", "or <|image_2|>?"]

    Raises: SampleError if numbered tags stand beside plain ones, or a tag is left that no picture
    answers to: <video>, <|image|>.
    """
    if not any(mark in text for text in texts for mark in ("<", "[", "&lt;")):
        return list(texts)
    if PLAIN_TAG not in as_text and any(PLAIN_TAG in text for text in texts):
        if any(IMAGE_TAG.search(text) for text in texts):
            raise SampleError(
                f"image tags are of two kinds: {PLAIN_TAG} and <|image_1|> in one row"
            )
        numbers = count(first)
        texts = [_numbered(text, numbers) for text in texts]
    for position, text in enumerate(texts):
        for tag in STRAY_TAG.finditer(text):
            if tag[0] not in as_text and _plain_form(tag) not in as_text:
                raise SampleError(
                    f"a tag stands for nothing: {tag[0][:LONG_TAG]} in message {position}; "
                    f"pictures stand where {PLAIN_TAG} or <|image_1|> is, films and sounds are not "
                    "read"
                )
    return list(texts)


def _plain_form(tag: re.Match[str]) -> str:
    """What a tag is called without number and attributes: <img>, [img], ![]()."""
    if word := tag["word"]:
        return f"<{word.lower()}>"
    if square := tag["square"]:
        return f"[{square.lower()}]"
    return "![]()" if tag[0].startswith("!") else tag[0]


def _numbered(text: str, numbers: Iterator[int]) -> str:
    head, *others = text.split(PLAIN_TAG)
    return head + "".join(f"<|image_{next(numbers)}|>{piece}" for piece in others)


def encode_messages(
    tokenizer: PreTrainedTokenizerFast,
    messages: Sequence[Message],
    tokens_of_image: Sequence[int],
    for_answer: bool = False,
) -> list[int]:
    """Tokenise a chat; the contents' words are text, whatever they look like, but for image tags.

    Equal to `encode(tokenizer, render(messages, for_answer), tokens_of_image)`, the published ids,
    where no content holds the text of an added token, which costs one search a content to know.

    Raises: SampleError if the tags are not 1..n for n images.
    """
    control = control_pattern(tokenizer)
    if any(control.search(message["content"]) for message in messages):
        return _encode_segments(tokenizer, _segments(messages, for_answer), tokens_of_image)
    return encode(tokenizer, render(messages, for_answer), tokens_of_image)


@lru_cache(maxsize=4)
def control_pattern(tokenizer: PreTrainedTokenizerFast) -> re.Pattern[str]:
    """Finds the text of any added token of a tokenizer."""
    added = sorted((str(t) for t in tokenizer.added_tokens_decoder.values()), key=len, reverse=True)
    return re.compile("|".join(re.escape(token) for token in added))


def encode(
    tokenizer: PreTrainedTokenizerFast, text: str, tokens_of_image: Sequence[int]
) -> list[int]:
    """Tokenise a rendered chat; the tag of image k becomes tokens_of_image[k-1] times -k.

    Raises: SampleError if the tags are not 1..n for n images.
    Source: Phi-3-V processing_phi3_v.py `_convert_images_texts_to_inputs`.
    """
    tags = _checked_tags(text, len(tokens_of_image))
    pieces = IMAGE_TAG.split(text)[::2]
    encoded: list[list[int]] = tokenizer(pieces, verbose=False)["input_ids"]
    fills = [[-tag] * tokens_of_image[tag - 1] for tag in tags]
    return list(chain(*chain(*zip(encoded, [*fills, []], strict=True))))


def _checked_tags(text: str, count: int) -> list[int]:
    tags = image_tags(text)
    if sorted(set(tags)) != list(range(1, count + 1)):
        advice = f"use <|image_1|> to <|image_{count}|>" if count else "give the images"
        raise SampleError(f"image tags {tags or 'none'} do not number {count} images; {advice}")
    return tags


@dataclass(frozen=True)
class _Parts:
    """A tokenizer taken apart: its added tokens by text, and a copy that knows none of them."""

    added: dict[str, dict[str, Any]]  # as in tokenizer.json: id, lstrip, rstrip
    plain: Tokenizer
    start: list[int]  # what every piece begins with, the BOS

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.plain.encode(text, add_special_tokens=False).ids
        return ids


@lru_cache(maxsize=4)
def _parts(tokenizer: PreTrainedTokenizerFast) -> _Parts:
    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    added = {token["content"]: token for token in definition["added_tokens"]}
    plain = definition | {"added_tokens": [], "truncation": None, "padding": None}
    return _Parts(added, Tokenizer.from_str(json.dumps(plain)), tokenizer("")["input_ids"])


def _encode_segments(
    tokenizer: PreTrainedTokenizerFast,
    segments: Sequence[tuple[str, str]],
    tokens_of_image: Sequence[int],
) -> list[int]:
    """Tokenise each segment's text on its own behind its control token, as the tokenizer does.

    Published ids without the search for added tokens, so those in the texts are not found.
    """
    _checked_tags("".join(chain(*segments)), len(tokens_of_image))
    parts = _parts(tokenizer)
    controls = [parts.added[control] for control, _ in segments]
    swallowed = [token["lstrip"] for token in controls[1:]] + [False]
    ids = [*parts.start]
    for (_, text), control, before_next in zip(segments, controls, swallowed, strict=True):
        text = text.lstrip(SPACE) if control["rstrip"] else text
        first, *others = IMAGE_TAG.split(text.rstrip(SPACE) if before_next else text)
        ids += [control["id"], *parts.encode(first)]
        for tag, piece in zip(map(int, others[::2]), others[1::2], strict=True):
            ids += [-tag] * tokens_of_image[tag - 1] + parts.start + parts.encode(piece)
    return ids


def label(input_ids: Sequence[int], assistant_id: int, end_id: int) -> np.ndarray:
    """Label what the assistant says: the tokens after each <|assistant|> up to its <|end|>.

    <|user|> \\n 4 <|end|> \\n <|assistant|> 7 8 <|end|> \\n  ->  only 7, 8 and their <|end|>

    Contents hold no control tokens as `encode_messages` gives them.

    returns  int32 (T,); -100 where nothing is trained
    """
    ids = np.asarray(input_ids, dtype=np.int32)
    opens, ends = ids == assistant_id, ids == end_id
    places = np.arange(len(ids))
    last = np.maximum.accumulate(np.where(opens | ends, places, -1))  # of the two, up to here
    is_open = np.append(False, (last >= 0) & opens[last])[:-1]  # before this token
    return np.where(is_open, ids, IGNORED).astype(np.int32)

"""From messages to token ids and labels, as the published chat template and processor make them.

    [{"role": "user", "content": "<|image_1|>\\nWhat?"}, {"role": "assistant", "content": "A cat."}]
    -> <|user|>\\n<|image_1|>\\nWhat?<|end|>\\n<|assistant|>\\nA cat.<|end|>\\n

The text is cut at the image tags and every piece tokenised on its own with a BOS, so that each
image is followed by token 1: that is what the published model was trained and served with.
"""

import re
from collections.abc import Sequence
from itertools import chain
from typing import TypedDict

from transformers import PreTrainedTokenizerFast

from phi3v.errors import SampleError
from phi3v.sample import IGNORED

IMAGE_TAG = re.compile(r"<\|image_(\d+)\|>")


class Message(TypedDict):
    """One turn: who speaks (system, user, assistant) and what."""

    role: str
    content: str


def render(messages: Sequence[Message], for_answer: bool = False) -> str:
    """Render the published chat template; with `for_answer` the assistant's turn is opened.

    Source: `chat_template` of the published tokenizer_config.json.
    """
    text = "".join(f"<|{m['role']}|>\n{m['content']}<|end|>\n" for m in messages)
    return text + "<|assistant|>\n" if for_answer else text


def image_tags(text: str) -> list[int]:
    """The numbers of the image tags in a text, in order of appearance."""
    return [int(number) for number in IMAGE_TAG.findall(text)]


def encode(
    tokenizer: PreTrainedTokenizerFast, text: str, tokens_of_image: Sequence[int]
) -> list[int]:
    """Tokenise a rendered chat; the tag of image k becomes tokens_of_image[k-1] times -k.

    Raises: SampleError if the tags are not 1..n for n images.
    Source: Phi-3-V processing_phi3_v.py `_convert_images_texts_to_inputs`.
    """
    tags = image_tags(text)
    if sorted(set(tags)) != list(range(1, len(tokens_of_image) + 1)):
        count = len(tokens_of_image)
        advice = f"use <|image_1|> to <|image_{count}|>" if count else "give the images"
        raise SampleError(f"image tags {tags or 'none'} do not number {count} images; {advice}")
    pieces = IMAGE_TAG.split(text)[::2]
    encoded: list[list[int]] = tokenizer(pieces)["input_ids"]
    fills = [[-tag] * tokens_of_image[tag - 1] for tag in tags]
    return list(chain(*chain(*zip(encoded, [*fills, []], strict=True))))


def label(input_ids: Sequence[int], assistant_id: int, end_id: int) -> list[int]:
    """Label what the assistant says: the tokens after each <|assistant|> up to its <|end|>.

    <|user|> \\n 4 <|end|> \\n <|assistant|> 7 8 <|end|> \\n  ->  only 7, 8 and their <|end|>

    Control tokens must not occur inside contents; `prepare` refuses rows where they do.
    """
    labels, answering = [], False
    for token in input_ids:
        labels.append(token if answering else IGNORED)
        answering = token == assistant_id or (answering and token != end_id)
    return labels

"""From a conversation to a sample: tokens, labels, canvases."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from phi3v.errors import SampleError
from phi3v.prepare.conversations import Conversation
from phi3v.processing import Phi3VProcessor
from phi3v.processing.decoding import Picture
from phi3v.processing.prompt import encode_messages, label
from phi3v.sample import IGNORED, Canvas, Sample

PIXEL_BYTES = 3


@dataclass(frozen=True)
class Tokens:
    """The tokens of a conversation whose pictures' sizes are known.

    input_ids, labels  int32 (T,)
    of_images          positions that each picture fills
    """

    input_ids: np.ndarray
    labels: np.ndarray
    of_images: tuple[int, ...]


class SampleBuilder:
    """Builds samples for one model; `max_tokens` per sample, None for no limit."""

    def __init__(self, processor: Phi3VProcessor, max_tokens: int | None) -> None:
        self.processor, self.max_tokens = processor, max_tokens
        self.assistant_id, self.end_id = control_ids(processor.tokenizer)
        self._layout = processor.num_crops, processor.crop_size, processor.never_upscale

    def tokens(self, conversation: Conversation, sizes: Sequence[tuple[int, int]]) -> Tokens:
        """Tokenise a conversation from its pictures' (width, height) alone.

        Raises: SampleError if it cannot be trained on as it stands.
        """
        count = self.processor.calc_num_image_tokens_from_image_size
        counts = tuple(count(width, height) for width, height in sizes)
        ids = encode_messages(self.processor.tokenizer, conversation.messages, counts)
        if self.max_tokens is not None and len(ids) > self.max_tokens:
            raise SampleError(f"too many tokens: {len(ids):,}, max_tokens is {self.max_tokens:,}")
        labels = label(ids, self.assistant_id, self.end_id)
        if conversation.untrained:
            self._leave_untrained(conversation, np.asarray(ids), labels)
        if not (labels != IGNORED).any():
            raise SampleError("no token is trained: the chat holds no answer that is to be trained")
        return Tokens(np.array(ids, dtype=np.int32), labels, counts)

    def _leave_untrained(
        self, conversation: Conversation, ids: np.ndarray, labels: np.ndarray
    ) -> None:
        """Take the labels off the answers that are not trained."""
        answers = enumerate(_answers(conversation), 1)
        numbers = [number for number, k in answers if k in conversation.untrained]
        labels[np.isin(np.cumsum(ids == self.assistant_id), numbers)] = IGNORED

    def build(
        self, conversation: Conversation, pictures: Sequence[Picture], provenance: dict[str, Any]
    ) -> tuple[Sample, Counter[str]]:
        """Encode a conversation and the canvases of its pictures; count what these needed.

        returns  the sample, and how many of its pictures have which of `pixels.TRAITS`
        Raises: SampleError if it cannot be trained on as it stands.
        """
        tokens = self.tokens(conversation, [(p.width, p.height) for p in pictures])
        traits: Counter[str] = Counter()
        canvases = []
        for picture in pictures:
            canvas, found = picture.canvas(*self._layout)
            canvases.append(canvas)
            traits.update(found)
        assert tuple(self.processor.canvas_tokens(c) for c in canvases) == tokens.of_images
        opened = np.flatnonzero(tokens.input_ids == self.assistant_id)
        last, answers = conversation.last_trained, _answers(conversation)
        meta: dict[str, Any] = {
            "prompt_length": int(opened[answers.index(last)]) + 1,
            "reference": conversation.messages[last]["content"],
            "trained_answers": [answer not in conversation.untrained for answer in answers],
        }
        if conversation.references:
            meta["references"] = list(conversation.references)
        sample = Sample(
            id=conversation.id,
            input_ids=tokens.input_ids,
            labels=tokens.labels,
            images=tuple(Canvas(canvas) for canvas in canvases),
            meta=meta | provenance,
        )
        return sample, traits


def _answers(conversation: Conversation) -> list[int]:
    """The positions of the answers among the messages."""
    return [k for k, message in enumerate(conversation.messages) if message["role"] == "assistant"]


def control_ids(tokenizer: PreTrainedTokenizerFast) -> tuple[int, int]:
    """The ids of <|assistant|> and <|end|>."""
    assistant, end = tokenizer.convert_tokens_to_ids(["<|assistant|>", "<|end|>"])
    return assistant, end


def canvas_bytes(processor: Phi3VProcessor, width: int, height: int) -> int:
    """Bytes of the canvas of a picture of width x height pixels."""
    return PIXEL_BYTES * processor.layout(width, height).grid.crops * processor.crop_size**2

"""From a conversation to a sample: tokens, labels, canvases."""

import re
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from phi3v.errors import SampleError
from phi3v.prepare.conversations import Conversation
from phi3v.prepare.images import load_image
from phi3v.processing import Phi3VProcessor
from phi3v.processing.prompt import encode, label, render
from phi3v.sample import Canvas, Sample


class SampleBuilder:
    """Builds samples for one model; `max_tokens` per sample, None for no limit."""

    def __init__(self, processor: Phi3VProcessor, image_root: Path, max_tokens: int | None) -> None:
        self.processor, self.image_root, self.max_tokens = processor, image_root, max_tokens
        self.assistant_id, self.end_id = control_ids(processor.tokenizer)
        self.controls = control_pattern(processor.tokenizer)

    def build(self, conversation: Conversation, provenance: dict[str, Any]) -> Sample:
        """Encode a conversation.

        Raises: SampleError if it cannot be trained on as it stands.
        """
        self._refuse_controls(conversation)
        pictures = [load_image(image, self.image_root) for image in conversation.images]
        canvases = [self.processor.canvas(picture) for picture in pictures]
        counts = [self.processor.canvas_tokens(canvas) for canvas in canvases]
        ids = encode(self.processor.tokenizer, render(conversation.messages), counts)
        if self.max_tokens is not None and len(ids) > self.max_tokens:
            raise SampleError(f"too many tokens: {len(ids):,}, max_tokens is {self.max_tokens:,}")
        input_ids = np.array(ids, dtype=np.int32)
        meta = {
            "prompt_length": int(np.flatnonzero(input_ids == self.assistant_id)[-1]) + 1,
            "reference": conversation.messages[-1]["content"],
        }
        return Sample(
            id=conversation.id,
            input_ids=input_ids,
            labels=np.array(label(ids, self.assistant_id, self.end_id), dtype=np.int32),
            images=tuple(Canvas(canvas) for canvas in canvases),
            meta=meta | provenance,
        )

    def _refuse_controls(self, conversation: Conversation) -> None:
        for message in conversation.messages:
            if found := self.controls.search(message["content"]):
                raise SampleError(f"a text holds a control token: {found[0]}, {message['role']}")


def control_ids(tokenizer: PreTrainedTokenizerFast) -> tuple[int, int]:
    """The ids of <|assistant|> and <|end|>."""
    assistant, end = tokenizer.convert_tokens_to_ids(["<|assistant|>", "<|end|>"])
    return assistant, end


def control_pattern(tokenizer: PreTrainedTokenizerFast) -> re.Pattern[str]:
    """Finds any added token of a tokenizer in a text."""
    added = sorted((str(t) for t in tokenizer.added_tokens_decoder.values()), key=len, reverse=True)
    return re.compile("|".join(re.escape(token) for token in added))

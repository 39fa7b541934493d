"""Answers by generation: greedy, batched, with a KV cache, explicit stop tokens.

    generator.answer(prompts)                        # in batches
    generator.stream(prompt, show=print)             # one, piece by piece

No row's answer depends on the rows it shares a batch with: rows that might cross the length where
the rotary factors change are answered alone. That holds for greedy answers; sampled ones share one
sequence of random numbers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from phi3v.errors import SampleError
from phi3v.evaluation.streaming import TextPieces
from phi3v.model import Phi3VForCausalLM
from phi3v.model.weights import STOP_TOKENS
from phi3v.progress import progress
from phi3v.sample import Canvas
from phi3v.views import ViewSettings, pixel_values


@dataclass(frozen=True)
class Prompt:
    """What is asked: ids (T,), image k's positions holding -k, and the canvases."""

    ids: np.ndarray
    images: tuple[Canvas, ...]


@dataclass(frozen=True)
class Sampling:
    """Tokens drawn at random: from the likeliest that make up `top_p` of the probability."""

    temperature: float = 1.0
    top_p: float = 1.0


@dataclass(frozen=True)
class Generator:
    """A model ready to answer; `max_new_tokens` per answer, `batch_rows` prompts at once.

    tick      is called before every batch; what it raises ends the answering
    sampling  None: the likeliest token each time
    """

    model: Phi3VForCausalLM
    tokenizer: PreTrainedTokenizerFast
    views: ViewSettings
    max_new_tokens: int
    batch_rows: int
    tick: Callable[[], None] = lambda: None
    sampling: Sampling | None = None

    def answer(
        self, prompts: Sequence[Prompt], name: str = "answer", quiet: bool = False
    ) -> list[str]:
        """Answer each prompt, in the order given."""
        answers = [""] * len(prompts)
        bar = progress(None, name, "row", total=len(prompts), disable=quiet)
        with bar, torch.inference_mode():
            for rows in self._batches(prompts):
                self.tick()
                texts = self._answer_batch([prompts[row] for row in rows])
                for row, text in zip(rows, texts, strict=True):
                    answers[row] = text
                bar.update(len(rows))
        return answers

    def _batches(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Rows by length, long ones that may change their rotary factors each alone."""
        lengths = [len(prompt.ids) for prompt in prompts]
        limit = self.model.config.original_max_position_embeddings - self.max_new_tokens
        rows = sorted(range(len(prompts)), key=lengths.__getitem__)
        short = [row for row in rows if lengths[row] <= limit]
        batches = [
            short[start : start + self.batch_rows]
            for start in range(0, len(short), self.batch_rows)
        ]
        return batches + [[row] for row in rows if lengths[row] > limit]

    def stream(self, prompt: Prompt, show: Callable[[str], None]) -> str:
        """Answer one prompt, giving `show` the text as it comes; returns what `answer` would.

        The pieces, put together, are the answer: characters of several tokens come whole.
        """
        self.tick()
        pieces = TextPieces(self.tokenizer, self.stop_ids, show)
        with torch.inference_mode():
            generated = self._generate([prompt], streamer=pieces)
        text = self._text(generated[0])
        pieces.finish(text)
        return text

    def check(self, prompt: Prompt) -> None:
        """Refuse a prompt that leaves no room for an answer.

        Raises: SampleError
        """
        limit = self.model.config.max_position_embeddings
        if len(prompt.ids) + self.max_new_tokens > limit:
            raise SampleError(
                f"prompt is too long: {len(prompt.ids):,} tokens and {self.max_new_tokens:,} of the"
                f" answer are more than the model's {limit:,}; shorten it, or show fewer pictures"
            )

    def _answer_batch(self, prompts: Sequence[Prompt]) -> list[str]:
        return [self._text(row) for row in self._generate(prompts)]

    def _generate(self, prompts: Sequence[Prompt], **settings: Any) -> list[list[int]]:
        """The tokens of each answer, and what pads it."""
        ids, mask = pad_left([prompt.ids for prompt in prompts], self.pad_id)
        device = self.model.device
        if sampling := self.sampling:
            draw = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
            settings |= {"do_sample": True, **draw}
        else:
            settings |= {"do_sample": False}
        generated = self.model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            **self._pictures([image for prompt in prompts for image in prompt.images]),
            max_new_tokens=self.max_new_tokens,
            eos_token_id=self.stop_ids,
            pad_token_id=self.pad_id,
            **settings,
        )
        answers: list[list[int]] = generated[:, ids.shape[1] :].tolist()
        return answers

    def _pictures(self, images: Sequence[Canvas]) -> dict[str, Tensor]:
        if not images:
            return {}
        canvases = [np.array(image.pixels) for image in images]
        size, device = self.views.crop_size, self.model.device
        slots = 1 + max(c.shape[0] * c.shape[1] // size**2 for c in canvases)
        values = pixel_values(canvases, slots, self.views)
        sizes = torch.tensor([canvas.shape[:2] for canvas in canvases])
        return {"pixel_values": values.to(device), "image_sizes": sizes.to(device)}

    def _text(self, ids: list[int]) -> str:
        stops = [position for position, token in enumerate(ids) if token in self.stop_ids]
        return self.tokenizer.decode(ids[: stops[0]] if stops else ids).strip()

    @property
    def stop_ids(self) -> list[int]:
        return [self.tokenizer.convert_tokens_to_ids(token) for token in STOP_TOKENS]

    @property
    def pad_id(self) -> int:
        return self.stop_ids[-1]


def pad_left(rows: Sequence[np.ndarray], pad_id: int) -> tuple[Tensor, Tensor]:
    """Stack prompts of different lengths: ids and attention mask, both (B, T) int64."""
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad_id)
    mask = torch.zeros(len(rows), width, dtype=torch.int64)
    for index, row in enumerate(rows):
        ids[index, width - len(row) :] = torch.from_numpy(row.astype(np.int64))
        mask[index, width - len(row) :] = 1
    return ids, mask

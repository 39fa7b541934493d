"""What a model says to held-out rows: one rank's share, asked in batches until the time is up."""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch

from phi3v.config.running import EvalSection
from phi3v.data.batch import collate, model_inputs
from phi3v.data.mixture import qualified_id
from phi3v.evaluation.controls import digest, exchange
from phi3v.evaluation.generation import Generator
from phi3v.evaluation.held_out import HeldOut, blind_prompt, prompt_of, question
from phi3v.evaluation.metrics import Answer
from phi3v.evaluation.metrics.names import UNSEEN
from phi3v.progress import progress
from phi3v.sample import IGNORED, Sample

TEACHER_FORCED = "teacher_forced_price_error"

Part = TypeVar("Part")


@dataclass(frozen=True)
class Job:
    """One rank's part in an evaluation: who is asked what, as number `rank` of `world_size`."""

    generator: Generator
    dataset: HeldOut
    settings: EvalSection
    rank: int = 0
    world_size: int = 1


@dataclass(frozen=True)
class Outcome:
    """One held-out row: what it asks, what it should say, what was said seeing and blind.

    references      all answers that are accepted; () means `reference` alone
    teacher_forced  see `say_teacher_forced`; None where no metric asks for it
    scores          of this row by metric; None where the row has no value
    pictures        how many are shown
    donor           the row whose pictures were shown instead; None where `blind` is None
    donor_reference what that row should say
    """

    row: int
    id: str
    prompt: str
    reference: str
    prediction: str
    blind: str | None
    references: tuple[str, ...] = ()
    teacher_forced: str | None = None
    scores: dict[str, float | None] = field(default_factory=dict)
    pictures: int = 0
    donor: int | None = None
    donor_reference: str | None = None

    @property
    def answer(self) -> Answer:
        """What was said seeing the pictures, as the metrics take it."""
        texts = self.id, self.reference, self.prediction
        return Answer(*texts, self.references, self.teacher_forced, self.prompt)

    @property
    def blind_answer(self) -> Answer | None:
        """What was said seeing another row's pictures; nothing teacher-forced was."""
        if self.blind is None:
            return None
        return Answer(self.id, self.reference, self.blind, self.references, prompt=self.prompt)

    @property
    def is_right(self) -> bool:
        """Whether the prediction is an accepted answer, letter by letter."""
        return self.prediction.strip() in [text.strip() for text in self.answer.accepted]


def answer_share(job: Job, rows: Sequence[int], seconds: float | None) -> list[Outcome]:
    """Answer this rank's share of the rows, seeing and blind; what is not begun in time is not.

    Each batch is asked twice in a row, so every row that is answered has its blind control.
    """
    lengths = job.dataset.tokens[list(rows)]
    mine = deal(lengths, job.rank, job.world_size)
    model = job.generator.model
    limit = model.config.original_max_position_embeddings - job.generator.max_new_tokens
    batches = cut(lengths[mine], job.settings.batch_rows, limit, is_mixed=seconds is not None)
    partners = _partners(job, rows)
    outcomes: list[Outcome] = []
    with progress(None, "evaluate", "row", total=len(mine), disable=job.rank > 0) as bar:
        for batch in within(seconds, batches):
            places = [int(mine[k]) for k in batch]
            outcomes += _answer_batch(job, rows, places, partners)
            bar.update(len(places))
    return outcomes


def deal(lengths: np.ndarray, rank: int, world_size: int) -> np.ndarray:
    """The places of a rank's rows, longest first: dealt there and back, so that all end together.

    lengths [9, 8, 7, 6, 5, 4] on 3 ranks -> [0, 5], [1, 4], [2, 3]
    """
    order = np.argsort(-lengths, kind="stable")
    rounds, turns = np.divmod(np.arange(len(order)), world_size)
    owners = np.where(rounds % 2, world_size - 1 - turns, turns)
    return np.asarray(order[owners == rank])


def cut(lengths: np.ndarray, batch_rows: int, limit: int, is_mixed: bool) -> list[np.ndarray]:
    """Rows, longest first, cut into batches of at most `batch_rows`; those over `limit` alone.

    is_mixed  batches in a fixed random order, of rows of any length: whenever the answering ends,
              the rows so far are a fair sample. Otherwise rows of a length go together, which pads
              least, but the long ones would be all that is answered
    """
    order = np.arange(len(lengths))
    if is_mixed:
        order = np.random.default_rng(0).permutation(order)
    short, alone = order[lengths[order] <= limit], order[lengths[order] > limit]
    together = np.array_split(short, -(-len(short) // batch_rows)) if len(short) else []
    placed = [
        ((number + 0.5) / len(group), batch)
        for group in (together, alone[:, None])
        for number, batch in enumerate(group)
    ]
    return [batch for _, batch in sorted(placed, key=lambda pair: pair[0])]


def within(seconds: float | None, parts: Iterable[Part]) -> Iterator[Part]:
    """Give part after part until the seconds are over, the first in any case; None: all."""
    end = None if seconds is None else time.monotonic() + seconds
    for number, part in enumerate(parts):
        if number and end is not None and time.monotonic() >= end:
            return
        yield part


def _partners(job: Job, rows: Sequence[int]) -> list[int | None]:
    if not job.settings.blind:
        return [None] * len(rows)
    samples = (job.dataset[row] for row in rows)
    shown = [(list(map(digest, prompt_of(s).images)), s.meta["reference"]) for s in samples]
    return exchange(*zip(*shown, strict=True)) if shown else []


def _answer_batch(
    job: Job, rows: Sequence[int], places: Sequence[int], partners: Sequence[int | None]
) -> list[Outcome]:
    generator, dataset = job.generator, job.dataset
    size, side = generator.views.crop_size, generator.model.config.image_side
    samples = {place: dataset[rows[place]] for place in places}
    donors = {p: dataset[rows[d]] for p in places if (d := partners[p]) is not None}
    seen = generator.answer([prompt_of(samples[p]) for p in places], quiet=True)
    asked = [blind_prompt(samples[p], donor, size, side) for p, donor in donors.items()]
    blind = dict(zip(donors, generator.answer(asked, quiet=True), strict=True))
    is_forced = any(map(is_teacher_forced, job.settings.metrics))
    return [
        Outcome(
            row=rows[place],
            id=qualified_id(dataset, rows[place]),
            prompt=question(sample, generator.tokenizer),
            reference=sample.meta["reference"],
            prediction=text,
            blind=blind.get(place),
            references=tuple(sample.meta.get("references") or ()),
            teacher_forced=say_teacher_forced(generator, sample) if is_forced else None,
            pictures=len(prompt_of(sample).images),
            donor=rows[partner] if (partner := partners[place]) is not None else None,
            donor_reference=donors[place].meta["reference"] if place in donors else None,
        )
        for (place, sample), text in zip(samples.items(), seen, strict=True)
    ]


def is_teacher_forced(name: str) -> bool:
    """Whether a metric reads teacher-forced answers, not generated ones."""
    return name.removesuffix(UNSEEN) == TEACHER_FORCED


@torch.inference_mode()
def say_teacher_forced(generator: Generator, sample: Sample) -> str:
    """The likeliest token at each place of the last answer, given the true text before it.

    The row ends with the answer's <|end|>. Taken are the predictions of the answer's tokens, of
    <|end|>, and of the token behind it, decoded as one text without special tokens. The public
    walkthrough decodes the prompt's predictions in front of them as well; the last word, which is
    all that its price error reads, is the same unless the whole answer is one word.

    Source: microsoft/Phi-3CookBook code/04.Finetuning/Phi-3-vision-Trainingscript.py `evaluate`.
    """
    generator.tick()
    stop = int(np.flatnonzero(sample.labels != IGNORED)[-1]) + 1  # behind <|end|>
    inputs = model_inputs(collate([sample]), generator.views, generator.model.device)
    embedded = generator.model.model.embed(
        inputs["input_ids"], inputs.get("views"), inputs.get("grids", ())
    )
    num_predicted = stop - sample.meta["prompt_length"] + 1
    logits = generator.model(
        inputs_embeds=embedded[:, :stop], logits_to_keep=num_predicted
    ).logits  # (1, T, V)
    return str(generator.tokenizer.decode(logits[0].argmax(-1), skip_special_tokens=True))

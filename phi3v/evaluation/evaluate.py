"""Ask a model the held-out rows, and ask them again with the pictures exchanged (blind control)."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from phi3v.config.running import EvalSection
from phi3v.data import Dataset
from phi3v.data.batch import collate, model_inputs
from phi3v.data.mixture import Mixture, open_datasets
from phi3v.errors import ConfigError
from phi3v.evaluation.generation import Generator, Prompt
from phi3v.evaluation.metrics import Answer, Pattern, Score, compile_pattern, find_metrics, score
from phi3v.evaluation.report import Example
from phi3v.sample import Sample, with_images

BLIND = "blind_"
EXAMPLES = 12  # rows shown in the report and the W&B table
Gather = Callable[[Any], list[Any]]


class Interrupted(Exception):
    """Raised by a generator's `tick`: this rank gives its share of an evaluation up."""


@dataclass(frozen=True)
class Outcome:
    """One held-out row: what it asks, what it should say, what was said seeing and blind."""

    row: int
    id: str
    prompt: str
    reference: str
    prediction: str
    blind: str | None


_Share = tuple[list[Outcome], np.ndarray]


@dataclass(frozen=True)
class Evaluation:
    """Scores by name (those of the blind control begin with blind_), loss, and every answer."""

    scores: dict[str, Score]
    loss: float
    outcomes: list[Outcome]
    dataset: Dataset | Mixture

    def metrics(self) -> dict[str, dict[str, Any]]:
        """The scores as they are written to files."""
        return {name: score.as_dict() for name, score in self.scores.items()}

    def examples(self, count: int = EXAMPLES) -> list[Example]:
        """The first rows, with their pictures, as people look at them."""
        return [
            Example(
                image=_first_picture(self.dataset[outcome.row]),
                prompt=outcome.prompt,
                reference=outcome.reference,
                prediction=outcome.prediction,
                blind=outcome.blind,
                is_right=outcome.prediction == outcome.reference,
            )
            for outcome in self.outcomes[:count]
        ]


def evaluate(
    generator: Generator,
    folders: Sequence[str],
    settings: EvalSection,
    rank: int = 0,
    world_size: int = 1,
    gather: Gather | None = None,
) -> Evaluation:
    """Answer `settings.rows` rows of a split of some datasets, shared among ranks, and score them.

    `gather` collects one object of every rank on each; all ranks return the same evaluation.
    Raises: ConfigError if the split has no rows or a metric does not fit; Interrupted on all ranks
    if one of them was.
    """
    dataset = open_held_out(folders, settings)
    rows = np.linspace(0, len(dataset) - 1, min(settings.rows, len(dataset))).round().astype(int)
    share: _Share | None = None
    with suppress(Interrupted):
        share = _answer_share(generator, dataset, rows, settings, rank, world_size)
    shares: list[_Share | None] = gather(share) if gather else [share]
    whole = [share for share in shares if share is not None]
    if len(whole) < len(shares):
        raise Interrupted
    merged = sorted((o for outcomes, _ in whole for o in outcomes), key=lambda o: o.row)
    losses = np.sum([loss for _, loss in whole], axis=0)
    return Evaluation(
        _scores(settings, folders, merged), float(losses[0] / losses[1]), merged, dataset
    )


def _answer_share(
    generator: Generator,
    dataset: Dataset | Mixture,
    rows: np.ndarray,
    settings: EvalSection,
    rank: int,
    world_size: int,
) -> _Share:
    """Every `world_size`-th of the rows, answered; the sum of their losses and trained tokens."""
    partners = exchange([len(dataset[int(row)].images) for row in rows])
    mine = range(rank, len(rows), world_size)
    samples = [dataset[int(rows[i])] for i in mine]
    donors = [None if partners[i] is None else dataset[int(rows[partners[i]])] for i in mine]
    seen = generator.answer([prompt_of(s) for s in samples], "evaluate", quiet=rank > 0)
    blind = _answer_blind(generator, samples, donors, rank) if settings.blind else {}
    outcomes = [
        Outcome(
            int(rows[i]), s.id, _question(generator, s), s.meta["reference"], text, blind.get(k)
        )
        for k, (i, s, text) in enumerate(zip(mine, samples, seen, strict=True))
    ]
    return outcomes, _total_loss(generator, samples)


def open_held_out(folders: Sequence[str], settings: EvalSection) -> Dataset | Mixture:
    """Open the split to be answered, of the datasets that have it.

    Call it before a run starts, to refuse early what cannot work.

    Raises: ConfigError if there is nothing to answer, or a metric does not fit the pattern.
    """
    find_metrics(settings.metrics, _pattern(settings))
    if not settings.rows:
        raise ConfigError("eval.rows is 0, so there is nothing to evaluate; set it above 0")
    dataset = open_datasets(folders, settings.split, is_optional=True)
    if not len(dataset):
        raise ConfigError(
            f"{', '.join(folders)} has no rows in split '{settings.split}'; prepare it with a "
            "larger split.validation, or set eval.rows=0"
        )
    return dataset


def _pattern(settings: EvalSection) -> Pattern | None:
    return compile_pattern(settings.pattern) if settings.pattern else None


def prompt_of(sample: Sample) -> Prompt:
    """A sample's conversation up to its last answer."""
    ids = sample.prompt_ids
    return Prompt(ids, sample.images[: _images_in(ids)])


def blind_prompt(sample: Sample, donor: Sample, crop_size: int, side: int) -> Prompt:
    """The same question about another sample's pictures."""
    ids = sample.prompt_ids
    images = donor.images[: _images_in(ids)]
    return Prompt(with_images(ids, images, crop_size, side), images)


def exchange(image_counts: Sequence[int]) -> list[int | None]:
    """Whose pictures each row gets: half way round among the rows with as many pictures.

    [1, 1, 0, 1, 1] -> [3, 4, None, 0, 1]; None where there is no picture, or nobody to swap with.
    """
    partners: list[int | None] = [None] * len(image_counts)
    for count in set(image_counts) - {0}:
        rows = [row for row, c in enumerate(image_counts) if c == count]
        if len(rows) > 1:
            for place, row in enumerate(rows):
                partners[row] = rows[(place + len(rows) // 2) % len(rows)]
    return partners


def _answer_blind(
    generator: Generator, samples: Sequence[Sample], donors: Sequence[Sample | None], rank: int
) -> dict[int, str]:
    size, side = generator.views.crop_size, generator.model.config.image_side
    pairs = [(k, s, d) for k, (s, d) in enumerate(zip(samples, donors, strict=True)) if d]
    prompts = [blind_prompt(sample, donor, size, side) for _, sample, donor in pairs]
    answers = generator.answer(prompts, "evaluate blind", quiet=rank > 0)
    return {k: answer for (k, _, _), answer in zip(pairs, answers, strict=True)}


def _scores(
    settings: EvalSection, folders: Sequence[str], outcomes: Sequence[Outcome]
) -> dict[str, Score]:
    pattern = _pattern(settings)
    needs_train = any(name.endswith("_unseen") for name in settings.metrics)
    seen = open_datasets(folders, "train") if needs_train else ()
    train = [sample.meta["reference"] for sample in seen]
    answers = [Answer(o.id, o.reference, o.prediction) for o in outcomes]
    scores = score(settings.metrics, answers, pattern, train)
    blind = [Answer(o.id, o.reference, o.blind) for o in outcomes if o.blind is not None]
    if blind:
        of_blind = score(settings.metrics, blind, pattern, train)
        scores |= {BLIND + name: value for name, value in of_blind.items()}
    return scores


def _total_loss(generator: Generator, samples: Sequence[Sample]) -> np.ndarray:
    """Summed loss and number of trained tokens of some samples."""
    total, count = 0.0, 0
    with torch.inference_mode():
        for sample in samples:
            generator.tick()
            batch = collate([sample])
            inputs = model_inputs(batch, generator.views, generator.model.device)
            total += float(generator.model(**inputs))
            count += batch.label_tokens
    return np.array([total, count])


def _question(generator: Generator, sample: Sample) -> str:
    """A prompt in words, each image as one <|image|>."""
    ids = sample.prompt_ids
    starts = np.flatnonzero((ids < 0) & (np.diff(ids, prepend=1) != 0))
    image = generator.tokenizer.convert_tokens_to_ids("<|image|>")
    shown = np.where(ids < 0, image, ids)[(ids >= 0) | np.isin(np.arange(len(ids)), starts)]
    return generator.tokenizer.decode(shown.tolist())


def _images_in(ids: np.ndarray) -> int:
    return int(max(0, -ids.min())) if len(ids) else 0


def _first_picture(sample: Sample) -> np.ndarray | None:
    return np.array(sample.images[0].pixels) if sample.images else None

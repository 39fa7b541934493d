"""Held-out rows: which are taken, what each asks, and what it asks about other pictures."""

from collections.abc import Collection, Sequence
from functools import cache
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerFast

from phi3v.config.names import nearest
from phi3v.config.running import EvalSection
from phi3v.data import Dataset
from phi3v.data.mixture import Mixture, open_datasets
from phi3v.errors import ConfigError
from phi3v.evaluation.generation import Prompt
from phi3v.evaluation.metrics import Answer, Pattern, compile_pattern, find_metrics
from phi3v.evaluation.metrics.answers import check_json, misfit
from phi3v.evaluation.metrics.names import JSON, UNSEEN, Metric
from phi3v.evaluation.metrics.own import is_own, own_value, takes_prompt
from phi3v.evaluation.metrics.structured import json_paths
from phi3v.sample import Sample, with_images

HeldOut = Dataset | Mixture


def open_held_out(folders: Sequence[str], settings: EvalSection) -> HeldOut:
    """Open the split to be answered, of the datasets that have it.

    Call it before a run starts, to refuse early what cannot work.

    Raises: ConfigError if there is nothing to answer, a metric does not fit the pattern, a
    reference is not what a metric reads, or a metric of the user's own fails; ShardError if no
    dataset has the split.
    """
    metrics = find_metrics(settings.metrics, pattern_of(settings))
    if not settings.rows:
        raise ConfigError("eval.rows is 0, so there is nothing to evaluate; set it above 0")
    dataset = open_datasets(folders, settings.split, is_optional=True)
    if not len(dataset):
        raise ConfigError(
            f"{', '.join(folders)} has no rows in split '{settings.split}'; prepare it with a "
            "larger split.validation, or set eval.rows=0"
        )
    if _needs_train(settings):
        open_datasets(folders, "train")
    _check_references(dataset, settings, metrics)
    return dataset


def _check_references(dataset: HeldOut, settings: EvalSection, metrics: Sequence[Metric]) -> None:
    """Refuse a reference that a metric cannot read, naming the folder and row that hold it.

    The user's own metrics are tried on the first row, as if it were answered right.
    """
    pattern = pattern_of(settings)
    needs_json = any(metric.needs_json for metric in metrics)
    paths: set[str] = set()
    own = [metric.kind for metric in metrics if is_own(metric.kind)]
    for number, row in enumerate(spread(len(dataset), settings.rows)):
        if not (pattern or needs_json or (own and number == 0)):
            return
        meta = dataset.read_meta(row)
        reference, references = meta["reference"], tuple(meta.get("references") or ())
        sample_id = dataset.read_id(row)
        place = f"{_folder_of(dataset, row)}, split '{settings.split}', row '{sample_id}'"
        if pattern and pattern.parse(reference) is None:
            raise misfit(place, reference, pattern)
        if needs_json:
            check_json(place, (reference, *references))
            paths |= {path for text in references or (reference,) for path in json_paths(text)}
        if number == 0:
            _try_own(own, Answer(sample_id, reference, reference, references))
    _check_paths(metrics, paths)


def _try_own(names: Sequence[str], answer: Answer) -> None:
    """Ask the user's functions about an answer, but for those that want its prompt in words."""
    for name in names:
        if not takes_prompt(name):
            own_value(name, answer)


def _check_paths(metrics: Sequence[Metric], paths: Collection[str]) -> None:
    for metric in metrics:
        if metric.is_json and metric.field is not None and metric.field not in paths:
            raise ConfigError(
                f"eval.metrics has '{JSON}{metric.field}_accuracy', but no reference of the rows "
                f"has the field {metric.field}; {nearest(metric.field, sorted(paths))}"
            )


def _folder_of(dataset: HeldOut, row: int) -> Path:
    parts = zip(dataset.datasets, dataset.parts, strict=True)
    return next(part.folder for part, (_, behind, _) in parts if row < behind)


def pattern_of(settings: EvalSection) -> Pattern | None:
    """What an answer looks like, if the recipe says so."""
    return compile_pattern(settings.pattern) if settings.pattern else None


def train_references(folders: Sequence[str], settings: EvalSection) -> frozenset[str]:
    """The answers of the training split, if a metric asks which values are new."""
    return _references_of(tuple(folders)) if _needs_train(settings) else frozenset()


@cache
def _references_of(folders: tuple[str, ...]) -> frozenset[str]:
    """Kept: every evaluation of a run asks for them, and it takes a pass over the split."""
    train = open_datasets(folders, "train")
    return frozenset(train.read_meta(row)["reference"] for row in range(len(train)))


def _needs_train(settings: EvalSection) -> bool:
    return any(name.endswith(UNSEEN) for name in settings.metrics)


def spread(total: int, count: int | None) -> list[int]:
    """`count` of `total` rows, evenly spaced from the first to the last; all for None.

    (10, 4) -> [0, 3, 6, 9]
    """
    chosen = total if count is None else min(count, total)
    return [int(row) for row in np.linspace(0, total - 1, chosen).round()]


def prompt_of(sample: Sample) -> Prompt:
    """A sample's conversation up to its last answer."""
    ids = sample.prompt_ids
    return Prompt(ids, sample.images[: _images_in(ids)])


def blind_prompt(sample: Sample, donor: Sample, crop_size: int, side: int) -> Prompt:
    """The same question about another sample's pictures."""
    ids = sample.prompt_ids
    images = donor.images[: _images_in(ids)]
    return Prompt(with_images(ids, images, crop_size, side), images)


def question(sample: Sample, tokenizer: PreTrainedTokenizerFast) -> str:
    """A prompt in words, each image as one <|image|>."""
    ids = sample.prompt_ids
    starts = np.flatnonzero((ids < 0) & (np.diff(ids, prepend=1) != 0))
    image = tokenizer.convert_tokens_to_ids("<|image|>")
    shown = np.where(ids < 0, image, ids)[(ids >= 0) | np.isin(np.arange(len(ids)), starts)]
    return str(tokenizer.decode(shown.tolist()))


def _images_in(ids: np.ndarray) -> int:
    return int(max(0, -ids.min())) if len(ids) else 0

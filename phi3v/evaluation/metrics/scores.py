"""From answers to scores: each metric over all rows with its interval, and row by row."""

from collections.abc import Callable, Collection, Hashable, Sequence

import numpy as np

from phi3v.evaluation.metrics import fields, structured, text
from phi3v.evaluation.metrics.answers import Answer, Row, read_rows
from phi3v.evaluation.metrics.bleu import bleu_of, row_counts
from phi3v.evaluation.metrics.intervals import LIMITS, UNIT, Score, interval, resample
from phi3v.evaluation.metrics.names import UNSEEN, Metric, Subject, find_metrics, is_bounded
from phi3v.evaluation.metrics.own import is_own, own_value
from phi3v.evaluation.metrics.patterns import Pattern
from phi3v.evaluation.metrics.vqa import vqa_accuracy

OF_TEXT: dict[str, Callable[[str, str], float]] = {
    "exact_match": text.exact_match,
    "accuracy": text.accuracy,
    "anls": text.anls,
    "relaxed_accuracy": text.relaxed_accuracy,
    "rouge_l": text.rouge_l,
    "json_parse_rate": structured.parse_rate,
    "json_field_f1": structured.field_f1,
    "json_field_accuracy": structured.field_accuracy,
    "json_exact_match": structured.exact_match,
}
OF_FIELD: dict[str, Callable[[fields.Value, fields.Value | None], float | None]] = {
    "accuracy": fields.accuracy,
    "exact_match": fields.exact_match,
    "similarity": fields.similarity,
    "mae": fields.mae,
    "mape": fields.mape,
    "log_error": fields.log_error,
}
BLEU = "bleu"

Values = list[float | None]
"""A metric of each row; None where the row has none, or is not counted."""


def score(
    metrics: Sequence[str],
    answers: Sequence[Answer],
    pattern: Pattern | None,
    train_references: Collection[str] = (),
    seed: int = 0,
) -> dict[str, Score]:
    """Compute each named metric over the answers.

    `train_references` are the answers of the training split, for `_unseen`; one that does not fit
    the pattern has no field values. A row that has no value is left out: `n` is the number of rows
    counted.

    Raises: ConfigError for an unknown metric, for no answers, for a reference that does not fit the
    pattern or is no JSON where a metric asks for it, and for what a metric of the user's own gives.
    """
    columns = value_columns(metrics, answers, pattern, train_references)
    return {
        name: corpus_bleu(counted_rows(answers, values), seed)
        if is_bleu(name)
        else interval(
            [value for value in values if value is not None],
            UNIT if is_bounded(name) else None,
            seed,
        )
        for name, values in columns.items()
    }


def row_scores(
    names: Sequence[str],
    answers: Sequence[Answer],
    pattern: Pattern | None,
    train_references: Collection[str] = (),
) -> list[dict[str, float | None]]:
    """Compute each named metric for each answer by itself; None where a row has no value.

    The `bleu` of a row is its own, of which the BLEU of all rows is no mean. Raises as `score`.
    """
    columns = value_columns(names, answers, pattern, train_references)
    return [
        dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
    ] or [{} for _ in answers]


def value_columns(
    names: Sequence[str],
    answers: Sequence[Answer],
    pattern: Pattern | None,
    train_references: Collection[str] = (),
) -> dict[str, Values]:
    """Compute each metric of each answer. Raises as `score`."""
    chosen = find_metrics(names, pattern)
    rows = read_rows(answers, pattern, any(metric.needs_json for metric in chosen))
    return {
        name: _only_unseen(metric, rows, _values(metric, rows), pattern, train_references)
        if metric.is_unseen
        else _values(metric, rows)
        for name, metric in zip(names, chosen, strict=True)
    }


def is_bleu(name: str) -> bool:
    """Whether a metric is BLEU, which is no mean over rows."""
    return name.removesuffix(UNSEEN) == BLEU


def counted_rows(answers: Sequence[Answer], values: Values) -> list[Answer]:
    """Keep the answers that have a value."""
    return [answer for answer, value in zip(answers, values, strict=True) if value is not None]


def corpus_bleu(answers: Sequence[Answer], seed: int = 0) -> Score:
    """Compute the BLEU of all answers together, and its 95 % interval over resampled rows."""
    if not answers:
        return Score(None, None, None, 0)
    total, sums = resample(row_counts(answers), seed)
    low, high = np.percentile([bleu_of(counts) for counts in sums], LIMITS)
    return Score(bleu_of(total), float(low), float(high), len(answers))


def content(subject: Subject, text: str, pattern: Pattern | None) -> Hashable:
    """What a text holds that a metric is about, a field or all of it; None if it has no such field.

    Equal for two texts that say the same of it.
    """
    field, is_json = subject
    if field is None:
        return text.strip()
    if is_json:
        return structured.path_values(text, field)
    parts = pattern.parse(text) if pattern else None
    return None if parts is None else parts[field]


def _only_unseen(
    metric: Metric,
    rows: Sequence[Row],
    values: Values,
    pattern: Pattern | None,
    train_references: Collection[str],
) -> Values:
    """Take the values away from rows whose field, or whole text, is in a training answer."""
    old = {content(metric.subject, text, pattern) for text in train_references}
    contents = (content(metric.subject, row.answer.reference, pattern) for row in rows)
    return [None if held in old else value for held, value in zip(contents, values, strict=True)]


def _values(metric: Metric, rows: Sequence[Row]) -> Values:
    if metric.kind == BLEU:
        return [bleu_of(counts, is_row=True) for counts in row_counts([r.answer for r in rows])]
    return [_value(metric, row) for row in rows]


def _value(metric: Metric, row: Row) -> float | None:
    """Return the metric of one row; None where it has none."""
    if is_own(metric.kind):
        return own_value(metric.kind, row.answer)
    if metric.is_json:
        return _json_value(metric, row.answer)
    if metric.field is not None:
        assert row.truth is not None
        guess = None if row.guess is None else row.guess[metric.field]
        return OF_FIELD[metric.kind](row.truth[metric.field], guess)
    if metric.kind == "parse_rate":
        return float(row.guess is not None)
    answer = row.answer
    if metric.kind == "teacher_forced_price_error":
        return _price_error(answer)
    if metric.kind == "vqa_accuracy":
        return vqa_accuracy(answer.prediction, answer.accepted)
    of_text = OF_TEXT[metric.kind]
    return max(of_text(answer.prediction, accepted) for accepted in answer.accepted)


def _json_value(metric: Metric, answer: Answer) -> float | None:
    """Whether a field of JSON is right, by the best of the accepted answers that have it."""
    assert metric.field is not None
    values = [
        structured.path_accuracy(answer.prediction, accepted, metric.field)
        for accepted in answer.accepted
    ]
    return max((value for value in values if value is not None), default=None)


def _price_error(answer: Answer) -> float | None:
    """The walkthrough's |parsed - actual|; None where no teacher-forced text was asked for."""
    if answer.teacher_forced is None:
        return None
    return abs(text.last_price(answer.teacher_forced) - text.last_price(answer.reference))

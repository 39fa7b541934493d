"""Score generated answers against references, with a 95 % interval on every number.

    pattern = compile_pattern("Product: {title}, Category: {category}, Full Price: {price:float}")
    scores = score(["category_accuracy", "price_mape"], answers, pattern)
    scores["category_accuracy"].as_dict()    # {"value": 0.91, "low": 0.87, "high": 0.95, "n": 256}

The pattern turns an answer into fields; metrics are named after them:

    exact_match                               the whole text equals the reference
    parse_rate                                the prediction fits the pattern
    <field>_accuracy, <field>_exact_match     the field equals that of the reference
    <field>_mape                              |prediction - reference| / |reference|, floats only
    <any of these>_unseen                     only rows whose value is new: the field's value (the
                                              whole text for the first two) is in no training answer

A prediction that does not fit the pattern is wrong in every field, and in `_mape` it counts as an
error of 1.0 (100 %). The model may do worse than that by writing a number, so read `_mape` beside
`parse_rate`. Rates and relative errors are fractions.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from string import Formatter

import numpy as np

from phi3v.errors import ConfigError

NUM_RESAMPLES = 1000
UNSEEN = "_unseen"
UNPARSED_ERROR = 1.0
"""Relative error of a prediction that does not fit the pattern."""

# At most 15 digits on each side, which a float64 holds: a model that repeats a digit for ever gives
# an answer that does not parse, rather than a mean of infinity.
_REGEX = {
    str: r".*?",
    float: r"[-+]?(?:[0-9]{1,3}(?:,[0-9]{3}){1,4}|[0-9]{1,15})(?:\.[0-9]{1,15})?",
}

Fields = Mapping[str, str | float]


@dataclass(frozen=True)
class Answer:
    """What the model said about one held-out row, and what it should have said."""

    id: str
    reference: str
    prediction: str


@dataclass(frozen=True)
class Score:
    """The mean of a metric over `n` rows and its 95 % interval; all None where n is 0."""

    value: float | None
    low: float | None
    high: float | None
    n: int

    def as_dict(self) -> dict[str, float | int | None]:
        """Return the entry of summary.json; never NaN."""
        return asdict(self)


@dataclass(frozen=True)
class Pattern:
    """The form of an answer: literal text with named fields. Made by `compile_pattern`."""

    template: str
    fields: Mapping[str, type]
    regex: re.Pattern[str]

    def parse(self, text: str) -> dict[str, str | float] | None:
        """Read the fields of a text; None where the text as a whole does not fit.

        White space around the text is ignored; a float field reads "1,250" as 1250.0.
        """
        match = self.regex.fullmatch(text.strip())
        if match is None:
            return None
        found = match.groupdict()
        return {
            name: float(found[name].replace(",", "")) if kind is float else found[name]
            for name, kind in self.fields.items()
        }


def compile_pattern(template: str) -> Pattern:
    """Compile "Product: {title}, Price: {price:float}" into a `Pattern`.

    A field is `{name}`, `{name:str}` or `{name:float}`; all else is literal, `{{` and `}}` are
    braces. A str field is as short as the text after it allows, and may be empty.

    Raises: ConfigError naming the template and what is wrong with it.
    """
    fields: dict[str, type] = {}
    regex = ""
    for literal, name, kind in _split(template.strip()):
        regex += re.escape(literal)
        if name is None:
            continue
        if fields and not literal:
            raise _refusal(template, f"no text between {{{name}}} and the field before it")
        if name in fields:
            raise _refusal(template, f"the field {{{name}}} twice")
        fields[name] = _field_type(template, name, kind)
        regex += f"(?P<{name}>{_REGEX[fields[name]]})"
    if not fields:
        raise _refusal(template, "no field")
    return Pattern(template.strip(), fields, re.compile(regex, re.DOTALL))


def score(
    metrics: Sequence[str],
    answers: Sequence[Answer],
    pattern: Pattern | None,
    train_references: Collection[str] = (),
    seed: int = 0,
) -> dict[str, Score]:
    """Compute each named metric over the answers.

    `train_references` are the answers of the training split, for `_unseen`; one that does not fit
    the pattern has no field values. A row whose reference is 0 has no relative error, so `_mape`
    leaves it out: `n` is the number of rows counted.

    Raises: ConfigError for an unknown metric, for no answers, and for a reference that does not
    fit the pattern.
    """
    chosen = find_metrics(metrics, pattern)
    if not answers:
        raise ConfigError(
            "the evaluation split has no rows: got 0 answers to score; give it some with split in "
            "the dataset recipe and prepare again, or choose another split"
        )
    rows = [_read_row(answer, pattern) for answer in answers]
    seen = [(text.strip(), _parse(text, pattern)) for text in train_references]
    return {
        name: interval(_values(metric, rows, seen), seed)
        for name, metric in zip(metrics, chosen, strict=True)
    }


def interval(values: Sequence[float], seed: int = 0) -> Score:
    """Return the mean of the values and its 95 % bootstrap percentile interval.

    A resample is drawn as counts of the distinct values, which has the distribution of drawing
    rows with replacement: 2 numbers per resample for a rate, whatever the rows, and at most n for
    a relative error (n = 10,000: 80 MB). Every call seeds afresh, so the interval of a metric
    does not depend on which others are computed.

    Source: B. Efron, Bootstrap methods: another look at the jackknife, 1979 (percentile method).
    """
    n = len(values)
    if n == 0:
        return Score(None, None, None, 0)
    distinct, counts = np.unique(np.asarray(values, dtype=np.float64), return_counts=True)
    draws = np.random.default_rng(seed).multinomial(n, counts / n, size=NUM_RESAMPLES)
    means = draws @ distinct / n  # (NUM_RESAMPLES,)
    low, high = np.percentile(means, [2.5, 97.5])
    return Score(float(counts @ distinct / n), float(low), float(high), n)


@dataclass(frozen=True)
class Metric:
    """A metric's name taken apart: `price_mape_unseen` is Metric("mape", "price", True)."""

    kind: str
    field: str | None = None
    is_unseen: bool = False


def find_metrics(names: Sequence[str], pattern: Pattern | None) -> list[Metric]:
    """Look up metric names; call it before a run starts to refuse a wrong name early.

    Raises: ConfigError naming the metric and the known names.
    """
    known = _known_metrics(pattern)
    for name in names:
        if name not in known:
            raise ConfigError(_unknown_metric(name, known, pattern))
    return [known[name] for name in names]


def _known_metrics(pattern: Pattern | None) -> dict[str, Metric]:
    known = {"exact_match": Metric("exact_match")}
    if pattern is not None:
        known["parse_rate"] = Metric("parse_rate")
        for field, kind in pattern.fields.items():
            known[f"{field}_accuracy"] = Metric("accuracy", field)
            known[f"{field}_exact_match"] = Metric("accuracy", field)
            if kind is float:
                known[f"{field}_mape"] = Metric("mape", field)
    unseen = {name + UNSEEN: Metric(m.kind, m.field, True) for name, m in known.items()}
    return known | unseen


def _unknown_metric(name: str, known: Mapping[str, Metric], pattern: Pattern | None) -> str:
    names = ", ".join(known_name for known_name in known if not known_name.endswith(UNSEEN))
    if pattern is None:
        return (
            f"eval.metrics has '{name}', but without a pattern the known names are {names} (also "
            f"with {UNSEEN}); set eval.pattern to the form of an answer, or correct the name"
        )
    return (
        f"eval.metrics has '{name}', which the pattern '{pattern.template}' does not give; the "
        f"known names are {names} (also with {UNSEEN})"
    )


@dataclass(frozen=True)
class _Row:
    answer: Answer
    truth: Fields | None
    guess: Fields | None


def _read_row(answer: Answer, pattern: Pattern | None) -> _Row:
    truth = _parse(answer.reference, pattern)
    if pattern is not None and truth is None:
        raise ConfigError(
            f"row '{answer.id}': the reference '{answer.reference}' does not fit the pattern "
            f"'{pattern.template}'; correct eval.pattern, or the assistant text of the dataset"
        )
    return _Row(answer, truth, _parse(answer.prediction, pattern))


def _parse(text: str, pattern: Pattern | None) -> Fields | None:
    return None if pattern is None else pattern.parse(text)


def _values(
    metric: Metric, rows: Sequence[_Row], seen: Sequence[tuple[str, Fields | None]]
) -> list[float]:
    """Return the metric of each row that counts."""
    if metric.is_unseen:
        old = {_value_of(metric.field, text, fields) for text, fields in seen}
        rows = [
            row
            for row in rows
            if _value_of(metric.field, row.answer.reference.strip(), row.truth) not in old
        ]
    values = (_value(metric, row) for row in rows)
    return [value for value in values if value is not None]


def _value_of(field: str | None, text: str, fields: Fields | None) -> str | float | None:
    if field is None:
        return text
    return None if fields is None else fields[field]


def _value(metric: Metric, row: _Row) -> float | None:
    """Return the metric of one row; None where it has none."""
    if metric.kind == "exact_match":
        return float(row.answer.prediction.strip() == row.answer.reference.strip())
    if metric.kind == "parse_rate":
        return float(row.guess is not None)
    assert metric.field is not None and row.truth is not None
    truth = row.truth[metric.field]
    guess = None if row.guess is None else row.guess[metric.field]
    if metric.kind == "accuracy":
        return float(guess == truth)
    assert isinstance(truth, float) and not isinstance(guess, str)
    return _relative_error(truth, guess)


def _relative_error(truth: float, guess: float | None) -> float | None:
    if truth == 0.0:
        return None
    return UNPARSED_ERROR if guess is None else abs(guess - truth) / abs(truth)


def _split(template: str) -> list[tuple[str, str | None, str]]:
    """Split a template into (literal text before the field, field name, field type).

    A last item with the name None holds the text after the last field.
    """
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise _refusal(template, f"unbalanced braces ({error})") from error
    pieces: list[tuple[str, str | None, str]] = []
    text = ""
    for literal, name, kind, conversion in parts:  # an escaped brace ends a part without a field
        text += literal
        if name is None:
            continue
        if conversion or not (name.isidentifier() and name.isascii()):
            raise _refusal(template, f"the unknown field {{{name}{'!' if conversion else ''}...}}")
        pieces.append((text, name, kind or "str"))
        text = ""
    return [*pieces, (text, None, "")]


def _field_type(template: str, name: str, kind: str) -> type:
    if kind not in ("str", "float"):
        raise _refusal(template, f"the unknown type '{kind}' in {{{name}:{kind}}}")
    return float if kind == "float" else str


def _refusal(template: str, fault: str) -> ConfigError:
    return ConfigError(
        f"eval.pattern '{template}' has {fault}; write each field once as {{name}} or "
        "{name:float}, with text between two fields, for example 'Product: {title}, "
        "Price: {price:float}'"
    )

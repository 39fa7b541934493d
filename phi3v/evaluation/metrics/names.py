"""The names of the metrics: what each says, how it is shown, and which a pattern gives.

`price_mape_unseen` is the kind `mape` of the field `price`, over the rows whose price is new;
`json.total.net_accuracy` is of the field total.net of an answer that is JSON; a name with a colon
is a function of the user's own (own.py).
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from phi3v.config.names import nearest
from phi3v.errors import ConfigError
from phi3v.evaluation.metrics.own import is_own, takes_prompt
from phi3v.evaluation.metrics.patterns import Pattern

UNSEEN = "_unseen"
BLIND = "blind_"
"""Before a metric's name: its score where each row is shown another row's pictures."""
CONSTANT = "constant_"
"""Before a metric's name: its score if every row is given training's most frequent answer."""
CONTROL_TITLES = {BLIND: "blind control", CONSTANT: "constant answer"}


@dataclass(frozen=True)
class Kind:
    """What a metric says, and how it is shown.

    text           one sentence; FIELD stands for the field's name
    is_rate        shown as a percentage
    is_bounded     a mean over rows of values from 0 to 1
    needs_pattern  of a metric of the whole text: whether it asks if the text fits the pattern
    needs_json     whether every reference must be JSON
    of             types of the fields that have it
    """

    text: str
    is_rate: bool = True
    is_bounded: bool = True
    is_lower_better: bool = False
    needs_pattern: bool = False
    needs_json: bool = False
    of: tuple[type, ...] = ()


_EITHER, _NUMBER = (str, float), (float,)

WHOLE: Mapping[str, Kind] = {
    "exact_match": Kind("rows whose whole answer is the same text as an accepted answer"),
    "accuracy": Kind(
        "rows whose whole answer is an accepted answer, but for case, white space and a final "
        "period"
    ),
    "anls": Kind("mean similarity of spelling to the best accepted answer, 0 where half is wrong"),
    "relaxed_accuracy": Kind(
        "rows whose number is within 5% of the right one, or whose text is right but for case"
    ),
    "vqa_accuracy": Kind(
        "mean VQA accuracy: 1 for what three others of ten people said too, or of "
        "fewer than four accepted answers any"
    ),
    "rouge_l": Kind("mean F1 of the words shared in order with the best accepted answer"),
    "bleu": Kind(
        "overlap of sequences of 1 to 4 words over all rows together, 0 to 1 (sacrebleu's over "
        "100)",
        is_rate=False,
        is_bounded=False,
    ),
    "parse_rate": Kind("answers of the expected form", needs_pattern=True),
    "json_parse_rate": Kind("answers that are JSON", needs_json=True),
    "json_field_f1": Kind(
        "mean F1 of the fields of the answer's JSON that are right, 0 for an answer that is none",
        needs_json=True,
    ),
    "json_field_accuracy": Kind(
        "mean share of the right JSON's fields that the answer has", needs_json=True
    ),
    "json_exact_match": Kind("rows whose whole JSON is the right one", needs_json=True),
    "teacher_forced_price_error": Kind(
        "lower is better: the public walkthrough's price error, for comparison only; it reads a "
        "teacher-forced answer, for which the model saw the true price, one token out of step",
        is_rate=False,
        is_bounded=False,
        is_lower_better=True,
    ),
}
OF_FIELD: Mapping[str, Kind] = {
    "accuracy": Kind(
        "rows whose FIELD is right, but for case, white space and a final period", of=_EITHER
    ),
    "exact_match": Kind("rows whose FIELD is the same text, or the same number", of=_EITHER),
    "similarity": Kind(
        "mean similarity of spelling of FIELD, 0 for an unparsable answer", of=(str,)
    ),
    "mae": Kind(
        "lower is better: mean error of FIELD in its own unit; an unparsable answer counts as 0",
        is_rate=False,
        is_bounded=False,
        is_lower_better=True,
        of=_NUMBER,
    ),
    "mape": Kind(
        "lower is better: mean relative error of FIELD, 100% for an unparsable answer",
        is_bounded=False,
        is_lower_better=True,
        of=_NUMBER,
    ),
    "log_error": Kind(
        "lower is better: mean |ln(predicted FIELD / true FIELD)|, 0.69 for a factor of two; an "
        "unparsable answer counts as a factor of ten",
        is_rate=False,
        is_bounded=False,
        is_lower_better=True,
        of=_NUMBER,
    ),
}

JSON = "json."
"""Before the dotted path of a field of JSON, in the name of its metric."""
OF_JSON = Kind("rows whose JSON is right in FIELD, of those that have one", needs_json=True)
OWN = Kind("mean of FIELD, a function of the recipe's author, from 0 to 1")

Subject = tuple[str | None, bool]
"""What is new in a row, or most frequent: a field and whether it is of JSON; None: all of it."""


@dataclass(frozen=True)
class Metric:
    """A metric's name taken apart: `price_mape_unseen` is Metric("mape", "price", True).

    kind   of the user's own, module:function
    field  of the pattern, or if `is_json` the path of a field of JSON; None: the whole text
    """

    kind: str
    field: str | None = None
    is_unseen: bool = False
    is_json: bool = False

    @property
    def subject(self) -> Subject:
        return self.field, self.is_json

    @property
    def needs_json(self) -> bool:
        """Whether every reference must be JSON."""
        return self.is_json or (
            self.field is None and self.kind in WHOLE and WHOLE[self.kind].needs_json
        )


def describe(name: str) -> str:
    """Say in one sentence what a metric is; "" for a name that is none."""
    kind, field = _kind_of(name)
    words = field.replace("_", " ") if kind and kind.of else field
    text = kind.text.replace("FIELD", words) if kind else ""
    return f"{text}; only values that never occur in training" if name.endswith(UNSEEN) else text


def is_rate(name: str) -> bool:
    """Whether a metric is a share or a relative error, to be shown as a percentage."""
    kind, _ = _kind_of(name)
    return kind is not None and kind.is_rate


def is_bounded(name: str) -> bool:
    """Whether a metric is a mean over rows of values from 0 to 1."""
    kind, _ = _kind_of(name)
    return kind is not None and kind.is_bounded


def controls(names: Collection[str]) -> set[str]:
    """The names that are a control of another one: blind, or of a constant answer."""
    return {
        prefix + name for name in names for prefix in (BLIND, CONSTANT) if prefix + name in names
    }


def is_lower_better(name: str) -> bool:
    """Whether a metric is an error, of which less is better."""
    kind, _ = _kind_of(name)
    return kind is not None and kind.is_lower_better


def find_metrics(names: Sequence[str], pattern: Pattern | None) -> list[Metric]:
    """Look up metric names; call it before a run starts to refuse a wrong name early.

    The modules of the user's own metrics are imported: name only what the user has named.

    Raises: ConfigError naming the metric and what to write instead.
    """
    known = _known_metrics(pattern)
    found = []
    for name in names:
        metric = known.get(name) or _open_ended(name)
        if metric is None:
            raise ConfigError(f"eval.metrics has '{name}', {_fault(name, known, pattern)}")
        if is_own(metric.kind):
            takes_prompt(metric.kind)
        found.append(metric)
    for name in sorted(controls(names)):
        raise ConfigError(
            f"eval.metrics has '{name}', which is also the name of a control of another of "
            "eval.metrics; name the field otherwise in eval.pattern, or leave one out"
        )
    return found


def _open_ended(name: str) -> Metric | None:
    """A metric of the user's own or of a field of JSON; None for another name."""
    stem, is_unseen = name.removesuffix(UNSEEN), name.endswith(UNSEEN)
    if is_own(stem):
        return Metric(stem, None, is_unseen)
    path = _json_path(stem)
    return Metric("accuracy", path, is_unseen, is_json=True) if path else None


def _json_path(stem: str) -> str | None:
    """ "total.net" of "json.total.net_accuracy"; None of another name, and of no path."""
    if not (stem.startswith(JSON) and stem.endswith("_accuracy")):
        return None
    return stem.removeprefix(JSON).removesuffix("_accuracy") or None


def _kind_of(name: str) -> tuple[Kind | None, str]:
    """The kind that a name ends with, and its field; (None, "") for another name."""
    stem = name.removeprefix(BLIND).removeprefix(CONSTANT).removesuffix(UNSEEN)
    if whole := WHOLE.get(stem):
        return whole, ""
    if is_own(stem):
        return OWN, stem
    if path := _json_path(stem):
        return OF_JSON, path
    for end, kind in OF_FIELD.items():
        if stem.endswith(f"_{end}"):
            return kind, stem.removesuffix(f"_{end}")
    return None, ""


def _known_metrics(pattern: Pattern | None) -> dict[str, Metric]:
    fields = pattern.fields if pattern else {}
    of_field = {
        f"{field}_{name}": Metric(name, field)
        for field, of in fields.items()
        for name, kind in OF_FIELD.items()
        if of in kind.of
    }
    whole = {
        name: Metric(name) for name, kind in WHOLE.items() if pattern or not kind.needs_pattern
    }
    # In this order relaxed_accuracy is ChartQA's also where a pattern has a field {relaxed}.
    known = of_field | whole
    unseen = {name + UNSEEN: Metric(m.kind, m.field, True) for name, m in known.items()}
    return known | unseen


def _fault(name: str, known: Mapping[str, Metric], pattern: Pattern | None) -> str:
    """What is wrong with an unknown name, and what to write instead."""
    kind, field = _kind_of(name)
    close = nearest(name, [other for other in known if not other.endswith(UNSEEN)])
    if kind is None:
        return f"which is no metric; {close} (docs/evaluation.md explains each)"
    if pattern is None:
        return (
            "which reads parts of an answer, but eval.pattern is not set; set it to the form of an "
            "answer, for example 'Product: {title}, Price: {price:float}'"
        )
    if field in pattern.fields:
        wanted = "a number, {FIELD:float}" if kind.of == _NUMBER else "a text, {FIELD}"
        return (
            f"which needs {wanted.replace('FIELD', field)}; the pattern '{pattern.template}' says "
            f"otherwise: change it, or leave the metric out; {close}"
        )
    return f"but the pattern '{pattern.template}' has no field {{{field}}}; {close}"

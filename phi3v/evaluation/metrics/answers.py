"""An answer to be scored, and the fields that a pattern finds in it."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from phi3v.errors import ConfigError
from phi3v.evaluation.metrics.patterns import Fields, Pattern
from phi3v.evaluation.metrics.structured import read_tree

MOST_SHOWN = 200  # characters of a reference in a message
DECIMAL_COMMA = re.compile(r"\b\d+,\d{1,2}\b")


@dataclass(frozen=True)
class Answer:
    """What the model said about one held-out row, and what it should have said.

    reference       the text that training would teach
    references      every accepted text, of which the best counts; (): only `reference`
    teacher_forced  the most likely token at each position, each given the true tokens before it;
                    None where nobody asked
    prompt          what was asked, for a metric of the user's own
    """

    id: str
    reference: str
    prediction: str
    references: tuple[str, ...] = ()
    teacher_forced: str | None = None
    prompt: str = ""

    @property
    def accepted(self) -> tuple[str, ...]:
        """Every text that would be right."""
        return self.references or (self.reference,)


@dataclass(frozen=True)
class Row:
    """An answer, and the fields of its reference and of its prediction: None if it has none."""

    answer: Answer
    truth: Fields | None
    guess: Fields | None


def read_rows(
    answers: Sequence[Answer], pattern: Pattern | None, needs_json: bool = False
) -> list[Row]:
    """Find the fields of every answer.

    needs_json  whether every reference must be JSON

    Raises: ConfigError for no answers, and for a reference that does not fit the pattern, or is no
    JSON where it must be.
    """
    if not answers:
        raise ConfigError(
            "the evaluation split has no rows: got 0 answers to score; give it some with split in "
            "the dataset recipe and prepare again, or choose another split"
        )
    if needs_json:
        for answer in answers:
            check_json(f"row '{answer.id}'", (answer.reference, *answer.references))
    return [_read_row(answer, pattern) for answer in answers]


def misfit(place: str, reference: str, pattern: Pattern) -> ConfigError:
    """The refusal of a reference that the pattern cannot read; `place` says where it is."""
    has_comma = float in pattern.fields.values() and DECIMAL_COMMA.search(reference)
    hint = f"{has_comma[0]} has a decimal comma, :float reads a point; " if has_comma else ""
    return ConfigError(
        f"{place}: the reference '{reference}' does not fit the pattern '{pattern.template}'; "
        f"{hint}correct eval.pattern, or the assistant text of the dataset"
    )


def check_json(place: str, references: Sequence[str]) -> None:
    """Refuse a reference that is no JSON; `place` says where it is.

    Raises: ConfigError
    """
    for reference in references:
        if read_tree(reference) is None:
            raise ConfigError(
                f"{place}: the reference '{shortened(reference)}' is no object or list of JSON, "
                "each key once and numbers finite, which a metric of eval.metrics asks for; leave "
                "out those that begin with json, or correct the assistant text of the dataset"
            )


def shortened(text: str) -> str:
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]} ..."


def _read_row(answer: Answer, pattern: Pattern | None) -> Row:
    if pattern is None:
        return Row(answer, None, None)
    truth = pattern.parse(answer.reference)
    if truth is None:
        raise misfit(f"row '{answer.id}'", answer.reference, pattern)
    return Row(answer, truth, pattern.parse(answer.prediction))

"""Whether two models differ: both answered the same rows, and each row is its own control.

difference = compare(["anls"], answers_of_a, answers_of_b, None)["anls"]
difference.value, difference.low, difference.high    # b - a and its 95 % interval
difference.p    # how often chance alone would give as large a difference
"""

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from phi3v.errors import ConfigError
from phi3v.evaluation.metrics.answers import Answer
from phi3v.evaluation.metrics.bleu import COUNTS, bleu_of, row_counts
from phi3v.evaluation.metrics.intervals import LIMITS, resample
from phi3v.evaluation.metrics.patterns import Pattern
from phi3v.evaluation.metrics.scores import Values, is_bleu, value_columns

NUM_FLIPS = 10_000
_SIGNS_AT_ONCE = 4_000_000  # 36 MB


@dataclass(frozen=True)
class Difference:
    """A metric of b minus that of a over `n` rows, its 95 % interval, and a two-sided p-value.

    All but n are None where n is 0.
    """

    value: float | None
    low: float | None
    high: float | None
    p: float | None
    n: int

    def as_dict(self) -> dict[str, float | int | None]:
        """Return the entry of a file; never NaN."""
        return asdict(self)


def compare(
    names: Sequence[str],
    a: Sequence[Answer],
    b: Sequence[Answer],
    pattern: Pattern | None,
    train_references: Collection[str] = (),
    seed: int = 0,
) -> dict[str, Difference]:
    """Compare the answers of two models to the same rows, metric by metric.

    A row that has no value with one of them is left out.

    Raises: ConfigError if the rows are not the same in the same order, and as `score` does.
    """
    _refuse_other_rows(a, b)
    columns = [value_columns(names, answers, pattern, train_references) for answers in (a, b)]
    return {
        name: _compare_bleu(a, b, columns[0][name], seed)
        if is_bleu(name)
        else _compare_rows(columns[0][name], columns[1][name], seed)
        for name in names
    }


def sign_flip_p(differences: np.ndarray, seed: int = 0) -> float:
    """Return how often a random sign for each row gives a sum as far from 0 as the true one.

    If the models are equally good, a row's difference is as likely to have the other sign. The
    true signs count as one of the NUM_FLIPS + 1, so p is never 0. Two-sided; it takes 0.4 s for
    10,000 rows.

    Source: Fisher, The Design of Experiments, 1935, section 21; (k + 1) / (m + 1) after Phipson
    and Smyth, Permutation p-values should never be zero, 2010.
    """
    moved = differences[differences != 0]
    n, total = len(moved), moved.sum()
    if n == 0:
        return 1.0
    least = abs(total) - 1e-12 * np.abs(moved).sum()  # a sum in another order ends otherwise
    rng = np.random.default_rng(seed)
    at_once = max(1, _SIGNS_AT_ONCE // n)
    reached = 0
    for start in range(0, NUM_FLIPS, at_once):
        packed = rng.integers(
            256, size=(min(at_once, NUM_FLIPS - start), n // 8 + 1), dtype=np.uint8
        )
        kept = np.unpackbits(packed, axis=1, count=n).astype(np.float64) @ moved
        reached += int((np.abs(2 * kept - total) >= least).sum())
    return (reached + 1) / (NUM_FLIPS + 1)


def _refuse_other_rows(a: Sequence[Answer], b: Sequence[Answer]) -> None:
    advice = "evaluate both on the same split, rows and eval.rows"
    if len(a) != len(b):
        raise ConfigError(
            f"two models cannot be compared on different rows: one answered {len(a):,}, the other "
            f"{len(b):,}; {advice}"
        )
    for number, (one, other) in enumerate(zip(a, b, strict=True)):
        if (one.id, one.reference, one.accepted) != (other.id, other.reference, other.accepted):
            raise ConfigError(
                f"two models cannot be compared on different rows: answer {number} is to row "
                f"'{one.id}' ('{one.reference}') for one, to '{other.id}' ('{other.reference}') "
                f"for the other; {advice}"
            )


def _compare_rows(a: Values, b: Values, seed: int) -> Difference:
    pairs = zip(a, b, strict=True)
    differences = np.array([y - x for x, y in pairs if x is not None and y is not None])
    n = len(differences)
    if n == 0:
        return Difference(None, None, None, None, 0)
    total, sums = resample(differences, seed)
    low, high = np.percentile(sums / n, LIMITS)
    p = sign_flip_p(differences, seed)
    return Difference(float(total / n), float(low), float(high), p, n)


def _compare_bleu(
    a: Sequence[Answer], b: Sequence[Answer], counted: Values, seed: int
) -> Difference:
    """BLEU is no mean over rows: its p-value is of the paired bootstrap.

    Source: Koehn, Statistical significance tests for machine translation evaluation, 2004; the
    shift to a mean of 0 as in Riezler and Maxwell, 2005, and in sacrebleu.
    """
    pairs = [(x, y) for x, y, value in zip(a, b, counted, strict=True) if value is not None]
    if not pairs:
        return Difference(None, None, None, None, 0)
    counts = np.hstack([row_counts(answers) for answers in zip(*pairs, strict=True)])  # (n, 20)
    total, sums = resample(counts, seed)
    value = _bleu_difference(total)
    drawn = np.array([_bleu_difference(both) for both in sums])
    low, high = np.percentile(drawn, LIMITS)
    reached = int((np.abs(drawn - drawn.mean()) >= abs(value)).sum())
    return Difference(value, float(low), float(high), (reached + 1) / (len(sums) + 1), len(pairs))


def _bleu_difference(both: np.ndarray) -> float:
    return bleu_of(both[COUNTS:]) - bleu_of(both[:COUNTS])

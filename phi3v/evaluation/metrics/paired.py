"""Whether two models differ: both answered the same rows, and each row is its own control.

difference = compare(["anls"], answers_of_a, answers_of_b, None)["anls"]
difference.value, difference.low, difference.high    # b - a and its 95 % interval
difference.p    # how often chance alone would give as large a difference

p is of one test, approximate randomisation: if the models are equally good, which of a row's two
answers is whose is chance. So the answers of random rows are swapped and the difference is taken
anew, 10,000 times; of few rows in each way there is, which gives p exactly. For a mean over rows a
swap turns the sign of the row's difference. Rows that a swap leaves as they are play no part.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from phi3v.errors import ConfigError
from phi3v.evaluation.metrics.answers import Answer
from phi3v.evaluation.metrics.bleu import COUNTS, bleu_of, row_counts
from phi3v.evaluation.metrics.intervals import LIMITS, Bounds, interval, resample
from phi3v.evaluation.metrics.names import is_bounded
from phi3v.evaluation.metrics.patterns import Pattern
from phi3v.evaluation.metrics.scores import Values, is_bleu, value_columns

NUM_FLIPS = 10_000
APART: Bounds = (-1.0, 1.0)
"""Between which the difference of two values from 0 to 1 lies."""
_FLIPS_AT_ONCE = 4_000_000  # 36 MB


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
        else _compare_rows(
            columns[0][name], columns[1][name], APART if is_bounded(name) else None, seed
        )
        for name in names
    }


def sign_flip_p(differences: np.ndarray, seed: int = 0) -> float:
    """Return how often a random sign for each row gives a sum as far from 0 as the true one.

    The true signs count as one of the ways, so p is never 0. Two-sided; it takes 0.4 s for 10,000
    rows.

    Source: Fisher, The Design of Experiments, 1935, section 21; (k + 1) / (m + 1) after Phipson
    and Smyth, Permutation p-values should never be zero, 2010.
    """
    moved = differences[differences != 0]
    n, total = len(moved), moved.sum()
    if n == 0:
        return 1.0
    least = abs(total) - 1e-12 * np.abs(moved).sum()  # a sum in another order ends otherwise
    sums = np.concatenate([total - 2 * (flips @ moved) for flips in _flips(n, seed)])
    return _share(np.abs(sums) >= least)


def bleu_swap_p(a: np.ndarray, b: np.ndarray, seed: int = 0) -> float:
    """Return how often swapping the counts of random rows sets two BLEUs as far apart as they are.

    a, b  (n, 10) counts of each model's rows

    Two-sided, and p is never 0, as in `sign_flip_p`; it takes 1.3 s for 10,000 rows.

    Source: Riezler and Maxwell, On some pitfalls in automatic evaluation and significance testing
    for MT, 2005; (k + 1) / (m + 1) as in `sign_flip_p`.
    """
    moved = (b - a)[(a != b).any(axis=1)]
    if len(moved) == 0:
        return 1.0
    sum_a, sum_b = a.sum(axis=0), b.sum(axis=0)
    least = abs(bleu_of(sum_b) - bleu_of(sum_a)) - 1e-12
    change = np.concatenate([flips @ moved for flips in _flips(len(moved), seed)])  # (m, 10)
    pairs = zip(sum_a + change, sum_b - change, strict=True)
    return _share(np.array([abs(bleu_of(y) - bleu_of(x)) >= least for x, y in pairs]))


def _flips(n: int, seed: int) -> Iterator[np.ndarray]:
    """Give which of n rows to flip, (m, n) of 0 and 1 a time: NUM_FLIPS draws, or all ways.

    All 2^n ways if they are fewer (n <= 13), but for the one that flips no row: the data are that.
    """
    if 2**n <= NUM_FLIPS:
        yield (np.arange(1, 2**n)[:, None] >> np.arange(n) & 1).astype(np.float64)
        return
    rng = np.random.default_rng(seed)
    at_once = max(1, _FLIPS_AT_ONCE // n)
    for start in range(0, NUM_FLIPS, at_once):
        packed = rng.integers(
            256, size=(min(at_once, NUM_FLIPS - start), n // 8 + 1), dtype=np.uint8
        )
        yield np.unpackbits(packed, axis=1, count=n).astype(np.float64)


def _share(is_reached: np.ndarray) -> float:
    """How many ways reach the true difference: these and the data themselves."""
    return (int(is_reached.sum()) + 1) / (len(is_reached) + 1)


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


def _compare_rows(a: Values, b: Values, bounds: Bounds | None, seed: int) -> Difference:
    pairs = zip(a, b, strict=True)
    differences = np.array([y - x for x, y in pairs if x is not None and y is not None])
    found = interval(differences.tolist(), bounds, seed)
    p = sign_flip_p(differences, seed) if found.n else None
    return Difference(found.value, found.low, found.high, p, found.n)


def _compare_bleu(
    a: Sequence[Answer], b: Sequence[Answer], counted: Values, seed: int
) -> Difference:
    """BLEU is no mean over rows: resamples and swaps add the rows' counts.

    Source: of the interval, Koehn, Statistical significance tests for machine translation
    evaluation, 2004.
    """
    pairs = [(x, y) for x, y, value in zip(a, b, counted, strict=True) if value is not None]
    if not pairs:
        return Difference(None, None, None, None, 0)
    counts = np.hstack([row_counts(answers) for answers in zip(*pairs, strict=True)])  # (n, 20)
    total, sums = resample(counts, seed)
    value = _bleu_difference(total)
    drawn = np.array([_bleu_difference(both) for both in sums])
    low, high = np.percentile(drawn, LIMITS)
    p = bleu_swap_p(counts[:, :COUNTS], counts[:, COUNTS:], seed)
    return Difference(value, float(low), float(high), p, len(pairs))


def _bleu_difference(both: np.ndarray) -> float:
    return bleu_of(both[COUNTS:]) - bleu_of(both[:COUNTS])

"""A score and its 95 % interval: exact for rates, never without width for bounded scores.

A mean of values that lie between two bounds (a rate, ANLS, the difference of two rates) is bounded
on each side by the rows and one more at that bound, which is what an unseen row may be. For 0 and 1
that is Clopper and Pearson's interval. Errors without an upper bound, and BLEU, are drawn again
with replacement: that is too narrow for few rows, and has no width where all are equal.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from scipy.special import betaincinv

NUM_RESAMPLES = 1000
NUM_WEIGHTS = 4000
_WEIGHTS_AT_ONCE = 4_000_000  # 32 MB
LIMITS = (2.5, 97.5)
"""Percentiles between which 95 % of the resamples lie."""

Bounds = tuple[float, float]
UNIT: Bounds = (0.0, 1.0)


@dataclass(frozen=True)
class Score:
    """A metric over `n` rows and its 95 % interval; all None where n is 0."""

    value: float | None
    low: float | None
    high: float | None
    n: int

    def as_dict(self) -> dict[str, float | int | None]:
        """Return the entry of summary.json; never NaN."""
        return asdict(self)


def interval(values: Sequence[float], bounds: Bounds | None = None, seed: int = 0) -> Score:
    """Return the mean of the values and its 95 % interval.

    bounds  between which every value lies whatever the rows are; None if there are none: then the
            interval is of the bootstrap

    Every call seeds afresh, so the interval of a metric does not depend on which others are
    computed.

    Source: of the bootstrap, B. Efron, Bootstrap methods: another look at the jackknife, 1979
    (percentile method).
    """
    n = len(values)
    if n == 0:
        return Score(None, None, None, 0)
    rows = np.asarray(values, dtype=np.float64)
    if bounds is not None:
        return Score(math.fsum(values) / n, *bounded_limits(rows, bounds, seed), n)
    total, sums = resample(rows, seed)
    low, high = np.percentile(sums / n, LIMITS)
    return Score(float(total / n), float(low), float(high), n)


def bounded_limits(rows: np.ndarray, bounds: Bounds, seed: int) -> tuple[float, float]:
    """Return the 95 % limits of the mean of (n,) values that lie between two bounds.

    The lower limit is the 2.5th percentile of the mean of the rows and the lower bound under random
    weights, uniform over all that add up to 1; the upper one likewise. Rows that are all at a bound
    have a Beta distribution there, and the limits are exact. 10,000 rows take 0.4 s otherwise.

    Source: Gaffke, Three test statistics for a nonparametric one-sided hypothesis on the mean of a
    nonnegative variable, 2005; Learned-Miller and Thomas, A new confidence interval for the mean of
    a bounded random variable, 2019. Of rates: Clopper and Pearson, The use of confidence or
    fiducial limits illustrated in the case of the binomial, 1934.
    """
    least, most = bounds
    if np.isin(rows, bounds).all():
        rates = rate_limits(int((rows == most).sum()), len(rows))
        return least + (most - least) * rates[0], least + (most - least) * rates[1]
    rng = np.random.default_rng(seed)
    lows, highs = np.empty(NUM_WEIGHTS), np.empty(NUM_WEIGHTS)
    at_once = max(1, _WEIGHTS_AT_ONCE // (len(rows) + 1))
    for start in range(0, NUM_WEIGHTS, at_once):
        part = slice(start, min(start + at_once, NUM_WEIGHTS))
        weights = rng.standard_exponential((part.stop - start, len(rows) + 1))
        unseen, sums = weights[:, -1], weights.sum(axis=1)
        seen = weights[:, :-1] @ rows
        lows[part] = (seen + unseen * least) / sums
        highs[part] = (seen + unseen * most) / sums
    return float(np.percentile(lows, LIMITS[0])), float(np.percentile(highs, LIMITS[1]))


def rate_limits(hits: int, n: int) -> tuple[float, float]:
    """Return Clopper and Pearson's 95 % limits of a rate of `hits` in n rows.

    (6, 6) -> (0.541, 1.0)
    """
    tail = LIMITS[0] / 100
    low = betaincinv(hits, n - hits + 1, tail) if hits else 0.0
    high = betaincinv(hits + 1, n - hits, 1 - tail) if hits < n else 1.0
    return float(low), float(high)


def resample(rows: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Sum the rows, and sum NUM_RESAMPLES draws of as many rows with replacement.

    rows     (n,) or (n, K) float64
    returns  () and (NUM_RESAMPLES,), or (K,) and (NUM_RESAMPLES, K)

    Equal rows are counted and not added one by one, so that equal values give equal sums. Which
    rows are drawn depends on n and the seed alone. One resample is held at a time: 24 bytes a row.
    It takes 0.2 s for 10,000 rows.
    """
    n = len(rows)
    distinct, which = np.unique(rows, axis=0, return_inverse=True)
    which = which.reshape(n)
    rng = np.random.default_rng(seed)
    sums = np.empty((NUM_RESAMPLES, *distinct.shape[1:]))
    for number in range(NUM_RESAMPLES):
        drawn = which[rng.integers(n, size=n)]
        sums[number] = np.bincount(drawn, minlength=len(distinct)) @ distinct
    return np.bincount(which) @ distinct, sums

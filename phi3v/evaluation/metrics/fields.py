"""How right one field of an answer is. `guess` is None where the answer does not fit the pattern.

Such an answer is wrong in every field: 0 for a rate or a similarity. Where a number is asked for it
counts as the number 0: an error of |truth| in `mae`, of 1.0 (100 %) in `mape`. In `log_error` 0 and
negative numbers have no logarithm: they count as off by a factor of ten, and so does an answer that
does not fit. A model can do worse by writing a number, so read these beside `parse_rate`.
"""

import math

from phi3v.evaluation.metrics import text

Value = str | float
NO_LOGARITHM = math.log(10)
"""The log error of a prediction that has no logarithm."""


def exact_match(truth: Value, guess: Value | None) -> float:
    """Return 1 for the same text, or the same number ("1,000" is 1000)."""
    return float(guess == truth)


def accuracy(truth: Value, guess: Value | None) -> float:
    """Return 1 for the same number, or the same text after `text.normalise`."""
    if isinstance(truth, str) and isinstance(guess, str):
        return text.accuracy(guess, truth)
    return float(guess == truth)


def similarity(truth: Value, guess: Value | None) -> float:
    """Return `text.similarity` of a text."""
    assert isinstance(truth, str) and not isinstance(guess, float)
    return 0.0 if guess is None else text.similarity(guess, truth)


def mae(truth: Value, guess: Value | None) -> float:
    """Return |guess - truth|, in the field's own unit."""
    expected, found = _numbers(truth, guess)
    return abs((found or 0.0) - expected)


def mape(truth: Value, guess: Value | None) -> float | None:
    """Return |guess - truth| / |truth|, a fraction; None where the truth is 0."""
    expected, found = _numbers(truth, guess)
    return abs((found or 0.0) - expected) / abs(expected) if expected else None


def log_error(truth: Value, guess: Value | None) -> float | None:
    """Return |ln(guess / truth)|: 0.69 is off by a factor of two; None where the truth is <= 0."""
    expected, found = _numbers(truth, guess)
    if expected <= 0:
        return None
    return abs(math.log(found / expected)) if found is not None and found > 0 else NO_LOGARITHM


def _numbers(truth: Value, guess: Value | None) -> tuple[float, float | None]:
    assert isinstance(truth, float) and not isinstance(guess, str)
    return truth, guess

"""A 95 % interval holds the true value at least 93 times of 100, near 0 and 1 and of few rows too.

Coverage of rates is summed exactly over all that can be seen; that of other scores is simulated.
benchmarks/intervals.py measures more of them, and the bootstrap's.
"""

import math
from collections.abc import Callable

import numpy as np
import pytest

from phi3v.evaluation.metrics import Answer, compare, compile_pattern, interval, score
from phi3v.evaluation.metrics.intervals import UNIT, bounded_limits
from phi3v.evaluation.metrics.paired import APART

LEAST = 0.93
Draw = Callable[[np.random.Generator, int], np.ndarray]


def answers(num_right: int, n: int) -> list[Answer]:
    return [Answer(str(row), "cat", "cat" if row < num_right else "dog") for row in range(n)]


@pytest.mark.parametrize("n", [6, 20, 35, 100, 1000])
@pytest.mark.parametrize("rate", [0.5, 0.9, 0.95, 0.98, 0.995])
def test_the_interval_of_a_rate_holds_it_often_enough(n: int, rate: float) -> None:
    """Of what is seen with a chance above 1e-9, whichever side of a half the rate is on."""
    for true in (rate, 1 - rate):
        held = 0.0
        for hits in range(n + 1):
            log_chance = math.lgamma(n + 1) - math.lgamma(hits + 1) - math.lgamma(n - hits + 1)
            chance = math.exp(log_chance + hits * math.log(true) + (n - hits) * math.log1p(-true))
            if chance > 1e-9:
                found = interval([1.0] * hits + [0.0] * (n - hits), UNIT)
                assert found.low is not None and found.high is not None
                held += chance * (found.low <= true <= found.high)
        assert held >= LEAST


def like_anls(rng: np.random.Generator, n: int) -> np.ndarray:
    """Mostly right to the letter, some nearly, some wrong; mean 0.95."""
    return rng.choice([1.0, 0.8, 0.6, 0.0], n, p=[0.92, 0.025, 0.016667, 0.038333])


def nearly_right(rng: np.random.Generator, n: int) -> np.ndarray:
    """Never quite right and rarely wrong: most samples have no spread at all; mean 0.931."""
    return np.where(rng.random(n) < 0.98, 0.95, 0.0)


def all_middling(rng: np.random.Generator, n: int) -> np.ndarray:
    return rng.beta(20, 5, n)


def models_apart(rng: np.random.Generator, n: int) -> np.ndarray:
    """Two models that differ in few rows, one of them nearly always for the better; mean 0.03."""
    return rng.choice([-1.0, 0.0, 1.0], n, p=[0.01, 0.95, 0.04])


@pytest.mark.parametrize("n", [6, 60])
@pytest.mark.parametrize(
    ("draw", "mean", "bounds"),
    [
        (like_anls, 0.95, UNIT),
        (nearly_right, 0.931, UNIT),
        (all_middling, 0.8, UNIT),
        (models_apart, 0.03, APART),
    ],
)
def test_the_interval_of_a_bounded_mean_holds_it_often_enough(
    draw: Draw, mean: float, bounds: tuple[float, float], n: int
) -> None:
    """Of 300 samples: were it held 95 times of 100, 270 or less would be seen once in 5,000."""
    rng = np.random.default_rng(n)
    limits = [bounded_limits(draw(rng, n), bounds, seed) for seed in range(300)]
    assert all(low < high for low, high in limits)
    assert sum(low <= mean <= high for low, high in limits) / len(limits) > LEAST - 0.03


def test_six_right_of_six_leave_room_for_one_in_two_wrong() -> None:
    """0.025^(1/6) = 0.541, by hand: at that rate six right in a row are seen 2.5 times of 100."""
    found = score(["exact_match", "anls"], answers(6, 6), None)
    for name in found:
        assert (found[name].value, found[name].high, found[name].n) == (1.0, 1.0, 6)
        assert found[name].low == pytest.approx(0.025 ** (1 / 6))
    none = score(["exact_match"], answers(0, 6), None)["exact_match"]
    assert (none.low, none.value) == (0.0, 0.0)
    assert none.high == pytest.approx(1 - 0.025 ** (1 / 6))


def test_equal_values_between_the_bounds_have_an_interval_on_both_sides() -> None:
    """A row more at a bound has a share of the mean that is above 0.459 in 2.5 % of all weights."""
    found = interval([0.8] * 6, UNIT)
    share = 1 - 0.025 ** (1 / 6)
    assert found.value == pytest.approx(0.8)
    assert found.low == pytest.approx(0.8 * (1 - share), abs=0.02)
    assert found.high == pytest.approx(0.8 + 0.2 * share, abs=0.01)


def test_a_spread_that_is_small_gives_a_narrow_interval() -> None:
    """Not that of a rate with the same mean, which is 0.16 wide."""
    values = np.random.default_rng(0).beta(80, 20, 100)
    low, high = bounded_limits(values, UNIT, 0)
    assert low < values.mean() < high
    assert 4 * values.std() / 10 < high - low < 0.06


def test_values_beside_the_bounds_give_nearly_the_limits_of_those_at_them() -> None:
    """The exact limits and the drawn ones are one rule: 90 and 10 of 100, moved by a hair."""
    rows = np.repeat([0.0, 1.0], [10, 90])
    moved = np.where(rows == 0, 1e-9, rows)
    assert bounded_limits(moved, UNIT, 0) == pytest.approx(bounded_limits(rows, UNIT, 0), abs=0.004)


def test_models_that_agree_on_few_rows_are_not_known_to_be_equal() -> None:
    for n, width in ((6, 0.45), (1000, 0.0036)):
        found = compare(["exact_match"], answers(n, n), answers(n, n), None)["exact_match"]
        assert found.value == 0.0 and found.low is not None and found.high is not None
        assert (found.low, found.high) == pytest.approx((-width, width), rel=0.15)


def test_what_has_no_bounds_keeps_its_bootstrap() -> None:
    values = [1.0, 5.0, 2.0, 30.0, 0.5, 4.0]
    found = interval(values)
    assert found.low is not None and found.high is not None
    assert min(values) <= found.low < found.high <= max(values)


def test_no_error_is_given_bounds_it_does_not_have() -> None:
    """Every row is off by three to four times the price, so the mean is, and its limits are."""
    rows = [Answer(str(n), "100", str(400 + n)) for n in range(50)]
    names = ["price_mae", "price_mape", "price_log_error"]
    found = score(names, rows, compile_pattern("{price:float}"))
    for name, (least, most) in zip(names, ((300, 350), (3, 3.5), (1.38, 1.51)), strict=True):
        low, high = found[name].low, found[name].high
        assert low is not None and high is not None and least < low < high < most, name

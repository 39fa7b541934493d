"""How often a 95 % interval holds the true value: of rates exactly, of other scores by simulation.

    python benchmarks/intervals.py [--samples 2000]

Prints the least coverage of rates from 0.005 to 0.995 over n from 6 to 1,000, that of mixtures as
ANLS has them and of differences of two models, and that of the bootstrap for errors without an
upper bound (log-normal, sigma 1, as prices' are), with the intervals' mean width.
"""

import argparse
from collections.abc import Callable

import numpy as np
from scipy.special import gammaln
from timing import describe_machine

from phi3v.evaluation.metrics.intervals import LIMITS, UNIT, bounded_limits, rate_limits, resample
from phi3v.evaluation.metrics.paired import APART

ROWS = (6, 10, 20, 35, 50, 100, 200, 500, 1000)
Draw = Callable[[np.random.Generator, int], np.ndarray]


def mixture(values: list[float], shares: list[float]) -> tuple[Draw, float]:
    return lambda rng, n: rng.choice(values, n, p=shares), float(np.dot(values, shares))


BOUNDED = {
    "0 and 1, mean 0.95": (*mixture([0, 1], [0.05, 0.95]), UNIT),
    "ANLS: 1, 0.8, 0.6, 0; mean 0.95": (
        *mixture([1, 0.8, 0.6, 0], [0.92, 0.025, 0.015, 0.04]),
        UNIT,
    ),
    "ANLS: 1, 0.7, 0; mean 0.54": (*mixture([1, 0.7, 0], [0.4, 0.2, 0.4]), UNIT),
    "0.95, rarely 0; mean 0.931": (*mixture([0.95, 0], [0.98, 0.02]), UNIT),
    "1, rarely 0; mean 0.995": (*mixture([1, 0], [0.995, 0.005]), UNIT),
    "Beta(20, 5); mean 0.8": ((lambda rng, n: rng.beta(20, 5, n)), 0.8, UNIT),
    "b - a: 1 % worse, 4 % better": (*mixture([-1, 0, 1], [0.01, 0.95, 0.04]), APART),
    "b - a: ANLS, 5 % +0.3, 2 % -1": (*mixture([-1, 0, 0.3], [0.02, 0.93, 0.05]), APART),
}


def rate_coverage(n: int) -> float:
    """The least over rates, summed over all that can be seen."""
    hits = np.arange(n + 1)
    lows, highs = np.array([rate_limits(k, n) for k in range(n + 1)]).T
    rates = np.linspace(0.005, 0.995, 199)[:, None]
    ways = gammaln(n + 1) - gammaln(hits + 1) - gammaln(n - hits + 1)
    chances = np.exp(ways + hits * np.log(rates) + (n - hits) * np.log1p(-rates))
    return float((chances * ((lows <= rates) & (rates <= highs))).sum(axis=1).min())


def simulated(limits: Callable[[int], tuple[float, float]], mean: float, samples: int) -> str:
    found = np.array([limits(seed) for seed in range(samples)])
    held = ((found[:, 0] <= mean) & (mean <= found[:, 1])).mean()
    return f"{held:6.1%} {np.diff(found).mean():8.3g}"


def bootstrap(rows: np.ndarray, seed: int) -> tuple[float, float]:
    low, high = np.percentile(resample(rows, seed)[1] / len(rows), LIMITS)
    return float(low), float(high)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=2000, help="of each number of rows")
    samples = parser.parse_args().samples
    print(describe_machine())
    least = {n: rate_coverage(n) for n in ROWS}
    print("rates, least:", ", ".join(f"n={n} {held:.1%}" for n, held in least.items()))
    sizes = (6, 30, 100, 1000)
    print(f"{'':34}" + "".join(f"{f'n={n}: held, width':>20}" for n in sizes))
    for name, (draw, mean, bounds) in BOUNDED.items():
        cells = []
        for n in sizes:
            rng = np.random.default_rng(n)
            few = samples if n < 1000 else samples // 4
            cells.append(
                simulated(
                    lambda seed, n=n, rng=rng, draw=draw, bounds=bounds: bounded_limits(
                        draw(rng, n), bounds, seed
                    ),
                    mean,
                    few,
                )
            )
        print(f"{name:34}" + "".join(f"{cell:>20}" for cell in cells), flush=True)
    cells = []
    for n in sizes:
        rng = np.random.default_rng(n)
        cells.append(
            simulated(
                lambda seed, n=n, rng=rng: bootstrap(rng.lognormal(size=n), seed),
                float(np.exp(0.5)),
                samples // 4,
            )
        )
    print(f"{'bootstrap: log-normal errors':34}" + "".join(f"{cell:>20}" for cell in cells))


if __name__ == "__main__":
    main()

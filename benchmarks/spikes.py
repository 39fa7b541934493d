"""How often `faults.spike` skips a step of a healthy run, and which jumps of the loss it finds.

    python benchmarks/spikes.py [--steps 20000]

Simulates curves of the loss (flat, falling as an exponential and as a power law, rising first while
the learning rate warms up) with Gaussian and with heavy-tailed noise (Student's t, 3 degrees of
freedom), as large as batches of 16 and of 256 samples make it. Prints, for the limit of training
and for the one of before (deviations from the median of 64 steps), the false alarms per 10,000
steps, and what share is found of steps whose loss is twice and four times what it would be. Takes
about ten minutes.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from timing import describe_machine

from phi3v.training.faults import FLOOR, NEEDED, TO_DEVIATION, spike_limit

SPIKES = (4.0, 6.0, 8.0, 12.0)
STEPS = 160  # of a run, most of them in the fall
SAMPLE = 0.6  # deviation of a sample's loss, as a share of it
JUMPS = (2.0, 4.0)
PLANTED = 4  # of each, in a run of their own
TIMES = np.arange(STEPS)
FALLING = 0.5 + 3.5 * np.exp(-TIMES / 40)
CURVES = {
    "flat": np.full(STEPS, 1.5),
    "exponential": FALLING,
    "power law": 4 * (TIMES + 1.0) ** -0.4,
    "warm-up": np.where(TIMES < 40, 3 + TIMES / 40, np.roll(FALLING, 40)),
}
Limit = Callable[[Sequence[float], float], float]


def limit_of_before(losses: Sequence[float], deviations: float) -> float:
    recent = np.asarray(losses[-64:])
    if len(recent) < NEEDED:
        return float("inf")
    median = float(np.median(recent))
    spread = TO_DEVIATION * float(np.median(np.abs(recent - median)))
    return median + deviations * max(spread, FLOOR * abs(median))


LIMITS: dict[str, Limit] = {"before": limit_of_before, "now": spike_limit}


def gaussian(rng: np.random.Generator) -> np.ndarray:
    return rng.standard_normal(STEPS)


def heavy(rng: np.random.Generator) -> np.ndarray:
    return rng.standard_t(3, STEPS) / np.sqrt(3)  # of deviation 1


@dataclass
class Seen:
    """Steps of healthy runs and the alarms among them; of each size of jump, those found."""

    steps: int
    alarms: int
    found: np.ndarray  # (jumps,) shares

    def __str__(self) -> str:
        shares = "".join(f"{share:5.0%}" for share in self.found)
        return f"{1e4 * self.alarms / self.steps:7.1f}{shares}"


def skipped(losses: np.ndarray, limit: Limit, deviations: float) -> Iterator[int]:
    """The steps of a run that are skipped; they do not count for later ones."""
    kept: list[float] = []
    for step, loss in enumerate(losses.tolist()):
        if loss > limit(kept[-64:], deviations):
            yield step
        else:
            kept.append(loss)


def measure(
    curve: np.ndarray,
    noise: Callable[[np.random.Generator], np.ndarray],
    batch: int,
    limit: Limit,
    deviations: float,
    runs: int,
) -> Seen:
    alarms = 0
    found = np.zeros(len(JUMPS))
    for seed in range(runs):
        rng = np.random.default_rng(seed)
        healthy = curve * np.maximum(1 + SAMPLE / np.sqrt(batch) * noise(rng), 0.05)
        alarms += sum(1 for _ in skipped(healthy, limit, deviations))
        size = (len(JUMPS), PLANTED)
        places = rng.choice(np.arange(NEEDED, STEPS), size, replace=False)
        jumping = healthy.copy()
        for row, times in zip(places, JUMPS, strict=True):
            jumping[row] *= times
        caught = list(skipped(jumping, limit, deviations))
        found += np.isin(places, caught).sum(axis=1)
    return Seen(runs * STEPS, alarms, found / (runs * PLANTED))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20_000, help="of healthy runs, for each case")
    runs = -(-parser.parse_args().steps // STEPS)
    print(describe_machine())
    print(
        "false alarms per 10,000 steps, found of jumps to "
        + ", ".join(f"{times:g}x" for times in JUMPS)
    )
    print(f"{'':34}" + "".join(f"{f'spike={spike:g}':>17}" for spike in SPIKES))
    for noise in (gaussian, heavy):
        for batch in (16, 256):
            for name, curve in CURVES.items():
                for rule, limit in LIMITS.items():
                    seen = [measure(curve, noise, batch, limit, k, runs) for k in SPIKES]
                    case = f"{noise.__name__:8} of {batch:3}, {name}"
                    print(f"{case:27} {rule:6}" + "".join(map(str, seen)), flush=True)


if __name__ == "__main__":
    main()

"""How full packs are, how alike the packs of a step are, and what their grouping does to a step.

    python benchmarks/packing.py

The lengths are synthetic, the layouts and token counts of pictures real: 15 % of the samples are
text (lognormal, median 400 tokens, sigma 1), 75 % have one picture and 10 % two to four, with a
text of median 150, sigma 0.8. `any` pictures have a lognormal width over height (median 1.2, sigma
0.4), `photos` those of cameras, half of them 4:3. A cost is the published model's training FLOPs.
"""

import argparse
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
from timing import describe_machine, measure

from phi3v.data.packing import Budget, Plan, Position
from phi3v.geometry import hd_layout, image_tokens
from phi3v.model import Phi3VConfig
from phi3v.training.metering import sample_flops

BUDGET = Budget(max_tokens=8192, max_views=64, window=1024)
RANKS = (8, 128, 1024)
CAMERAS = (4 / 3, 3 / 2, 16 / 9, 1, 3 / 4, 2 / 3, 9 / 16)
CAMERA_SHARES = (0.35, 0.2, 0.1, 0.1, 0.15, 0.05, 0.05)
MIXTURES = (("any", 4), ("any", 16), ("photos", 4), ("photos", 16))


@dataclass(frozen=True)
class Lengths:
    """(samples,) of each sample."""

    tokens: np.ndarray
    views: np.ndarray
    label_tokens: np.ndarray
    costs: np.ndarray

    def plan(self, packs_per_step: int) -> Plan:
        return Plan("any", 0, self.tokens, self.views, self.costs, BUDGET, packs_per_step)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=200_000)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    print(f"{describe_machine()}; load {os.getloadavg()[0]:.1f}")
    mixtures = {
        f"{kind}, {crops}": draw(kind, crops, arguments.samples) for kind, crops in MIXTURES
    }
    print(f"{arguments.samples:,} samples, {BUDGET.max_tokens:,} tokens a pack, window 1,024\n")
    print_packing(mixtures, arguments.repeats)
    print_balance(mixtures)
    print_bias(mixtures)


def print_packing(mixtures: dict[str, Lengths], repeats: int) -> None:
    print("real tokens, 8 packs a step; planning of an epoch, on one core, by processor time")
    print(f"{'pictures, crops':16}{'padded, 4':>12}{'packed':>12}{'samples/s (quartiles)':>36}")
    for name, of in mixtures.items():
        random = np.random.default_rng(1)
        fours = of.tokens[random.permutation(len(of.tokens))[: len(of.tokens) // 4 * 4]]
        padded = fours.mean() / fours.reshape(-1, 4).max(axis=1).mean()
        plan = of.plan(8)
        packed = of.tokens.sum() / (8 * len(whole_epoch(plan)) * BUDGET.max_tokens)
        times = measure({"plan": partial(whole_epoch, plan)}, repeats)["plan"].processor
        low, median, high = len(of.tokens) / np.percentile(times, [75, 50, 25])
        speed = f"{median:,.0f} ({low:,.0f} to {high:,.0f})"
        print(f"{name:16}{padded:12.4f}{packed:12.4f}{speed:>36}")


def print_balance(mixtures: dict[str, Lengths]) -> None:
    print(
        "\nbalance: mean over maximum cost of what ranks do at once, accumulation 1, mean of steps;"
    )
    print("of 4 random samples, our packs at random, ours; time: sum of means over sum of maxima")
    head = "".join(
        f"{word:>10}" for word in ("ranks", "4 samples", "packs", "ours", "time", "steps")
    )
    print(f"{'pictures, crops':16}{head}")
    for name, of in mixtures.items():
        for ranks in RANKS:
            random = np.random.default_rng(2)
            steps = whole_epoch(of.plan(ranks))
            samples = random.permutation(len(of.costs))[: len(of.costs) // 4 * 4]
            sides = (
                deal(of.costs[samples].reshape(-1, 4).sum(axis=1), ranks),
                deal(random.permutation(costs_of(of, steps).ravel()), ranks),
                costs_of(of, steps),
            )
            fours, packs, ours = (np.mean(side.mean(axis=1) / side.max(axis=1)) for side in sides)
            time = sides[2].mean(axis=1).sum() / sides[2].max(axis=1).sum()
            print(
                f"{name:16}{ranks:10}{fours:10.4f}{packs:10.4f}{ours:10.4f}{time:10.4f}{len(steps):10}"
            )


def print_bias(mixtures: dict[str, Lengths]) -> None:
    print("\nlabel tokens per step (mean, standard deviation), 128 packs a step, the same packs")
    print("grouped by cost and at random; correlation of a step's cost with its place in the epoch")
    print(f"{'pictures, crops':16}{'grouped':>20}{'random':>20}{'correlation':>13}")
    for name, of in mixtures.items():
        steps = whole_epoch(of.plan(128))
        labels = sums(of.label_tokens, steps)
        grouped = labels.sum(axis=1)
        mixed = deal(np.random.default_rng(3).permutation(labels.ravel()), 128).sum(axis=1)
        place = np.corrcoef(costs_of(of, steps).sum(axis=1), np.arange(len(steps)))[0, 1]
        columns = [f"{side.mean():,.0f}, {side.std():,.0f}" for side in (grouped, mixed)]
        print(f"{name:16}{columns[0]:>20}{columns[1]:>20}{place:13.3f}")


def whole_epoch(plan: Plan) -> list[Sequence[np.ndarray]]:
    """The packs of each step."""
    return [step.packs for step in plan.steps(Position(), 1)]


def costs_of(of: Lengths, steps: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
    return sums(of.costs, steps)


def sums(values: np.ndarray, steps: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
    """(steps, packs) the sum over each pack."""
    return np.array([[values[pack].sum() for pack in packs] for packs in steps])


def deal(costs: np.ndarray, ranks: int) -> np.ndarray:
    """(steps, ranks) as they come; a last step that is not whole is left out, unless it is all."""
    steps = max(len(costs) // ranks, 1)
    return np.resize(costs, (steps, ranks))


def draw(kind: str, num_crops: int, samples: int) -> Lengths:
    """Lengths of a mixture; samples that are longer than a pack are drawn again."""
    random = np.random.default_rng(0)
    number = samples + samples // 5 + 100
    pictures = random.choice([0, 1, 2, 3, 4], number, p=[0.15, 0.75, *[0.1 / 3] * 3])
    text = np.where(
        pictures == 0,
        random.lognormal(np.log(400), 1, number),
        random.lognormal(np.log(150), 0.8, number),
    )
    text = np.clip(text.astype(int), 8, BUDGET.max_tokens)
    shapes = SHAPES[kind](random, int(pictures.sum()))
    each = np.array([fill(int(1000 * shape), num_crops) for shape in shapes]).T
    owner = np.repeat(np.arange(number), pictures)
    filled, views = (np.bincount(owner, of, number).astype(int) for of in each)
    labels = 1 + (text * random.uniform(0.1, 0.6, number)).astype(int)
    costs = sample_flops(Phi3VConfig(), text + filled, labels, views, filled)
    kept = np.flatnonzero(text + filled <= BUDGET.max_tokens)[:samples]
    return Lengths(*(of[kept] for of in (text + filled, views, labels, costs)))


@cache
def fill(width: int, num_crops: int) -> tuple[int, int]:
    """Image tokens and views of a picture 1,000 pixels high."""
    grid = hd_layout(width, 1000, num_crops, 336).grid
    return image_tokens(grid, 12), grid.views


SHAPES: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "any": lambda random, number: random.lognormal(np.log(1.2), 0.4, number),
    "photos": lambda random, number: random.choice(CAMERAS, number, p=CAMERA_SHARES),
}

if __name__ == "__main__":
    main()

"""Which samples share a pack, and in what order packs come: pure functions of lengths and a seed.

An epoch's samples are shuffled, cut into windows, and each window is packed by best fit: longest
first, into the fullest pack that still takes it. Packs are then shuffled. Nothing here knows how
many ranks there are, so a run goes on with the same next pack on any number of them.
"""

import hashlib
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from phi3v.errors import ConfigError


@dataclass(frozen=True)
class Budget:
    """What one pack may hold: `max_tokens`, `max_views`; `window` samples are packed together."""

    max_tokens: int
    max_views: int
    window: int


@dataclass(frozen=True)
class Position:
    """Where a run is in its sequence of packs: the next pack is number `pack` of `epoch`."""

    epoch: int = 0
    pack: int = 0


@dataclass(frozen=True)
class PackPlan:
    """The sequence of packs of a dataset; a pack is an int array of sample numbers.

    tokens, views  (samples,) of each sample
    """

    fingerprint: str
    seed: int
    tokens: np.ndarray
    views: np.ndarray
    budget: Budget

    def epoch(self, epoch: int) -> list[np.ndarray]:
        """All packs of an epoch; every sample is in exactly one."""
        random = self._random(epoch)
        order = random.permutation(len(self.tokens))
        packs: list[np.ndarray] = []
        for start in range(0, len(order), self.budget.window):
            packs += self._pack(order[start : start + self.budget.window])
        return [packs[i] for i in random.permutation(len(packs))]

    def packs(
        self, start: Position, epochs: int | None = None
    ) -> Iterator[tuple[np.ndarray, Position]]:
        """Packs from a position on, each with the position behind it; endless without `epochs`."""
        epoch, first = start.epoch, start.pack
        while epochs is None or epoch < epochs:
            packs = self.epoch(epoch)
            for number in range(first, len(packs)):
                is_last = number + 1 == len(packs)
                yield packs[number], Position(epoch + 1) if is_last else Position(epoch, number + 1)
            epoch, first = epoch + 1, 0

    def count(self, epochs: int) -> int:
        """Packs in so many epochs."""
        return sum(len(self.epoch(epoch)) for epoch in range(epochs))

    def first_too_large(self) -> int | None:
        """The first sample that no pack can hold, if there is one."""
        over = (self.tokens > self.budget.max_tokens) | (self.views > self.budget.max_views)
        return int(np.flatnonzero(over)[0]) if over.any() else None

    def _random(self, epoch: int) -> np.random.Generator:
        text = f"{self.fingerprint}:{self.seed}:{epoch}"
        return np.random.default_rng(list(hashlib.sha256(text.encode()).digest()))

    def _pack(self, samples: np.ndarray) -> list[np.ndarray]:
        """Best fit by tokens, longest first, of one window."""
        tokens, views = self.tokens[samples], self.views[samples]
        open_packs: list[tuple[int, int]] = []  # (tokens left, number), sorted
        views_left: list[int] = []
        packs: list[list[int]] = []
        for i in np.argsort(-tokens, kind="stable"):
            need = int(tokens[i])
            place = bisect_left(open_packs, (need, -1))
            while place < len(open_packs) and views_left[open_packs[place][1]] < views[i]:
                place += 1
            if place == len(open_packs):
                left, number = self.budget.max_tokens, len(packs)
                packs.append([])
                views_left.append(self.budget.max_views)
            else:
                left, number = open_packs.pop(place)
            packs[number].append(int(samples[i]))
            views_left[number] -= int(views[i])
            insort(open_packs, (left - need, number))
        return [np.array(pack) for pack in packs]


def check_fits(plan: PackPlan, name_of: Callable[[int], str]) -> None:
    """Refuse a dataset in which a sample is larger than a pack.

    Raises: ConfigError naming the sample.
    """
    sample = plan.first_too_large()
    if sample is None:
        return
    raise ConfigError(
        f"sample '{name_of(sample)}' has {plan.tokens[sample]:,} tokens and "
        f"{plan.views[sample]:,} views, a pack holds data.max_tokens {plan.budget.max_tokens:,} "
        f"and data.max_views {plan.budget.max_views:,}; raise the budget or prepare with max_tokens"
    )

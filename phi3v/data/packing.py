"""Which samples share a pack and which packs a step: pure functions of lengths, costs and a seed.

An epoch's samples are shuffled and cut into windows. A window is packed by best fit, longest first.
Packs that make no whole step are dissolved into the next window, the least filled first; the last
window is packed by a smaller budget instead, and what is still missing split off the dearest, so
every step is whole and of one epoch. The window's packs are then sorted by cost and cut into steps,
so that all packs of a step take about the same time, and the steps are shuffled. Nothing here knows
how many ranks there are: rank r of n takes `packs[r::n]` of every step, and packs that run side by
side are neighbours in cost.
"""

import hashlib
import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from phi3v.errors import ConfigError

FILLED = 0.99  # a window filled so well is not packed again in the next way
WAYS = ((1,), (1, 2, 3))  # of `best_fit`; which fills better depends on the data
TRIAL = 8  # windows after which all ways are tried again; between, the last winner packs alone
SAMPLE_PRICE = 0.005  # of a pack: the room that a pack may leave to spare a sample for another
NO_SAMPLES = np.array([], dtype=np.int64)
HALVINGS = 10  # of the interval in which the budget of an epoch's last window is looked for
COST_UNITS = 1 << 30  # of the dearest sample: whole numbers have the same sum on every machine


@dataclass(frozen=True)
class Budget:
    """What one pack may hold: `max_tokens`, `max_views`; `window` samples are packed together."""

    max_tokens: int
    max_views: int
    window: int


@dataclass(frozen=True)
class Position:
    """Where a run is in its sequence: the next step is number `step` of a window of an epoch."""

    epoch: int = 0
    window: int = 0
    step: int = 0


@dataclass(frozen=True)
class PlannedStep:
    """What all ranks do in one optimizer step.

    packs  as many int arrays of sample numbers as a step has packs, dearest first; some are empty
           only where a whole last window has fewer samples than that
    at     where in the sequence it is
    after  where the sequence goes on
    """

    packs: Sequence[np.ndarray]
    at: Position
    after: Position


@dataclass(frozen=True)
class Epoch:
    """What one pass over the samples is: `fill` is the share of the budget that binds."""

    samples: int
    packs: int
    steps: int
    fill: float


@dataclass(frozen=True)
class Plan:
    """The sequence of steps of a dataset.

    tokens, views  (samples,) of each sample
    costs          (samples,) predicted cost of each, in any unit
    window_steps   steps whose packs are packed and dealt together, at least
    parts          (start, stop, weight): an epoch holds samples start to stop `weight` times each;
                   of a fraction it takes other samples in the next epoch; default: all once
    """

    fingerprint: str
    seed: int
    tokens: np.ndarray
    views: np.ndarray
    costs: np.ndarray
    budget: Budget
    packs_per_step: int
    window_steps: int = 16
    parts: Sequence[tuple[int, int, float]] = ()

    def steps(self, start: Position, epochs: int | None = None) -> Iterator[PlannedStep]:
        """Steps from a position on; endless without `epochs`.

        What a window packs depends on what the one before it left, so going on within an epoch
        packs its earlier windows again: about a second for a million samples.
        """
        epoch, costs = start.epoch, self._whole_costs()
        while epochs is None or epoch < epochs:
            for window, packs, is_last in self._windows(epoch):
                here = Position(epoch, window)
                if epoch == start.epoch and window < start.window:
                    continue
                steps = self._deal(packs, costs, self._random(epoch, window))
                first = start.step if here == Position(start.epoch, start.window) else 0
                behind = Position(epoch + 1) if is_last else Position(epoch, window + 1)
                for number in range(first, len(steps)):
                    at, after = (Position(epoch, window, n) for n in (number, number + 1))
                    yield PlannedStep(
                        steps[number], at, behind if number + 1 == len(steps) else after
                    )
            epoch += 1

    def count(self, epochs: int) -> int:
        """Steps in so many epochs; packs them all, about a second for a million samples."""
        return sum(
            -(-len(packs) // self.packs_per_step)
            for epoch in range(epochs)
            for _, packs, _ in self._windows(epoch)
        )

    def first_epoch(self) -> Epoch:
        """What the first pass is; packs it, about a second for a million samples."""
        samples, steps = self._samples(0), self.count(epochs=1)
        packs = steps * self.packs_per_step
        filled = max(
            self.tokens[samples].sum() / self.budget.max_tokens,
            self.views[samples].sum() / self.budget.max_views,
        )
        return Epoch(len(samples), packs, steps, float(filled / max(1, packs)))

    def first_too_large(self) -> int | None:
        """The first sample that no pack can hold, if there is one."""
        over = (self.tokens > self.budget.max_tokens) | (self.views > self.budget.max_views)
        return int(np.flatnonzero(over)[0]) if over.any() else None

    def _random(self, *place: int | str) -> np.random.Generator:
        text = ":".join(str(word) for word in (self.fingerprint, self.seed, *place))
        return np.random.default_rng(list(hashlib.sha256(text.encode()).digest()))

    def _samples(self, epoch: int) -> np.ndarray:
        """The samples of an epoch, shuffled.

        A part's samples stand in a circle, from which each epoch takes the next weight * samples.
        """
        taken = []
        for number, (start, stop, weight) in enumerate(self.parts or [(0, len(self.tokens), 1.0)]):
            circle = self._random("part", number).permutation(np.arange(start, stop))
            ends = [round(of * weight * len(circle)) for of in (epoch, epoch + 1)]
            taken.append(circle[np.arange(*ends) % max(len(circle), 1)])
        return self._random(epoch).permutation(np.concatenate(taken))

    def _windows(self, epoch: int) -> Iterator[tuple[int, list[np.ndarray], bool]]:
        """Each window's number, its packs, and whether it is the epoch's last.

        All but the last hold whole steps, perhaps none.
        """
        samples, budget = self._samples(epoch), self.budget
        filled = max(
            self.tokens[samples].sum() / budget.max_tokens,
            self.views[samples].sum() / budget.max_views,
        )
        steps = filled / self.packs_per_step
        num_windows = max(1, int(min(len(samples) / budget.window, steps / self.window_steps)))
        carried = samples[:0]
        ways: Sequence[Sequence[int]] = WAYS
        for number, window in enumerate(np.array_split(samples, num_windows)):
            packs, best = self._pack(np.concatenate([carried, window]), ways)
            ways = (best,) if (number + 1) % TRIAL else WAYS
            is_last = number + 1 == num_windows
            if is_last:
                packs = self._fill_steps(packs, best)
            else:
                spare = len(packs) % self.packs_per_step
                emptiest = np.argsort(self._filled(packs), kind="stable")[:spare]
                carried = np.concatenate([samples[:0], *(packs[pack] for pack in emptiest)])
                for pack in sorted(emptiest, reverse=True):
                    del packs[pack]
            yield number, packs, is_last

    def _fill_steps(self, packs: list[np.ndarray], way: Sequence[int]) -> list[np.ndarray]:
        """Pack an epoch's last window again, by the smallest budget that takes no further step.

        Then all its packs are alike; to split some of full ones would make a step of unlike packs.
        """
        count = len(packs) + -len(packs) % self.packs_per_step
        if count == len(packs):
            return packs
        samples, low, high = np.concatenate(packs), 0.0, 1.0
        for _ in range(HALVINGS):
            share = (low + high) / 2
            tried, _ = self._pack(samples, (way,), share)
            if len(tried) <= count:
                packs, high = tried, share
            else:
                low = share
        return packs

    def _filled(self, packs: Sequence[np.ndarray]) -> np.ndarray:
        """How full each pack is, by the budget that it fills more of."""
        return np.maximum(
            reduce(np.add, self.tokens, packs) / self.budget.max_tokens,
            reduce(np.add, self.views, packs) / self.budget.max_views,
        )

    def _pack(
        self, samples: np.ndarray, ways: Sequence[Sequence[int]], share: float = 1.0
    ) -> tuple[list[np.ndarray], Sequence[int]]:
        """Pack a window by the budget that binds, in the way that takes fewer packs; and that way.

        A way that leaves little empty is taken without a look at the next. Of the budget that binds
        `share` is used; a sample that is larger than that is a pack.
        """
        sizes, size = self.tokens[samples], self.budget.max_tokens
        others, other = self.views[samples], self.budget.max_views
        if sizes.sum() / size < others.sum() / other:
            sizes, size, others, other = others, other, sizes, size
        size = int(size * share)
        large = sizes > size
        alone = [samples[k : k + 1] for k in np.flatnonzero(large)]
        samples, sizes, others = (values[~large] for values in (samples, sizes, others))
        tried: list[tuple[list[np.ndarray], Sequence[int]]] = []
        for shares in ways:
            packs = best_fit(samples, sizes, size, others, other, shares)
            tried.append((alone + packs, shares))
            if sizes.sum() >= FILLED * size * len(packs):
                break
        return min(tried, key=lambda of: len(of[0]))

    def _whole_costs(self) -> np.ndarray:
        """The costs as whole numbers."""
        return np.rint(self.costs / (self.costs.max(initial=0) or 1) * COST_UNITS).astype(np.int64)

    def _deal(
        self, packs: list[np.ndarray], costs: np.ndarray, random: np.random.Generator
    ) -> list[list[np.ndarray]]:
        """Cut a window's packs into steps of like cost, and shuffle the steps."""
        size = self.packs_per_step
        packs = split(packs, costs, size)
        packs = [packs[i] for i in np.argsort(-reduce(np.add, costs, packs), kind="stable")]
        packs += [NO_SAMPLES] * (-len(packs) % size)
        return [packs[k * size : k * size + size] for k in random.permutation(len(packs) // size)]


def reduce(by: np.ufunc, values: np.ndarray, packs: Sequence[np.ndarray]) -> np.ndarray:
    """The sum (`np.add`), or whatever it is by, of `values` over each pack; no pack is empty."""
    if not packs:
        return values[:0]
    starts = np.cumsum([0] + [len(pack) for pack in packs[:-1]])
    return by.reduceat(values[np.concatenate(packs)], starts)


def split(packs: Sequence[np.ndarray], costs: np.ndarray, multiple: int) -> list[np.ndarray]:
    """Split packs until their number is a multiple, or each is one sample.

    The next is the one that loses most without its dearest sample, which may be half of it: a pack
    of one large and one tiny sample would make a step of very unlike packs.
    """
    packs = list(packs)
    if not len(packs) % multiple:
        return packs
    totals = reduce(np.add, costs, packs)
    losses = np.minimum(totals - reduce(np.maximum, costs, packs), totals // 2)
    queue = [(-loss, k) for k, loss in enumerate(losses.tolist()) if len(packs[k]) > 1]
    heapq.heapify(queue)
    while len(packs) % multiple and queue:
        _, number = heapq.heappop(queue)
        pack = packs[number][np.argsort(-costs[packs[number]], kind="stable")]
        packs[number] = pack[::2]
        packs.append(pack[1::2])
        for place in (number, len(packs) - 1):
            half = costs[packs[place]]
            if len(half) > 1:
                loss = min(half.sum() - half.max(), half.sum() // 2)
                heapq.heappush(queue, (-int(loss), place))
    return packs


def best_fit(
    samples: np.ndarray,
    sizes: np.ndarray,
    budget: int,
    others: np.ndarray,
    other_budget: int,
    shares: Sequence[int] = (1,),
) -> list[np.ndarray]:
    """Pack samples, pack by pack: the largest that is left, then what fits behind it.

    sizes, others  (samples,) what counts against `budget`, and against `other_budget`
    shares         (1,): behind the first goes the largest that fits, and so on; (1, 2, 3): also
                   tried is one that fits twice, or thrice. The pack with the least room is kept,
                   where each sample in it counts as SAMPLE_PRICE of room

    Where a sample is too large by `others`, smaller ones are looked at in growing strides: a pack
    costs no more than the logarithm of the samples, and may miss one that would have fitted.
    """
    order = np.argsort(sizes, kind="stable")
    size, other = [0, *sizes[order].tolist()], [0, *others[order].tolist()]  # place 0: no sample
    last_fitting = np.cumsum(np.bincount(sizes, minlength=budget + 1)).tolist()  # of a room
    below = list(range(len(size)))  # leads from a place that is taken to the next that is not
    price = SAMPLE_PRICE * budget if len(shares) > 1 else 0

    def untaken(place: int) -> int:
        while (lower := below[place]) != place:
            below[place] = place = below[lower]
        return place

    def fill(first: int, share: int) -> tuple[list[int], int]:
        pack, room, other_room = [first], budget - size[first], other_budget - other[first]
        place, stride = min(last_fitting[room // share], first - 1), 1
        while True:
            while (lower := below[place]) != place:
                below[place] = place = below[lower]
            if not place:
                return pack, room
            if other[place] > other_room:
                place, stride = max(place - stride, 0), 2 * stride
                continue
            pack.append(place)
            room -= size[place]
            other_room -= other[place]
            fits = last_fitting[room]
            place = fits if fits < place else place - 1

    places, ends = [], []
    first = len(sizes)
    while first := untaken(first):
        tried = [fill(first, share) for share in shares]
        pack, _ = min(tried, key=lambda of: of[1] + price * len(of[0]))
        for place in pack:
            below[place] = place - 1
        places += pack
        ends.append(len(places))
    packed = samples[order][np.array(places, dtype=np.int64) - 1]
    return [packed[a:b] for a, b in zip([0, *ends], ends, strict=False)]


def check_fits(plan: Plan, name_of: Callable[[int], str]) -> None:
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

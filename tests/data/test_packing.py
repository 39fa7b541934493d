"""The sequence of steps: complete, within budget, and a pure function of data, seed and epoch."""

from collections import Counter
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phi3v.data.packing import (
    WAYS,
    Budget,
    Plan,
    PlannedStep,
    Position,
    best_fit,
    check_fits,
    split,
)
from phi3v.errors import ConfigError

BUDGET = Budget(max_tokens=100, max_views=20, window=16)


def make_plan(seed: int = 0, fingerprint: str = "f", samples: int = 75) -> Plan:
    """Two steps of four packs to a window; 75 samples are two windows."""
    random = np.random.default_rng(3)
    tokens, views = random.integers(1, 60, samples), random.integers(0, 12, samples)
    costs = tokens + 0.3 * views
    return Plan(fingerprint, seed, tokens, views, costs, BUDGET, packs_per_step=4, window_steps=2)


def epoch_of(plan: Plan, epoch: int = 0) -> list[PlannedStep]:
    return list(plan.steps(Position(epoch), epoch + 1))


def as_lists(steps: list[PlannedStep]) -> list[list[list[int]]]:
    return [[pack.tolist() for pack in step.packs] for step in steps]


def packs_of(plan: Plan, epoch: int = 0) -> list[np.ndarray]:
    return [pack for step in epoch_of(plan, epoch) for pack in step.packs]


def counts_of(plan: Plan, epoch: int) -> np.ndarray:
    """How often each sample is in an epoch."""
    return np.bincount(np.concatenate(packs_of(plan, epoch)), minlength=len(plan.tokens))


lengths = st.lists(st.tuples(st.integers(1, 64), st.integers(0, 9)), min_size=1, max_size=80)
budgets = st.builds(Budget, st.integers(64, 200), st.integers(9, 40), st.integers(1, 100))


@settings(deadline=None)
@given(lengths, budgets, st.integers(1, 9), st.integers(1, 4), st.integers(0, 3))
def test_an_epoch_holds_every_sample_once_in_whole_steps_and_no_pack_exceeds_its_budget(
    lengths: list[tuple[int, int]], budget: Budget, size: int, window_steps: int, epoch: int
) -> None:
    tokens, views = np.array(lengths).T
    plan = Plan("any", 0, tokens, views, tokens + views, budget, size, window_steps)
    steps = epoch_of(plan, epoch)
    packs = [pack for step in steps for pack in step.packs]
    assert sorted(np.concatenate(packs).tolist()) == list(range(len(lengths)))
    for pack in packs:
        assert tokens[pack].sum() <= budget.max_tokens
        assert views[pack].sum() <= budget.max_views
    assert {len(step.packs) for step in steps} == {size}
    assert {step.at.epoch for step in steps} == {epoch}


@settings(deadline=None)
@given(lengths, st.integers(1, 9), st.integers(1, 4))
def test_packs_are_empty_only_in_a_step_of_single_samples(
    lengths: list[tuple[int, int]], size: int, window_steps: int
) -> None:
    tokens, views = np.array(lengths).T
    plan = Plan("any", 0, tokens, views, tokens, Budget(64, 9, 8), size, window_steps)
    sizes = [sorted({len(pack) for pack in step.packs}) for step in epoch_of(plan)]
    short = [of for of in sizes if of[0] == 0]
    assert not short or short == [[0, 1]]


@pytest.mark.parametrize("shares", WAYS)
def test_packs_are_well_filled(shares: tuple[int, ...]) -> None:
    """Measured 99.9 % of the tokens; one sample a pack gives 30."""
    tokens = np.random.default_rng(0).integers(1, 60, 3000)
    packs = best_fit(np.arange(3000), tokens, 100, np.zeros(3000, int), 1, shares)
    assert tokens.sum() / (100 * len(packs)) > 0.99


def test_where_few_samples_fill_a_pack_those_that_fit_together_are_found() -> None:
    """34 + 33 + 33 fill a pack; the largest that fits behind a 34 is another, and no third."""
    tokens = np.repeat([34, 33], [40, 80])
    samples, none = np.arange(120), np.zeros(120, int)
    assert len(best_fit(samples, tokens, 100, none, 1)) == 47
    assert len(best_fit(samples, tokens, 100, none, 1, WAYS[1])) == 40
    plan = Plan("f", 0, tokens, none, tokens, Budget(100, 1, 120), packs_per_step=1)
    assert len(packs_of(plan)) == 40


def test_small_samples_are_spared_for_room_that_nothing_else_fills() -> None:
    """34 + 33 + 33 fill a pack as 34 + 34 and 32 ones do, and leave the ones to fill others."""
    tokens = np.repeat([34, 33, 1], [40, 80, 640])
    packs = best_fit(np.arange(760), tokens, 100, np.zeros(760, int), 1, WAYS[1])
    assert sorted(map(len, packs)) == [*[3] * 40, 40, *[100] * 6]


def test_the_budget_that_binds_is_packed_by() -> None:
    """7 + 3 views fill a pack; by tokens, three samples of 3 views would share one."""
    views, tokens = np.repeat([7, 3], 64), np.repeat([1, 2], 64)
    plan = Plan("f", 0, tokens, views, tokens, Budget(100, 10, 128), packs_per_step=1)
    assert len(packs_of(plan)) == 64


def test_the_steps_are_a_function_of_fingerprint_seed_and_epoch() -> None:
    first = as_lists(epoch_of(make_plan(), 2))
    assert as_lists(epoch_of(make_plan(), 2)) == first
    for other in (make_plan(seed=1), make_plan(fingerprint="g")):
        assert as_lists(epoch_of(other, 2)) != first
    assert as_lists(epoch_of(make_plan(), 3)) != first


def test_each_epoch_packs_other_samples_together() -> None:
    plan = make_plan()
    together = [{frozenset(pack.tolist()) for pack in packs_of(plan, epoch)} for epoch in (0, 1, 2)]
    for one, other in ((0, 1), (1, 2), (0, 2)):
        assert len(together[one] & together[other]) < len(together[one]) / 2


def test_the_order_is_that_of_the_first_release() -> None:
    """A checkpoint's position means nothing if this changes: say so in CHANGELOG, then renew."""
    assert as_lists(epoch_of(make_plan(samples=9))) == GOLDEN


GOLDEN = [[[5, 7, 3], [6, 0], [2, 4, 1], [8]]]


def test_the_unit_of_a_cost_does_not_matter() -> None:
    plan = make_plan()
    dearer = replace(plan, costs=plan.costs * 1e12)
    assert as_lists(epoch_of(dearer)) == as_lists(epoch_of(plan))


def costs_of(step: PlannedStep, plan: Plan) -> list[float]:
    return [float(plan.costs[pack].sum()) for pack in step.packs]


def make_costly_plan() -> Plan:
    """Samples of which four fill a pack, their costs unlike."""
    costs = np.random.default_rng(0).lognormal(0, 1, 4096)
    ones = np.ones(4096, int)
    return Plan("f", 0, ones, ones, costs, Budget(4, 4, 16), packs_per_step=8)


def test_packs_of_a_step_cost_alike_and_the_dearest_comes_first() -> None:
    """Mean over dearest: measured 0.927; 0.514 if the same packs are dealt at random."""
    plan = make_costly_plan()
    costs = np.array([costs_of(step, plan) for step in epoch_of(plan)])
    assert (np.diff(costs, axis=1) <= 1e-6).all()
    assert (costs.mean(axis=1) / costs.max(axis=1)).mean() > 0.9


def test_steps_of_a_window_come_in_any_order_of_cost() -> None:
    """Sixteen steps are in order by chance once in 10 ** 13."""
    plan = make_costly_plan()
    steps = list(islice(plan.steps(Position()), 16))
    assert steps[-1].after == Position(0, 1)
    costs = [sum(costs_of(step, plan)) for step in steps]
    assert costs != sorted(costs, reverse=True)


def test_what_makes_no_whole_step_is_packed_with_the_next_window() -> None:
    """Seven samples are seven packs: a step of four, and three that go on; the rest are split."""
    tokens = np.full(28, 60)
    plan = Plan("f", 0, tokens, tokens, tokens, Budget(100, 100, 7), 4, window_steps=1)
    steps = epoch_of(plan)
    assert [step.after for step in steps] == [
        Position(0, 1),
        *(Position(0, 1, 1), Position(0, 2)),
        *(Position(0, 2, 1), Position(0, 3)),
        *(Position(0, 3, 1), Position(1)),
    ]


def test_it_is_the_emptiest_packs_that_are_packed_again() -> None:
    """Measured 98.1 % of the tokens; 92.6 % if it is the fullest."""
    tokens = np.random.default_rng(0).integers(10, 60, 3000)
    plan = Plan("f", 0, tokens, tokens, tokens, Budget(100, 100, 24), 8, window_steps=1)
    assert tokens.sum() / (100 * len(packs_of(plan))) > 0.96


def test_at_the_end_of_an_epoch_packs_are_split_and_only_then_left_empty() -> None:
    tokens = np.full(10, 10)
    plan = Plan("f", 0, tokens, tokens, tokens, Budget(100, 100, 10), packs_per_step=4)
    assert [[len(pack) for pack in step.packs] for step in epoch_of(plan)] == [[3, 3, 3, 1]]
    wide = replace(plan, packs_per_step=12)
    assert [[len(p) for p in step.packs] for step in epoch_of(wide)] == [[1] * 10 + [0] * 2]


def test_a_pack_of_one_large_and_one_tiny_sample_is_not_the_one_that_is_split() -> None:
    costs = np.array([95, 5, 40, 40])
    packs = split([np.array([0, 1]), np.array([2, 3])], costs, 3)
    assert sorted(sorted(costs[pack].tolist()) for pack in packs) == [[5, 95], [40], [40]]


def test_the_last_packs_of_an_epoch_are_as_full_as_each_other() -> None:
    """Some seventeen packs' worth in steps of eight: 24 packs, all of them about 70 % full."""
    tokens = np.random.default_rng(0).integers(1, 20, 170)
    plan = Plan("f", 0, tokens, tokens, tokens, Budget(100, 1000, 170), packs_per_step=8)
    filled = sorted(int(tokens[pack].sum()) for step in epoch_of(plan) for pack in step.packs)
    assert sum(filled) == tokens.sum() and len(filled) == 24
    assert filled[1] >= 0.95 * filled[-1], "only the very last may be less full"


def test_a_sample_larger_than_what_the_last_packs_are_filled_to_is_alone() -> None:
    tokens = np.array([100] + [10] * 9)
    nothing = np.zeros(10, dtype=np.int64)
    plan = Plan("f", 0, tokens, nothing, tokens, BUDGET, packs_per_step=4)
    assert max(tokens[pack].sum() for pack in packs_of(plan)) == 100


@settings(deadline=None)
@given(st.integers(1, 30), st.floats(0.1, 3.5), st.integers(1, 6))
def test_by_its_weight_a_part_is_seen_and_its_samples_equally_often(
    samples: int, weight: float, epochs: int
) -> None:
    tokens = np.full(samples + 5, 10)
    parts = [(0, 5, 1.0), (5, samples + 5, weight)]
    plan = Plan("f", 0, tokens, tokens, tokens, Budget(100, 100, 8), 2, parts=parts)
    each = np.array([counts_of(plan, epoch) for epoch in range(epochs)])
    assert (each[:, :5] == 1).all()
    weighted = each[:, 5:]
    assert abs(weighted.sum() - epochs * weight * samples) <= 1
    assert np.ptp(weighted.sum(axis=0)) <= 1
    assert {*np.unique(weighted)} <= {int(weight), int(weight) + 1}


def test_a_fraction_of_a_part_is_drawn_from_all_of_it() -> None:
    tokens = np.full(100, 10)
    plan = Plan("f", 0, tokens, tokens, tokens, BUDGET, 2, parts=[(0, 100, 0.5)])
    assert 15 < counts_of(plan, 0)[:50].sum() < 35


def test_samples_outside_every_part_are_left_out() -> None:
    plan = replace(make_plan(samples=20), parts=[(0, 4, 1.0), (10, 12, 2.0)])
    samples = Counter(np.concatenate(packs_of(plan)).tolist())
    assert samples == {0: 1, 1: 1, 2: 1, 3: 1, 10: 2, 11: 2}


def test_going_on_from_any_position_gives_the_rest_of_the_sequence() -> None:
    plan = make_plan()
    whole = list(plan.steps(Position(), epochs=2))
    assert {step.after.window for step in whole} == {0, 1}
    for number, step in enumerate(whole):
        rest = list(plan.steps(step.after, epochs=2))
        assert as_lists(rest) == as_lists(whole[number + 1 :])
        assert [s.after for s in rest] == [s.after for s in whole[number + 1 :]]


def test_positions_count_steps_within_windows_within_epochs() -> None:
    steps = list(islice(make_plan().steps(Position()), 8))
    positions = [step.after for step in steps]
    assert len(positions) == len(set(positions))
    assert positions == sorted(positions, key=lambda of: (of.epoch, of.window, of.step))
    assert positions[0] == Position(0, 0, 1)
    assert Position(0, 1) in positions and Position(1) in positions


def test_every_step_says_where_it_is() -> None:
    steps = list(islice(make_plan().steps(Position()), 8))
    assert [step.at for step in steps] == [Position(), *[step.after for step in steps[:-1]]]


def test_with_epochs_the_sequence_ends_and_without_it_goes_on() -> None:
    plan = make_plan()
    both = len(epoch_of(plan, 0)) + len(epoch_of(plan, 1))
    assert len(list(plan.steps(Position(), epochs=2))) == both == plan.count(2)
    assert not list(plan.steps(Position(2), epochs=2))
    assert len(list(islice(plan.steps(Position()), 5 * both))) == 5 * both


def test_a_sample_as_large_as_a_pack_fits() -> None:
    plan = make_plan()
    exact = Budget(int(plan.tokens.max()), int(plan.views.max()), window=16)
    assert replace(plan, budget=exact).first_too_large() is None


@pytest.mark.parametrize("budget", [Budget(50, 20, 16), Budget(100, 10, 16)])
def test_a_sample_larger_than_a_pack_is_named(budget: Budget) -> None:
    plan = make_plan()
    check_fits(plan, str)
    small = replace(plan, budget=budget)
    sample = small.first_too_large()
    assert sample is not None
    with pytest.raises(ConfigError) as caught:
        check_fits(small, lambda index: f"row-{index}")
    assert str(caught.value) == (
        f"sample 'row-{sample}' has {plan.tokens[sample]} tokens and {plan.views[sample]} views, a "
        f"pack holds data.max_tokens {budget.max_tokens} and data.max_views {budget.max_views}; "
        "raise the budget or prepare with max_tokens"
    )

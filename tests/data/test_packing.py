"""The sequence of packs: complete, within budget, and a pure function of data, seed and epoch."""

from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phi3v.data.packing import Budget, PackPlan, Position, check_fits
from phi3v.errors import ConfigError

BUDGET = Budget(max_tokens=100, max_views=20, window=16)


def make_plan(seed: int = 0, fingerprint: str = "f", samples: int = 75) -> PackPlan:
    random = np.random.default_rng(3)
    tokens, views = random.integers(1, 60, samples), random.integers(0, 12, samples)
    return PackPlan(fingerprint, seed, tokens, views, BUDGET)


def as_lists(packs: list[np.ndarray]) -> list[list[int]]:
    return [pack.tolist() for pack in packs]


lengths = st.lists(st.tuples(st.integers(1, 64), st.integers(0, 9)), min_size=1, max_size=80)
budgets = st.builds(Budget, st.integers(64, 200), st.integers(9, 40), st.integers(1, 100))


@settings(deadline=None)
@given(lengths, budgets, st.integers(0, 3), st.integers(0, 3))
def test_an_epoch_holds_every_sample_once_and_no_pack_exceeds_its_budget(
    lengths: list[tuple[int, int]], budget: Budget, seed: int, epoch: int
) -> None:
    tokens, views = np.array(lengths).T
    packs = PackPlan("any", seed, tokens, views, budget).epoch(epoch)
    assert sorted(np.concatenate(packs).tolist()) == list(range(len(lengths)))
    for pack in packs:
        assert tokens[pack].sum() <= budget.max_tokens
        assert views[pack].sum() <= budget.max_views
        assert len(set(pack)) == len(pack) > 0


def test_packs_are_well_filled() -> None:
    """Best fit over windows of 1,024: measured 99.9 % of the tokens; one sample a pack gives 30."""
    random = np.random.default_rng(0)
    tokens = random.integers(1, 60, 3000)
    plan = PackPlan("f", 0, tokens, np.zeros(3000, int), Budget(100, 1, 1024))
    assert tokens.sum() / (100 * len(plan.epoch(0))) > 0.99


def test_the_packs_are_a_function_of_fingerprint_seed_and_epoch() -> None:
    first = as_lists(make_plan().epoch(2))
    assert as_lists(make_plan().epoch(2)) == first
    for other in (make_plan(seed=1), make_plan(fingerprint="g")):
        assert as_lists(other.epoch(2)) != first
    assert as_lists(make_plan().epoch(3)) != first


def test_the_order_is_that_of_the_first_release() -> None:
    """A checkpoint's position means nothing if this changes: say so in CHANGELOG, then renew."""
    assert as_lists(make_plan(samples=9).epoch(0)) == GOLDEN


GOLDEN = [[4, 2, 1], [8], [0, 7, 3], [6, 5]]


def test_an_epochs_order_is_shuffled_after_packing() -> None:
    """Packs are shuffled after packing, so the one longest sample in a window is anywhere."""
    tokens = np.where(np.arange(160) % 16, 20, 90)
    plan = PackPlan("f", 0, tokens, tokens, Budget(100, 100, 160))
    place = [k for k, pack in enumerate(plan.epoch(0)) if tokens[pack].max() == 90]
    assert len(place) == 10
    assert place != list(range(10))


def test_going_on_from_any_position_gives_the_rest_of_the_sequence() -> None:
    plan = make_plan()
    whole = list(plan.packs(Position(), epochs=2))
    for number, (_, position) in enumerate(whole):
        rest = list(plan.packs(position, epochs=2))
        assert as_lists([pack for pack, _ in rest]) == as_lists(
            [pack for pack, _ in whole[number + 1 :]]
        )
        assert [p for _, p in rest] == [p for _, p in whole[number + 1 :]]


def test_positions_count_packs_within_epochs() -> None:
    plan = make_plan()
    length = len(plan.epoch(0))
    positions = [p for _, p in islice(plan.packs(Position()), length + 1)]
    assert positions[:2] == [Position(0, 1), Position(0, 2)]
    assert positions[-2:] == [Position(1, 0), Position(1, 1)]


def test_with_epochs_the_sequence_ends_and_without_it_goes_on() -> None:
    plan = make_plan()
    both = len(plan.epoch(0)) + len(plan.epoch(1))
    assert len(list(plan.packs(Position(), epochs=2))) == both == plan.count(2)
    assert not list(plan.packs(Position(2), epochs=2))
    assert len(list(islice(plan.packs(Position()), 5 * both))) == 5 * both


@pytest.mark.parametrize("budget", [Budget(50, 20, 16), Budget(100, 10, 16)])
def test_a_sample_larger_than_a_pack_is_named(budget: Budget) -> None:
    plan = make_plan()
    check_fits(plan, str)
    small = PackPlan("f", 0, plan.tokens, plan.views, budget)
    sample = small.first_too_large()
    assert sample is not None
    with pytest.raises(ConfigError) as caught:
        check_fits(small, lambda index: f"row-{index}")
    assert str(caught.value) == (
        f"sample 'row-{sample}' has {plan.tokens[sample]} tokens and {plan.views[sample]} views, a "
        f"pack holds data.max_tokens {budget.max_tokens} and data.max_views {budget.max_views}; "
        "raise the budget or prepare with max_tokens"
    )

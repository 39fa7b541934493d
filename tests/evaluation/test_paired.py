"""Two models on the same rows: calibrated where they are equal, sharp where they differ."""

import json
from itertools import product

import numpy as np
import pytest

from phi3v.errors import ConfigError
from phi3v.evaluation.metrics import Answer, Difference, compare, compile_pattern
from phi3v.evaluation.metrics.bleu import bleu_of, row_counts
from phi3v.evaluation.metrics.paired import NUM_FLIPS, bleu_swap_p, sign_flip_p

RIGHT, WRONG = "A red bag of leather, 120", "A red scarf of wool, 90"
NAMES = ["exact_match", "anls", "bleu"]


def answers(is_right: np.ndarray) -> list[Answer]:
    texts = (RIGHT if right else WRONG for right in is_right)
    return [Answer(str(row), RIGHT, text) for row, text in enumerate(texts)]


def test_p_is_uniform_where_two_models_are_equally_good():
    rng = np.random.default_rng(0)
    ps = np.array([sign_flip_p(rng.normal(size=30), seed) for seed in range(1000)])
    # The largest gap of n uniform values is below 1.36 / sqrt(n) 95 times of 100 (Kolmogorov).
    gap = np.abs(np.sort(ps) - np.linspace(0, 1, len(ps))).max()
    assert gap < 1.36 / np.sqrt(len(ps))
    assert (ps < 0.05).mean() == pytest.approx(0.05, abs=3 * np.sqrt(0.05 * 0.95 / len(ps)))


def test_p_is_that_of_all_signs():
    differences = np.array([1.0, 1.0, 0.5, -0.25, 0.0, 2.0, 1.0, 0.3])
    signs = np.array(list(product([1, -1], repeat=8)))
    exact = (np.abs(signs @ differences) >= differences.sum() - 1e-9).mean()
    assert sign_flip_p(differences) == exact


def test_p_of_many_rows_is_that_of_all_signs_but_for_the_luck_of_the_draw():
    differences = np.random.default_rng(5).normal(0.3, size=14)  # 16,384 ways are more than 10,000
    signs = np.array(list(product([1, -1], repeat=14)))
    exact = (np.abs(signs @ differences) >= abs(differences.sum()) - 1e-9).mean()
    assert sign_flip_p(differences) != exact
    assert sign_flip_p(differences) == pytest.approx(exact, abs=4 * np.sqrt(exact / NUM_FLIPS))


def test_the_p_of_bleu_is_that_of_all_swaps_of_rows():
    texts = [RIGHT, WRONG, "A red bag of wool, 120", "A bag of leather", RIGHT, "A red bag of felt"]
    a = row_counts([Answer(str(row), RIGHT, text) for row, text in enumerate(texts)])
    b = row_counts([Answer(str(row), RIGHT, text) for row, text in enumerate(texts[1:] + [WRONG])])
    apart = []
    for swaps in product([False, True], repeat=len(a)):
        swap = np.array(swaps)[:, None]
        one, other = np.where(swap, b, a), np.where(swap, a, b)
        apart.append(abs(bleu_of(other.sum(axis=0)) - bleu_of(one.sum(axis=0))))
    exact = np.mean([distance >= apart[0] - 1e-12 for distance in apart])
    assert 2 / 64 < exact < 1
    assert bleu_swap_p(a, b) == exact
    again = np.vstack([a, a, a]), np.vstack([b, b, b])  # 18 rows are drawn
    assert 1 / NUM_FLIPS < bleu_swap_p(*again) < exact


@pytest.mark.parametrize("n", [1, 2, 5, 13])
def test_few_rows_prove_no_more_by_bleu_than_by_another_metric(n: int) -> None:
    """All and none of n swaps reach a difference that all rows share: p is 2 of 2^n."""
    found = compare(NAMES, answers(np.zeros(n) > 0), answers(np.zeros(n) == 0), None)
    assert {difference.p for difference in found.values()} == {2 / 2**n}


def test_ties_count_whatever_the_order_of_the_sum():
    differences = np.array([0.1, 0.2, 0.3, 0.7])  # only all plus and all minus reach it: 2 of 16
    assert sign_flip_p(differences) == 2 / 16
    assert sign_flip_p(np.full(3, 0.1)) == 2 / 8


def test_a_true_difference_is_found_and_named_with_its_size():
    is_right = np.arange(200) % 2 == 0
    better = is_right | (np.arange(200) % 10 == 1)  # 20 rows more, none less
    found = compare(NAMES, answers(is_right), answers(better), None)
    exact = found["exact_match"]
    assert (exact.value, exact.n) == (pytest.approx(0.1), 200)
    for name, difference in found.items():
        assert difference.low is not None and difference.p is not None, name
        assert difference.low > 0 and difference.p < 0.01, name
    # 20 rows of 200 changed: standard error sqrt(0.1 * 0.9 / 200) = 0.021. Two models of two sets
    # of rows would have 0.05 each, and the interval would hold 0.
    assert exact.low == pytest.approx(0.1 - 1.96 * 0.021, abs=0.01)
    assert exact.p == 1 / (NUM_FLIPS + 1)


def test_noise_is_not_taken_for_a_difference():
    rng = np.random.default_rng(3)
    found = compare(NAMES, answers(rng.random(100) < 0.5), answers(rng.random(100) < 0.5), None)
    for name, difference in found.items():
        assert difference.low is not None and difference.high is not None, name
        assert difference.low < 0 < difference.high, name
        assert difference.p is not None and difference.p > 0.05, name


def test_the_order_of_the_models_changes_the_sign_only():
    rng = np.random.default_rng(1)
    a, b = answers(rng.random(80) < 0.5), answers(rng.random(80) < 0.6)
    there, back = compare(NAMES, a, b, None), compare(NAMES, b, a, None)
    for name in NAMES:
        x, y = there[name], back[name]
        assert x.value is not None and x.low is not None and x.high is not None
        assert (y.value, y.low, y.high) == pytest.approx((-x.value, -x.high, -x.low)), name
        assert y.p == pytest.approx(x.p) and y.n == x.n, name


def test_the_same_answers_do_not_differ():
    a = answers(np.arange(10) < 5)
    found = compare(NAMES, a, a, None)
    assert found["bleu"] == Difference(0.0, 0.0, 0.0, 1.0, 10)
    for name in ("exact_match", "anls"):
        difference = found[name]
        assert (difference.value, difference.p, difference.n) == (0.0, 1.0, 10)
        # 10 rows without a difference rule out that 31 % differ: 0.69^10 = 0.025.
        assert (difference.low, difference.high) == pytest.approx((-0.31, 0.31), abs=0.03)


def test_rows_without_a_value_are_left_out():
    pattern = compile_pattern("{price:float}")
    a = [Answer("1", "0", "5"), Answer("2", "100", "110")]
    b = [Answer("1", "0", "0"), Answer("2", "100", "100")]
    found = compare(["price_mape", "price_mape_unseen", "bleu_unseen"], a, b, pattern, ["100", "0"])
    assert found["price_mape"] == Difference(-0.1, -0.1, -0.1, 1.0, 1)
    for name in ("price_mape_unseen", "bleu_unseen"):
        assert found[name] == Difference(None, None, None, None, 0)
        assert json.dumps(found[name].as_dict(), allow_nan=False)


def test_other_rows_are_refused():
    a = answers(np.arange(3) < 2)
    with pytest.raises(ConfigError, match="one answered 3, the other 2; evaluate both on the same"):
        compare(NAMES, a, a[:2], None)
    with pytest.raises(ConfigError, match="answer 0 is to row '0' .* for one, to '1' "):
        compare(NAMES, a, [a[1], a[0], a[2]], None)
    taught = [Answer(answer.id, WRONG, answer.prediction) for answer in a]
    with pytest.raises(ConfigError, match=f"'{RIGHT}'. for one, to '0' .'{WRONG}'. for the other"):
        compare(NAMES, a, taught, None)

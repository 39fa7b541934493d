"""Which steps are skipped, and what is remembered of them."""

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest

from phi3v.data.packing import Position
from phi3v.training.faults import HISTORY, NEEDED, FaultLog, reason_to_skip, spike_limit
from phi3v.training.loop import read_trail
from phi3v.training.opening import Run
from phi3v.training.run_folder import RunFolder

USUAL = [2.0, 2.1, 1.9, 2.2, 1.8] * 7  # level; deviations of 0, 0.1 and 0.2
CURVES = {
    "flat": lambda t: 2.0 + 0 * t,
    "a slow fall": lambda t: 4 * np.exp(-t / 300),
    "a fast fall": lambda t: 0.2 + 4 * np.exp(-t / 30),
    "a power law": lambda t: 4 * (t + 1) ** -0.4,
    "a rise at warm-up": lambda t: np.where(t < 40, 2 + t / 20, 4 * np.exp(-(t - 40) / 60)),
}
Curve = Callable[[np.ndarray], np.ndarray]


def skipped(losses: np.ndarray, deviations: float) -> list[int]:
    """The steps of a run that are skipped, which later ones do not see."""
    kept: list[float] = []
    found = []
    for step, loss in enumerate(losses.tolist()):
        if loss > spike_limit(kept, deviations):
            found.append(step)
        else:
            kept.append(loss)
    return found


def noisy(curve: Curve, seed: int, heavy: bool = False, steps: int = 160) -> np.ndarray:
    """A curve whose noise is 4 % of it."""
    rng = np.random.default_rng(seed)
    noise = rng.standard_t(3, steps) / math.sqrt(3) if heavy else rng.standard_normal(steps)
    return curve(np.arange(steps)) * (1 + 0.04 * noise)


def test_the_limit_is_so_many_robust_deviations_above_what_is_expected() -> None:
    assert spike_limit(USUAL, 10) == pytest.approx(2.0 + 10 * 1.4826 * 0.1, rel=0.02)
    falling = [4 * 0.97**step * (1 + 0.05 * (-1) ** step) for step in range(32)]
    expected = 4 * 0.97**32
    spread = np.median(np.abs(falling - 4 * 0.97 ** np.arange(32)))
    assert spike_limit(falling, 8) == pytest.approx(expected + 8 * 1.4826 * spread, rel=0.02)
    assert spike_limit(falling, 8) < falling[0]


@pytest.mark.parametrize("name", CURVES)
def test_a_curve_without_noise_has_no_spikes_and_hides_none(name: str) -> None:
    """The limit of before, in which the fall itself was spread, let twice the loss pass."""
    losses = CURVES[name](np.arange(160)).astype(float)
    assert skipped(losses, 4) == [] and skipped(losses + 1e-7 * (-1) ** np.arange(160), 4) == []
    jumps = [20, 26, 33, 70, 71, 90, 120, 159]
    losses[jumps] *= 2
    assert skipped(losses, 6) == jumps


@pytest.mark.parametrize("name", CURVES)
def test_eight_poisoned_steps_of_a_noisy_curve_are_found_and_hardly_another(name: str) -> None:
    """Of 640 healthy steps none is skipped at 8 with Gaussian noise, of 1,600 with tails few."""
    jumps = [24, 30, 45, 60, 80, 100, 130, 159]
    for seed in range(4):
        losses = noisy(CURVES[name], seed)
        assert skipped(losses, 8) == []
        losses[jumps] *= 3
        assert skipped(losses, 8) == jumps
    tails = sum(len(skipped(noisy(CURVES[name], seed, heavy=True), 8)) for seed in range(10))
    assert tails <= 6


def test_the_limit_follows_a_rise_of_all_losses() -> None:
    rising = [2.0 + 0.05 * step for step in range(32)]
    assert 3.6 < spike_limit(rising, 4) < 4.1


def test_a_few_wild_losses_hardly_move_the_limit() -> None:
    assert spike_limit([*USUAL, 1e6, 1e6], 10) < 5
    wild = noisy(CURVES["a slow fall"], 0)[:32]
    calm = spike_limit(wild.tolist(), 8)
    wild[[3, 9, 17, 28, 31]] = 1e6
    assert calm * 0.9 < spike_limit(wild.tolist(), 8) < calm * 1.2


def test_only_the_last_steps_count() -> None:
    assert spike_limit([100.0] * 1000 + [2.0] * HISTORY, 10) < 3


def test_nothing_is_a_spike_before_enough_steps_or_without_the_key() -> None:
    assert spike_limit([], 10) == spike_limit(USUAL[: NEEDED - 1], 10) == math.inf
    assert spike_limit(USUAL[:NEEDED], 10) < math.inf
    assert spike_limit(USUAL, None) == math.inf


def test_equal_losses_leave_room_for_others_and_so_do_those_of_rounding() -> None:
    assert spike_limit([2.0] * 32, 10) == pytest.approx(2.2)
    assert spike_limit([0.0] * 32, 10) == pytest.approx(0.01)
    assert spike_limit([1e-7, 0.0, 3e-7, 2e-7] * 8, 8) == pytest.approx(0.008, rel=0.01)


def test_after_a_resume_and_after_skipped_steps_the_limit_is_that_of_an_unbroken_run(
    tmp_path: Path,
) -> None:
    """What is read of metrics.jsonl gives the same number to the last bit."""
    folder = RunFolder(tmp_path)
    run = cast(Run, SimpleNamespace(folder=folder, ranks=SimpleNamespace(is_first=True)))
    losses, kept = noisy(CURVES["a fast fall"], 3), list[float]()
    losses[[30, 31, 50]] *= 4
    for step, loss in enumerate(losses.tolist(), 1):
        trail, _ = read_trail(run)
        limit = spike_limit(kept, 8)
        assert spike_limit(trail.losses, 8) == limit
        is_skipped = loss > limit
        assert is_skipped == (step - 1 in (30, 31, 50))
        if not is_skipped:
            kept.append(loss)
        reason = reason_to_skip(loss, 1.0, limit)
        folder.add_metrics({"step": step, "loss": loss, "skipped": reason})


@pytest.mark.parametrize(
    ("loss", "norm", "reason"),
    [
        (2.0, 1.0, None),
        (3.0, 1.0, None),
        (3.1, 1.0, "the loss is above 3"),
        (math.nan, 1.0, "the loss is not finite"),
        (math.inf, math.nan, "the loss is not finite"),
        (2.0, math.inf, "the gradient is not finite"),
        (2.0, math.nan, "the gradient is not finite"),
    ],
)
def test_a_step_is_skipped_for_a_reason(loss: float, norm: float, reason: str | None) -> None:
    assert reason_to_skip(loss, norm, limit=3.0) == reason


def fault(step: int, at: Position) -> dict:
    return {"step": step, "at": vars(at), "reason": "the loss is not finite", "samples": [["a"]]}


def test_what_is_left_out_is_left_out_for_good_and_its_samples_stay(tmp_path: Path) -> None:
    log = FaultLog(tmp_path / "faults.jsonl")
    assert log.read() == [] and log.left_out() == []
    bad = [Position(0, 0, 6), Position(0, 1)]
    for step, at in ((3, Position(0, 0, 2)), (7, bad[0]), (8, bad[1]), (9, Position(0, 1, 1))):
        log.add(fault(step, at))
    log.add_rollback(4, bad)
    log.keep(4)
    assert [line.get("step") for line in log.read()] == [3, 7, 8, None]
    assert log.left_out() == bad
    assert (log.rollbacks_to(4), log.rollbacks_to(0)) == (1, 0)
    log.keep(0)
    assert log.left_out() == bad


def test_a_line_that_a_crash_cut_off_is_no_fault(tmp_path: Path) -> None:
    log = FaultLog(tmp_path / "faults.jsonl")
    log.add(fault(3, Position()))
    with log.path.open("a") as file:
        file.write('{"step": 4')
    assert [line["step"] for line in log.read()] == [3]

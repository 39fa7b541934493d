"""Which steps are skipped, and what is remembered of them."""

import math
from pathlib import Path

import pytest

from phi3v.data.packing import Position
from phi3v.training.faults import NEEDED, FaultLog, reason_to_skip, spike_limit

USUAL = [2.0, 2.1, 1.9, 2.2, 1.8] * 8  # median 2.0, median deviation 0.1


def test_the_limit_is_so_many_robust_deviations_above_the_median() -> None:
    assert spike_limit(USUAL, 10) == pytest.approx(2.0 + 10 * 1.4826 * 0.1)


def test_a_few_wild_losses_hardly_move_the_limit() -> None:
    assert spike_limit([*USUAL, 1e6, 1e6], 10) < 5


def test_only_the_last_steps_count() -> None:
    assert spike_limit([100.0] * 1000 + [2.0] * 64, 10) < 3


def test_nothing_is_a_spike_before_enough_steps_or_without_the_key() -> None:
    assert spike_limit(USUAL[: NEEDED - 1], 10) == math.inf
    assert spike_limit(USUAL, None) == math.inf


def test_equal_losses_leave_room_for_others() -> None:
    assert spike_limit([2.0] * 64, 10) == pytest.approx(2.2)


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

"""One line that lives on a terminal, a line now and then in a log, and silence elsewhere."""

import fcntl
import io
import pty
import struct
import sys
import termios
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from transformers.utils.logging import enable_progress_bar, is_progress_bar_enabled

from phi3v.output import say
from phi3v.training import console
from phi3v.training.console import Console, describe, describe_evaluation
from phi3v.training.ranks import _set_defaults

Clock = Callable[[float], None]


def metrics(number: int, **changes: Any) -> dict[str, Any]:
    """What the console reads of a line of metrics.jsonl."""
    line = {
        "step": number,
        "loss": 1.28371,
        "lr": {"vision": 1e-6, "language": 2e-5},
        "tokens_per_second": 12345.4,
        "mfu": 0.41234,
        "packing": 0.9912,
    }
    return line | changes


@pytest.fixture
def wait(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The console's clock, which goes on when this is called."""
    now = [1000.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])

    def go_on(seconds: float) -> None:
        now[0] += seconds

    return go_on


def test_a_line_says_what_matters_first() -> None:
    assert describe(metrics(120), 1000, 3760.4) == (
        "step 120/1000, 1:02:40 left, loss 1.284, lr 2e-05, 12,345 tokens/s, MFU 41.2%, "
        "packed 99.1%"
    )


def test_what_is_not_known_is_not_said() -> None:
    assert describe(metrics(1, mfu=None, loss=None), 9, None) == (
        "step 1/9, loss not finite, lr 2e-05, 12,345 tokens/s, packed 99.1%"
    )


def test_a_log_has_the_first_step_the_last_and_one_every_30_seconds(
    wait: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = Console(100, 0, is_first=True)
    for number in range(1, 101):
        wait(1.0)
        shown.step(metrics(number))
    shown.close()
    out, err = capsys.readouterr()
    assert (out, "\r" in err) == ("", False)
    assert [line.split(",")[0] for line in err.splitlines()] == [
        f"step {number}/100" for number in (1, 31, 61, 91, 100)
    ]


def test_time_left_goes_by_the_steps_of_this_process_without_its_first(
    wait: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run of 100 steps that goes on behind step 60, and compiles for ten minutes."""
    shown = Console(100, 60, is_first=True)
    wait(600.0)
    shown.step(metrics(61))
    for number in range(62, 72):
        wait(6.0)
        shown.step(metrics(number))
    lines = capsys.readouterr().err.splitlines()
    assert "left" not in lines[0]
    assert [line.split(", ")[:2] for line in lines[1:]] == [
        ["step 66/100", "03:24 left"],
        ["step 71/100", "02:54 left"],
    ]


def test_a_run_that_is_over_has_no_time_left(
    wait: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = Console(2, 0, is_first=True)
    for number in (1, 2):
        wait(5.0)
        shown.step(metrics(number))
    assert "step 2/2, 00:00 left" in capsys.readouterr().err


def test_other_ranks_say_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    shown = Console(3, 0, is_first=False)
    for number in (1, 2, 3):
        shown.step(metrics(number))
    shown.close()
    assert capsys.readouterr() == ("", "")


def test_an_evaluation_is_one_line_of_its_first_metrics() -> None:
    score = {"value": 0.61, "low": 0.55, "high": 0.67, "n": 256}
    none = {"value": None, "low": None, "high": None, "n": 0}
    error = {"value": 12.5, "low": 10.25, "high": 15.0, "n": 256}
    found = {"anls": score, "price_mae": error, "bleu_unseen": none, "accuracy": score}
    found["blind_anls"] = score | {"value": 0.125, "n": 250}
    found["constant_anls"] = score | {"value": 0.09}
    assert describe_evaluation(120, 1.30958, found) == (
        "evaluation at step 120: loss 1.310, anls 61.0% (55.0% to 67.0% n=256, "
        "blind 12.5% n=250, constant 9.0%), price_mae 12.5 (10.25 to 15 n=256), bleu_unseen has no "
        "rows, 1 more in evaluations.jsonl"
    )
    few = {"price_mae": error | {"n": 6}}
    assert describe_evaluation(1, 1.0, few).endswith(
        "price_mae 12.5 (10.25 to 15 n=6, few rows: interval too narrow)"
    )


def on_terminal(show: Callable[[], None], monkeypatch: pytest.MonkeyPatch, columns: int) -> str:
    """What appears on a real terminal while `show` runs: a few lines, which its buffer holds."""
    reading, writing = pty.openpty()
    fcntl.ioctl(writing, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with open(writing, "w", encoding="utf-8") as stderr, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stderr)
        show()
    text = b""
    with open(reading, "rb", buffering=0) as screen, suppress(OSError):  # Linux's end of file
        while piece := screen.read(4096):
            text += piece
    return text.decode()


def test_a_terminal_has_one_line_that_changes(wait: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    def show() -> None:
        shown = Console(1000, 998, is_first=True)
        for number in (999, 1000):
            wait(1.0)
            shown.step(metrics(number))
        shown.close()
        print("afterwards", file=sys.stderr)

    text = on_terminal(show, monkeypatch, columns=120)
    live, *rest = text.split("\r\n")
    assert live.split("\r")[-1] == describe(metrics(1000), 1000, 0.0)
    assert rest == ["afterwards", ""]


def test_a_line_that_is_said_stands_above_the_live_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def show() -> None:
        shown = Console(1000, 998, is_first=True)
        shown.step(metrics(999))
        say("evaluation at step 999")
        shown.close()

    *_, said, live, end = on_terminal(show, monkeypatch, columns=120).split("\r\n")
    assert said.split("\r")[-1] == "evaluation at step 999"
    assert live.split("\r")[-1].startswith("step 999/1000") and end == ""


def test_a_narrow_terminal_keeps_to_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def show() -> None:
        shown = Console(1000, 0, is_first=True)
        shown.step(metrics(1))
        shown.close()

    lines = on_terminal(show, monkeypatch, columns=40).strip().split("\r")
    assert max(len(line.rstrip()) for line in lines) <= 40
    assert lines[-1].startswith("step 1/1000, loss 1.284")


def test_other_ranks_leave_a_terminal_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def show() -> None:
        shown = Console(3, 0, is_first=False)
        shown.step(metrics(1))
        shown.close()
        print("end", end="", file=sys.stderr)

    assert on_terminal(show, monkeypatch, columns=80) == "end"


def test_bars_of_transformers_are_off_in_a_log_and_on_other_ranks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def show() -> None:
        for rank in ("0", "1"):
            enable_progress_bar()
            monkeypatch.setenv("RANK", rank)
            _set_defaults()
            print(is_progress_bar_enabled(), file=sys.stderr)

    assert on_terminal(show, monkeypatch, columns=80).split() == ["True", "False"]
    enable_progress_bar()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    _set_defaults()
    assert not is_progress_bar_enabled()

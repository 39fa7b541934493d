"""A piece of work takes what it is granted, and nothing of it reaches the next one."""

import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from phi3v.errors import Phi3VError, SampleError
from phi3v.processing import bounded as module
from phi3v.processing.bounded import LEFT_BYTES, MOST_BYTES, Overspent, bounded
from tests.processing import work

ROOT = Path(__file__).parents[2]


def test_the_answer_is_that_of_the_function() -> None:
    data = bytes(range(256)) * 1000
    array, text = bounded(work.reversed_array, data, "x", seconds=2)
    assert np.array_equal(array, np.frombuffer(data, np.uint8)[::-1]) and text == "x"


def test_the_process_stays_for_the_next_piece_and_imports_no_torch() -> None:
    first, has_torch = bounded(work.process, b"", seconds=2)
    assert first != os.getpid() and not has_torch
    assert bounded(work.process, b"", seconds=2) == (first, False)


def test_a_sample_error_is_handed_on_and_a_defect_keeps_its_lines() -> None:
    with pytest.raises(SampleError, match="^image is odd$"):
        bounded(work.refuse, b"image is odd", seconds=2)
    with pytest.raises(RuntimeError, match=r"(?s)work\.py.*in fail.*ZeroDivisionError"):
        bounded(work.fail, b"", seconds=2)


def test_a_picture_that_is_refused_is_let_go_of_at_once() -> None:
    data, was_on = bytes(1000), gc.isenabled()
    count = sys.getrefcount(data)
    gc.disable()
    try:
        with suppress(SampleError):
            bounded(work.refuse, data, seconds=2)
        assert sys.getrefcount(data) == count
    finally:
        if was_on:
            gc.enable()


def test_time_counts_as_far_as_it_is_used() -> None:
    bounded(work.sleep, b"", 0.5, seconds=0.2)
    before = time.monotonic()
    with pytest.raises(Overspent, match=r"takes more than 0\.2 seconds of processor time"):
        bounded(work.spin, b"", seconds=0.2)
    assert time.monotonic() - before < 10
    assert bounded(work.process, b"", seconds=2)[0]  # another one


def test_what_one_piece_has_used_is_not_counted_to_the_next() -> None:
    for _ in range(4):
        bounded(work.spin_for, b"", 0.2, seconds=0.5)


def test_memory_is_held_at_the_limit() -> None:
    assert bounded(work.take, b"", MOST_BYTES // 2, seconds=10) == MOST_BYTES // 2
    bounded(work.give_back, b"", seconds=2)  # what it has is less than at its start
    with pytest.raises(Overspent, match="takes more than 900 MB of memory"):
        bounded(work.take, b"", MOST_BYTES, seconds=10)


@pytest.mark.parametrize("take", [work.take, work.take_or_refuse])
def test_memory_that_stays_behind_narrows_nothing(take: Callable[[bytes, int], int]) -> None:
    bounded(work.keep, b"", MOST_BYTES // 2, seconds=10)
    most = MOST_BYTES - LEFT_BYTES
    assert bounded(take, b"", most, seconds=10) == most


def test_a_crash_is_the_pictures_and_a_kill_is_not() -> None:
    with pytest.raises(Overspent, match=r"makes its decoder crash \(SIGSEGV\)"):
        bounded(work.end_by, b"", signal.SIGSEGV, seconds=2)
    with pytest.raises(Phi3VError, match="was ended by SIGKILL, perhaps for want of memory; start"):
        bounded(work.end_by, b"", signal.SIGKILL, seconds=2)


@pytest.mark.slow
def test_a_limit_that_there_is_already_is_kept() -> None:
    code = (
        "import resource, phi3v.processing.bounded as b, tests.processing.work as w;"
        "resource.setrlimit(resource.RLIMIT_AS, (12 << 30, 12 << 30));"
        "print(b.bounded(w.process, b'', seconds=2)[1])"
    )
    assert _python(code) == "False"


@pytest.mark.slow
def test_a_fork_has_a_process_of_its_own_and_none_stays_behind() -> None:
    code = (
        "import os, phi3v.processing.bounded as b, tests.processing.work as w;"
        "first = b.bounded(w.process, b'', seconds=2)[0];"
        "ids = [first];"
        "reader, writer = os.pipe();"
        "child = os.fork();"
        "own = b.bounded(w.process, b'', seconds=2)[0];"
        "child or (os.write(writer, str(own).encode()), os._exit(0));"
        "os.waitpid(child, 0);"
        "print(first, own, os.read(reader, 99).decode())"
    )
    first, again, forked = map(int, _python(code).split())
    assert first == again != forked
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{number}").exists() for number in (first, forked)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _python(code: str) -> str:
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0 and not run.stderr, run.stderr
    return run.stdout.strip()


def test_the_process_can_be_told_to_end() -> None:
    number, _ = bounded(work.process, b"", seconds=2)
    assert module._stop() == 0
    assert not Path(f"/proc/{number}").exists()

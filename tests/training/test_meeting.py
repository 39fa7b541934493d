"""Ranks that meet, and wait for each other, outside of collectives; the ranks are threads."""

import itertools
import os
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest import mock

import pytest
import torch
from torch.distributed import HashStore

from phi3v.errors import ConfigError
from phi3v.training import meeting
from phi3v.training.meeting import Turn, meet
from phi3v.training.ranks import Ranks, free_port

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def port() -> Iterator[int]:
    """Where the ranks of a test meet."""
    number = free_port()
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(number)}
    with mock.patch.dict(os.environ, place):
        yield number


def at_once(*tasks: Callable[[], Any]) -> list[Any]:
    """What each task gives or raises."""
    with ThreadPoolExecutor(len(tasks)) as pool:
        futures = [pool.submit(task) for task in tasks]
        return [future.exception() or future.result() for future in futures]


def met(rank: int, seconds: float = 20) -> Any:
    return meet(Ranks(rank, 2, rank, 2), CPU, seconds)


def test_ranks_meet_whoever_comes_first() -> None:
    def late() -> Any:
        time.sleep(0.3)
        return met(0)

    assert all(not isinstance(found, Exception) for found in at_once(late, lambda: met(1)))


def test_two_ranks_on_one_gpu_are_refused_on_both(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "name_of", lambda device: "GPU-1234")
    first, second = at_once(lambda: met(0), lambda: met(1))
    assert isinstance(first, ConfigError) and str(first) == str(second)
    host = socket.gethostname()
    for rank in (0, 1):
        assert f"rank {rank} on {host}" in str(first)
    assert " both have the GPU GPU-1234 (cpu, CUDA_VISIBLE_DEVICES None); a rank needs " in str(
        first
    )


def test_ranks_on_gpus_of_their_own_are_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    names = map(str, itertools.count())
    monkeypatch.setattr(meeting, "name_of", lambda device: next(names))
    assert all(
        not isinstance(found, Exception) for found in at_once(lambda: met(0), lambda: met(1))
    )


def test_a_rank_that_does_not_come_is_named(
    port: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(meeting, "LINE_SECONDS", 0.2)
    with pytest.raises(
        ConfigError, match=rf"^1 of 2 ranks \(1\) did not come to 127.0.0.1:{port} "
    ):
        met(0, seconds=0.5)
    assert f"waiting at 127.0.0.1:{port} for 1 of 2 ranks (1)\n" in capfd.readouterr().err


def test_a_first_rank_that_does_not_listen_is_named(
    port: int, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(
        ConfigError, match=rf"^nobody answers at 127.0.0.1:{port}, where the first "
    ):
        met(1, seconds=0.3)
    assert capfd.readouterr().err == ""


def test_a_port_in_use_is_named_with_what_to_type(
    port: int, capfd: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as other:
        other.bind(("0.0.0.0", port))
        other.listen()
        with pytest.raises(ConfigError, match=rf"^port {port} of .* in use.*--master_port"):
            met(0)
    assert capfd.readouterr().err == ""


@pytest.fixture
def turns(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Turn]:
    """One rank's part of a turn of two; made by the ranks of a test, which are one process here."""
    store = HashStore()
    monkeypatch.setattr(meeting, "_get_default_store", lambda: store)
    monkeypatch.setattr(meeting, "_turns", itertools.repeat(0))
    return lambda: Turn("evaluation", 2)


def test_who_is_done_waits_and_beats_while_another_moves(turns: Callable[[], Turn]) -> None:
    beats: list[float] = []

    def slow() -> None:
        turn = turns()
        for _ in range(5):
            time.sleep(0.2)
            turn.move()
        turn.wait(lambda: None)

    began = time.monotonic()
    failures = at_once(slow, lambda: turns().wait(lambda: beats.append(time.monotonic())))
    assert failures == [None, None]
    assert beats[-1] - began > 0.9
    assert len(beats) >= 5


def test_who_waits_for_a_rank_that_stands_still_does_not_beat(
    turns: Callable[[], Turn], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """So its watchdog ends it: the other's machine may be gone."""
    monkeypatch.setattr(meeting, "LINE_SECONDS", 0.2)
    beats: list[float] = []

    def still() -> None:
        time.sleep(0.8)
        turns().wait(lambda: None)

    at_once(still, lambda: turns().wait(lambda: beats.append(time.monotonic())))
    assert len(beats) == 2, "one when it came, one when all had come"
    said = capsys.readouterr().err
    assert said.startswith("evaluation: 1 of 2 ranks have waited for the others for 0 s\n")

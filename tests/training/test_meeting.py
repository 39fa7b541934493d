"""Ranks that meet, and wait for each other, outside of collectives; the ranks are threads."""

import itertools
import os
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
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


def listeners(port: int) -> set[str]:
    """The addresses here at which somebody listens at a port, as the kernel writes them."""
    lines = [
        line.split()
        for table in ("tcp", "tcp6")
        for line in Path("/proc/net", table).read_text().splitlines()[1:]
    ]
    places = [place.split(":") for _, place, _, state, *_ in lines if state == "0A"]
    return {address for address, number in places if int(number, 16) == port}


V4, V6 = "0100007F", "0" * 24 + "01000000"


def test_one_rank_opens_no_port(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_ADDR")
    monkeypatch.delenv("MASTER_PORT")
    assert isinstance(meet(Ranks(0, 1, 0, 1), CPU, 20), HashStore)


@pytest.mark.parametrize(("address", "kernels"), [("127.0.0.1", V4), ("::1", V6)])
def test_the_first_of_several_listens_where_they_meet_and_nowhere_else(
    address: str, kernels: str, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MASTER_ADDR", address)
    stores = at_once(lambda: met(0), lambda: met(1))
    assert all(not isinstance(found, Exception) for found in stores)
    assert listeners(port) == {kernels}
    stores[0].set("a", "b")
    assert stores[1].get("a") == b"b"


@pytest.mark.parametrize("address", ["127.0.0.1", "192.0.2.7"])
def test_where_other_hosts_would_not_reach_it_it_listens_everywhere_and_says_so(
    address: str, port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """A host may know its own name as 127.0.1.1, and a service's address is no host's."""
    with meeting._bind(address, port, is_one_host=False):
        assert listeners(port) & {"0" * 32, "0" * 8}
    assert capsys.readouterr().err == (
        f"the first rank listens at port {port} of all addresses of {socket.gethostname()}, for "
        f"{address} is none of them that other hosts reach; see docs/security.md\n"
    )


def test_a_loopback_address_that_this_host_has_not_is_told_with_the_one_that_it_has(
    port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where IPv6 alone is there; the ranks would knock at it for half an hour."""
    monkeypatch.setattr(meeting, "_serve", lambda family, place: None)
    said = f"^{socket.gethostname()} has no address 127.0.0.1, where its ranks are to meet; bring "
    with pytest.raises(ConfigError, match=said + ".*MASTER_ADDR=127.0.0.1 by srun"):
        meeting._bind("127.0.0.1", port, is_one_host=True)


def test_a_name_that_is_not_known_is_told_with_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*args: Any, **kwargs: Any) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setenv("MASTER_ADDR", "gpu07")
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    monkeypatch.setattr(meeting, "NAME_SECONDS", 0.2)
    for error in at_once(lambda: met(0), lambda: met(1)):
        assert isinstance(error, ConfigError)
        assert str(error) == (
            f"{socket.gethostname()} does not know gpu07, where the ranks are to meet (Name or "
            "service not known); set MASTER_ADDR (torchrun: --local_addr) to an address that all "
            "hosts reach, 127.0.0.1 if it is one host"
        )


@pytest.mark.parametrize("text", ["0", "65536", "-1", "http"])
def test_a_port_that_is_none_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_PORT", text)
    with pytest.raises(ConfigError, match=f"^MASTER_PORT must be a port, 1 to 65535, got '{text}'"):
        met(0)


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

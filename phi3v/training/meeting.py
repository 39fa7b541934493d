"""Where ranks speak outside of collectives: a store at MASTER_ADDR:MASTER_PORT, held by rank 0.

    store = meet(ranks, device, seconds)     # before any process group: all are there
    turn = Turn("evaluation", world_size)    # later: work that takes each rank its own time
    turn.move()                              # each batch
    turn.wait(watchdog.beat)                 # until all are done

A collective that some ranks enter long before others looks like a hang, to NCCL's watchdog and to
ours, and spins a processor. What ranks do at their own pace ends here instead.

The store has no password: whoever reaches it can write what he likes. So one rank opens no port at
all, and the first of several listens at MASTER_ADDR alone, which of one host is a loopback address.

Surprising: under torchrun the server is the agent's, and listens on all addresses of its host.
"""

import errno
import itertools
import os
import socket
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from ipaddress import ip_address

import torch
from torch.distributed import HashStore, PrefixStore, Store, TCPStore
from torch.distributed.distributed_c10d import _get_default_store

from phi3v.devices import name_of
from phi3v.errors import ConfigError
from phi3v.printing import print
from phi3v.training.ranks import Ranks, loopback

POLL_SECONDS = 0.05
ASKS_PER_SECOND = 4000  # of all ranks together, which one thread of the first rank's answers
LINE_SECONDS = 60.0  # between two lines about ranks that are waited for
NAME_SECONDS = 60.0  # how long a name that nobody knows is asked for
BACKLOG = 4096  # ranks that may knock at once
_turns = itertools.count()


def meet(ranks: Ranks, device: torch.device, seconds: float) -> Store:
    """Wait until all ranks are there, and refuse two of them on one GPU; returns the store.

    Hand the store to the process group: what it has to say goes the same way.

    Raises: ConfigError on every rank if a GPU is taken twice, if ranks are missing after `seconds`,
    if the address is not known here, or if the first one cannot listen at the port.
    """
    if ranks.world_size == 1:
        return HashStore()
    is_one_host = ranks.local_size == ranks.world_size
    address, port = os.environ["MASTER_ADDR"], _port()
    deadline = time.monotonic() + seconds
    whole = (
        _listen(address, port, ranks.world_size, is_one_host)
        if _is_server(ranks)
        else _call(address, port, deadline)
    )
    store = PrefixStore("phi3v/meeting", whole)
    refusal = _take(store, ranks, device)
    store.set(f"rank/{ranks.rank}", refusal or "here")
    if refusal:
        store.set("refusal", refusal)
    if store.add("arrived", 1) == ranks.world_size:
        store.set("all", "here")
    _wait_for_all(store, ranks, deadline, f"{address}:{port}")
    if store.check(["refusal"]):
        raise ConfigError(store.get("refusal").decode())
    return whole


class Turn:
    """Work that every rank does at its own pace; all ranks make one, at the same point.

    Once a rank is done it waits without a limit of its own, for as long as anyone moves on: who
    stands still ends by its own watchdog, and a rank that has vanished moves no more.
    """

    def __init__(self, name: str, world_size: int) -> None:
        self._store = PrefixStore(f"phi3v/turn/{next(_turns)}/{name}", _get_default_store())
        self._name = name
        self._world_size = world_size

    def move(self) -> None:
        """Say that this rank goes on."""
        self._store.add("moves", 1)

    def wait(self, beat: Callable[[], None]) -> None:
        """Wait until all ranks wait here; beats whenever another has moved or come."""
        self._store.add("done", 1)
        last, began, lines = "", time.monotonic(), 0
        while (done := self._store.add("done", 0)) < self._world_size:
            seen = f"{done} {self._store.add('moves', 0)}"
            if seen != last:
                last = seen
                beat()
            if time.monotonic() - began > (lines + 1) * LINE_SECONDS:
                lines += 1
                self._say(done, lines * LINE_SECONDS)
            _pause(self._world_size)
        beat()

    def _say(self, done: int, seconds: float) -> None:
        """One rank's line is enough: the first asker's of each minute."""
        if self._store.add(f"line/{seconds}", 1) == 1:
            print(
                f"{self._name}: {done} of {self._world_size} ranks have waited for the others for "
                f"{seconds:.0f} s",
                file=sys.stderr,
                flush=True,
            )


def _is_server(ranks: Ranks) -> bool:
    return ranks.is_first and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


def _port() -> int:
    text = os.environ["MASTER_PORT"]
    if not text.isdecimal() or not 0 < int(text) < 65536:
        raise ConfigError(f"MASTER_PORT must be a port, 1 to 65535, got {text!r}; set it anew")
    return int(text)


def _listen(address: str, port: int, world_size: int, is_one_host: bool) -> Store:
    server = _bind(address, port, is_one_host)
    return TCPStore(
        *(address, port, world_size, True),
        wait_for_workers=False,
        master_listen_fd=server.detach(),
    )


def _bind(address: str, port: int, is_one_host: bool) -> socket.socket:
    """Listen at the address where the ranks meet, and at no other if that is one of this host's.

    Raises: ConfigError if the name is not known, the port is in use, or it is a loopback address
    that this host has not.
    """
    places = _places(address, port)
    for family, place in places:
        # Of its own name a host may have 127.0.1.1, where no other host reaches it.
        if not is_one_host and ip_address(place[0]).is_loopback:
            continue
        if (server := _serve(family, place)) is not None:
            return server
    if is_one_host and all(ip_address(place[0]).is_loopback for _, place in places):
        raise ConfigError(
            f"{socket.gethostname()} has no address {address}, where its ranks are to meet; bring "
            f"it up (ip addr add {address} dev lo), or start the ranks with MASTER_ADDR="
            f"{loopback()} by srun or your own script: the launchers of deepspeed and torchrun "
            "overwrite it"
        )
    print(
        f"the first rank listens at port {port} of all addresses of {socket.gethostname()}, for "
        f"{address} is none of them that other hosts reach; see docs/security.md",
        file=sys.stderr,
    )
    families = (socket.AF_INET6, "::"), (socket.AF_INET, "0.0.0.0")
    found = (_serve(family, (every, port)) for family, every in families)
    server = next((one for one in found if one is not None), None)
    assert server is not None, "a host without any address"
    return server


def _serve(family: int, place: tuple[str, int]) -> socket.socket | None:
    """Listen at an address, None if this host has no such one.

    Raises: ConfigError if the port is in use.
    """
    is_every = place[0] == "::"
    try:
        return socket.create_server(place, family=family, backlog=BACKLOG, dualstack_ipv6=is_every)
    except (OSError, ValueError) as error:
        if not isinstance(error, OSError) or error.errno != errno.EADDRINUSE:
            return None
        raise ConfigError(
            f"port {place[1]} of {socket.gethostname()}, at which the ranks are to meet, is in "
            "use: by another run, or by what is left of one; give the launcher a free one "
            "(deepspeed --master_port, torchrun --master_port, or MASTER_PORT), or end the other"
        ) from None


def _places(address: str, port: int) -> list[tuple[int, tuple[str, int]]]:
    """What an address or a name is here: families, and addresses with the port.

    Raises: ConfigError if the name is not known.
    """
    try:
        found = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ConfigError(_unknown(address, error)) from None
    return [(family, (str(place[0]), port)) for family, _, _, _, place in found]


def _unknown(address: str, error: OSError) -> str:
    return (
        f"{socket.gethostname()} does not know {address}, where the ranks are to meet "
        f"({error.strerror}); set MASTER_ADDR (torchrun: --local_addr) to an address "
        "that all hosts reach, 127.0.0.1 if it is one host"
    )


def _call(address: str, port: int, deadline: float) -> Store:
    """Connect to the first rank, as soon as it listens.

    By a socket first: the store's own attempts fill a log with C++ stacks.
    """
    named_until = time.monotonic() + NAME_SECONDS  # names may come late, of a pod say
    while True:
        try:
            socket.create_connection((address, port), timeout=5).close()
            break
        except socket.gaierror as error:
            if time.monotonic() > min(named_until, deadline):
                raise ConfigError(_unknown(address, error)) from None
        except OSError as error:
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"nobody answers at {address}:{port}, where the first rank should listen "
                    f"({error}); check MASTER_ADDR and MASTER_PORT, that rank 0 was started, and "
                    f"that {socket.gethostname()} reaches its host"
                ) from None
        time.sleep(POLL_SECONDS)
    return TCPStore(address, port, wait_for_workers=False, timeout=timedelta(seconds=60))


def _take(store: Store, ranks: Ranks, device: torch.device) -> str | None:
    """Write this rank's GPU down as its own; returns why it cannot be, where another has it."""
    name, own = name_of(device), f"rank {ranks.rank} on {socket.gethostname()}"
    if name is None:
        return None
    holder = store.compare_set(f"device/{name}", "", own).decode()
    if holder == own:
        return None
    return (
        f"{own} and {holder} both have the GPU {name} ({device}, CUDA_VISIBLE_DEVICES "
        f"{os.environ.get('CUDA_VISIBLE_DEVICES')!r}); a rank needs one of its own: let every rank "
        "of a host see all its GPUs, and check that LOCAL_RANK differs between them"
    )


def _wait_for_all(store: Store, ranks: Ranks, deadline: float, where: str) -> None:
    began, lines = time.monotonic(), 0
    while not store.check(["all"]):
        if time.monotonic() > deadline:
            raise ConfigError(
                f"{_missing(store, ranks)} did not come to {where} within "
                f"{time.monotonic() - began:.0f} s; look at their logs, and check that their hosts "
                "reach that address"
            )
        if ranks.is_first and time.monotonic() - began > (lines + 1) * LINE_SECONDS:
            lines += 1
            print(f"waiting at {where} for {_missing(store, ranks)}", file=sys.stderr, flush=True)
        _pause(ranks.world_size)


def _pause(world_size: int) -> None:
    time.sleep(POLL_SECONDS + world_size / ASKS_PER_SECOND)


def _missing(store: Store, ranks: Ranks) -> str:
    """The ranks that have not come, as "3 of 16 ranks (4, 5, 6)"."""
    missing = [rank for rank in range(ranks.world_size) if not store.check([f"rank/{rank}"])]
    names = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
    return f"{len(missing)} of {ranks.world_size} ranks ({names})"

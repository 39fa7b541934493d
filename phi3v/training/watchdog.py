"""Processes that must not stay: a rank that hangs, and one whose launcher or neighbours are gone.

Both are watched by daemon threads, which run while the main thread waits in gloo or NCCL, and which
end the process with `os._exit`: no destructor may wait for other ranks.

The kernel's parent-death signal is not used: it would end a rank before it could say why, and it
goes by the parent's thread. A process whose GIL is held for good, where no thread can run, is ended
by faulthandler's own C thread after the hang timeout. Children of a rank are left alone: wandb-core
ends by itself within 2 s, a compiler finishes what the next start waits for.
"""

import faulthandler
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import psutil

from phi3v.files import sync
from phi3v.output import STDERR, shout

POLL_SECONDS = 0.5
DUMP_SECONDS = 5.0  # how long a rank that hangs stays, for the others to write their stacks too
NEIGHBOUR_SECONDS = 2.0  # how long a rank lives on that was sent SIGTERM because another has died
LAUNCHERS = {
    *("deepspeed", "deepspeed.pt", "ds", "deepspeed.launcher.runner", "deepspeed.launcher.launch"),
    *("torchrun", "torch.distributed.run", "torch.distributed.launch", "accelerate"),
}


class Watchdog:
    """Ends this process, and says where it stood, when it has not beaten for too long.

    timeout        seconds that a step, or a batch of an evaluation, may take
    start_timeout  seconds for what is done once and takes longer, where it is more: the start until
                   `settle` is called, and what is done in `patience`
    told           is called with the limit whenever it changes: it is that of collectives as well

    Beat after everything that all ranks finish together: a step, an evaluated batch, a save. The
    stacks go to stderr and to RUN/stacks/rank-00003.txt. Other ranks wait for the one that hangs,
    so all dumps come at about the same time.
    """

    def __init__(
        self,
        timeout: float,
        folder: Path,
        rank: int,
        start_timeout: float = 0.0,
        told: Callable[[float], None] = lambda limit: None,
    ) -> None:
        self._timeouts = timeout, max(timeout, start_timeout)
        self._path = folder / "stacks" / f"rank-{rank:05d}.txt"
        self._rank = rank
        self._told = told
        self._last = time.monotonic()
        self._is_starting, self._is_patient = True, False
        self._is_closed = threading.Event()
        faulthandler.enable(STDERR)  # a crash in C (SIGSEGV, SIGABRT) shows its stacks as well
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    @property
    def limit(self) -> float:
        """Seconds of silence that are allowed now."""
        return self._timeouts[self._is_starting or self._is_patient]

    def beat(self) -> None:
        """Say that this rank goes on."""
        self._last = time.monotonic()

    def settle(self) -> None:
        """Say that the start is over; all ranks call at the same step, and may call again."""
        if self._is_starting:
            self._allow(starting=False, patient=self._is_patient)

    @contextmanager
    def patience(self) -> Iterator[None]:
        """Allow what is inside the time of a start: disks may be slow. All ranks call together."""
        before = self._is_patient
        self._allow(starting=self._is_starting, patient=True)
        try:
            yield
        finally:
            self._allow(starting=self._is_starting, patient=before)

    def _allow(self, starting: bool, patient: bool) -> None:
        self.beat()  # before the watching thread can see a shorter limit
        self._is_starting, self._is_patient = starting, patient
        self._told(self.limit)

    def close(self) -> None:
        """Stop watching."""
        self._is_closed.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._is_closed.wait(min(1.0, self._timeouts[0] / 10)):
            limit = self.limit
            faulthandler.dump_traceback_later(limit, exit=True, file=STDERR)
            silence = time.monotonic() - self._last
            if silence > limit:
                self._end(silence, limit)
        faulthandler.cancel_dump_traceback_later()

    def _end(self, silence: float, limit: float) -> NoReturn:
        """Write the stacks, to stderr first: a disk that hangs may be the cause."""
        key = "train.hang_timeout" if limit == self._timeouts[0] else "train.start_timeout"
        line = (
            f"rank {self._rank}: nothing was finished for {silence:.0f} s, longer than "
            f"{key} {limit:g} s; its stacks are below and in {self._path}, "
            "and the rank that stands elsewhere than the others is the cause"
        )
        try:
            faulthandler.dump_traceback_later(2 * DUMP_SECONDS, exit=True, file=STDERR)
            shout(line)
            faulthandler.dump_traceback(file=STDERR)
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("w", encoding="utf-8") as file:
                file.write(f"{line}\n")
                file.flush()
                faulthandler.dump_traceback(file=file)
            sync(self._path)
            time.sleep(DUMP_SECONDS)
        finally:
            os._exit(1)


def end_with_launcher() -> None:
    """End this process within a second of its launcher's death, be it gone already.

    Under deepspeed these are two processes, `launch` and the `deepspeed` that started it, under
    torchrun one. What is above, a shell, tmux or sshd, may die, and nothing is watched under srun
    and plain python. Also ends a rank of which another on this node has died where it does not
    notice by itself: the launcher sends SIGTERM, which training only counts, and SIGKILL no
    sooner than 30 s later.

    Call it once, in the main thread, beside StopRequests.listen: it reads the signals' wakeup
    descriptor, which is written to even while the main thread is in C.
    """
    launchers = _find_launchers()
    if _has_lost_launcher(launchers):
        _end("its launcher was gone before it had started")
    if launchers:
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
        arguments = (launchers, reader)
        threading.Thread(target=_watch, args=arguments, name="launcher", daemon=True).start()


def _find_launchers() -> list[psutil.Process]:
    """This process's ancestors up to the topmost launcher, the parent first."""
    ancestors = psutil.Process().parents()
    found = [index for index, process in enumerate(ancestors) if _is_launcher(process)]
    return ancestors[: found[-1] + 1] if found else []


def _is_launcher(process: psutil.Process) -> bool:
    """Whether it is python running a launcher: `timeout 60 torchrun` is none, its child is."""
    try:
        program, *words = process.cmdline() or [""]
    except psutil.Error:  # another user's, or gone
        return False
    name = next((word for word in words if not word.startswith("-")), "")  # python -u -m NAME
    return Path(program).name.startswith("python") and Path(name).name in LAUNCHERS


def _has_lost_launcher(launchers: list[psutil.Process]) -> bool:
    """Whether a launcher died in the seconds that a rank needs to get here.

    Then its child has been adopted by the machine's first process, or will be as soon as the
    launcher's memory has been freed (0.2 s for 1 GB): until then that has no command line any more.
    The child bears the launcher's marks: a rank its variables or its argument, `launch` that it was
    started for one node.
    """
    try:
        if launchers:
            top, words = launchers[-1], launchers[-1].cmdline()
            is_for_many = any(word.startswith("--node_rank") for word in words)
            is_started = "deepspeed.launcher.launch" in words and not is_for_many
        else:
            top = psutil.Process()
            is_given_rank = any(word.startswith("--local_rank") for word in sys.argv)
            is_started = is_given_rank or "TORCHELASTIC_RUN_ID" in os.environ
        return is_started and _is_no_launcher_any_more(top.parent())
    except psutil.NoSuchProcess:  # has gone this moment
        return True


def _is_no_launcher_any_more(parent: psutil.Process | None) -> bool:
    """Whether it is the machine's first process, or that of a user's session, or is dying."""
    return parent is None or parent.pid == 1 or parent.name() == "systemd" or not parent.cmdline()


def _watch(launchers: list[psutil.Process], signals: int) -> None:
    told: set[int] = set()  # the signals that have come
    bereft: float | None = None  # since when a neighbour is known to be gone
    while True:
        if select.select([signals], [], [], POLL_SECONDS)[0]:
            told.update(os.read(signals, 4096))
        gone = [process for process in launchers if not _is_alive(process)]
        if gone and select.select([signals], [], [], POLL_SECONDS)[0]:  # what ended it, maybe
            told.update(os.read(signals, 4096))
        for process in gone:
            if process in _watched(launchers, told):
                _end(f"its launcher (process {process.pid}) is gone")
        if signal.SIGTERM in told and bereft is None and _misses_neighbour(launchers[0]):
            bereft = time.monotonic()
        if bereft is not None and time.monotonic() - bereft > NEIGHBOUR_SECONDS:
            _end("another rank of this node has ended; see its messages for the cause")


def _watched(launchers: list[psutil.Process], told: set[int]) -> list[psutil.Process]:
    """The launchers that must live, by the signals that this rank was told.

    Ctrl-C ends `deepspeed` at once; the `launch` below it waits for its ranks to save. A terminal
    that is closed ends both by SIGHUP, and the ranks save: all of them have got it.
    """
    if signal.SIGHUP in told:
        return []
    return launchers[:1] if signal.SIGINT in told else launchers


def _misses_neighbour(launcher: psutil.Process) -> bool:
    """Whether fewer ranks are there than the launcher started on this node."""
    size = os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE", "1")
    try:
        children = launcher.children()
    except psutil.NoSuchProcess:  # is noticed in the next round
        return False
    return sum(map(_is_alive, children)) < int(size)


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _end(reason: str) -> NoReturn:
    rank = os.environ.get("RANK", "0")
    shout(f"rank {rank}: {reason}; it ends at once, start the same command again to go on")
    os._exit(1)

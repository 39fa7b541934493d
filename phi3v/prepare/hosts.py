"""Whose turn it is to ask a host: few at once, and nobody while it wants to be left alone.

    hosts = Hosts(cache / "hosts", per_host=8)
    with hosts.turn("example.org"):          # waits until fewer than eight others ask it
        ...
    hosts.rest("example.org", 30)            # it answered: Retry-After: 30
    hosts.seconds_left("example.org")        # 29.9, to every process that shares the folder

    hosts/6f/6f1c.../0 ... 7   one file a turn, locked for as long as it is taken
    hosts/6f/6f1c.../rest      its time of modification, in the future, is when the rest ends

The folder lies in the cache of fetched images, so that the worker processes of a machine share it,
and the parts of a job array as far as their file system passes locks on. Where it has no locks at
all, each process asks a host once at a time.
"""

import errno
import fcntl
import hashlib
import os
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

LOOK_SECONDS = (0.02, 0.1)  # between two looks for a free turn, drawn between these
OPEN = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
MOST_REST = 3600.0  # seconds that a host may close itself to everybody by one answer
NO_LOCKS_HERE = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # Lustre without its flock option


class Hosts:
    """The turns and rests of hosts, shared through a folder.

    folder    None: among the threads of this process alone
    per_host  turns of a host at once
    """

    def __init__(self, folder: Path | None, per_host: int) -> None:
        self.folder, self.per_host = folder, per_host
        self._mine: dict[str, threading.Semaphore] = {}
        self._rests: dict[str, float] = {}  # ends, where there is no folder
        self._lock = threading.Lock()

    @contextmanager
    def turn(self, host: str) -> Iterator[None]:
        """Hold one of the host's turns, once there is one."""
        shares = self.folder is not None and self._has_locks
        with self._own(host, self.per_host if shares or self.folder is None else 1):
            if not shares:
                yield
                return
            turn = self._take(self._place(host))
            try:
                yield
            finally:
                os.close(turn)  # which unlocks it

    def rest(self, host: str, seconds: float) -> None:
        """Let everybody leave the host alone for so long from now; a longer rest stays."""
        end = time.time() + min(seconds, MOST_REST)
        with self._lock:
            self._rests[host] = max(end, self._rests.get(host, 0.0))
        if self.folder is not None:
            note = self._place(host) / "rest"
            os.close(os.open(note, OPEN, 0o666))
            if end > note.stat().st_mtime:
                os.utime(note, (end, end))

    def seconds_left(self, host: str) -> float:
        """Seconds for which the host is still to be left alone."""
        ends = [self._rests.get(host, 0.0)]
        if self.folder is not None:
            try:
                ends.append((self._place(host) / "rest").stat().st_mtime)
            except FileNotFoundError:
                pass
        return min(MOST_REST, max(0.0, max(ends) - time.time()))

    @cached_property
    def _has_locks(self) -> bool:
        """Whether the folder's file system has locks."""
        assert self.folder is not None
        self.folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.folder, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH)  # nobody takes it alone
        except OSError as error:
            if error.errno not in NO_LOCKS_HERE:
                raise
            return False
        finally:
            os.close(descriptor)
        return True

    def _own(self, host: str, turns: int) -> threading.Semaphore:
        """At most as many threads of this process look for a turn as there are turns."""
        with self._lock:
            return self._mine.setdefault(host, threading.Semaphore(turns))

    def _take(self, place: Path) -> int:
        """Lock one of the turns; returns its descriptor."""
        while True:
            for number in random.sample(range(self.per_host), self.per_host):
                if (turn := _locked(place / str(number))) is not None:
                    return turn
            time.sleep(random.uniform(*LOOK_SECONDS))

    def _place(self, host: str) -> Path:
        assert self.folder is not None
        name = hashlib.sha256(host.encode()).hexdigest()
        place = self.folder / name[:2] / name
        place.mkdir(parents=True, exist_ok=True)
        return place


def _locked(path: Path) -> int | None:
    descriptor = os.open(path, OPEN, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor

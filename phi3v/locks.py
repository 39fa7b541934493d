"""Who works in a folder: one lock for prepare, runs and the demo.

    with locked(work / "lock", is_shared=True):   # parts of one job
    lock = take(run / ".lock", patience=10.0)     # until lock.close(), or the process ends
    lock.check()                                  # each step: is it still ours?

A lock is a file that is held by flock and ends with its process, so none outlives a kill. What it
holds is a note of who has it, for the others' message.

Where a lock cannot be had from the file system (Lustre without its flock option), the note alone
counts: a process of this host that lives is believed, of another host nothing can be known, and
what is left to the user is said. So it is where locks hold on each host alone: whose note stands in
the file is the owner, and who finds another's note there ends.

A lock file lies where others may write, so it is opened without following a link, and nothing is
written over but such a note. A scratch purge takes what is old: an owner makes its lock young again
each hour, and takes one that was removed anew.
"""

import errno
import fcntl
import os
import pwd
import re
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import inf
from pathlib import Path

import psutil

from phi3v.errors import ConfigError, naming
from phi3v.output import say

NO_LOCKS_HERE = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
POLL_SECONDS = 0.2
REFRESH_SECONDS = 3600.0
NOTE = re.compile(r"process (\d+) on ([^\s,]+)[^\n]*\n?(?:since (\d+\.\d+)\n)?")
NOTE_BYTES = 400
_told: set[Path] = set()  # folders of which it was said that they have no locks


def take(path: Path, is_shared: bool = False, patience: float = 0.0, name: str = "") -> "Lock":
    """Hold the lock of a file, alone or shared with others that share it; its folder is there.

    patience  seconds to wait for an owner to end
    name      of what is locked, for messages; default: the folder

    Raises: ConfigError naming who holds it, or what is there that is no lock of ours.
    """
    deadline, name = time.monotonic() + patience, name or str(path.parent)
    with naming(path):
        return _take(path, is_shared, deadline, name)


def _take(path: Path, is_shared: bool, deadline: float, name: str) -> "Lock":
    _check_folder(path.parent)
    while True:
        handle = _open(path)
        try:
            owner = _try(handle, path, is_shared)
            if owner is None and _is_at(path, handle) and _sign(handle, path, is_shared):
                return Lock(path, handle, is_shared)
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)
        if owner and time.monotonic() >= deadline:
            raise ConfigError(
                f"{name} is in use by {owner}; wait for its end, stop it, or name another folder"
            )
        time.sleep(POLL_SECONDS if owner else 0.0)


@contextmanager
def locked(path: Path, is_shared: bool = False, waits: bool = False) -> Iterator["Lock"]:
    """Hold a lock for a while; `waits` for its owner's end, however long that is."""
    lock = take(path, is_shared, inf if waits else 0.0)
    try:
        yield lock
    finally:
        lock.close()


@dataclass
class Lock:
    """A lock that this process holds."""

    path: Path
    handle: int
    is_shared: bool = False

    def close(self) -> None:
        """Let others have it."""
        os.close(self.handle)

    def check(self) -> None:
        """Refuse to go on where another has become the owner; take a lock that was removed anew.

        Raises: ConfigError naming the other, or saying that the folder is gone.
        """
        with naming(self.path):
            self._check()

    def _check(self) -> None:
        if not self.path.parent.is_dir():
            raise ConfigError(
                f"{self.path.parent} was removed while {this_process()} worked in it; put it back, "
                "or start anew"
            )
        if not _is_at(self.path, self.handle):
            self._take_again()
        elif not self.is_shared and (note := _note(self.handle)) not in ("", _own_note()):
            raise ConfigError(
                f"{self.path.parent} was taken over by {_who(note)}; this process ends and leaves "
                "it to that one"
            )
        elif time.time() - os.fstat(self.handle).st_mtime > REFRESH_SECONDS:
            os.utime(self.handle)

    def _take_again(self) -> None:
        """Its file is gone, or another's: a start since then that holds it is the owner."""
        try:
            lock = take(self.path, self.is_shared)
        except ConfigError as error:
            raise ConfigError(f"{self.path} was removed, and {error}") from None
        say(f"{self.path} was removed, as a purge of old files does, and is taken anew")
        os.close(self.handle)
        self.handle = lock.handle


def this_process() -> str:
    """Who this is, also among the starts of a Slurm job whose processes all have number 1."""
    who = f"process {os.getpid()} on {socket.gethostname()}"
    job, start = (os.environ.get(name) for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"))
    return f"{who}, start {start or 0} of job {job}" if job else who


def _own_note() -> str:
    """A process is known by its number and its start: numbers are given out again."""
    return f"{this_process()}\nsince {psutil.Process().create_time():.2f}\n"


def _open(path: Path) -> int:
    """Raises: ConfigError if what has the lock's name is no file, a link, or a file of others."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        handle = os.open(path, flags, 0o666)
    except OSError as error:
        kinds = {errno.ELOOP: "a link", errno.EISDIR: "a folder", errno.ENXIO: "no file"}
        if error.errno in (errno.EACCES, errno.EPERM) and path.exists():
            raise ConfigError(
                f"{path} belongs to {_user(path.lstat().st_uid)} and may not be written to; have "
                "it removed, or name another folder"
            ) from None
        if error.errno not in kinds:
            raise
        raise _no_lock(path, kinds[error.errno]) from None
    found = os.fstat(handle)
    problem = None
    if not stat.S_ISREG(found.st_mode):
        problem = "no file"
    elif found.st_nlink > 1:
        problem = "another name of some other file"
    elif found.st_size > NOTE_BYTES or (found.st_size and not NOTE.fullmatch(_note(handle))):
        problem = "a file of something else"
    if problem:
        os.close(handle)
        raise _no_lock(path, problem)
    return handle


def _check_folder(folder: Path) -> None:
    """Refuse a folder of somebody else that everybody may write to.

    What a group shares, or a user gave to a container's root, is theirs to share.
    """
    found = folder.stat()
    if found.st_mode & stat.S_IWOTH and found.st_uid not in (0, os.geteuid()):
        raise ConfigError(
            f"{folder} belongs to {_user(found.st_uid)}, and everybody may write to it; name "
            "another folder, or have it made writable to your group alone (chmod o-w)"
        )


def _try(handle: int, path: Path, is_shared: bool) -> str | None:
    """Take the lock of an open file; who has it, if somebody does."""
    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return _who(_note(handle)) or "another process"
    except OSError as error:
        if error.errno not in NO_LOCKS_HERE:
            raise
        return None if is_shared else _believed(_note(handle), path)
    return None


def _believed(note: str, path: Path) -> str | None:
    """Who has a lock by its note, where the file system has no locks."""
    found, is_new = NOTE.fullmatch(note), path.parent not in _told
    _told.add(path.parent)
    if found and found[2] == socket.gethostname():
        if _lives(int(found[1]), found[3]):
            return _who(note)
        found = None
    if is_new:
        last = f"; the last one here was {_who(note)}" if found else ""
        say(
            f"{path.parent} is on a file system without locks: see to it that nobody else works "
            f"there{last}"
        )
    return None


def _lives(number: int, since: str | None) -> bool:
    """Whether a process of this host still works; one of before, which told no start, does not."""
    if number == os.getpid() or since is None:
        return False
    with suppress(psutil.Error):
        return abs(psutil.Process(number).create_time() - float(since)) < 1.0
    return False


def _is_at(path: Path, handle: int) -> bool:
    """Whether an open file is the one that has a name: it may have been removed meanwhile."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return False
    return os.path.samestat(found, os.fstat(handle))


def _sign(handle: int, path: Path, is_shared: bool) -> bool:
    """Write down who has a lock; False if it is to be opened again.

    Another user's file is not written to. It is removed, and made anew; not one that is shared,
    which others may hold.
    """
    found = os.fstat(handle)
    if found.st_size and found.st_uid != os.geteuid():
        if is_shared:
            return True
        try:
            path.unlink()
        except OSError as error:
            raise ConfigError(
                f"{path} belongs to {_user(found.st_uid)} and cannot be removed "
                f"({error.strerror}); have it removed, or name another folder"
            ) from None
        return False
    note = _own_note().encode()
    os.pwrite(handle, note, 0)
    os.ftruncate(handle, len(note))
    return True


def _note(handle: int) -> str:
    return os.pread(handle, NOTE_BYTES, 0).decode(errors="replace")


def _who(note: str) -> str:
    return note.partition("\n")[0].strip()


def _no_lock(path: Path, what: str) -> ConfigError:
    return ConfigError(
        f"{path} is {what}, not a lock that this program made; move it away, or name another folder"
    )


def _user(number: int) -> str:
    try:
        return f"user {pwd.getpwuid(number).pw_name}"
    except KeyError:
        return f"user {number}"

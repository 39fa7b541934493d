"""One prepare at a time in a work folder, or any number of parts at once."""

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from phi3v.errors import ConfigError

NO_LOCKS_HERE = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # Lustre without its flock option


@contextmanager
def locked(path: Path, is_shared: bool, waits: bool = False) -> Iterator[None]:
    """Hold the lock of a file: alone, or shared with others that share it.

    The lock ends with the process, so that none outlives a kill. A file system without locks gives
    none, and it is up to the user that no two are at work.
    Raises: ConfigError naming who holds it, unless `waits` for its end.
    """
    kind = (fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX) | (0 if waits else fcntl.LOCK_NB)
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(handle, kind)
        except BlockingIOError:
            owner = os.pread(handle, 200, 0).decode(errors="replace").strip() or "another process"
            raise ConfigError(
                f"{path.parent} is in use by {owner}; wait for its end, or stop it"
            ) from None
        except OSError as error:
            if error.errno not in NO_LOCKS_HERE:
                raise
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        yield
    finally:
        os.close(handle)

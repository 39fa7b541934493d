"""Files that rows name, read with care; and whether the file is to blame where one cannot be read.

    reach = Reach.of("photos")
    data = reach.read("photos/a.png", "a.png", max_bytes)

A row is what somebody wrote, perhaps a stranger. It may name a pipe that nobody writes to, a
device, 40 GB of nothing, a link to a private key. So where a file lies is asked once all links are
followed, what it is before it is opened, and its size before it is read.

What cannot be read is the file's own fault (it is absent, it may not be read) or the machine's (a
disk, a file server, memory, too many open files). The first rejects a row. The second is tried
again, and then ends the command: no row is dropped because a disk had hiccups.
"""

import errno
import os
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from phi3v.content import HEAD, disguise_of, has_image_signature
from phi3v.errors import MachineError, SampleError

T = TypeVar("T")

OF_THE_FILE = frozenset(
    {
        *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM),
        *(errno.ELOOP, errno.ENAMETOOLONG, errno.EILSEQ),
    }
)
"""What the system says of a file itself. No row pays for any other failure."""

OF_THE_MACHINE = frozenset(
    {
        *(errno.EIO, errno.EREMOTEIO, errno.EUCLEAN, errno.EBADMSG, errno.ENODEV, errno.ENOMEDIUM),
        *(errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.ESHUTDOWN, errno.EHOSTDOWN),
        *(errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH, errno.ECONNABORTED),
        *(errno.ECONNRESET, errno.ENOLINK, errno.ECOMM, errno.EPROTO, errno.ENOLCK),
        *(errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.EAGAIN, errno.EBUSY),
        *(errno.EKEYEXPIRED, errno.EKEYREVOKED, errno.EKEYREJECTED, errno.ENOKEY),
    }
)
"""What may be gone at the next try. A disk that is full is not among them: it stays so."""

PAUSES = (0.1, 0.5, 2.0)  # seconds before each further try of what the machine failed at
ADVICE = {
    errno.EMFILE: "raise the limit of open files (ulimit -n), or take fewer workers",
    errno.ENFILE: "the machine has too many files open; end what holds them",
    errno.ENOMEM: "free memory, or take fewer workers",
}
PLAIN, FOLDER, HIDDEN = "a file", "a folder", "hidden"  # hidden: it may not be looked at
KINDS = {
    stat.S_IFREG: PLAIN,
    stat.S_IFDIR: FOLDER,
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
OF_THE_SYSTEM = ("/proc", "/sys")  # what lies there looks like files and is the machine's own state
HUB_REPOSITORY = ("datasets--", "models--", "spaces--")  # starts of names in the hub's cache
# Opening waits for nobody who should write to a pipe, and takes no terminal for its own.
FLAGS = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_NOFOLLOW | os.O_CLOEXEC


def is_of_machine(error: BaseException) -> bool:
    """Whether the machine failed, and not what was to be read.

    Not an OSError without a number: it is a library's word for a file's content.
    """
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, OSError) and error.errno in OF_THE_MACHINE


def machine_error(error: BaseException, name: str, tries: int = 1) -> MachineError:
    """What is said of an error for which `is_of_machine`; `name` is of what was read."""
    number = error.errno if isinstance(error, OSError) else errno.ENOMEM
    reason = os.strerror(number or errno.EIO)
    after = f", {tries} times" if tries > 1 else ""
    advice = ADVICE.get(number or 0, "look after the disk or the file server")
    return MachineError(
        f"{name} cannot be read ({reason}{after}), which is the machine's fault and not the "
        f"file's; {advice}, then start the same command again"
    )


def retried(read: Callable[[], T], name: str) -> T:
    """Call `read`; again, after PAUSES, while the machine fails at it.

    Raises: MachineError if it fails each time; any other error at once.
    """
    for pause in (*PAUSES, None):
        try:
            return read()
        except (OSError, MemoryError) as error:
            if not is_of_machine(error):
                raise
            if pause is None:
                file = getattr(error, "filename", None)
                raise machine_error(error, str(file or name), len(PAUSES) + 1) from error
            time.sleep(pause)
    raise AssertionError


def kind_at(path: str | Path) -> str | None:
    """What is at a path once links are followed: PLAIN, FOLDER, "a pipe", ...; None for nothing.

    HIDDEN stands for what may not be looked at. `os.path.isfile` and its like take that for
    nothing, and what a file server does not give just now.

    Raises: MachineError if the machine fails.
    """
    try:
        mode = retried(lambda: os.stat(path).st_mode, str(path))
    except PermissionError:
        return HIDDEN
    except ValueError:  # a NUL, or half of a surrogate pair
        return None
    except OSError as error:
        if error.errno in OF_THE_FILE:
            return None
        raise machine_error(error, str(path)) from error
    return _kind(mode)


@dataclass(frozen=True)
class Reach:
    """The folders that pictures may be read from.

    folders  real paths
    key      of the recipe or the command, that names further ones
    """

    folders: tuple[str, ...]
    key: str = "source.image_folders"

    @classmethod
    def of(cls, *folders: str | Path, key: str = key) -> "Reach":
        """What lies in these folders, which the user named, wherever they really are.

        A snapshot in the hub's cache is a folder of links into the `blobs` beside it, which
        therefore belong to it:

            datasets--owner--name/snapshots/3f2a/a.png -> ../../blobs/90c1
        """
        real = [os.path.realpath(folder) for folder in folders]
        blobs = [found for folder in real if (found := _blobs(folder))]
        return cls(tuple(dict.fromkeys([*real, *blobs])), key)

    def holds(self, real: str) -> bool:
        """Whether a real path, one without links, lies in one of the folders."""
        return not _is_of_system(real) and any(_is_within(real, folder) for folder in self.folders)

    def read(self, path: str, name: str, max_bytes: int) -> bytes:
        """Read a picture's file; of one that does not start like a picture its first bytes alone.

        name  for messages

        Raises: SampleError if it lies elsewhere, is no plain file, has more than `max_bytes`, may
        not be read, or is a pointer of git-lfs or a web page; MachineError if the machine fails.
        """
        try:
            real = retried(lambda: os.path.realpath(path, strict=True), name)
            self._refuse_outside(real, name)
            return retried(lambda: self._read(real, name, max_bytes), name)
        except OSError as error:
            if error.errno not in OF_THE_FILE:
                raise machine_error(error, name) from error
            raise SampleError(f"image cannot be read: {name}, {error.strerror}") from error

    def _read(self, path: str, name: str, max_bytes: int) -> bytes:
        _refuse_kind(os.lstat(path).st_mode, name)  # to open a device may already do something
        with os.fdopen(os.open(path, FLAGS), "rb") as file:
            # A folder of its path may have become a link since.
            opened = os.readlink(f"/proc/self/fd/{file.fileno()}").removesuffix(" (deleted)")
            self._refuse_outside(opened, name)
            found = os.fstat(file.fileno())
            _refuse_kind(found.st_mode, name)  # it may be another by now
            head = file.read(HEAD)
            if not has_image_signature(head):
                if cause := disguise_of(head):
                    raise SampleError(f"image cannot be read: {name}, it is {cause}")
                return head  # not the 200 GB of an archive
            if found.st_size > max_bytes:
                raise SampleError(
                    f"image has too many bytes: {found.st_size:,}, {name}; max_row_bytes is "
                    f"{max_bytes:,}"
                )
            return head + file.read(max(0, found.st_size - len(head)))

    def _refuse_outside(self, real: str, name: str) -> None:
        if _is_of_system(real):
            raise SampleError(f"image is not a plain file: {name}, it is the system's own")
        if not self.holds(real):
            where = name if name == real else f"{name} is {real}"
            raise SampleError(
                f"image lies outside of the folders that may be read: {where}; to allow it, name "
                f"its folder in {self.key}"
            )


EVERYWHERE = Reach(("/",))
"""For files that the user names himself."""


def _is_of_system(real: str) -> bool:
    return any(_is_within(real, folder) for folder in OF_THE_SYSTEM)


def _is_within(path: str, folder: str) -> bool:
    return path == folder or path.startswith(os.path.join(folder, ""))


def _blobs(folder: str) -> str | None:
    """Where the files of a snapshot in the hub's cache are kept; None if the folder is in none."""
    parts = Path(folder).parts
    for place in range(len(parts) - 1, 1, -1):
        if parts[place - 1] == "snapshots" and parts[place - 2].startswith(HUB_REPOSITORY):
            return os.path.join(*parts[: place - 1], "blobs")  # if it is a link, no path begins so
    return None


def _refuse_kind(mode: int, name: str) -> None:
    if (kind := _kind(mode)) != PLAIN:
        raise SampleError(f"image is not a plain file: {name}, it is {kind}")


def _kind(mode: int) -> str:
    return KINDS.get(stat.S_IFMT(mode), "of no kind that is known")

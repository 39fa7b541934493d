"""Folders whose files are run, compiled kernels say: nobody else may be able to put one there.

    weakness(Path("/tmp/phi3v-1000"))    # None, or "it belongs to mallory"

Whoever can write to such a folder can run what he likes as us: a cache of torch's holds pickles and
libraries. A folder that is not there yet has no weakness; who makes it gives it mode 0700.
"""

import os
import pwd
import stat
from contextlib import suppress
from grp import getgrgid
from pathlib import Path

OTHERS = stat.S_IWGRP | stat.S_IWOTH


def weakness(folder: Path, like: Path | None = None) -> str | None:
    """Why somebody else could put a file into a folder, or None if only we and root can.

    like  a folder whose owner is trusted as well, for we run what lies there: this Python's; one
          in it may be as open as it is
    """
    owners, open_bits = {0, os.getuid()}, OTHERS
    if like is not None:
        owners.add(like.stat().st_uid)
        if folder.resolve().is_relative_to(like.resolve()):
            open_bits &= ~like.stat().st_mode
    for place in dict.fromkeys((Path(os.path.abspath(folder)), folder.resolve())):
        with suppress(OSError):  # nothing there, or not for us to see
            if reason := _own_weakness(place, owners, open_bits):
                return reason
        for above in place.parents:
            with suppress(OSError):  # nothing there, or not for us to see
                mode = above.stat().st_mode
                if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
                    return f"everybody can put another in its place, for {above} is open to all"
    return None


def make_private(folder: Path) -> str | None:
    """Make a folder with mode 0700, if it is not there; why it cannot be used, or None."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        return weakness(folder) if os.access(folder, os.W_OK) else "it cannot be written to"
    except OSError as error:
        return f"it cannot be made ({error.strerror})"


def _own_weakness(place: Path, owners: set[int], open_bits: int) -> str | None:
    found = place.lstat()
    if found.st_uid not in owners:
        return f"it belongs to {_user(found.st_uid)}"
    if stat.S_ISLNK(found.st_mode):
        return None
    if found.st_mode & open_bits & stat.S_IWOTH:
        return f"everybody can write to it (mode {found.st_mode & 0o7777:o})"
    if found.st_mode & open_bits & stat.S_IWGRP and not _is_of_one(found.st_gid):
        return f"its group can write to it (mode {found.st_mode & 0o7777:o})"
    return None


def _user(number: int) -> str:
    try:
        return f"user {pwd.getpwuid(number).pw_name}"
    except KeyError:
        return f"user {number}"


def _is_of_one(group: int) -> bool:
    """Whether a group is a user's own, as most Linux systems give each user one of his name."""
    try:
        return getgrgid(group).gr_name == pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return False

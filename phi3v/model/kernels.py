"""Whether fused kernels can be made here: Triton compiles them at a run's first step.

    reason = kernel_obstacle(device)    # None, or why not: "no compiler: ..."

On every machine, beside its own compiler, Triton builds a small C program against Python.h and
libcuda when it starts, and keeps what it made in a cache. Compute nodes lack one or the other, so
it is looked for before a run loads its weights; at last one kernel is made and run.

Surprising: Triton's own cache is in the home folder, which the nodes of a cluster share, and
torch's is named after the user in /tmp. `private_caches` puts both into one folder of the machine
that nobody else can write to.
"""

import os
import shutil
import stat
import sysconfig
import tempfile
from pathlib import Path

import torch

CACHES = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}


def private_caches() -> None:
    """Name the folders of compiled kernels where the environment does not: below /tmp, ours alone.

    A folder of that name that belongs to another user is not used: torch's and Triton's own places
    remain then.
    """
    folder = Path(tempfile.gettempdir(), f"phi3v-{os.getuid()}")
    if _is_private(folder):
        for variable, name in CACHES.items():
            os.environ.setdefault(variable, str(folder / name))


def _is_private(folder: Path) -> bool:
    """Whether a folder is there, or could be made, as a real one that is ours and ours alone."""
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError:
        return False
    is_ours = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
    return is_ours and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def kernel_obstacle(device: torch.device) -> str | None:
    """Why a fused kernel cannot be made and run on a device, or None if one was.

    Two seconds where the cache does not have the kernel yet.
    """
    return _missing(device) or _failure(device)


def _missing(device: torch.device) -> str | None:
    """What a compiler needs and this machine does not have."""
    named = os.environ.get("CC" if device.type == "cuda" else "CXX")
    usual = ("gcc", "clang") if device.type == "cuda" else ("g++", "clang++", "c++")
    if not any(shutil.which(name) for name in ([named] if named else usual)):
        return f"no compiler: no {named or ' or '.join(usual)} on PATH; install gcc, or set CC"
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")
    header = Path(sysconfig.get_paths(scheme=scheme)["include"], "Python.h")
    if not header.is_file():
        return f"no {header}; install Python's headers (python3-dev)"
    for variable in CACHES:
        folder = os.environ.get(variable)
        if folder and not _can_write(Path(folder)):
            return f"{variable} {folder} cannot be written to; name another folder"
    return None


def _can_write(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _failure(device: torch.device) -> str | None:
    """Make one kernel and run it; the first line of what went wrong, if anything did."""
    try:
        doubled = torch.compile(_double)(torch.ones(8, device=device))
    except Exception as error:  # whatever a compiler of another machine comes up with
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return f"a first kernel failed: {type(error).__name__}: {lines[0] if lines else 'no text'}"
    return None if bool((doubled == 2).all()) else "a first kernel computed a wrong result"


def _double(x: torch.Tensor) -> torch.Tensor:
    return x + x

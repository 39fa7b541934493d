"""Whether fused kernels can be made here: Triton compiles them at a run's first step.

    reason = kernel_obstacle(device)    # None, or why not: "no compiler: ..."

On every machine, beside its own compiler, Triton builds a small C program against Python.h and
libcuda when it starts, and keeps what it made in a cache. Compute nodes lack one or the other, so
it is looked for before a run loads its weights; at last one kernel is made and run.

Surprising: Triton's own cache is in the home folder, which the nodes of a cluster share, and
torch's is named after the user in /tmp. `private_caches` puts both into one folder of the machine
that nobody else can write to; the home folder, where locks may not work, is the second choice.
"""

import os
import shutil
import sysconfig
import tempfile
from pathlib import Path

import torch

from phi3v.errors import ConfigError
from phi3v.output import say
from phi3v.private import make_private, weakness

CACHES = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}


def private_caches(is_told: bool = True) -> None:
    """Name the folders of compiled kernels where the user does not, one that is ours alone.

    What lies there is run, pickles among it. torch names a folder in /tmp after the user, and takes
    it as it is when somebody else has made it before; once imported it may have set the variable.

    is_told  whether to say which folder is taken, where it is the second choice

    Raises: ConfigError if others can write to a folder that the user named, or there is none.
    """
    unnamed = []
    for variable, name in CACHES.items():
        named = os.environ.get(variable)
        if not named or _is_torchs(Path(named)):
            unnamed.append((variable, name))
        elif reason := weakness(Path(named)):
            raise ConfigError(
                f"{variable} names {named}, whose files are run, and {reason}; name a folder of "
                "your own that nobody else can write to (chmod 700), or unset it"
            )
    if unnamed:
        folder = _own_folder(is_told)
        for variable, name in unnamed:
            (folder / name).mkdir(mode=0o700, exist_ok=True)
            os.environ[variable] = str(folder / name)


def _is_torchs(folder: Path) -> bool:
    """Whether a folder is, or lies in, the one that torch takes where none is named."""
    temporary = Path(tempfile.gettempdir()).absolute()
    if not folder.absolute().is_relative_to(temporary):
        return False
    parts = folder.absolute().relative_to(temporary).parts
    return bool(parts) and parts[0].startswith("torchinductor_")


def _own_folder(is_told: bool) -> Path:
    """A folder that is ours alone, made if need be: of the machine, else below the home folder.

    Raises: ConfigError naming what is wrong with each.
    """
    refused: list[str] = []
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    for folder in (Path(tempfile.gettempdir(), f"phi3v-{os.getuid()}"), Path(home, "phi3v")):
        reason = make_private(folder)
        if reason is None:
            if refused and is_told:
                say(f"compiled kernels are kept in {folder}: {refused[0]}")
            return folder
        refused.append(f"{folder} is not used, {reason}")
    raise ConfigError(
        f"there is no folder for compiled kernels: {'; '.join(refused)}; remove the first, make "
        f"HOME ({os.environ.get('HOME', 'not set')}) a folder that you can write to, or set "
        f"{' and '.join(CACHES)} to folders of your own"
    )


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

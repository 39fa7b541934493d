"""Where an export is written: a folder that may be replaced, and is whole at every moment.

The folder is written as `.NAME.partial` beside its place. An interrupted export leaves that behind
and what was there before untouched; the next one removes it.
"""

import ctypes
import hashlib
import json
import os
import shutil
from pathlib import Path

from phi3v.errors import ConfigError
from phi3v.files import sync, sync_tree

ORIGIN = "phi3v_export.json"
RENAME_EXCHANGE, AT_FDCWD = 2, -100  # of linux/fs.h and fcntl.h


def origin_of(run: Path, checkpoint: str) -> dict[str, str]:
    """What an export says of where it comes from: no path, for it may go to anybody."""
    path = run.resolve()
    digest = hashlib.sha256(str(path).encode()).hexdigest()
    return {"run": path.name, "run_path_sha256": digest, "checkpoint": checkpoint}


def check_target(out: Path, run: Path) -> None:
    """Refuse a place that holds anything but an export of the same run.

    Raises: ConfigError
    """
    if not os.path.lexists(out) or (out.is_dir() and not any(out.iterdir())):
        return
    found = read_origin((out / ORIGIN).read_text(encoding="utf-8")) if _has_origin(out) else {}
    if not is_same_run(found, run):
        source = f"was exported from another run, {found['run']}" if found else "is not an export"
        raise ConfigError(f"--out {out} exists and {source}; name another folder, or remove it")


def read_origin(text: str) -> dict[str, str]:
    """What `origin_of` gave; empty if that is something else."""
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) and "run" in found else {}


def is_same_run(found: dict[str, str], run: Path) -> bool:
    """Whether an export's origin is this run folder."""
    return found.get("run_path_sha256") == origin_of(run, "")["run_path_sha256"]


def _has_origin(out: Path) -> bool:
    return out.is_dir() and not out.is_symlink() and (out / ORIGIN).is_file()


def begin(out: Path) -> Path:
    """An empty folder to write to, beside the place of the export."""
    partial = _partial(out)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def finish(out: Path) -> None:
    """Give what was written its name; what stood there goes.

    The two change places in one step where the system can (Linux, most local file systems);
    elsewhere the place is empty between two renames.
    """
    partial = _partial(out)
    sync_tree(partial)
    if not out.exists():
        partial.rename(out)
    elif _exchange(partial, out):
        shutil.rmtree(partial)
    else:
        old = out.with_name(f".{out.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        out.rename(old)
        partial.rename(out)
        shutil.rmtree(old)
    sync(out.parent)


def _partial(out: Path) -> Path:
    return out.with_name(f".{out.name}.partial")


def _exchange(one: Path, other: Path) -> bool:
    """Let two folders change names at once; False where the system or file system cannot."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    if rename is None:
        return False
    paths = (os.fsencode(path) for path in (one, other))
    first, second = paths
    return bool(rename(AT_FDCWD, first, AT_FDCWD, second, RENAME_EXCHANGE) == 0)

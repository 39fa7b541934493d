"""What a checkpoint's files may hold: tensors and plain values, never code.

    state = load_data(path, mmap=True)      # ours
    with data_only(folder):                 # DeepSpeed's own loads, which ask torch for more
        engine.load_checkpoint(...)

A checkpoint may be another person's, and a pickle that is read in full runs whatever it names. So
every torch.load here takes torch's restricted reader, which knows tensors, numbers, texts and their
containers, and besides them the few names of ALLOWED. The digests of a manifest do not help:
whoever changes a file can write its manifest anew.

Surprising: where we read a file ourselves, an object of DeepSpeed's or numpy's becomes a `Stub`,
which holds what it was made of; none of their code is called, and DeepSpeed is not imported.
"""

import os
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from phi3v.errors import CheckpointError


class Stub:
    """In place of an object that is made by another package: what it was made of."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


# Of DeepSpeed 0.19.8, what its optimizers save beside tensors and plain values.
ALLOWED = (
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",  # where a weight lies, stages 1 and 2
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
)
# Random states of runs of before: numpy's. They are data by now (saving.py).
NUMPY = (
    *("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct"),
    *("numpy.ndarray", "numpy.dtype"),
)
FORCE, FORCE_NOT = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
WANTED = re.compile(r"GLOBAL (\S+)")
TOLD, FIRST = re.compile(r"WeightsUnpickler error: (.{,120})"), re.compile(r"(.{1,120})")


def load_data(path: Path, mmap: bool = False) -> Any:
    """Read a file of a checkpoint, to the CPU; objects of other packages as `Stub`.

    mmap  map its tensors instead of reading them

    Raises: CheckpointError if it holds anything else than data, or is no such file at all.
    """
    stubs: list[Any] = [(Stub, name) for name in (*ALLOWED, *NUMPY)]
    with safe_globals(stubs):
        try:
            return torch.load(path, map_location="cpu", mmap=mmap, weights_only=True)
        except OSError:
            raise
        except Exception as error:  # a file of a stranger's making fails in any way it likes
            raise _refusal(path, error) from None


@contextmanager
def data_only(folder: Path) -> Iterator[None]:
    """While it lasts no torch.load of this process, or of one it starts, runs code of a file.

    Those of DeepSpeed say weights_only=False; torch's own variable overrides that.

    folder  from which is loaded, to name the file that is refused

    Raises: CheckpointError if a file holds anything else than data.
    """
    before = {name: os.environ.pop(name, None) for name in (FORCE, FORCE_NOT)}
    os.environ[FORCE] = "1"
    try:
        with safe_globals([_find(name) for name in ALLOWED]):
            yield
    except (pickle.UnpicklingError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "weights_only" not in str(error):
            raise
        raise _refusal(_culprit(folder), error) from None
    finally:
        del os.environ[FORCE]
        os.environ.update({name: value for name, value in before.items() if value is not None})


def _find(name: str) -> Any:
    module, _, own = name.rpartition(".")
    return getattr(import_module(module), own)


def _culprit(folder: Path) -> Path:
    """The file of a folder that torch has refused; the folder, if none stands out."""
    with safe_globals([(Stub, name) for name in ALLOWED]):
        for path in sorted(folder.rglob("*.pt")):
            try:
                if get_unsafe_globals_in_checkpoint(path):
                    return path
            except Exception:  # not of torch's making at all
                return path
    return folder


def _refusal(path: Path, error: Exception) -> CheckpointError:
    text = "".join(c for c in str(error) if c.isprintable() or c == "\n")
    if wanted := WANTED.search(text):
        return CheckpointError(
            f"{path} names {wanted[1]}, which is code and not data, so it is not read; take a "
            "checkpoint of somebody whom you trust, or train it anew"
        )
    told = TOLD.search(text) or FIRST.search(text)
    return CheckpointError(
        f"{path} cannot be read as tensors and plain values ({type(error).__name__}: "
        f"{told[1] if told else 'no reason given'}); bring it back from a copy, or take another "
        "checkpoint"
    )

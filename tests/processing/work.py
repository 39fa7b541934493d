"""Pieces of work for test_bounded.py, which the other process imports: so no torch here."""

import ctypes
import gc
import os
import sys
import time

import numpy as np

from phi3v.errors import SampleError

KEPT: list[np.ndarray] = []


def reversed_array(data: bytes, text: str) -> tuple[np.ndarray, str]:
    return np.frombuffer(data, np.uint8)[::-1].copy(), text


def process(data: bytes) -> tuple[int, bool]:
    return os.getpid(), "torch" in sys.modules


def refuse(data: bytes) -> None:
    raise SampleError(data.decode())


def fail(data: bytes) -> None:
    1 / len(data)


def sleep(data: bytes, seconds: float) -> None:
    time.sleep(seconds)


def spin(data: bytes) -> None:
    while True:
        pass


def spin_for(data: bytes, seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def take(data: bytes, size: int) -> int:
    return len(np.ones(size, np.uint8))


def give_back(data: bytes) -> None:
    """Give the system back what Python and malloc hold and do not use."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def keep(data: bytes, size: int) -> None:
    KEPT.append(np.ones(size, np.uint8))


def take_or_refuse(data: bytes, size: int) -> int:
    """As a decoder does that calls a picture damaged where it was denied memory."""
    try:
        return take(data, size)
    except MemoryError:
        raise SampleError("image cannot be decoded") from None


def end_by(data: bytes, number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(10)

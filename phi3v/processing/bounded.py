"""Work whose cost nobody can tell beforehand, in a process that may take only so much for it.

    size = bounded(header_size, data, "a.webp", rules, seconds=3.0)

One such process serves its parent for as long as both live. It is started when it is first needed,
has Python, numpy and Pillow in it and no torch (0.3 s, 40 MB), and what it takes beyond is held by
the system: of memory MOST_BYTES (RLIMIT_AS), of processor time what the caller grants for this one
piece of work (ITIMER_PROF, which counts the time that it runs, not the time that passes: a busy
machine changes nothing). A decoder that is caught by the clock ends with its process, and the next
piece of work starts another. What a piece of work is allowed does not depend on those before it: if
it fails while memory that they left is still held, it is run again in a new process.
"""

import atexit
import os
import pickle
import resource
import signal
import socket
import struct
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

from phi3v.errors import Phi3VError, SampleError

Result = TypeVar("Result")

MOST_BYTES = 900_000_000
"""Of memory for one piece of work, beyond the least that the process has had before it."""

LEFT_BYTES = 1 << 23
"""Of memory that stays behind and makes no difference, 1 % of what a piece of work may take."""

PACKAGE = Path(__file__).parents[1]
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MALLOC_ARENA_MAX"), "1")
"""Each thread would set memory aside, and how much is allowed would depend on the processors."""

STDERR = 2
SIZE = struct.Struct("Q")  # of what follows, in bytes
KEPT = {"MALLOC_MMAP_THRESHOLD_": str(1 << 25), "MALLOC_TRIM_THRESHOLD_": str(1 << 26)}
"""Bytes that stay for the next picture, which would else take 3 ms to be made anew for each."""

CRASHES = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL)

# The packages without what their __init__ imports: torch and transformers.
START = """
import sys, types
sys.path[:] = {path!r}
for name, folder in {packages!r}:
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [folder]
from phi3v.processing.bounded import serve
import phi3v.processing.decoding
serve({handle})
"""


class Overspent(Exception):
    """The work took more than it was granted; the text says what it did: "takes too long"."""


class _Server:
    """The process and the way to it."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        self.left = 0  # bytes of memory that those before have left behind
        self.way, other = socket.socketpair()
        packages = [("phi3v", str(PACKAGE)), ("phi3v.processing", str(PACKAGE / "processing"))]
        code = START.format(path=sys.path, packages=packages, handle=other.fileno())
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", code],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=[other.fileno()],
            env=os.environ | ONE_THREAD | KEPT,
        )
        other.close()

    def answer(self, data: bytes, request: Any) -> Any:
        """What the process answers.

        Raises: EOFError or OSError where it ends instead.
        """
        _send(self.way, request)
        _send_block(self.way, data)
        answer, self.left = _receive(self.way)
        return answer

    def end(self) -> int:
        """Wait for its end, which it comes to when nobody can ask any more; its exit code."""
        self.way.close()
        return self.process.wait()


_server: _Server | None = None
_lock = Lock()


def bounded(
    function: Callable[..., Result], data: bytes, *arguments: Any, seconds: float
) -> Result:
    """Call `function(data, *arguments)` in the other process.

    function  of a module that does not import torch
    seconds   of processor time that it may take

    Raises: SampleError as the function does; Overspent where it takes more memory or time, or
    crashes; Phi3VError where the process is killed by somebody else.
    """
    with _lock:
        answer = _answer(function, data, arguments, seconds)
    if isinstance(answer, Exception):
        try:
            raise answer
        finally:
            del answer  # it holds this frame, and so `data`, until it is dropped itself
    return answer


def _answer(
    function: Callable[..., Result], data: bytes, arguments: tuple[Any, ...], seconds: float
) -> Result | Exception:
    """What the other process answers, or the error that it ended with."""
    server = _ready()
    was_narrow = server.left > LEFT_BYTES
    try:
        answer = server.answer(data, (function, arguments, seconds))
    except (EOFError, OSError):
        answer = _reason(_stop(), seconds)
    if was_narrow and isinstance(answer, Exception):
        _stop()
        return _answer(function, data, arguments, seconds)
    if isinstance(answer, MemoryError):
        return Overspent(f"takes more than {MOST_BYTES // 10**6} MB of memory")
    return answer


def _ready() -> _Server:
    global _server
    if _server is not None and _server.owner != os.getpid():  # a fork has copied it
        _server.way.close()
        _server.process.returncode = 0  # it is no child of this process, which need not wait for it
        _server = None
    if _server is None:
        _server = _Server()
        atexit.register(_stop)
    return _server


def _stop() -> int:
    global _server
    atexit.unregister(_stop)
    server, _server = _server, None
    return 0 if server is None or server.owner != os.getpid() else server.end()


def _reason(code: int, seconds: float) -> Exception:
    """Why the process ended before it gave an answer."""
    if code == -signal.SIGPROF:
        return Overspent(f"takes more than {seconds:.1f} seconds of processor time")
    if -code in CRASHES:
        return Overspent(f"makes its decoder crash ({signal.Signals(-code).name})")
    if code < 0:
        return Phi3VError(
            f"the process that decodes pictures was ended by {signal.Signals(-code).name}, perhaps "
            "for want of memory; start again to go on, with fewer workers"
        )
    return RuntimeError(f"the process that decodes pictures ended with exit code {code}")


def serve(handle: int) -> None:
    """Answer requests until nobody can ask any more; the other side of `bounded`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who asks ends at Ctrl-C, and this with it
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.dup2(os.open(os.devnull, os.O_WRONLY), STDERR)  # libtiff tells it of every damaged tag
    least = _size()  # it shrinks where Python or malloc give back what they do not use
    with socket.socket(fileno=handle) as way:
        try:
            while True:
                least = min(least, _size())
                _allow(least + MOST_BYTES)
                answer = _worked(way)
                _send(way, (answer, _size() - least))
        except EOFError:
            return


def _worked(way: socket.socket) -> Any:
    """The answer to the next request, or an error to be raised.

    Raises: EOFError if there is none, for nobody is there to ask.
    """
    try:
        function, arguments, seconds = _receive(way)
        data = bytes(_receive_block(way))
        signal.setitimer(signal.ITIMER_PROF, seconds)
        return function(data, *arguments)
    except (SampleError, MemoryError) as error:
        return type(error)(*error.args)  # the error itself holds on to what was decoded
    except EOFError:
        raise
    except Exception as error:  # a defect, with the lines where it is
        return RuntimeError("".join(traceback.format_exception(error)))
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _allow(soft: int) -> None:
    """Let this process take so many bytes of address space."""
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    soft = soft if hard == resource.RLIM_INFINITY else min(soft, hard)
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _size() -> int:
    """Bytes of address space that this process has."""
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def _send(way: socket.socket, message: Any) -> None:
    """Send an object; the pixels of arrays go as they lie, without a copy."""
    buffers: list[pickle.PickleBuffer] = []
    body = pickle.dumps(message, 5, buffer_callback=buffers.append)
    way.sendall(SIZE.pack(len(buffers)))
    for block in (body, *(buffer.raw() for buffer in buffers)):
        _send_block(way, block)


def _receive(way: socket.socket) -> Any:
    (count,) = SIZE.unpack(_exactly(way, SIZE.size))
    body, *buffers = [_receive_block(way) for _ in range(1 + count)]
    return pickle.loads(body, buffers=buffers)


def _send_block(way: socket.socket, block: Any) -> None:
    """Send bytes, or what lies as bytes."""
    way.sendall(SIZE.pack(len(block)))
    way.sendall(block)


def _receive_block(way: socket.socket) -> bytearray:
    (size,) = SIZE.unpack(_exactly(way, SIZE.size))
    return _exactly(way, size)


def _exactly(way: socket.socket, size: int) -> bytearray:
    """So many bytes.

    Raises: EOFError where the other side is gone.
    """
    block = bytearray(size)
    rest = memoryview(block)
    while rest:
        count = way.recv_into(rest)
        if not count:
            raise EOFError
        rest = rest[count:]
    return block

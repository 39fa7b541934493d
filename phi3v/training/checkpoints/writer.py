"""DeepSpeed's plug for saving: each state is copied in memory, and written behind training.

    writer = Writer(device, ds.offloads_optimizer)
    engine.checkpoint_engine = writer
    writer.guard(engine.optimizer.optimizer)    # its steps wait for the copies
    writer.prepare(engine.optimizer.state_dict())
    writer.begin(partial)                       # waits for the checkpoint before
    engine.save_checkpoint(...)                 # calls writer.save for each file of this rank
    writer.end(publish)                         # publish(files) runs in the thread, files down
    writer.error                                # looked at every step
    writer.finish()                             # at the end of the run

A thread copies the tensors while training computes the next gradient, and writes the copies when
it has them all. Only an optimizer's step changes what is saved, and waits for what is not copied
yet: nothing, where a step takes longer than 0.07 s per GiB (at 16 GB/s from memory to memory). From
CUDA the copies go on a stream of the thread's own, behind what was asked of the device when they
were ordered and beside what is asked of it afterwards.
Without `guard`, `save` returns when the copy is made.

Surprising: the copy is made into memory that is kept, so a rank holds its state twice
(`training/memory.py` `staging_bytes`). The system gives a GiB of fresh pages in 0.6 to 6 s;
`prepare` has that done behind training too.

The state of an optimizer that is offloaded lies in the host's memory and would fill it twice. It is
written from where it lies, nothing is copied or reserved, and the optimizer's next step waits until
it is on the disk: the forward and backward passes until then are what the writing hides behind.
"""

import copy
import errno
import hashlib
import io
import os
import queue
import sys
import threading
import time
import traceback
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine
from torch import Tensor

from phi3v.errors import CheckpointError
from phi3v.printing import print
from phi3v.training.checkpoints.store import SavedFile

CPU = torch.device("cpu")
PIECE_BYTES = 1 << 26  # written and hashed before the next
ANNOUNCE_SECONDS = 1.0  # training waits so long for the disk before it says so
Shape = tuple[torch.dtype, torch.Size, bool]  # the last: whether its memory is pinned
Copy = tuple[Tensor, Tensor]  # to, from
ADVICE = {
    errno.ENOSPC: "free space there",
    errno.EDQUOT: "free space there, or have the quota raised",
    errno.EACCES: "make the folder writable",
    errno.EROFS: "have the disk mounted writable, or move the run folder to another",
    errno.ENOENT: "find out what removed the folder",
}


class Writer(CheckpointEngine):
    """Saves one checkpoint at a time, a rank's files in the order in which they were given.

    One daemon thread writes. What fails there stops this checkpoint, is kept in `error`, and is
    raised by the next `finish` or `begin`.

    device      of the engine, and of the thread
    offloaded   whether the optimizer's state is in the host's memory, and is written as it lies
    """

    def __init__(self, device: torch.device = CPU, offloaded: bool = False) -> None:
        super().__init__()
        self._device, self._offloaded = device, offloaded
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._staging = Staging()
        self._is_guarded = False
        self._jobs: queue.Queue[tuple[Callable[[], None], threading.Event]] = queue.Queue()
        self._owed: list[threading.Event] = []  # until then what was saved must not change
        self._writes: list[tuple[Callable[[], None], bool]] = []  # and whether the step waits
        self._folder = Path()
        self._files: dict[str, SavedFile] = {}
        self._error: CheckpointError | None = None
        self._moved: Callable[[], None] | None = None
        threading.Thread(target=self._work, name="checkpoint writer", daemon=True).start()

    def guard(
        self, optimizer: torch.optim.Optimizer, beat: Callable[[], None] = lambda: None
    ) -> None:
        """Let `save` and `end` return at once; the optimizer's next step waits for what it must.

        For an optimizer that alone changes what is saved, and whose state is not on NVMe.

        beat  is called in the thread while a step waits and the disk takes what is written
        """
        optimizer.register_step_pre_hook(lambda *_: self._hold(beat))
        self._is_guarded = True

    def _hold(self, beat: Callable[[], None]) -> None:
        """Have the optimizer's step wait, and say so if it waited long."""
        assert not any(is_owed for _, is_owed in self._writes), "a step between save and end"
        start, self._moved = time.perf_counter(), beat
        try:
            self.settle()
        finally:
            self._moved = None
        self._announce(start, f"{self._folder} to be {'written' if self._offloaded else 'copied'}")

    def settle(self) -> None:
        """Wait until what was given to `save` may change again."""
        while self._owed:
            self._owed.pop().wait()

    def prepare(self, state: Any) -> None:
        """Get the memory for a state like this one behind training; the first save then has it."""
        shapes: list[Shape] = []

        def note(tensor: Tensor) -> None:
            if not self._stays(tensor):
                shapes.append(shape_of(tensor))

        map_tensors(state, note)
        self._put(partial(self._staging.reserve, shapes))

    def begin(self, folder: Path) -> None:
        """Start the checkpoint of a folder; waits until the one before is written.

        Raises: CheckpointError if that one could not be written.
        """
        start, before = time.perf_counter(), self._folder
        self.finish()
        what = f"{before} to be written" if before.name else "the memory of its copy"
        self._announce(start, what)
        self._staging.release()
        self._folder, self._files, self._writes = folder, {}, []

    def end(self, then: Callable[[dict[str, SavedFile]], None]) -> None:
        """Have the files written, and `then` called in the thread when they are on the disk."""
        writes, self._writes = self._writes, []
        for write, is_owed in writes:
            done = self._put(write)
            if is_owed:
                self._owed.append(done)
        self._put(lambda: then(dict(self._files)))
        if not self._is_guarded:
            self.settle()

    @property
    def is_busy(self) -> bool:
        """Whether anything is still being written."""
        return self._jobs.unfinished_tasks > 0

    @property
    def error(self) -> CheckpointError | None:
        """What went wrong in the thread and was not raised yet."""
        return self._error

    def finish(self) -> dict[str, SavedFile]:
        """Wait for what is being written; returns its files by name in the checkpoint's folder.

        Raises: CheckpointError if it could not be written; once.
        """
        self._jobs.join()
        error, self._error = self._error, None
        if error:
            raise error
        return dict(self._files)

    # What DeepSpeed calls.

    def save(self, state_dict: Any, path: str) -> None:
        """Have a state copied, as a file of the checkpoint that was begun."""
        name = str(Path(path).relative_to(self._folder))
        staying: list[Tensor] = []
        copies: list[Copy] = []

        def take(tensor: Tensor) -> Tensor:
            if self._stays(tensor):
                staying.append(tensor.detach())
                return staying[-1]
            assert tensor.is_cpu or self._stream, "nobody would wait for a copy from CUDA"
            return self._staging.take(tensor, copies)

        state = map_tensors(state_dict, take)
        ready = torch.cuda.current_stream(self._device).record_event() if self._stream else None
        self._owed.append(self._put(partial(self._copy, copies, ready)))
        self._writes.append((partial(self._write, state, name), bool(staying)))
        if not self._is_guarded:
            self.settle()

    def _stays(self, tensor: Tensor) -> bool:
        """Whether a tensor is written from where it lies; a view's whole storage would be."""
        size = tensor.numel() * tensor.element_size()
        return self._offloaded and tensor.is_cpu and tensor.untyped_storage().nbytes() == size

    def _announce(self, start: float, what: str) -> None:
        waited = time.perf_counter() - start
        if waited > ANNOUNCE_SECONDS:
            print(f"training waited {waited:.1f} s for {what}; save less often", file=sys.stderr)

    def load(self, path: str, map_location: Any = None) -> Any:
        """Read a file that was saved, inside `loading.data_only`, which says what it may hold."""
        self.settle()  # what is loaded replaces what was saved
        return torch.load(path, map_location=map_location, weights_only=True)

    def create(self, info: Any) -> None:
        """Nothing: `begin` did it."""

    def commit(self, info: Any) -> bool:
        """Nothing: `end` does it."""
        return True

    def preserves_storage_sharing(self) -> bool:
        """No: views are copied as what they show, and DeepSpeed need not clone them before."""
        return False

    # In the thread.

    def _put(self, job: Callable[[], None]) -> threading.Event:
        """Have a job done after those before it; returns what is set when it is."""
        done = threading.Event()
        self._jobs.put((job, done))
        return done

    def _work(self) -> None:
        if self._stream:
            torch.cuda.set_device(self._device)  # else pinned memory opens a context on the first
        while True:
            job, done = self._jobs.get()
            try:
                if self._error is None:
                    job()
            except CheckpointError as error:
                self._error = error
            except OSError as error:
                self._error = _explain(error, self._folder)
            except Exception as error:  # a defect; training goes on to where all ranks can leave
                traceback.print_exc()
                self._error = CheckpointError(
                    f"{self._folder} could not be written for a defect of this program, "
                    f"{error!r}; please report it with the traceback above"
                )
            finally:
                done.set()
                self._jobs.task_done()

    def _copy(self, copies: list[Copy], ready: torch.cuda.Event | None) -> None:
        """Make the copies; on CUDA once the device has come to `ready`, on the thread's stream."""
        if self._stream is None or ready is None:
            copy_all(copies)
            return
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(ready)
            copy_all(copies)
            self._stream.record_event(torch.cuda.Event(blocking=True)).synchronize()

    def _beat(self) -> None:
        if moved := self._moved:
            moved()

    def _write(self, state: Any, name: str) -> None:
        with Sink(self._folder / name, self._beat) as sink:
            torch.save(state, sink)
            self._files[name] = sink.finish()


class Sink(io.FileIO):
    """A file that torch.save writes to: unbuffered, hashed on the way, `moved` after each piece."""

    def __init__(self, path: Path, moved: Callable[[], object] = bool) -> None:
        super().__init__(path, "wb")
        self._moved = moved
        self._digest = hashlib.sha256()
        self._error: OSError | None = None

    def write(self, data: Any) -> int:
        """Write all of it; an error waits for `finish`, for torch would make a riddle of it."""
        whole = memoryview(data)
        for start in range(0, len(whole), PIECE_BYTES):
            piece = whole[start : start + PIECE_BYTES]
            self._write_piece(piece)
            self._digest.update(piece)
            self._moved()
        return len(whole)

    def _write_piece(self, rest: memoryview) -> None:
        try:
            while rest and self._error is None:
                rest = rest[super().write(rest) :]
        except OSError as error:
            self._error = error
            error.filename = self.name

    def finish(self) -> SavedFile:
        """Flush to the disk.

        Raises: OSError of this or of the first write that failed.
        """
        if self._error:
            raise self._error
        os.fsync(self.fileno())
        return SavedFile(self.tell(), self._digest.hexdigest())


def _explain(error: OSError, folder: Path) -> CheckpointError:
    advice = ADVICE.get(error.errno or 0, "look after the disk")
    return CheckpointError(
        f"{error.filename or folder} could not be written: {error.strerror or error}; {advice} and "
        "start the same command again, which goes on from the checkpoint before"
    )


class Staging:
    """Memory for one copy of a rank's tensors, used again by the next copy.

    A tensor finds memory by its dtype and shape; what a copy did not use is freed by the next.
    """

    def __init__(self) -> None:
        self._free: defaultdict[Shape, list[Tensor]] = defaultdict(list)
        self._used: list[tuple[Shape, Tensor]] = []

    def take(self, tensor: Tensor, copies: list[Copy]) -> Tensor:
        """Memory in place of a tensor; the copy that is to be made is added to `copies`."""
        shape = shape_of(tensor)
        free = self._free[shape]
        kept = free.pop() if free else empty(shape)
        self._used.append((shape, kept))
        copies.append((kept, tensor.detach()))
        return kept

    def release(self) -> None:
        """Take back all memory that is in use."""
        if self._used:
            self._free.clear()
        while self._used:
            shape, kept = self._used.pop()
            self._free[shape].append(kept)

    def reserve(self, shapes: list[Shape]) -> None:
        """Get memory for these, pages included."""
        for shape in shapes:
            self._free[shape].append(empty(shape).zero_())


def copy_all(copies: list[Copy]) -> None:
    for kept, tensor in copies:
        kept.copy_(tensor, non_blocking=True)


def shape_of(tensor: Tensor) -> Shape:
    return tensor.dtype, tensor.shape, tensor.is_cuda


def empty(shape: Shape) -> Tensor:
    dtype, size, is_pinned = shape
    return torch.empty(size, dtype=dtype, pin_memory=is_pinned)


def map_tensors(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """Copy a tree of dicts, lists and tuples with its tensors changed, and all else deep-copied."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        copied = copy.copy(value)  # keeps the order, and `_metadata` of a module's state
        for key, item in value.items():
            copied[key] = map_tensors(item, change)
        return copied
    if type(value) in (list, tuple):
        return type(value)([map_tensors(item, change) for item in value])
    return copy.deepcopy(value)

"""Units of work over worker processes: bounded in memory, none left behind, results as they come.

    with progress(None, "scan", "row", total=rows) as bar:
        for done in work_off(open_tools, (cfg, plan), scan_chunk, chunks, workers=8):
            bar.add(done)

A unit's result must not depend on which process does it, nor on what that one did before. Workers
are forked from one server process that has imported what they need, so that 64 of them share one
copy of torch; where it ends (a kill of the parent included) they end too.
"""

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.connection import wait as wait_for
from typing import Any, TypeVar

import torch

from phi3v.errors import Phi3VError
from phi3v.progress import progress
from phi3v.reading import retried

Task = TypeVar("Task")

AHEAD = 2  # units handed out per worker: none waits for work, and few are lost on a stop
FEW = 16  # units
PRELOAD = ["phi3v.prepare.scan", "phi3v.prepare.write"]


@dataclass(frozen=True)
class Done:
    """What a unit of work went through: rows, their images, bytes read or written, rejections."""

    rows: int = 0
    images: int = 0
    bytes: int = 0
    rejected: int = 0


def work_off(
    open_tools: Callable[..., Any],
    arguments: tuple[Any, ...],
    function: Callable[[Any, Task], Done],
    tasks: Sequence[Task],
    workers: int | None = None,
) -> Iterator[Done]:
    """Call `function(tools, task)` for every task, tools being `open_tools(*arguments)`.

    Each worker opens its tools once. With one worker, or one task, all is done in this process.
    workers  processes; None: one for each CPU that this process may use (of a Slurm job its share
             of the node) as far as there are FEW tasks for each, for it takes seconds to start
    Raises: what a task raises; MachineError if the machine fails at it again and again; Phi3VError
    if a worker dies.
    """
    if workers is None:
        workers = min(len(os.sched_getaffinity(0)), len(tasks) // FEW)
    workers = min(workers, len(tasks))
    if workers <= 1:
        tools = open_tools(*arguments) if tasks else None
        yield from (_patient(function, tools, task) for task in tasks)
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    pool = ProcessPoolExecutor(workers, context, _start, (open_tools, arguments))
    try:
        yield from _hand_out(pool, function, tasks, workers * AHEAD)
    except BrokenProcessPool as error:
        raise Phi3VError(
            f"one of {workers} worker processes was killed, perhaps for want of memory; start "
            f"again to go on, with fewer of them: workers={max(1, workers // 2)}"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _hand_out(
    pool: ProcessPoolExecutor,
    function: Callable[[Any, Task], Done],
    tasks: Sequence[Task],
    limit: int,
) -> Iterator[Done]:
    waiting: set[Future[Done]] = set()
    for task in tasks:
        waiting.add(pool.submit(_do, function, task))
        if len(waiting) >= limit:
            finished, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in finished)
    while waiting:
        finished, waiting = wait(waiting, return_when=FIRST_COMPLETED)
        yield from (future.result() for future in finished)


_tools: Any = None  # of this worker process


def _start(open_tools: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    global _tools
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # else each starts threads for all CPUs
    torch.set_num_threads(1)
    _tools = open_tools(*arguments)


def _do(function: Callable[[Any, Task], Done], task: Task) -> Done:
    return _patient(function, _tools, task)


def _patient(function: Callable[[Any, Task], Done], tools: Any, task: Task) -> Done:
    """Do a task; again, if the machine failed at reading or writing a file of it.

    Raises: MachineError if it still fails; what a task raises otherwise.
    """
    return retried(lambda: function(tools, task), f"a file of {task}")


def _end_with_parent() -> None:
    """End this worker when the command that started it is gone, by a SIGKILL too."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait_for([parent.sentinel])
    os._exit(1)


class Tally:
    """A progress bar of rows that also shows images/s, MB/s and how many rows are rejected."""

    def __init__(self, name: str, total: int, finished: int, rejected: int = 0) -> None:
        self.bar = progress(None, name, "row", total=total, initial=finished)
        self.images, self.bytes, self.rejected = 0, 0, rejected

    def __enter__(self) -> "Tally":
        return self

    def __exit__(self, *_: Any) -> None:
        self.bar.close()

    def add(self, done: Done) -> None:
        """Count a finished unit."""
        self.images += done.images
        self.bytes += done.bytes
        self.rejected += done.rejected
        seconds = max(float(self.bar.format_dict["elapsed"]), 1e-3)
        self.bar.set_postfix_str(
            f"{self.images / seconds:,.0f} images/s, {self.bytes / seconds / 1e6:,.0f} MB/s, "
            f"{self.rejected:,} rejected",
            refresh=False,
        )
        self.bar.update(done.rows)

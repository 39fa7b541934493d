"""The steps of one rank, read ahead in threads, in the plan's order whichever thread is first.

    loader = Loader(dataset, plan, rank, world_size, device)
    for step in loader.steps(Position()):
        for batch in loader.on_device(step.batches):
            ...

A batch lies in an arena, which is filled again once the next step is taken: what is to be kept of
a batch for longer must be copied. Memory is bounded by the packs of one step and those read ahead.
"""

import time
from collections import deque
from collections.abc import Collection, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from phi3v.data.batch import ALIGNMENT, CPU, Arena, Batch, collate, row_bytes
from phi3v.data.mixture import Mixture
from phi3v.data.packing import Plan, PlannedStep, Position
from phi3v.data.reader import Dataset

AHEAD = 4  # packs read in advance, in whole steps: 4 steps of 1 pack, 1 step of 4 or of 16
READERS = 4  # threads

_Sent = tuple[Batch, torch.cuda.Event | None]


@dataclass(frozen=True)
class Step:
    """What one optimizer step trains on.

    packs    of all ranks and rounds, `train_batch_size` of them (empty ones may end an epoch)
    batches  this rank's, one per round; valid until the next step is taken
    at       where in the sequence it is
    after    where the sequence goes on after this step
    """

    packs: Sequence[np.ndarray]
    batches: Sequence[Batch]
    at: Position
    after: Position
    wait_seconds: float = 0.0


@dataclass(frozen=True)
class OnePack:
    """A plan of the first pack of another, in every place of every step (debug.overfit_one_pack).

    It never ends, and every step is at the same position.
    """

    plan: Plan

    @property
    def packs_per_step(self) -> int:
        return self.plan.packs_per_step

    def steps(self, start: Position, epochs: int | None = None) -> Iterator[PlannedStep]:
        pack = next(self.plan.steps(Position())).packs[0]
        while True:
            yield PlannedStep([pack] * self.packs_per_step, Position(), Position())


class Loader:
    """Yields the steps of a run from a position on; pack k of a step belongs to rank k % ranks."""

    def __init__(
        self,
        dataset: Dataset | Mixture,
        plan: Plan | OnePack,
        rank: int,
        world_size: int,
        device: torch.device = CPU,
    ) -> None:
        self.dataset, self.plan = dataset, plan
        self.rank, self.world_size, self.device = rank, world_size, device
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    def steps(
        self,
        start: Position,
        epochs: int | None = None,
        left_out: Collection[Position] = (),
    ) -> Generator[Step, None, None]:
        """Steps from `start` on but those `left_out`; `wait_seconds` is what each let wait.

        Raises: what planning or reading raised, at the step that it happened to.
        """
        rounds = self.plan.packs_per_step // self.world_size
        ahead = -(-AHEAD // rounds)
        free = deque(Arena(self.device) for _ in range(rounds * (ahead + 1)))
        planned = (s for s in self.plan.steps(start, epochs) if s.at not in left_out)
        planner, readers = self._threads(1), self._threads(READERS)
        coming = deque(planner.submit(self._begin, planned, readers, free) for _ in range(ahead))
        try:
            while True:
                began = time.perf_counter()
                begun = coming.popleft().result()
                if begun is None:
                    return
                step, reads = begun
                batches, arenas = zip(*(read.result() for read in reads), strict=True)
                waited = time.perf_counter() - began
                coming.append(planner.submit(self._begin, planned, readers, free))
                yield Step(step.packs, batches, step.at, step.after, waited)
                self._release(arenas)
                free.extend(arenas)
        finally:
            for threads in (planner, readers):
                threads.shutdown(cancel_futures=True)

    def on_device(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Batches on the loader's device; on CUDA the next is copied while one is used.

        The copies run on a stream of their own. The first of a step has nothing to hide behind.
        """
        before: _Sent | None = None
        for batch in batches:
            following = self._send(batch)
            if before:
                yield self._arrived(before)
            before = following
        if before:
            yield self._arrived(before)

    def _threads(self, count: int) -> ThreadPoolExecutor:
        """Threads that pin memory for the loader's device, not for the first of the machine."""
        if self._copies is None:
            return ThreadPoolExecutor(count, "loader")
        return ThreadPoolExecutor(count, "loader", torch.cuda.set_device, (self.device,))

    def _begin(
        self, planned: Iterator[PlannedStep], readers: ThreadPoolExecutor, free: deque[Arena]
    ) -> tuple[PlannedStep, list[Future[tuple[Batch, Arena]]]] | None:
        """Plan the next step and have this rank's packs read; None behind the last."""
        step = next(planned, None)
        if step is None:
            return None
        mine = step.packs[self.rank :: self.world_size]
        return step, [readers.submit(self._read, pack, free) for pack in mine]

    def _read(self, pack: np.ndarray, free: deque[Arena]) -> tuple[Batch, Arena]:
        arena, data = free.popleft(), self.dataset
        sizes = data.message_bytes[pack].tolist()
        needed = int(data.memory_bytes[pack].sum()) + ALIGNMENT * len(sizes)
        arena.reset(needed + row_bytes(int(data.tokens[pack].sum())))
        samples = [
            data.read_into(index, arena.take(size).numpy())
            for index, size in zip(pack.tolist(), sizes, strict=True)
        ]
        return collate(samples, arena), arena

    def _send(self, batch: Batch) -> _Sent:
        with torch.cuda.stream(self._copies):
            sent = batch.to(self.device)
            return sent, self._copies.record_event() if self._copies else None

    def _arrived(self, sent: _Sent) -> Batch:
        """Have the computation wait for a copy, and the copy's memory for the computation."""
        batch, event = sent
        if event:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(event)
            for canvas in batch.canvases:
                canvas.record_stream(stream)
        return batch

    def _release(self, arenas: Sequence[Arena]) -> None:
        if self._copies:  # of batches that were sent and never used
            torch.cuda.current_stream(self.device).wait_stream(self._copies)
        for arena in arenas:
            arena.release()

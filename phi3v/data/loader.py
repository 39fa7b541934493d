"""Packs of one rank, read ahead in a thread."""

import queue
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np

from phi3v.data.batch import Batch, collate
from phi3v.data.packing import PackPlan, Position
from phi3v.data.reader import Dataset

AHEAD = 2  # steps read in advance
NO_SAMPLES = np.array([], dtype=np.int64)


@dataclass(frozen=True)
class Step:
    """What one optimizer step trains on.

    packs    of all ranks and rounds, `train_batch_size` of them (empty ones behind the last epoch)
    batches  this rank's, one per round
    after    where the sequence goes on after this step
    """

    packs: Sequence[np.ndarray]
    batches: Sequence[Batch]
    epoch: int
    after: Position
    wait_seconds: float = 0.0


class Loader:
    """Yields the steps of a run from a position on; pack k of a step belongs to rank k % ranks."""

    def __init__(
        self, dataset: Dataset, plan: PackPlan, packs_per_step: int, rank: int, world_size: int
    ) -> None:
        self.dataset, self.plan = dataset, plan
        self.packs_per_step, self.rank, self.world_size = packs_per_step, rank, world_size

    def steps(self, start: Position, epochs: int | None = None) -> Generator[Step, None, None]:
        """Steps from `start` on; the time spent waiting for each is in `wait_seconds`."""
        ready: queue.Queue[Step | BaseException | None] = queue.Queue(maxsize=AHEAD)
        stop = threading.Event()
        reader = threading.Thread(
            target=self._fill, args=(ready, stop, start, epochs), name="loader", daemon=True
        )
        reader.start()
        try:
            while True:
                began = time.perf_counter()
                item = ready.get()
                if item is None:
                    return
                if isinstance(item, BaseException):
                    raise item
                waited = time.perf_counter() - began
                yield replace(item, wait_seconds=waited)
        finally:
            stop.set()
            while reader.is_alive():
                _drain(ready)
                reader.join(timeout=0.05)

    def _fill(
        self,
        ready: "queue.Queue[Step | BaseException | None]",
        stop: threading.Event,
        start: Position,
        epochs: int | None,
    ) -> None:
        try:
            for step in self._read(start, epochs):
                ready.put(step)
                if stop.is_set():
                    return
            ready.put(None)
        except BaseException as error:  # handed to the consumer, which raises it
            ready.put(error)

    def _read(self, start: Position, epochs: int | None) -> Iterator[Step]:
        packs = self.plan.packs(start, epochs)
        epoch = start.epoch
        while taken := list(islice(packs, self.packs_per_step)):
            after = taken[-1][1]
            filled = [pack for pack, _ in taken]
            filled += [NO_SAMPLES] * (self.packs_per_step - len(filled))
            mine = filled[self.rank :: self.world_size]
            batches = [collate([self.dataset[int(i)] for i in pack]) for pack in mine]
            yield Step(filled, batches, epoch, after)
            epoch = after.epoch


def _drain(ready: "queue.Queue[Step | BaseException | None]") -> None:
    while not ready.empty():
        ready.get_nowait()

"""Saving a run behind its training.

    saver = Saver(engine, folder, cfg.checkpoint, ranks, facts, device, offloaded, beat)
    saver.save(done, metrics_bytes=..., wandb_id=...)    # returns when the state is copied
    saver.wait()                                         # until it is on disk under its name

Every rank writes its own files in a thread and leaves a marker that says what they should be; the
first rank's thread waits for all markers, writes the manifest and gives the checkpoint its name.
Threads speak through the folder alone: a collective of theirs would meet those of the training.
"""

import json
import random
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed

from phi3v.config.running import CheckpointSection
from phi3v.data.packing import Position
from phi3v.devices import has_cuda
from phi3v.errors import CheckpointError
from phi3v.stored import read_object
from phi3v.training import zero
from phi3v.training.checkpoints.store import (
    SavedFile,
    partial_name,
    publish,
    retain,
    write_manifest,
)
from phi3v.training.checkpoints.writer import Writer
from phi3v.training.ranks import Ranks

POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Progress:
    """How far a run is: optimizer steps done, and the next pack."""

    step: int = 0
    position: Position = Position()


@dataclass
class Saver:
    """Saves a run, one checkpoint at a time; all ranks call its methods at the same steps.

    facts      of the manifest that stay the same: world size, stage, fingerprints, versions
    device     on which the engine computes
    offloaded  whether the optimizer's state lies in the host's memory
    beat       what says that this rank goes on, while its step waits for a disk that is slow
    scores     of the evaluated steps, higher is better, for `checkpoint.best`
    """

    engine: Any
    folder: Path
    section: CheckpointSection
    ranks: Ranks
    facts: Mapping[str, Any]
    device: torch.device
    offloaded: bool
    beat: Callable[[], None]
    scores: dict[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.writer = Writer(self.device, self.offloaded)
        self.engine.checkpoint_engine = self.writer
        self.writer.guard(self.engine.optimizer.optimizer, self.beat)
        self.writer.prepare(self.engine.optimizer.state_dict())
        self.saved_step: int | None = None
        self._given_up = threading.Event()

    def save(self, progress: Progress, **facts: Any) -> None:
        """Have the state copied and written; waits for the checkpoint before, if it must.

        Raises: CheckpointError on all ranks if an earlier one could not be written.
        """
        self.wait()
        partial = self.folder / partial_name(progress.step)
        if self.ranks.is_first:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            remove_scripts(self.folder)
        torch.distributed.barrier()
        self.writer.begin(partial)
        state = {"step": progress.step, "position": asdict(progress.position)}
        self.engine.save_checkpoint(
            str(self.folder), tag=partial.name, client_state=state, save_latest=False
        )
        self.writer.save(random_states(), str(partial / random_name(self.ranks.rank)))
        facts = {**self.facts, **state, **facts, "saved_at": datetime.now(timezone.utc).isoformat()}
        self.writer.end(lambda files: self._written(partial, progress.step, facts, files))
        self.saved_step = progress.step

    def wait(self) -> None:
        """Return when what was saved is on disk under its name.

        The ranks ask each other while they wait: the first could not publish, and would wait for
        ever, where another cannot write.

        Raises: CheckpointError on all ranks if one could not write; what it had written is removed.
        """
        while True:
            error = self.writer.error
            states = zero.gather_objects((self.writer.is_busy, error and str(error)))
            failures = [words for _, words in states if words]
            if failures:
                self._give_up()
                raise CheckpointError(failures[0])
            if not any(is_busy for is_busy, _ in states):
                return
            time.sleep(POLL_SECONDS)

    def _give_up(self) -> None:
        """Free the room of a checkpoint that cannot be finished.

        No rank returns before that: the first to leave with its mistake ends the others at once.
        """
        self._given_up.set()
        with suppress(CheckpointError):
            self.writer.finish()
        torch.distributed.barrier()
        zero.first_rank_does(self._remove_partials, self.ranks.is_first)

    def _remove_partials(self) -> None:
        for partial in self.folder.glob(".step-*.partial"):
            shutil.rmtree(partial, ignore_errors=True)

    def tidy(self) -> None:
        """Remove what need not be kept, now that everything is saved and scored."""
        if self.ranks.is_first:
            retain(self.folder, self.section.keep, self.section.keep_every, self.scores)

    def _written(
        self, partial: Path, step: int, facts: dict[str, Any], files: Mapping[str, SavedFile]
    ) -> None:
        """What a rank's thread does when its files are down."""
        leave_marker(partial, self.ranks.rank, files)
        if not self.ranks.is_first:
            return
        write_manifest(partial, facts, self._collect(partial))
        publish(self.folder, step)
        self.tidy()

    def _collect(self, partial: Path) -> dict[str, SavedFile]:
        """Wait for the markers of all ranks; returns all files, the markers removed."""
        files: dict[str, SavedFile] = {}
        for rank in range(self.ranks.world_size):
            marker = partial / _marker(rank)
            while not marker.is_file():
                if self._given_up.wait(POLL_SECONDS):
                    raise CheckpointError(f"{partial} was given up: another rank could not write")
            entries = read_object(marker)
            files |= {name: SavedFile(**entry) for name, entry in entries.items()}
            marker.unlink()
        for path in partial.iterdir():  # DeepSpeed's own script, which no state goes through
            if path.name not in files:
                files[path.name] = SavedFile.of(path)
        return files


def leave_marker(partial: Path, rank: int, files: Mapping[str, SavedFile]) -> None:
    """Say what a rank's files should be, now that they are down.

    With the marker's name the folder is the first rank's, which may give it another at once: so
    nothing here is done to it afterwards, not even a flush. The manifest replaces all markers.
    """
    marker = partial / _marker(rank)
    temporary = marker.with_suffix(".tmp")
    temporary.write_text(json.dumps({name: asdict(file) for name, file in files.items()}), "utf-8")
    temporary.replace(marker)


def _marker(rank: int) -> str:
    return f".rank-{rank:05d}.json"


def random_name(rank: int) -> str:
    return f"random-{rank:05d}.pt"


def remove_scripts(folder: Path) -> None:
    """Remove the scripts beside checkpoints, which DeepSpeed copies there at each save.

    It writes to what has their names: to a file of anybody, where that is a link.
    """
    for path in folder.glob("zero_to_*.py"):
        if path.is_symlink() or not path.is_dir():
            path.unlink()


def random_states() -> dict[str, Any]:
    """What every random number of this process follows from, as tensors and plain values."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if has_cuda() else None,
    }

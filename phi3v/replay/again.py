"""A step taken once more: the engine as it stood before it, and the steps from there on.

    with before(step, ranks) as again:
        for line, result in again.steps(step.number): ...

The newest whole checkpoint before the step is loaded (the base model where there is none), and the
steps between are taken by the loop's own `train_step`, each with the learning rates that its line
of metrics.jsonl has, and without effect where the run skipped it: the length of the run and
`faults.spike` may have been changed since.

The run folder is read and never written to: the checkpoints are seen through links in a temporary
folder, where one of another number of ranks is converted as well (it takes twice the checkpoint's
bytes of TMPDIR while it is made). Of ranks on several machines all must see that folder.
"""

import contextlib
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phi3v.data.loader import Loader
from phi3v.data.packing import Position
from phi3v.errors import CheckpointError, ConfigError
from phi3v.printing import print
from phi3v.replay.steps import TakenStep
from phi3v.shapes import fault_of
from phi3v.training import zero
from phi3v.training.checkpoints.resuming import Choice, choose, restore
from phi3v.training.checkpoints.saving import Progress
from phi3v.training.checkpoints.store import step_name, steps_saved
from phi3v.training.loop import StepResult, train_step
from phi3v.training.opening import Run, place_run
from phi3v.training.ranks import Ranks
from phi3v.training.run_folder import METRICS
from phi3v.training.session import build, check_data, seed

Line = Mapping[str, Any]


@dataclass
class Again:
    """A run as it stood after step `done.step`; all ranks call its methods."""

    taken: TakenStep
    run: Run
    engine: Any
    done: Progress

    def steps(self, last: int) -> Iterator[tuple[Line, StepResult]]:
        """Take the steps up to `last`: what the run wrote down of each, and what it gives now.

        Raises: CheckpointError if the run was at another position than the plan is.
        """
        run, left_out = self.run, frozenset(self.taken.folder.faults.left_out())
        place = run.ranks.rank, run.ranks.world_size
        loader = Loader(run.dataset, self.taken.sequence, *place, run.device)
        with contextlib.closing(loader.steps(self.done.position, left_out=left_out)) as steps:
            while self.done.step < last:
                step, line = next(steps), self.taken.lines[self.done.step + 1]
                self._check(line)
                if "at" in line and Position(**line["at"]) != step.at:
                    raise CheckpointError(
                        f"step {line['step']} of {run.folder.path} was at {line['at']}, after its "
                        f"checkpoint comes {step.at}; metrics.jsonl, faults.jsonl and the "
                        "checkpoints are not of one run"
                    )
                limit = float("-inf" if line.get("skipped") else "inf")
                result = train_step(run, self.engine, loader, step, line["lr"], limit)
                self.done = Progress(self.done.step + 1, step.after)
                yield line, result

    def _check(self, line: Line) -> None:
        if fault := fault_of(line, {"lr": object, "grad_norm": object}):
            raise CheckpointError(
                f"{self.run.folder.path / METRICS} {fault} at step {line['step']}, which cannot be "
                "taken again without it; bring the file back from a copy"
            )


@contextlib.contextmanager
def before(taken: TakenStep, ranks: Ranks) -> Iterator[Again]:
    """The engine of a run with the newest checkpoint before a step; all ranks call.

    Raises: CheckpointError if there are checkpoints before it and all are damaged; ConfigError if
    a rank does not see the temporary folder of the first.
    """
    limit = max(taken.cfg.train.hang_timeout, taken.cfg.train.start_timeout)
    zero.start_process_group(limit)
    places = taken.cfg, taken.ds, ranks, taken.dataset, taken.plan
    run = place_run(*places, max(taken.lines))
    seed(run.cfg)
    with _linked(taken, ranks) as checkpoints:
        choice = _choose(taken, checkpoints, ranks)
        check_data(run, dict(choice.manifest) if choice else {})
        engine = build(run)
        zero.set_timeouts(limit)  # DeepSpeed has made groups of its own
        try:
            done = restore(engine, choice, ranks)
        except FileNotFoundError as error:
            raise CheckpointError(
                f"{error.filename} was removed by its run meanwhile; start again"
            ) from error
        zero.leave_together()  # all have read it
    if ranks.is_first:
        start = f"its checkpoint of step {done.step}" if choice else "its base model"
        more = taken.number - done.step
        print(f"{run.folder.path}: from {start}, {more:,} steps to take", file=sys.stderr)
    yield Again(taken, run, engine, done)
    zero.leave_together()


def _choose(taken: TakenStep, checkpoints: Path, ranks: Ranks) -> Choice | None:
    """The checkpoint to begin with; an error names the run's own folder, not that of the links."""
    try:
        return choose(checkpoints, ranks, beat=lambda: None, before=taken.number)
    except CheckpointError as error:
        own = str(taken.folder.checkpoints)
        raise CheckpointError(str(error).replace(str(checkpoints), own)) from error


@contextlib.contextmanager
def _linked(taken: TakenStep, ranks: Ranks) -> Iterator[Path]:
    """A temporary folder of checkpoints whose files are links to the run's, those before a step."""
    with contextlib.ExitStack() as open_:
        name = ""
        if ranks.is_first:
            name = open_.enter_context(tempfile.TemporaryDirectory(prefix="phi3v-replay-"))
            _link(taken.folder.checkpoints, Path(name), taken.number)
        place = Path(zero.from_first_rank(name))
        hidden = [
            rank for rank, is_seen in enumerate(zero.gather_objects(place.is_dir())) if not is_seen
        ]
        if hidden:
            raise ConfigError(
                f"ranks {', '.join(map(str, hidden))} do not see {place} of the first rank, where "
                "checkpoints are read; set TMPDIR to a folder that all machines share"
            )
        yield place


def _link(checkpoints: Path, place: Path, before: int) -> None:
    for step in steps_saved(checkpoints):
        if step < before:
            copy, own = place / step_name(step), checkpoints.absolute() / step_name(step)
            copy.mkdir()
            with contextlib.suppress(FileNotFoundError):  # its run removes it meanwhile
                for file in own.iterdir():
                    (copy / file.name).symlink_to(file)

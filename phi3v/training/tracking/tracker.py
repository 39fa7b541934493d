"""What the sinks are told of a run, each thing once however often the run was restarted."""

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from queue import Empty, Queue
from typing import Any

from phi3v.evaluation.report import Example
from phi3v.output import say
from phi3v.training.tracking.sinks import (
    EVALUATION,
    EXAMPLES,
    TRAIN,
    Artifact,
    Histogram,
    Sink,
    Table,
)

PATIENCE_SECONDS, SLOW = 60.0, 5
Lines = Callable[[], Sequence[Mapping[str, Any]]]
PLACE = ("step", "at", "ranks")  # of a line of metrics.jsonl: which step it is, no measurement
COLUMNS = ("prompt", "reference", "prediction", "blind", "right")


class Tracker:
    """Tells all sinks of a run; without sinks it does nothing.

    id        of the W&B run, for the checkpoints
    patience  seconds that a sink may take for a record; five times that to open and to finish

    A sink is somebody else's program or service. One that fails, or takes too long, is given up
    with a warning: what is told is in the run's own files as well, and the run goes on.
    """

    def __init__(self, known_id: str | None = None, patience: float = PATIENCE_SECONDS) -> None:
        self.id, self.patience = known_id, patience
        self._sinks: dict[str, Sink] = {}

    def add(self, name: str, open_sink: Callable[[], Sink]) -> None:
        """Open a sink; `name` is what people call it."""
        opened: list[Sink] = []
        try:
            within(SLOW * self.patience, lambda: opened.append(open_sink()))
        except Exception as error:
            self._give_up(name, error)
        else:
            self._sinks[name] = opened[0]

    def log_config(self, step: int, values: Mapping[str, Any]) -> None:
        """What the run is made of, as it starts after a step."""
        self._each(lambda sink: sink.config(step, values))

    def log_data(self, read: Callable[[], Mapping[str, Histogram]]) -> None:
        """How the data are distributed; `read` gives it where a sink asks for it."""
        if self._sinks:
            for name, histogram in read().items():
                self._once(0, f"data/{name}", _histogram_of(f"data/{name}", histogram))

    def log_again(self, read_steps: Lines, read_evaluations: Lines) -> None:
        """Tell what sinks miss of earlier starts: steps and scores, from the run's own files."""
        if not self._sinks:
            return
        evaluations = {entry["step"]: entry for entry in read_evaluations()}
        for line in ({"step": 0}, *read_steps()):  # the base was evaluated before any step
            if line["step"]:
                self.log_step(line)
            if entry := evaluations.get(line["step"]):
                self.log_evaluation(entry["step"], entry["loss"], entry["metrics"], ())

    def log_step(self, metrics: Mapping[str, Any]) -> None:
        """The numbers of a step, by its line of metrics.jsonl."""
        values = flatten({k: v for k, v in metrics.items() if k not in PLACE})
        if "skipped" in metrics:
            values["skipped"] = float(metrics["skipped"] is not None)
        self._scalars(metrics["step"], TRAIN, values)

    def log_evaluation(
        self,
        step: int,
        loss: float | None,
        scores: Mapping[str, Mapping[str, Any]],
        examples: Sequence[Example],
    ) -> None:
        """Scores with their intervals and blind control, and a table of rows with pictures.

        scores  by name, as summary.json has them: value, low, high, n
        """
        values: dict[str, Any] = {"loss": loss}
        for name, score in scores.items():
            values |= {name: score["value"], f"{name}_low": score["low"]}
            values |= {f"{name}_high": score["high"], f"{name}_n": score["n"]}
        self._scalars(step, EVALUATION, flatten(values))
        if examples:
            table = table_of(examples)
            self._once(step, EXAMPLES, lambda sink: sink.table(step, EXAMPLES, table))

    def log_checkpoint(self, step: int, checkpoint: Path, aliases: Sequence[str]) -> None:
        """A checkpoint as an artifact: its manifest, the run's recipe, and where it lies."""
        run = checkpoint.parents[1]
        files = [checkpoint / "manifest.json", run / "config.yaml", *sorted(run.glob("*.json"))]
        facts = {"step": step, "path": str(checkpoint.absolute())}
        artifact = Artifact(f"{run.absolute().name}-checkpoint", checkpoint, files, aliases, facts)
        self._once(step, "checkpoint", lambda sink: sink.artifact(step, artifact))

    def forget_after(self, step: int) -> None:
        """Drop what later steps have told, which are about to be repeated."""
        self._each(lambda sink: sink.forget_after(step))

    def finish(self) -> None:
        self._each(lambda sink: sink.finish(), SLOW * self.patience)

    def _scalars(self, step: int, name: str, values: Mapping[str, float]) -> None:
        self._once(step, name, lambda sink: sink.scalars(step, name, values))

    def _once(self, step: int, name: str, tell: Callable[[Sink], None]) -> None:
        """Tell the sinks that do not know it yet."""

        def tell_new(sink: Sink) -> None:
            if sink.last[name] < step:
                tell(sink)
                sink.last[name] = step

        self._each(tell_new)

    def _each(self, act: Callable[[Sink], None], seconds: float | None = None) -> None:
        for name, sink in list(self._sinks.items()):
            try:
                within(seconds or self.patience, partial(act, sink))
            except Exception as error:
                self._give_up(name, error)

    def _give_up(self, name: str, error: Exception) -> None:
        if name in self._sinks:
            self._sinks.pop(name).abandon()
        reason = " ".join(str(error).split()) or type(error).__name__
        say(
            f"{name} is told nothing more in this start of the run: {reason}; training goes on, "
            "metrics.jsonl and evaluations.jsonl have all of it"
        )


def within(seconds: float, act: Callable[[], None]) -> None:
    """Do something that may hang; a thread is left behind where it does.

    Raises: TimeoutError if it takes longer than `seconds`, or what it raises itself.
    """
    outcome: Queue[Exception | None] = Queue()

    def act_and_tell() -> None:
        try:
            act()
        except Exception as error:
            outcome.put(error)
        else:
            outcome.put(None)

    threading.Thread(target=act_and_tell, daemon=True).start()
    try:
        error = outcome.get(timeout=seconds)
    except Empty:
        raise TimeoutError(f"it did not answer within {seconds:g} s") from None
    if error:
        raise error


def _histogram_of(name: str, histogram: Histogram) -> Callable[[Sink], None]:
    return lambda sink: sink.histogram(0, name, histogram)


def table_of(examples: Sequence[Example]) -> Table:
    """Rows as people look at them, with the score of each row by each metric."""
    names = list(dict.fromkeys(name for example in examples for name in example.scores))
    rows = [
        [e.prompt, e.reference, e.prediction, e.blind, e.is_right]
        + [e.scores.get(name) for name in names]
        + [e.id]
        for e in examples
    ]
    return Table([*COLUMNS, *names, "id"], rows, [e.image for e in examples])


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of a tree, by a/b; what is no finite number is left out."""
    pairs: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            pairs |= flatten(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and math.isfinite(value):
            pairs[prefix + name] = int(value) if isinstance(value, bool) else value
    return pairs

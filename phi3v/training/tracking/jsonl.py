"""Every record as a line of the run's events.jsonl, for other tools.

    {"event": "scalars", "step": 7, "name": "train", "values": {"loss": 1.25, "lr/vision": 2e-06}}

Events: config, scalars, histogram (counts and edges), table (columns and rows; pictures are left to
the report), artifact. A record is there once: a restart cuts off what it is about to repeat.
"""

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from phi3v.lines import append_line, read_lines, write_lines
from phi3v.shapes import COUNT
from phi3v.training.tracking.sinks import Artifact, Histogram, Table

EVENTS = "events.jsonl"
EVENT = (
    {"event": str, "step": COUNT, "name": str},
    {"event": str, "step": COUNT, "values": dict},  # of the config, which has no name
)


class JsonSink:
    """Appends to a file whose records end at `step`, after which the run goes on."""

    def __init__(self, folder: Path, step: int) -> None:
        self.last: defaultdict[str, int] = defaultdict(lambda: -1)
        self._path = folder / EVENTS
        self._config: Any = None
        self._path.touch()
        self.forget_after(step)

    def config(self, step: int, values: Mapping[str, Any]) -> None:
        if values != self._config:
            self._add("config", step, values=values)
            self._config = values

    def scalars(self, step: int, name: str, values: Mapping[str, float]) -> None:
        self._add("scalars", step, name=name, values=values)

    def histogram(self, step: int, name: str, histogram: Histogram) -> None:
        counts, edges = histogram.counts.tolist(), histogram.edges.tolist()
        self._add("histogram", step, name=name, counts=counts, edges=edges)

    def table(self, step: int, name: str, table: Table) -> None:
        self._add("table", step, name=name, columns=table.columns, rows=table.rows)

    def artifact(self, step: int, artifact: Artifact) -> None:
        where = {"folder": str(artifact.folder), "files": [str(file) for file in artifact.files]}
        self._add("artifact", step, name="checkpoint", aliases=artifact.aliases, **where)

    def forget_after(self, step: int) -> None:
        events = read_lines(self._path, kind=EVENT)
        kept = [event for event in events if event["step"] <= step]
        if len(kept) < len(events):
            write_lines(self._path, kept)
        self.last.clear()
        for event in kept:
            if event["event"] == "config":
                self._config = event["values"]
            else:
                self.last[event["name"]] = event["step"]

    def finish(self) -> None:
        """Every record is in the file already."""

    def abandon(self) -> None:
        """Nothing is held."""

    def _add(self, event: str, step: int, **values: Any) -> None:
        append_line(self._path, {"event": event, "step": step, **values})

"""TensorBoard's event files, in the run's folder `tensorboard`.

Every step is flushed, so a killed run lacks none that its checkpoint has. A restart begins a file
that tells TensorBoard to forget the steps it repeats; `told.json` remembers what is not told every
step. TensorBoard has no artifacts, so the checkpoint is no record here.
"""

import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from phi3v.files import write_json
from phi3v.stored import read_object
from phi3v.training.tracking.sinks import PICTURE, TRAIN, Artifact, Histogram, Table

FOLDER = "tensorboard"
TOLD = "told.json"
CONFIG, TEXTS = "config", "texts"  # what TensorBoard does not forget


class TensorboardSink:
    """Writes an event file for the steps after `step`."""

    def __init__(self, folder: Path, step: int) -> None:
        self._folder = folder / FOLDER
        self._told = self._folder / TOLD
        self.last: defaultdict[str, int] = defaultdict(lambda: -1)
        if self._told.is_file():
            self.last.update(read_object(self._told))
            self.last[TRAIN] = step
        self._open(step)

    def _open(self, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        for name in self.last.keys() - {CONFIG, TEXTS}:
            self.last[name] = min(self.last[name], step)
        is_first = not self._folder.exists()
        self._writer = SummaryWriter(str(self._folder), purge_step=None if is_first else step + 1)
        write_json(self._told, self.last)

    def config(self, step: int, values: Mapping[str, Any]) -> None:
        if self.last[CONFIG] < step:
            text = json.dumps(values, indent=1, ensure_ascii=False)
            self._writer.add_text(CONFIG, "\n".join("    " + s for s in text.splitlines()), step)
            self._remember(CONFIG, step)

    def scalars(self, step: int, name: str, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            self._writer.add_scalar(f"{name}/{key}", value, step)
        self._writer.flush()
        if name != TRAIN:
            self._remember(name, step)

    def histogram(self, step: int, name: str, histogram: Histogram) -> None:
        counts, edges = histogram.counts, histogram.edges
        middles = (edges[:-1] + edges[1:]) / 2
        self._writer.add_histogram_raw(
            name,
            min=edges[0],
            max=edges[-1],
            num=int(counts.sum()),
            sum=float(counts @ middles),
            sum_squares=float(counts @ middles**2),
            bucket_limits=edges[1:].tolist(),
            bucket_counts=counts.tolist(),
            global_step=step,
        )
        self._remember(name, step)

    def table(self, step: int, name: str, table: Table) -> None:
        if self.last[TEXTS] < step:
            self._writer.add_text(name, _markdown(table), step)
            self.last[TEXTS] = step
        for number, picture in enumerate(table.pictures, 1):
            if picture is not None:
                tag = f"{name}/{PICTURE}-{number:02d}"
                self._writer.add_image(tag, np.asarray(picture), step, dataformats="HWC")
        self._remember(name, step)

    def artifact(self, step: int, artifact: Artifact) -> None:
        """TensorBoard has no place for it."""

    def forget_after(self, step: int) -> None:
        self._writer.close()
        self._open(step)

    def finish(self) -> None:
        self._writer.close()

    def abandon(self) -> None:
        """The writer's thread ends with the process."""

    def _remember(self, name: str, step: int) -> None:
        """Write down what a restart must not repeat."""
        self._writer.flush()
        self.last[name] = step
        write_json(self._told, self.last)


def _markdown(table: Table) -> str:
    lines = [["row", *table.columns], ["---"] * (len(table.columns) + 1)]
    lines += [[str(n), *map(_cell, row)] for n, row in enumerate(table.rows, 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    """One cell of a Markdown table, where lines and bars would end it."""
    text = "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
    return " ".join(text.replace("|", "\\|").split())

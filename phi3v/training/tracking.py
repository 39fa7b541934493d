"""Weights & Biases: curves and the table of answers; offline by default."""

import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from phi3v.config import RunConfig, to_dict
from phi3v.evaluation.report import Example
from phi3v.files import write_text

RUN_ID = "wandb-id"
CLOSED_STEP = "closed-step"


class Tracker:
    """One W&B run, or none (`wandb.mode=disabled`, and on all ranks but the first).

    known_id  the run's id if a checkpoint knows it

    Offline, the steps that an earlier start has logged and closed are not logged again. What it
    had logged when it was killed is mostly lost (wandb writes in blocks of 32 KB), so `log_again`
    logs all steps since; the few that were not lost are then there twice, with equal values. Online
    the service keeps what it got, and drops repeated steps itself.
    """

    def __init__(
        self,
        cfg: RunConfig,
        folder: Path,
        is_first: bool,
        known_id: str | None = None,
    ) -> None:
        mode: Any = os.environ.get("WANDB_MODE") or cfg.wandb.mode
        self._run: Any = None
        self._closed = folder / "wandb" / CLOSED_STEP
        self._seen = self._last = 0
        self._is_offline = mode == "offline"
        self.id: str | None = known_id
        if not is_first or mode == "disabled":
            return
        # Tables' pictures and wandb's own logs; by default they would litter the home folder.
        for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR"):
            os.environ.setdefault(name, str((folder / "wandb").absolute()))
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        (folder / "wandb").mkdir(parents=True, exist_ok=True)
        self._wandb = wandb
        if self._is_offline and self._closed.is_file():
            self._seen = int(self._closed.read_text(encoding="utf-8"))
        self.id = self._find_id(folder, known_id)
        self._run = wandb.init(
            project=cfg.wandb.project,
            name=folder.name,
            id=self.id,
            resume="allow",
            dir=str(folder),
            mode=mode,
            config=to_dict(cfg),
        )

    def _find_id(self, folder: Path, known_id: str | None) -> str:
        """The run's id, the same after every restart."""
        path = folder / "wandb" / RUN_ID
        if not path.is_file():
            write_text(path, known_id or uuid.uuid4().hex[:8])
        return path.read_text(encoding="utf-8")

    def log_again(self, read: Callable[[], Sequence[Mapping[str, Any]]]) -> None:
        """Offline, log what earlier starts have not closed; `read` gives the lines of all steps."""
        if self._run is not None and self._is_offline:
            for line in read():
                self.log(line["step"], {"train": line})

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Log the numbers of a step; nested names become a/b, missing values are left out."""
        if self._run is not None and step > self._seen:
            self._run.log(dict(_flatten(values)), step=step)
            self._last = step

    def log_evaluation(
        self, step: int, values: Mapping[str, Any], examples: Sequence[Example]
    ) -> None:
        """Log numbers, and a table of rows: picture, question, reference, answer, blind answer."""
        if self._run is None or step <= self._seen:
            return
        self.log(step, values)
        columns: list[Any] = ["image", "prompt", "reference", "prediction", "blind", "right"]
        table = self._wandb.Table(columns=columns)
        for example in examples:
            image = None if example.image is None else self._wandb.Image(example.image)
            table.add_data(
                image,
                example.prompt,
                example.reference,
                example.prediction,
                example.blind,
                example.is_right,
            )
        self._run.log({"eval/examples": table}, step=step)

    def finish(self) -> None:
        if self._run is not None:
            self._run.finish()
            write_text(self._closed, str(max(self._seen, self._last)))


def _flatten(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            pairs += _flatten(value, f"{prefix}{name}/")
        elif value is not None:
            pairs.append((prefix + name, value))
    return pairs

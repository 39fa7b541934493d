"""Weights & Biases: curves and the table of answers; offline by default."""

import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from phi3v.config import RunConfig, to_dict
from phi3v.evaluation.report import Example

RUN_ID = "wandb-id"


class Tracker:
    """One W&B run, or none (`wandb.mode=disabled`, and on all ranks but the first)."""

    def __init__(self, cfg: RunConfig, folder: Path, is_first: bool) -> None:
        mode: Any = os.environ.get("WANDB_MODE") or cfg.wandb.mode
        self._run: Any = None
        if not is_first or mode == "disabled":
            return
        # Tables' pictures and wandb's own logs; by default they would litter the home folder.
        for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR"):
            os.environ.setdefault(name, str((folder / "wandb").absolute()))
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        (folder / "wandb").mkdir(parents=True, exist_ok=True)
        self._wandb = wandb
        self._run = wandb.init(
            project=cfg.wandb.project,
            name=folder.name,
            id=self._id(folder),
            resume="allow",
            dir=str(folder),
            mode=mode,
            config=to_dict(cfg),
        )

    def _id(self, folder: Path) -> str:
        """The run's id, the same after every restart."""
        path = folder / "wandb" / RUN_ID
        if not path.is_file():
            path.write_text(uuid.uuid4().hex[:8], encoding="utf-8")
        return path.read_text(encoding="utf-8")

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Log the numbers of a step; nested names become a/b, missing values are left out."""
        if self._run is not None:
            self._run.log(dict(_flatten(values)), step=step)

    def log_examples(self, step: int, examples: Sequence[Example]) -> None:
        """Log a table of held-out rows: picture, question, reference, answer, blind answer."""
        if self._run is None:
            return
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


def _flatten(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            pairs += _flatten(value, f"{prefix}{name}/")
        elif value is not None:
            pairs.append((prefix + name, value))
    return pairs

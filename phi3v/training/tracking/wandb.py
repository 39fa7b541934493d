"""Weights & Biases; offline by default.

Offline, the records that an earlier start has logged and closed are not logged again. What it had
logged when it was killed is mostly lost (wandb writes in blocks of 32 KB), so all records since are
logged again; the few that were not lost are then there twice, with equal values. Online the service
keeps what it got, and drops repeated steps itself.
"""

import os
import re
import uuid
from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from phi3v.config.running import WandbSection
from phi3v.errors import ConfigError
from phi3v.files import write_json, write_text
from phi3v.output import say
from phi3v.stored import read_object
from phi3v.training.tracking.sinks import PICTURE, Artifact, Histogram, Table

FOLDER = "wandb"
RUN_ID = "wandb-id"
CLOSED_STEP = "closed-step"
SERVICE = "wandb-core"  # wandb's own process, which writes and uploads


def mode_of(section: WandbSection) -> str:
    """The mode that holds: the environment's, else the recipe's."""
    return os.environ.get("WANDB_MODE") or section.mode


def check_wandb(section: WandbSection) -> None:
    """Refuse to log online as nobody; whether the service takes the key is seen when it is told.

    Raises: ConfigError if there is no key, or none that could be one.
    """
    if mode_of(section) != "online":
        return
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb

    problem = "this machine has no key of Weights & Biases"
    try:
        has_key = wandb.login(prompt=False, verify=False)
    except wandb.errors.AuthenticationError as error:
        has_key, problem = False, str(error).rstrip(".")
    if not has_key:
        raise ConfigError(
            f"wandb.mode is 'online', but {problem}; run `wandb login` or set WANDB_API_KEY, or "
            "set wandb.mode to offline or disabled"
        )


class WandbSink:
    """One W&B run, the same over all starts of a run that go on after `step`."""

    def __init__(
        self,
        section: WandbSection,
        folder: Path,
        step: int,
        known_id: str | None,
        finish_seconds: float,
    ) -> None:
        own = folder / FOLDER
        # Tables' pictures and wandb's own logs; by default they would litter the home folder.
        for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR"):
            os.environ.setdefault(name, str(own.absolute()))
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        own.mkdir(parents=True, exist_ok=True)
        self._wandb: Any = wandb
        self._closed = own / CLOSED_STEP
        self.id = _find_id(own, known_id)
        mode: Any = mode_of(section)
        self._run = wandb.init(
            **names(section, folder),
            id=self.id,
            resume="allow",
            dir=os.environ.get("WANDB_DIR") or str(folder),
            mode=mode,
            settings=wandb.Settings(finish_timeout=finish_seconds, finish_timeout_raises=True),
        )
        self.last = self._find_last(step)
        if mode == "online":
            say(f"W&B: {self._run.url}")

    def _find_last(self, step: int) -> defaultdict[str, int]:
        if self._run.resumed:  # online, where the service has it
            return defaultdict(lambda: step - 1)
        last: defaultdict[str, int] = defaultdict(lambda: -1)
        if self._closed.is_file():
            last.update(read_object(self._closed))
        return last

    def config(self, step: int, values: Mapping[str, Any]) -> None:
        self._run.config.update(values, allow_val_change=True)

    def scalars(self, step: int, name: str, values: Mapping[str, float]) -> None:
        self._run.log({f"{name}/{key}": value for key, value in values.items()}, step=step)

    def histogram(self, step: int, name: str, histogram: Histogram) -> None:
        pair = histogram.counts, histogram.edges
        self._run.log({name: self._wandb.Histogram(np_histogram=pair)}, step=step)

    def table(self, step: int, name: str, table: Table) -> None:
        """Named with the step: of records of one name, W&B shows the last."""
        shown = self._wandb.Table(columns=[PICTURE, *table.columns])
        for picture, row in zip(table.pictures, table.rows, strict=True):
            image = None if picture is None else self._wandb.Image(picture)
            shown.add_data(image, *row)
        self._run.log({f"{name}/step-{step:08d}": shown}, step=step)

    def artifact(self, step: int, artifact: Artifact) -> None:
        """The small files are uploaded; the folder's become references to where they lie."""
        name = re.sub(r"[^\w.-]", "-", artifact.name)
        logged = self._wandb.Artifact(name, type="model", metadata=dict(artifact.facts))
        for file in artifact.files:
            logged.add_file(str(file))
        where = artifact.folder.absolute().as_uri()
        logged.add_reference(where, name=artifact.folder.name, checksum=False)
        self._run.log_artifact(logged, aliases=list(artifact.aliases))

    def forget_after(self, step: int) -> None:
        """What W&B has it keeps: of steps that are repeated, their first values."""

    def finish(self) -> None:
        self._run.finish()
        write_json(self._closed, self.last)

    def abandon(self) -> None:
        """End wandb's process: this one would wait for it at its own end."""
        for child in psutil.Process().children():
            with suppress(psutil.NoSuchProcess):
                if child.name() == SERVICE:
                    child.kill()


def names(section: WandbSection, folder: Path) -> dict[str, Any]:
    """Under what the run appears; W&B's own variables win over the recipe."""
    tags = os.environ.get("WANDB_TAGS")
    return {
        "project": os.environ.get("WANDB_PROJECT") or section.project,
        "entity": os.environ.get("WANDB_ENTITY") or section.entity,
        "name": os.environ.get("WANDB_NAME") or section.name or folder.absolute().name,
        "group": os.environ.get("WANDB_RUN_GROUP") or section.group,
        "tags": tags.split(",") if tags else list(section.tags) or None,
    }


def _find_id(folder: Path, known_id: str | None) -> str:
    """The run's id, the same after every restart."""
    path = folder / RUN_ID
    if not path.is_file():
        write_text(path, known_id or os.environ.get("WANDB_RUN_ID") or uuid.uuid4().hex[:8])
    return path.read_text(encoding="utf-8")

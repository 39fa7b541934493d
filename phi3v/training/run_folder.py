"""The run folder: who owns it, what it was started with, its metrics, whether it is finished."""

import json
import os
import platform
import socket
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from phi3v.config import DeepSpeedConfig, RunConfig, differences, dump_yaml, read_mapping, to_dict
from phi3v.devices import has_cuda
from phi3v.errors import CheckpointError, ConfigError
from phi3v.files import sync, write_json, write_text
from phi3v.lines import append_line, read_lines
from phi3v.locks import Lock, take
from phi3v.reading import kind_at
from phi3v.shapes import COUNT, NUMBER
from phi3v.stored import read_object
from phi3v.training.base_model import model_digest
from phi3v.training.faults import PLACE, FaultLog

CONFIG, DEEPSPEED, ENVIRONMENT, DATA = (
    "config.yaml deepspeed.json environment.json data.json".split()
)
METRICS, SUMMARY, REPORT = "metrics.jsonl summary.json report.html".split()
PREDICTIONS, CHECKPOINTS = "predictions.jsonl checkpoints".split()
EVALUATIONS, FAULTS, LOCK = "evaluations.jsonl faults.jsonl .lock".split()
PERHAPS = (NUMBER, None)  # what is not finite is written as null
COUNTED = ("samples", "tokens", "label_tokens", "views")
STEP = {  # a line of metrics.jsonl
    "step": COUNT,
    "loss": PERHAPS,
    "grad_norm?": PERHAPS,
    "skipped?": (str, None),
    "at?": PLACE,
    "ranks?": COUNT,
    "epoch?": COUNT,
    "is_warmup?": bool,
    "lr?": {"*": NUMBER},
    "grad_norms?": ({"*": PERHAPS}, None),
    **{f"{name}?": COUNT for name in COUNTED},
    **{f"{name}?": NUMBER for name in ("step_seconds", "data_wait_seconds", "flops", "memory_gb")},
    "*": PERHAPS,
}
SCORE = {"value": PERHAPS, "low?": PERHAPS, "high?": PERHAPS, "n?": COUNT, "*": (NUMBER, str, None)}
EVALUATED = {  # a line of evaluations.jsonl
    "step": COUNT,
    "loss": PERHAPS,
    "metrics": {"*": SCORE},
    "loss_rows?": (COUNT, None),
    "split?": (str, None),
    "unanswered?": (COUNT, None),
}
TOTALLED = (  # keys of each step that a run's summary is made of
    *COUNTED,
    *("step_seconds", "data_wait_seconds", "flops", "mfu", "packing", "balance", "memory_gb"),
)
APPENDED = (METRICS, EVALUATIONS, FAULTS)  # the others are replaced, with a link itself
LOCK_SECONDS = 10.0  # that an owner may take to end
FILES = (  # that a run writes, all of them
    *(CONFIG, DEEPSPEED, ENVIRONMENT, DATA, METRICS, SUMMARY, REPORT, EVALUATIONS, FAULTS),
    PREDICTIONS,
)
# A folder that was moved is the same run. The DeepSpeed JSON is compared by what is in it, and so
# are the shards, by the fingerprint that each checkpoint tells.
CHANGEABLE = (
    *(
        "run.out",
        "deepspeed",
        "data.shards",
        "train.max_steps",
        "eval.",
        "checkpoint.",
        "wandb.",
        "tracking.",
    ),
    *("model.checkpointing", "model.vision_checkpointing", "model.offload_activations"),
    *("train.stop_after", "train.stop_if", "train.hang_timeout", "train.start_timeout", "faults."),
    "debug.profile_steps",
)
PACKAGES = (
    *("phi3v", "torch", "deepspeed", "transformers", "datasets", "pyarrow", "pillow", "wandb"),
    *("flash-attn", "liger-kernel"),
)


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run, and what is written there; only rank 0 writes."""

    path: Path
    _held: list[Lock] = field(default_factory=list, init=False, repr=False, compare=False)

    @property
    def checkpoints(self) -> Path:
        return self.path / CHECKPOINTS

    @property
    def faults(self) -> FaultLog:
        return FaultLog(self.path / FAULTS)

    @property
    def profile(self) -> Path:
        return self.path / "profile"

    def lock(self, patience: float = LOCK_SECONDS) -> Lock:
        """Become the owner of the folder until the lock is closed or the process ends.

        patience  seconds to wait for an owner about to end, as ranks are whose launcher was killed

        Raises: ConfigError naming the host and process that own it, or what is there that is not
        of a run.
        """
        self.check_names()
        self.path.mkdir(parents=True, exist_ok=True)
        self._held[:] = [take(self.path / LOCK, patience=patience, name=f"run.out {self.path}")]
        for temporary in self.path.glob(".*.tmp"):  # of a process that was killed while it wrote
            if temporary.is_file() or temporary.is_symlink():
                temporary.unlink()
        return self._held[0]

    def check_names(self) -> None:
        """Refuse a folder where a file of the run belongs, and a file where a folder does.

        And a link in the place of a file that the run adds to: it may lead to anybody's.

        Raises: ConfigError naming it.
        """
        folders = [self.path, self.checkpoints]
        wrong = [path for path in folders if path.exists() and not path.is_dir()]
        files = [self.path / name for name in FILES]
        wrong += [path for path in files if path.exists() and not path.is_file()]
        for path in wrong:
            meant = "file" if path in files else "folder"
            raise ConfigError(
                f"{path} is {kind_at(path)}, where a run has a {meant}; move it away, or name "
                "another run.out"
            )
        for path in (self.path / name for name in APPENDED):
            if path.is_symlink():
                raise ConfigError(
                    f"{path} is a link, and a run writes to no file of another name; move it away, "
                    "or name another run.out"
                )

    def check_owner(self) -> None:
        """Refuse to go on where another start has become the owner; only after `lock`.

        Some shared file systems lock on each host alone: there a rank on a node that was given up
        for dead would go on writing beside the run that took its place.

        Raises: ConfigError naming the other.
        """
        self._held[0].check()

    def check_recipe(self, cfg: RunConfig, ds: DeepSpeedConfig) -> None:
        """Refuse to go on with another recipe than the run was started with.

        Raises: ConfigError naming the keys that differ, and both values of each.
        """
        if not (self.path / CONFIG).is_file():
            return
        before = read_mapping(self.path / CONFIG)
        found = differences(_meant(before), _meant(to_dict(cfg)))
        different = {key: pair for key, pair in found.items() if not key.startswith(CHANGEABLE)}
        if "model.path" in different and self._is_same_model(before, cfg):
            del different["model.path"]
        before_ds = read_object(self.path / DEEPSPEED)
        of_json = differences(before_ds, ds.json)
        different |= {f"{ds.path.name}: {key}": pair for key, pair in of_json.items()}
        changes = [
            f"{key} was {json.dumps(was)} and is {json.dumps(is_now)}"
            for key, (was, is_now) in different.items()
        ]
        if changes:
            raise ConfigError(
                f"run.out {self.path} was started with another recipe: {', '.join(changes)}; take "
                "the values back, or name another run.out; to train on from what this run has "
                f"learnt: python launch/export.py {self.path} --out DIR, then model.path=DIR in "
                "another run.out"
            )

    def _is_same_model(self, before: Mapping[str, Any], cfg: RunConfig) -> bool:
        """Whether the model was only moved, or named in another way; None is no digest of any."""
        path = self.path / ENVIRONMENT
        known = read_object(path).get("model") if path.is_file() else None
        known = known or model_digest(before["model"]["path"])  # a run of before told none
        return known is not None and known == model_digest(cfg.model.path)

    def check_data(self, fingerprint: str) -> None:
        """Refuse to take a run that is finished for one on other data.

        A run that goes on compares with its checkpoint.

        Raises: ConfigError naming both fingerprints.
        """
        path = self.path / DATA
        if self.read_summary() is None or not path.is_file():
            return
        before = read_object(path, needs={"fingerprint": str})["fingerprint"]
        if before != fingerprint:
            raise ConfigError(
                f"run.out {self.path} was trained on data with fingerprint {before[:12]}, "
                f"data.shards now has {fingerprint[:12]}; name another run.out, or take the data "
                "of before"
            )

    def write_origin(
        self,
        cfg: RunConfig,
        ds: DeepSpeedConfig,
        data: dict[str, Any],
        world_size: int,
        execution: dict[str, Any] | None = None,
    ) -> None:
        """Write what the run is made of: config, DeepSpeed JSON, versions, kernels, model, data."""
        write_json(self.path / DEEPSPEED, ds.json)
        environment = describe_environment(world_size)
        environment |= {"execution": execution, "model": model_digest(cfg.model.path)}
        write_json(self.path / ENVIRONMENT, environment)
        write_json(self.path / DATA, data)
        write_text(self.path / CONFIG, dump_yaml(cfg))  # last: with it the folder is a run's

    def read_metrics(self, needs: Sequence[str] = ()) -> list[dict[str, Any]]:
        """The steps done so far; the end of a line that a crash cut off is no step.

        needs  keys that each line must have; older runs wrote fewer of them
        """
        return read_lines(self.path / METRICS, kind=dict.fromkeys(needs, object) | STEP)

    @property
    def metrics_bytes(self) -> int:
        """Size of the metrics so far, on the disk: what a checkpoint remembers."""
        path = self.path / METRICS
        if not path.is_file():
            return 0
        sync(path)
        return path.stat().st_size

    def cut_metrics(self, size: int) -> None:
        """Drop the lines of steps that are about to be repeated.

        size  bytes when the checkpoint was saved

        Raises: CheckpointError if the file is shorter than that.
        """
        path = self.path / METRICS
        path.touch()
        if path.stat().st_size < size:
            raise CheckpointError(
                f"{path} has {path.stat().st_size:,} bytes, its checkpoint was saved with "
                f"{size:,}; put the file back, or name another run.out to start anew"
            )
        os.truncate(path, size)

    def add_metrics(self, metrics: dict[str, Any]) -> None:
        """Append one step's line."""
        append_line(self.path / METRICS, metrics)

    def read_evaluations(self) -> list[dict[str, Any]]:
        """What the evaluations gave so far, the last of a step that was repeated."""
        found = read_lines(self.path / EVALUATIONS, kind=EVALUATED)
        return list({entry["step"]: entry for entry in found}.values())

    def add_evaluation(self, step: int, **found: Any) -> dict[str, Any]:
        """Append what an evaluation gave; returns its line."""
        entry = {"step": step, **found}
        append_line(self.path / EVALUATIONS, entry)
        return entry

    def read_summary(self) -> dict[str, Any] | None:
        """The summary of a finished run, None before."""
        path = self.path / SUMMARY
        return read_object(path) if path.is_file() else None

    def write_summary(self, summary: dict[str, Any]) -> None:
        write_json(self.path / SUMMARY, summary)


def _meant(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe in which what says the same is the same: no warm-up is one of 0 steps."""
    optim = dict(recipe.get("optim") or {})
    optim["warmup_steps"] = optim.get("warmup_steps") or None
    return {**recipe, "optim": optim}


def describe_environment(world_size: int) -> dict[str, Any]:
    """Host, device, versions and commit of this program."""
    return {
        "host": socket.gethostname(),
        "ranks": world_size,
        "device": torch.cuda.get_device_name() if has_cuda() else f"cpu {platform.machine()}",
        "python": platform.python_version(),
        "versions": package_versions(),
        "commit": _commit(),
    }


def package_versions() -> dict[str, str | None]:
    """Of each package that results may depend on; None where it is not installed."""
    return {name: _version(name) for name in PACKAGES}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of this checkout, None where it is none (an installed package, no git)."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None

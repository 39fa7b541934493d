"""A step of a run, found again in its folder and its shards; nothing is written and nothing locked.

    step = open_step(Path("runs/one"), 812)
    step.planned.packs                    # sample numbers of step.dataset, pack by pack

Which samples share a step is a pure function of the run's recipe, its DeepSpeed JSON and its shards
(`data.packing.Plan`); metrics.jsonl says at which position of that sequence each step was. All of
it is compared with what the run wrote down, and nothing is guessed: where it differs, that is said.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from phi3v.config import DeepSpeedConfig, RunConfig, load_deepspeed
from phi3v.data import Dataset
from phi3v.data.format import MANIFEST
from phi3v.data.loader import OnePack
from phi3v.data.mixture import Mixture, open_datasets
from phi3v.data.packing import Plan, PlannedStep, Position
from phi3v.errors import ConfigError, ShardError
from phi3v.evaluation.models import check_model
from phi3v.export import read_run
from phi3v.stored import read_object
from phi3v.training.base_model import model_digest
from phi3v.training.opening import plan_steps
from phi3v.training.run_folder import COUNTED, DATA, DEEPSPEED, ENVIRONMENT, METRICS, RunFolder

MOVED = ("data.shards", "model.path")  # what of a run may lie elsewhere today


@dataclass(frozen=True)
class TakenStep:
    """Step `number` of a run.

    cfg, ds      as the run has them now; `run.out` is the folder it was opened by
    lines        of metrics.jsonl by step, up to this one
    environment  what environment.json says of the newest start
    planned      its packs, as sample numbers of `dataset`
    """

    folder: RunFolder
    cfg: RunConfig
    ds: DeepSpeedConfig
    dataset: Dataset | Mixture
    plan: Plan
    lines: Mapping[int, Mapping[str, Any]]
    environment: Mapping[str, Any]
    number: int
    planned: PlannedStep

    @property
    def line(self) -> Mapping[str, Any]:
        """What metrics.jsonl says of the step."""
        return self.lines[self.number]

    @property
    def sequence(self) -> Plan | OnePack:
        """The steps as the run takes them."""
        return sequence_of(self.cfg, self.plan)


def open_step(
    run: Path, number: int, overrides: Sequence[str] = (), world_size: int | None = None
) -> TakenStep:
    """Find a step of a run, whether it is finished or still trains.

    overrides   where shards and model lie now (`MOVED`)
    world_size  ranks that are to take the step again; default: the run's own

    Raises: ConfigError or ShardError if there is no such run or step, if shards or model are not
    there or not the run's, or if what the run wrote down does not fit them.
    """
    _check_overrides(overrides)
    cfg = read_run(run, overrides)
    cfg = replace(cfg, run=replace(cfg.run, out=str(run)))
    folder = RunFolder(run)
    lines = _read_lines(folder, number)
    environment = read_object(run / ENVIRONMENT, needs={"ranks": int})
    dataset = _open_dataset(cfg, run)
    _check_base(cfg, dataset, run, environment)
    ds = load_deepspeed(run / DEEPSPEED, world_size or environment["ranks"])
    plan = plan_steps(cfg, ds, dataset)
    sequence = sequence_of(cfg, plan)
    if "at" in lines[number]:
        planned = _at_position(sequence, lines[number], dataset, run)
    else:
        planned = _by_counting(sequence, lines, folder.faults.left_out(), dataset, run)
    return TakenStep(folder, cfg, ds, dataset, plan, lines, environment, number, planned)


def sequence_of(cfg: RunConfig, plan: Plan) -> Plan | OnePack:
    """The steps of a plan, or of its first pack alone."""
    return OnePack(plan) if cfg.debug.overfit_one_pack else plan


def counts(dataset: Dataset | Mixture, packs: Sequence[np.ndarray]) -> dict[str, int]:
    """What metrics.jsonl counts of a step's packs."""
    samples = np.concatenate(packs)
    sizes = {name: int(getattr(dataset, name)[samples].sum()) for name in COUNTED[1:]}
    return {"samples": len(samples), **sizes}


def _check_overrides(overrides: Sequence[str]) -> None:
    for text in overrides:
        if not text.startswith(tuple(f"{key}=" for key in MOVED)):
            raise ConfigError(
                f"{text!r} cannot be given: a step is looked at as its run took it; only "
                f"{' and '.join(MOVED)} may say where the run's shards and model lie now"
            )


def _read_lines(folder: RunFolder, number: int) -> dict[int, dict[str, Any]]:
    """The lines of metrics.jsonl up to a step."""
    lines = {line["step"]: line for line in folder.read_metrics(COUNTED)}
    if number not in lines:
        done = f"{max(lines):,} steps" if lines else "no step"
        raise ConfigError(
            f"--step {number} is none that {folder.path} has taken: its {METRICS} has {done} so "
            "far, counted from 1"
        )
    missing = next((n for n in range(1, number) if n not in lines), None)
    if missing is not None:
        raise ConfigError(
            f"{folder.path / METRICS} has no line of step {missing}, though it has one of step "
            f"{number}; bring the file back from a copy"
        )
    return {n: lines[n] for n in range(1, number + 1)}


def _open_dataset(cfg: RunConfig, run: Path) -> Dataset | Mixture:
    """The run's shards, if they are those that it trains on."""
    for path in cfg.data.folders:
        if not (Path(path) / MANIFEST).is_file():
            raise ShardError(
                f"{run} was trained on the shards {path}, which are not there (seen from "
                f"{Path.cwd()}); data.shards=DIR says where they lie now"
            )
    dataset = open_datasets(cfg.data.folders, "train", [part.weight for part in cfg.data.parts])
    known = read_object(run / DATA, needs={"fingerprint": str})["fingerprint"]
    if dataset.fingerprint != known:
        raise ShardError(
            f"{run} was trained on data with fingerprint {known[:12]}, "
            f"{', '.join(cfg.data.folders)} now has {dataset.fingerprint[:12]}; data.shards=DIR "
            "names the data of then, which alone can tell its samples"
        )
    return dataset


def _check_base(
    cfg: RunConfig, dataset: Dataset | Mixture, run: Path, environment: Mapping[str, Any]
) -> None:
    """Refuse a base model that is not there, or not the one that the run started from."""
    path, hint = cfg.model.path, "model.path=DIR says where the run's base model lies now"
    try:
        for part in dataset.datasets:
            check_model(part, path)
    except ConfigError as error:
        raise ConfigError(f"{error}; {hint}") from error
    known, found = environment.get("model"), model_digest(path)
    if known and found != known:
        raise ConfigError(
            f"{run} started from a model with digest {known[:12]}, {path} now has "
            f"{(found or 'none')[:12]}; {hint}"
        )


def _at_position(
    sequence: Plan | OnePack, line: Mapping[str, Any], dataset: Dataset | Mixture, run: Path
) -> PlannedStep:
    """The step at the position that its line has."""
    at = Position(**line["at"])
    planned = next(iter(sequence.steps(at)))
    if planned.at != at or not _fits(line, planned, dataset):
        raise ConfigError(
            f"step {line['step']} of {run} is not the one that its recipe plans at {at}: "
            f"{_difference(line, planned, dataset)}; {METRICS} or the recipe was changed, or the "
            "run is one of another version of this program"
        )
    return planned


def _by_counting(
    sequence: Plan | OnePack,
    lines: Mapping[int, Mapping[str, Any]],
    left_out: Sequence[Position],
    dataset: Dataset | Mixture,
    run: Path,
) -> PlannedStep:
    """The last of the lines, where they do not say their positions, by going through all steps.

    The sizes of every step must be those that its line has.
    """
    steps = (step for step in sequence.steps(Position()) if step.at not in left_out)
    for line, planned in zip(lines.values(), islice(steps, len(lines)), strict=True):
        if not _fits(line, planned, dataset):
            raise ConfigError(
                f"{run / METRICS} is of a version that did not write down where steps are, and "
                f"counting does not find them: step {line['step']} differs, "
                f"{_difference(line, planned, dataset)}; which samples it had is not known"
            )
    return planned


def _fits(line: Mapping[str, Any], planned: PlannedStep, dataset: Dataset | Mixture) -> bool:
    found = counts(dataset, planned.packs)
    return all(line[name] == found[name] for name in COUNTED)


def _difference(line: Mapping[str, Any], planned: PlannedStep, dataset: Dataset | Mixture) -> str:
    """What a line says of its step and what the plan has, in words."""
    found = counts(dataset, planned.packs)
    written, has = (", ".join(f"{c[name]:,} {name}" for name in COUNTED) for c in (line, found))
    return f"it had {written}, the plan has {has} at {planned.at}"

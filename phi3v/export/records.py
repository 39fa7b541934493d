"""What a run's own files say of one of its checkpoints, as it may be told to anybody.

    records = read_records(run, manifest)
    records.recipe()            # the resolved recipe, with folders by their names

A folder is told by the last part of its path, a model or dataset of the hub by its whole name. What
says how a run was watched and kept, and on which host, is not told.

Surprising: config.yaml and environment.json are those of the run's last start, the manifest is that
of the checkpoint. What may differ between them (the number of ranks, evaluation) is said of either.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import metadata_load
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from phi3v.config import MODULES, Module, RunConfig, to_dict
from phi3v.data.format import HUB, LICENSES
from phi3v.export.opening import read_run
from phi3v.export.originals import find_base
from phi3v.stored import read_object
from phi3v.training.run_folder import DATA, DEEPSPEED, ENVIRONMENT, RunFolder

RECIPE = "run.yaml"  # names under which the card gives the files
# Sections and keys that say how a run was watched and kept, not what it learned.
UNTOLD = ("checkpoint", "debug", "faults", "tracking", "wandb")
UNTOLD_JSON = (
    *("comms_logger", "flops_profiler", "timers", "wall_clock_breakdown", "memory_breakdown"),
    *("steps_per_print", "dump_state", "log_level"),
)


@dataclass(frozen=True)
class DatasetRecord:
    """A dataset of the mixture that was trained on.

    name      of its folder; with a number after it where two have the same
    weight    how often an epoch holds each training sample
    samples   by split; {} where the run's files do not tell
    rejected  rows that became no sample; None where the run's files do not tell
    recipe    that prepared it, folders by their names; None where the run's files do not tell
    licenses  what its recipe named: {source, license}
    hub       names of its sources that are datasets of the hub
    """

    name: str
    weight: float
    samples: Mapping[str, int]
    rejected: int | None
    recipe: Mapping[str, Any] | None
    licenses: Sequence[Mapping[str, str]]
    hub: Sequence[str]


@dataclass(frozen=True)
class Records:
    """What the files of a run say of a checkpoint.

    manifest     of the checkpoint
    data, environment, summary  content of those files; empty where there is none
    deepspeed    the DeepSpeed JSON; None where there is none
    evaluation   the line of evaluations.jsonl of this step; None if it was not evaluated
    steps        lines of metrics.jsonl up to this step
    base_card    head of the base's own model card; empty where it has none, or cannot be reached
    """

    name: str
    cfg: RunConfig
    manifest: Mapping[str, Any]
    data: Mapping[str, Any]
    environment: Mapping[str, Any]
    summary: Mapping[str, Any]
    deepspeed: Mapping[str, Any] | None
    evaluation: Mapping[str, Any] | None
    steps: Sequence[Mapping[str, Any]]
    base_card: Mapping[str, Any]

    @property
    def step(self) -> int:
        return int(self.manifest["step"])

    @property
    def title(self) -> str:
        return f"{self.name}, step {self.step}"

    @property
    def hub_base(self) -> str | None:
        """The base's name on the hub; None for a folder."""
        base = self.cfg.model.path
        return base if is_hub_name(base) else None

    @property
    def base(self) -> str:
        """What the base is called: its name on the hub, or that of its folder."""
        return told(self.cfg.model.path)

    @property
    def trained(self) -> list[Module]:
        return self.cfg.model.trained

    @property
    def frozen(self) -> list[Module]:
        return [module for module in MODULES if module not in self.trained]

    def datasets(self) -> list[DatasetRecord]:
        """Those of the mixture, in its order."""
        parts, known = self.cfg.data.parts, list(self.data.get("datasets", ()))
        if len(known) != len(parts):  # a run begun before data.json told them
            known = [{}] * len(parts)
        names = distinct([Path(part.path).name for part in parts])
        return [
            DatasetRecord(
                name=name,
                weight=part.weight,
                samples={s: sizes["samples"] for s, sizes in entry.get("splits", {}).items()},
                rejected=(entry.get("rejected") or {}).get("count"),
                recipe=_told_recipe(entry, name) if "recipe" in entry else None,
                licenses=entry.get(LICENSES, ()),
                hub=entry.get(HUB, ()),
            )
            for name, part, entry in zip(names, parts, known, strict=True)
        ]

    def recipe(self) -> dict[str, Any]:
        """What of the resolved recipe made the model; it can be loaded as one."""
        tree = {key: value for key, value in to_dict(self.cfg).items() if key not in UNTOLD}
        tree["run"]["out"] = self.name
        tree["model"]["path"] = self.base
        tree["data"]["shards"] = [
            {"path": dataset.name, "weight": dataset.weight} for dataset in self.datasets()
        ]
        tree["deepspeed"] = DEEPSPEED if self.deepspeed is not None else None
        return dict(_without_nulls(_without_paths(tree, _is_absolute)))

    def told_deepspeed(self) -> dict[str, Any] | None:
        """What of the DeepSpeed JSON made the model."""
        if self.deepspeed is None:
            return None
        kept = {key: v for key, v in self.deepspeed.items() if key not in UNTOLD_JSON}
        return dict(_without_paths(kept, lambda text: "/" in text))


def read_records(run: Path, manifest: Mapping[str, Any]) -> Records:
    """Read what a run's files say of the checkpoint with this manifest.

    Raises: ConfigError if it is not a run folder.
    """
    folder, step, cfg = RunFolder(run), manifest["step"], read_run(run)
    evaluations = [entry for entry in folder.read_evaluations() if entry["step"] == step]
    return Records(
        name=run.resolve().name,
        cfg=cfg,
        manifest=manifest,
        data=_read(run / DATA) or {},
        environment=_read(run / ENVIRONMENT) or {},
        summary=folder.read_summary() or {},
        deepspeed=_read(run / DEEPSPEED),
        evaluation=evaluations[0] if evaluations else None,
        steps=[line for line in folder.read_metrics() if line["step"] <= step],
        base_card=_card_of(cfg.model.path),
    )


def _card_of(base: str) -> dict[str, Any]:
    """The head of a model's card; {} where it has none, or the hub is out of reach."""
    card = find_base(base, "README.md")
    return (metadata_load(card) if card else None) or {}


def is_hub_name(model: str) -> bool:
    """Whether a model is one of the hub, not a folder, be it one that has gone."""
    if Path(model).is_dir() or model.startswith((".", "~", "/")):
        return False
    try:
        validate_repo_id(model)
    except HFValidationError:
        return False
    return True


def told(place: str) -> str:
    """A model's name: on the hub, or its folder's."""
    return place if is_hub_name(place) else Path(place).name


def distinct(names: Sequence[str]) -> list[str]:
    """Names of which each is there once: [a, b, a] -> [a, b, a-2]."""
    found: list[str] = []
    for name in names:
        others = (f"{name}-{number}" for number in range(2, len(names) + 2))
        found.append(name if name not in found else next(o for o in others if o not in found))
    return found


def _told_recipe(entry: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A dataset's recipe as launch/prepare.py takes it, of its entry in data.json."""
    recipe = {key: value for key, value in entry["recipe"].items() if key != "inputs"}
    hub = set(entry.get(HUB, ()))
    recipe["source"] = _told_source(recipe["source"], hub)
    if isinstance(own := recipe["split"]["validation"], dict):
        recipe["split"] = recipe["split"] | {"validation": _told_source(own, hub)}
    recipe |= {"model": told(recipe["model"]), "out": name}
    return dict(_without_nulls(recipe))


def _told_source(section: Any, hub: set[str]) -> Any:
    """A section with folders by their names; or a list of sections, or of paths."""
    if isinstance(section, list):
        return [_told_source(item, hub) for item in section]
    if isinstance(section, str):
        return section if section in hub else Path(section).name
    places = {
        key: _told_source(section[key], hub) for key in ("path", "image_root") if section.get(key)
    }
    return {**section, **places}


def _without_nulls(value: Any) -> Any:
    """A tree without the keys that are not set."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


def _without_paths(value: Any, is_path: Callable[[str], bool]) -> Any:
    """A tree in which texts that are paths are the last part of these."""
    if isinstance(value, dict):
        return {key: _without_paths(item, is_path) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_paths(item, is_path) for item in value]
    return Path(value).name if isinstance(value, str) and is_path(value) else value


def _is_absolute(text: str) -> bool:
    return text.startswith(("/", "~")) and "\n" not in text


def _read(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    return read_object(path)

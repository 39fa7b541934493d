"""Opening a run: everything that can be checked is checked before anything slow starts."""

import hashlib
import json
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from phi3v.config import DeepSpeedConfig, RunConfig, check_warmup, is_smoke_run, to_dict
from phi3v.data import Dataset
from phi3v.data.audit import canvas_sizes
from phi3v.data.format import HUB, LICENSES
from phi3v.data.mixture import SIZES, Mixture, open_datasets, qualified_id
from phi3v.data.packing import Budget, Plan, check_fits
from phi3v.devices import take_device
from phi3v.errors import ConfigError
from phi3v.evaluation.held_out import open_held_out
from phi3v.evaluation.models import check_model
from phi3v.model import Phi3VConfig, Phi3VForCausalLM
from phi3v.model.execution import Execution, choose_execution
from phi3v.model.weights import WeightFiles, load_weights
from phi3v.output import say
from phi3v.pictures import VIEWS, prepared
from phi3v.training import zero
from phi3v.training.extensions import load_extensions
from phi3v.training.metering import sample_costs
from phi3v.training.optimizer import freeze
from phi3v.training.ranks import Ranks
from phi3v.training.run_folder import RunFolder, package_versions
from phi3v.training.tracking import check_sinks

FEW_STEPS = 100  # a run of fewer hardly learns, unless it is there to see that everything works


@dataclass(frozen=True)
class Run:
    """What stays the same while a run trains."""

    cfg: RunConfig
    ds: DeepSpeedConfig
    ranks: Ranks
    folder: RunFolder
    dataset: Dataset | Mixture
    plan: Plan
    total_steps: int
    device: torch.device
    execution: Execution

    def facts(self) -> dict[str, Any]:
        """What the manifest of every checkpoint says of the run."""
        recipe = {**to_dict(self.cfg), "deepspeed": self.ds.json}
        config = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()
        return {
            "world_size": self.ranks.world_size,
            "zero_stage": self.ds.zero_stage,
            "fingerprints": {"config": config, "data": self.dataset.fingerprint},
            "versions": package_versions(),
        }


def open_run(cfg: RunConfig, ds: DeepSpeedConfig, ranks: Ranks) -> Run:
    """Check everything that can be checked before anything slow starts."""
    folder = RunFolder(Path(cfg.run.out))
    folder.check_recipe(cfg, ds)
    load_extensions(ds)
    check_sinks(cfg)
    weights = [part.weight for part in cfg.data.parts]
    dataset = open_datasets(cfg.data.folders, "train", weights, verify=cfg.data.verify)
    if not len(dataset):
        raise ConfigError(
            f"{', '.join(cfg.data.folders)} has no rows in split 'train', so there is nothing to "
            "train on; prepare it with a smaller split.validation, or from more rows"
        )
    folder.check_data(dataset.fingerprint)
    for part in dataset.datasets:
        check_model(part, cfg.model.path)
    if cfg.eval.rows:
        open_held_out(cfg.data.folders, cfg.eval)
    plan = plan_steps(cfg, ds, dataset)
    check_fits(plan, lambda index: qualified_id(dataset, index))
    steps = cfg.train.max_steps
    if steps is None:
        assert cfg.train.epochs is not None
        steps = plan.count(cfg.train.epochs)
    check_warmup(cfg, steps)
    return place_run(cfg, ds, ranks, dataset, plan, steps)


def place_run(
    cfg: RunConfig,
    ds: DeepSpeedConfig,
    ranks: Ranks,
    dataset: Dataset | Mixture,
    plan: Plan,
    total_steps: int,
) -> Run:
    """A run on this rank's device, with the kernels that it has there."""
    device = take_device(ranks.local_rank, ranks.local_size)
    execution = choose_execution(cfg.model, device, dtype_of(ds))
    if execution.eager_because and ranks.local_rank == 0:
        say(f"kernels of {socket.gethostname()} are not compiled: {execution.eager_because}")
    folder = RunFolder(Path(cfg.run.out))
    return Run(cfg, ds, ranks, folder, dataset, plan, total_steps, device, execution)


def plan_steps(cfg: RunConfig, ds: DeepSpeedConfig, dataset: Dataset | Mixture) -> Plan:
    """The sequence of steps: which samples share a pack, and which packs a step."""
    config = Phi3VConfig.from_pretrained(cfg.model.path)
    return Plan(
        dataset.fingerprint,
        cfg.run.seed,
        dataset.tokens,
        dataset.views,
        sample_costs(config, dataset, cfg.data.cost, cfg.model.freeze),
        Budget(cfg.data.max_tokens, cfg.data.max_views, cfg.data.window),
        ds.train_batch_size,
        cfg.data.window_steps,
        dataset.parts,
    )


def describe_length(run: Run) -> str:
    """How long the run is and why, in one line, and what makes it longer if it is short."""
    cfg, total = run.cfg, run.total_steps
    if cfg.debug.overfit_one_pack:
        return f"{total:,} steps on the first pack alone (debug.overfit_one_pack)"
    epoch = run.plan.first_epoch()
    line = (
        f"{epoch.samples:,} samples in {epoch.packs:,} packs, {epoch.fill:.0%} full; "
        f"{epoch.steps:,} steps an epoch of {run.ds.train_batch_size:,} packs each, {total:,} "
        "steps in all"
    )
    if total >= FEW_STEPS or is_smoke_run(cfg):
        return line
    if cfg.train.epochs is None:
        return f"{line}: few to learn from, raise train.max_steps"
    smaller = run.ds.world_size * max(
        1, epoch.packs * cfg.train.epochs // FEW_STEPS // run.ds.world_size
    )
    if smaller < run.ds.train_batch_size:
        more = -(-epoch.packs // smaller) * cfg.train.epochs
        way = f"deepspeed.train_batch_size={smaller} makes about {more:,} of them, or "
    else:
        way = ""
    return f"{line}: few to learn from; {way}raise train.epochs, or train on more rows"


def load_model(cfg: RunConfig, ds: DeepSpeedConfig) -> Phi3VForCausalLM:
    """The model in training mode, in the JSON's precision, with frozen parts."""
    with torch.device("meta"):
        model = Phi3VForCausalLM(Phi3VConfig.from_pretrained(cfg.model.path))
    with WeightFiles(cfg.model.path) as files:
        if ds.zero_stage == 3:
            zero.load_partitioned(model, files, dtype_of(ds), ds)
        else:
            load_weights(model, files, dtype_of(ds))
    freeze(model, cfg.model.freeze)
    return model.train()


def dtype_of(ds: DeepSpeedConfig) -> torch.dtype:
    """What the JSON lets the model compute in."""
    return torch.bfloat16 if ds.bf16 else torch.float32


def describe_data(dataset: Dataset | Mixture) -> dict[str, Any]:
    """What the run is trained on: folders, fingerprint, sizes (weights are in the recipe).

    `pictures` is how they became canvases, `view_settings` how these become views, for all that
    ask the model later (`phi3v.pictures`).
    """
    return {
        "shards": ", ".join(str(part.folder) for part in dataset.datasets),
        "fingerprint": dataset.fingerprint,
        **{name: dataset.entry[name] for name in SIZES},
        "view_settings": {name: dataset.datasets[0].manifest[name] for name in VIEWS},
        "pictures": [
            entry.to_dict()
            for part in dataset.datasets
            for entry in prepared(str(part.folder), part.split, part.manifest)
        ],
        "datasets": [_describe_folder(part) for part in dataset.datasets],
    }


def _describe_folder(dataset: Dataset) -> dict[str, Any]:
    """A folder's splits with their sizes and lengths, how it was made, and what was rejected."""
    manifest = dataset.manifest
    splits = {name: _describe_split(entry) for name, entry in manifest["splits"].items()}
    splits[dataset.split]["images"] = len(canvas_sizes(dataset))
    return {
        "folder": str(dataset.folder),
        "splits": splits,
        "rejected": manifest.get("rejected"),
        "recipe": manifest["recipe"],
        LICENSES: manifest.get(LICENSES, []),
        HUB: manifest.get(HUB, []),
    }


def _describe_split(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes of a split; `histogram`: [tokens, samples] by the start of a bin of lengths."""
    lengths = entry.get("audit", {}).get("histograms", {}).get("tokens")
    return {name: entry[name] for name in SIZES} | {"histogram": lengths}

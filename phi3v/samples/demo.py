"""The demo: its inputs, made where they are missing, and the whole job from rows to an answer."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from phi3v.config import DatasetConfig, RunConfig, load_recipe
from phi3v.data.format import MANIFEST
from phi3v.devices import has_cuda
from phi3v.errors import ConfigError
from phi3v.evaluation.metrics.names import BLIND, CONSTANT, controls
from phi3v.evaluation.report.words import metric_value
from phi3v.locks import locked
from phi3v.prepare import prepare
from phi3v.prepare.conversations import read_conversation
from phi3v.prepare.sources import read_rows
from phi3v.printing import print
from phi3v.processing.prompt import render
from phi3v.samples.products import make_products
from phi3v.samples.tiny import make_tiny_model
from phi3v.stored import read_object
from phi3v.training.ranks import RANK_VARIABLES, free_port

RANKS = 2
SEED = 1  # of the catalogue; drawings and learning rate were chosen on seed 0
QUESTION = "What is shown in this image?"
COMPARED = ("eval.rows=50", "eval.blind=false")  # the model before and after; a few rows are enough


@dataclass(frozen=True)
class DemoFolders:
    """Where the demo's parts lie; all but the recipes are made anew."""

    recipes: Path
    data: Path
    model: Path
    shards: Path
    run: Path


def make_missing(cfg: RunConfig, recipe: Path) -> None:
    """Make the sample products, the tiny model and the shards of a run where they are missing.

    recipe  dataset recipe of the sample products; model and shards are those of `cfg`
    Every rank of a host calls; the first to come does the work and the others wait for it.
    """
    (shards,) = cfg.data.folders
    overrides = [f"model={cfg.model.path}", f"out={shards}"]
    dataset = load_recipe(DatasetConfig, recipe, overrides)
    lock = Path(f"{shards}.lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    with locked(lock, waits=True):
        if not Path(shards, MANIFEST).is_file():
            make_inputs(dataset)


def make_inputs(dataset: DatasetConfig) -> None:
    """Make a catalogue, a model that can spell it, and its shards."""
    catalogue = Path(dataset.sources[0].paths[0])
    if not catalogue.is_file():
        make_products(catalogue.parent, seed=SEED)
    if not Path(dataset.model, "config.json").is_file():
        make_tiny_model(Path(dataset.model), catalogue_texts(dataset))
    prepare(dataset)


def catalogue_texts(dataset: DatasetConfig) -> Iterator[str]:
    """Every conversation of a source as text, for a tokenizer to learn from."""
    for row in read_rows(Path(dataset.sources[0].paths[0])):
        yield render(read_conversation(row, dataset.sources[0]).messages)


def run_demo(folders: DemoFolders, launch: Path, overrides: Sequence[str]) -> None:
    """Do the main job from rows to an answer, with the commands a user would type.

    launch     folder of the commands
    overrides  of the run recipe
    Raises: ConfigError if a command fails.
    """
    began = time.perf_counter()
    values = [f"run.out={folders.run}", f"model.path={folders.model}"]
    values += [f"data.shards={folders.shards}", *overrides]
    load_recipe(RunConfig, folders.recipes / "demo.yaml", values)  # a mistake is told at once
    for folder in (folders.data, folders.model, folders.shards, folders.run):
        shutil.rmtree(folder, ignore_errors=True)
    make_inputs(_dataset_recipe(folders))
    ranks = min(RANKS, torch.cuda.device_count()) if has_cuda() else RANKS
    python = Path(sys.executable)
    _run(
        python.with_name("deepspeed"),
        *("--num_gpus", ranks, "--master_port", free_port()),
        *(launch / "train.py", folders.recipes / "demo.yaml", *values),
    )
    export = folders.run / "export"
    _run(python, launch / "export.py", folders.run, "--out", export)
    picture = min((folders.data / "images").iterdir())
    print(f"\n{picture}: {QUESTION}", flush=True)
    _run(python, launch / "generate.py", export, "--prompt", QUESTION, "--image", picture)
    _run(
        *(python, launch / "evaluate.py", folders.model, folders.run),
        *("--shards", folders.shards, *COMPARED),
    )
    _print_results(folders.run, time.perf_counter() - began)


def _dataset_recipe(folders: DemoFolders) -> DatasetConfig:
    overrides = {
        "source.path": folders.data / "products.csv",
        "source.image_root": folders.data,
        "model": folders.model,
        "out": folders.shards,
    }
    values = [f"{key}={value}" for key, value in overrides.items()]
    return load_recipe(DatasetConfig, folders.recipes / "products.yaml", values)


def _run(*command: object) -> None:
    """Run a command of the demo; its variables must not pass for those of a rank."""
    arguments = [str(part) for part in command]
    print("$", " ".join(arguments), flush=True)
    environment = {k: v for k, v in os.environ.items() if k not in RANK_VARIABLES}
    done = subprocess.run(arguments, env=environment, check=False)
    if done.returncode:
        raise ConfigError(
            f"the demo's command ended with exit code {done.returncode}: {' '.join(arguments)}; "
            "see its message above"
        )


def _print_results(run: Path, seconds: float) -> None:
    summary = read_object(run / "summary.json")
    metrics = summary["metrics"]
    training = summary["totals"]["step_seconds"]
    print(f"\n{'held-out products':28}{'seeing':>9}{'blind':>9}{'constant':>10}{'rows':>7}")
    of_others = controls(metrics)
    for name in (name for name in metrics if name not in of_others):
        seen, blind, constant = (metrics.get(prefix + name) for prefix in ("", BLIND, CONSTANT))
        print(
            f"{name:28}{_show(name, seen):>9}{_show(name, blind):>9}"
            f"{_show(name, constant):>10}{metrics[name]['n']:>7}"
        )
    print(f"{summary['steps']} steps in {training:,.0f} s, the whole demo in {seconds:,.0f} s")
    print(f"report: {run / 'report.html'}")


def _show(name: str, score: dict[str, Any] | None) -> str:
    return "-" if score is None or score["value"] is None else metric_value(name, score["value"])

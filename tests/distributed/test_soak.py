"""A run that disks, logs, signals and torn lines befall ends as the run that nothing befell.

PHI3V_HAZARDS says how many of them (`make soak`: 100), PHI3V_SEED repeats a failure.
"""

import json
import os
import random
import shutil
import subprocess
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from phi3v.data import Dataset
from phi3v.lines import read_lines
from phi3v.prepare import prepare
from phi3v.training.checkpoints.store import find_damage, read_manifest, step_name, steps_saved
from phi3v.training.run_folder import RunFolder
from tests.commands import ROOT, metrics, plain, run
from tests.distributed.hazards import Soaked, befall, draw_hazards
from tests.model.tiny import SIZES
from tests.tiny import make_model, turn, write_jsonl
from tests.tiny import recipe as dataset_recipe

pytestmark = pytest.mark.slow

HAZARDS = int(os.environ.get("PHI3V_HAZARDS", "3"))
SEED = os.environ.get("PHI3V_SEED") or str(time.time_ns())
STEPS = 4 * HAZARDS + 2
HANG_SECONDS = 20  # before a stopped rank is noticed
SECONDS = 120 + 15 * HAZARDS


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two short texts a step, a checkpoint after each, an evaluation after every third."""
    folder = tmp_path_factory.mktemp("recipe")
    model = make_model(folder / "model", **asdict(SIZES))
    rows = [turn(f"What is {k} times {k}?", f"It is {k * k}.", id=f"row {k}") for k in range(60)]
    source = {"path": str(write_jsonl(folder / "rows.jsonl", rows))}
    prepare(dataset_recipe(model, folder / "shards", source, split={"validation": 0.3}))
    ds = json.loads((ROOT / "ds_configs" / "zero3_cpu.json").read_text())
    (folder / "ds.json").write_text(json.dumps(ds | {"train_batch_size": 2}))
    longest = int(Dataset(folder / "shards", "train").tokens.max())
    values = {
        "run": {"out": "run"},
        "model": {"path": str(model)},
        "data": {"shards": str(folder / "shards"), "max_tokens": longest},
        "optim": {"lr": 2e-3, "schedule": "constant"},
        "train": {"max_steps": STEPS, "hang_timeout": HANG_SECONDS, "start_timeout": 120},
        "eval": {"every": 3, "rows": 2, "loss_rows": 2, "blind": False, "max_new_tokens": 2},
        "checkpoint": {"every": 1, "keep": 2},
        "tracking": {"sinks": ["json"]},
        "debug": {"deterministic": True},
        "wandb": {"mode": "disabled"},
        "deepspeed": str(folder / "ds.json"),
    }
    (folder / "run.yaml").write_text(json.dumps(values))
    return folder / "run.yaml"


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled disk.c."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler, which makes disks fail here")
    library = tmp_path_factory.mktemp("disk") / "disk.so"
    source = Path(__file__).with_name("disk.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    return library


def test_a_run_that_hazards_befall_ends_as_if_nothing_had_happened(
    recipe: Path, disk: Path, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    """Bit for bit, each step and each evaluation once; no start ends but in words."""
    print(f"PHI3V_SEED={SEED}")
    chance = random.Random(SEED)
    whole = tmp_path_factory.mktemp("unbroken") / "run"
    done = run(*plain(2, recipe), cwd=whole.parent, timeout=SECONDS)
    assert done.returncode == 0, done.stderr
    (tmp_path / "logs").mkdir()
    soaked = Soaked(lambda: plain(2, recipe), tmp_path / "run", disk, tmp_path / "logs")
    for number, hazard in enumerate(draw_hazards(HAZARDS, chance), 1):
        print(number, befall(hazard, soaked, chance, number), flush=True)
    done = run(*plain(2, recipe), cwd=tmp_path, timeout=SECONDS)
    assert done.returncode == 0, done.stderr
    assert found(tmp_path / "run") == found(whole)


def found(folder: Path) -> dict[str, Any]:
    """All of a run that must not depend on what befell it."""
    saved = steps_saved(folder / "checkpoints")
    last = read_manifest(folder / "checkpoints" / step_name(STEPS))["files"]
    events = read_lines(folder / "events.jsonl")
    hidden = ("stacks/", "stacks")  # where a rank stood still
    return {
        "steps": [
            (line["step"], line["loss"], line["grad_norm"], *line["grad_norms"].values())
            for line in metrics(folder)
        ],
        "evaluations": RunFolder(folder).read_evaluations(),
        "told": sorted((e["step"], e["name"]) for e in events if e["event"] != "config"),
        "files": sorted(
            name
            for path in folder.rglob("*")
            if not (name := str(path.relative_to(folder))).startswith(hidden)
        ),
        "checkpoints": saved,
        "damages": [find_damage(folder / "checkpoints" / step_name(step)) for step in saved],
        "states": {name: file for name, file in last.items() if name.endswith("_states.pt")},
    }

"""A run that is killed at any moments, whoever of it, ends as the run that never was.

PHI3V_KILLS says how often it is killed (`make soak`: 200 times), PHI3V_SEED repeats a failure.
"""

import json
import os
import random
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from phi3v.data import Dataset
from phi3v.prepare import prepare
from phi3v.training.checkpoints.store import find_damage, read_manifest, step_name, steps_saved
from tests.commands import ROOT, deepspeed, metrics, python, run, start, torchrun
from tests.distributed import kills
from tests.distributed.kills import Kill, draw_kills, survive
from tests.model.tiny import SIZES
from tests.tiny import make_model, turn, write_jsonl
from tests.tiny import recipe as dataset_recipe

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("PHI3V_KILLS", "10"))
SEED = os.environ.get("PHI3V_SEED") or str(time.time_ns())
CONVERSIONS = max(1, KILLS // 7)  # of the kills
STEPS = 3 * KILLS  # a kill comes after 1 to 4 steps that are made for the first time, or none
CONVERTED = STEPS - 4  # the step from which another number of ranks goes on
TOLERANCE = 1e-4  # relative, between numbers of ranks; measured: 2e-16 in 4 steps
SECONDS = 60 + 10 * KILLS  # for a run to its end


@pytest.fixture
def chance() -> random.Random:
    print(f"PHI3V_SEED={SEED}")
    return random.Random(SEED)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two short texts a step, which takes a tenth of a second, and a checkpoint after each."""
    folder = tmp_path_factory.mktemp("recipe")
    model = make_model(folder / "model", **asdict(SIZES))
    rows = [turn(f"What is {k} times {k}?", f"It is {k * k}.", id=f"row {k}") for k in range(60)]
    source = {"path": str(write_jsonl(folder / "rows.jsonl", rows))}
    prepare(dataset_recipe(model, folder / "shards", source))
    ds = json.loads((ROOT / "ds_configs" / "zero3_cpu.json").read_text())
    (folder / "ds.json").write_text(json.dumps(ds | {"train_batch_size": 2}))
    longest = int(Dataset(folder / "shards", "train").tokens.max())
    values = {
        "run": {"out": "run"},
        "model": {"path": str(model)},
        "data": {"shards": str(folder / "shards"), "max_tokens": longest},
        "optim": {"lr": 2e-3, "schedule": "constant"},
        "train": {"max_steps": STEPS},
        "eval": {"rows": 0},
        "checkpoint": {"every": 1, "keep": 2, "keep_every": CONVERTED},
        "debug": {"deterministic": True},
        "wandb": {"mode": "disabled"},
        "deepspeed": str(folder / "ds.json"),
    }
    (folder / "run.yaml").write_text(json.dumps(values))
    return folder / "run.yaml"


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, recipe: Path) -> tuple[Path, float]:
    """The folder of a run of two ranks that nobody killed, and the seconds to its first step."""
    folder, began = tmp_path_factory.mktemp("unbroken") / "run", time.monotonic()
    process = start(*torchrun(2, recipe), cwd=folder.parent)
    kills.wait_until(lambda: kills.count_steps(folder) > 0, process)
    seconds = time.monotonic() - began
    _, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, errors
    return folder, seconds


def test_a_run_killed_at_random_moments_ends_as_if_nothing_had_happened(
    unbroken: tuple[Path, float],
    recipe: Path,
    chance: random.Random,
    tmp_path: Path,
) -> None:
    """Bit for bit, each step once, the same files and no others, and no process left."""
    whole, seconds = unbroken
    folder, drawn = tmp_path / "run", draw_kills(KILLS - CONVERSIONS, chance)

    def command(launcher: str) -> list[object]:
        return {"torchrun": torchrun, "deepspeed": deepspeed}[launcher](2, recipe)

    survive(drawn, command, folder, chance, seconds)
    done = run(*command("torchrun"), cwd=tmp_path, timeout=SECONDS)
    assert done.returncode == 0, done.stderr
    assert steps_and_values(folder) == steps_and_values(whole)
    assert files(folder) == files(whole)
    assert_intact(folder)
    assert states(folder) == states(whole)


def test_a_run_killed_while_it_is_converted_goes_on_with_the_same_samples(
    unbroken: tuple[Path, float],
    recipe: Path,
    chance: random.Random,
    tmp_path: Path,
) -> None:
    """What two ranks have saved, one rank takes up; converted once, though not by the first."""
    whole, seconds = unbroken
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    (folder / "summary.json").unlink()
    for step in steps_saved(folder / "checkpoints")[1:]:
        shutil.rmtree(folder / "checkpoints" / step_name(step))
    drawn = [Kill("python", kills.RANK, "conversion")] * CONVERSIONS
    survive(drawn, lambda _: python(recipe), folder, chance, seconds)
    done = run(*python(recipe), cwd=tmp_path, timeout=SECONDS)
    assert done.returncode == 0, done.stderr
    found, expected = steps_and_values(folder), steps_and_values(whole)
    assert [line[0] for line in found] == list(range(1, STEPS + 1))
    for line, other in zip(found, expected, strict=True):
        assert line[:3] == pytest.approx(other[:3], rel=TOLERANCE)
    hidden = [path.name for path in folder.glob("checkpoints/.*")]
    assert hidden == [f".{step_name(CONVERTED)}.universal"]
    assert_intact(folder)


def steps_and_values(folder: Path) -> list[tuple[float, ...]]:
    return [
        (line["step"], line["loss"], line["grad_norm"], *line["grad_norms"].values())
        for line in metrics(folder)
    ]


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def states(folder: Path) -> dict[str, Any]:
    """Size and digest of the last checkpoint's weights and moments, by file."""
    saved = read_manifest(folder / "checkpoints" / step_name(STEPS))["files"]
    return {name: file for name, file in saved.items() if name.endswith("_states.pt")}


def assert_intact(folder: Path) -> None:
    saved = steps_saved(folder / "checkpoints")
    assert saved == [CONVERTED, STEPS - 1, STEPS]
    for step in saved:
        assert find_damage(folder / "checkpoints" / step_name(step)) is None

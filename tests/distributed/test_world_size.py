"""A run goes on with the same command on another number of ranks, as if nothing had happened.

The numbers of ranks change from start to start of one run folder; each start trains a few steps
more. Then every kind of optimizer that ZeRO has, by its state: tests/distributed/worlds.py.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from phi3v.config import default_deepspeed
from phi3v.training.checkpoints.store import SavedFile, write_manifest
from tests.commands import BIN, ROOT, metrics, plain, python, run, run_ranks

pytestmark = pytest.mark.slow

WORLDS = (2, 1, 2, 4, 2)
STEPS = 3  # of each start
LAST = STEPS * len(WORLDS)
# Measured: 4e-7 at most (order of summation only); 0.01 where optimizer state is not what it was.
TOLERANCE = 1e-4
# Each of DeepSpeed's optimizers: stage 1 in bf16 has one of its own.
CASES = ("bf16-zero1.json", "fp32-zero2.json", "bf16-zero3.json", "fp32-zero3.json")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, tiny_shards: Path, tiny_model: Path) -> Path:
    """A run recipe whose parameter groups differ in rate and decay, and which keeps one save."""
    path = tmp_path_factory.mktemp("recipe") / "run.yaml"
    optim = {"lr": 1e-3, "vision_lr": 3e-4, "weight_decay": 0.1, "vision_layer_decay": 0.5}
    values = {
        "run": {"out": "run"},
        "model": {"path": str(tiny_model)},
        "data": {"shards": str(tiny_shards), "max_tokens": 264, "max_views": 32},
        "optim": optim | {"warmup_steps": 2, "schedule": "constant"},
        "train": {"max_steps": LAST},
        "eval": {"rows": 0},
        "checkpoint": {"every": 100, "keep": 1},
    }
    path.write_text(json.dumps(values), encoding="utf-8")
    return path


def test_the_number_of_ranks_may_change_with_every_start(recipe: Path, tmp_path: Path) -> None:
    whole, folder = tmp_path / "whole", tmp_path / "run"
    done = run(*python(recipe, f"run.out={whole}"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    before = None
    for start, ranks in enumerate(WORLDS, 1):
        last = f"train.max_steps={start * STEPS}"
        command = plain(ranks, recipe, last) if ranks > 1 else python(recipe, last)
        done = run(*command, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        said = [line for line in done.stderr.splitlines() if line.startswith("converting ")]
        name = f"step-{(start - 1) * STEPS:08d}"
        assert len(said) == (0 if before is None else 1), done.stderr
        assert all(f"{name} from {before} ranks to any number" in line for line in said)
        before = ranks
    ours, theirs = metrics(folder), metrics(whole)
    assert [line["step"] for line in ours] == list(range(1, LAST + 1))
    for key in ("samples", "tokens", "label_tokens", "views"):
        assert [line[key] for line in ours] == [line[key] for line in theirs]
    for key in ("loss", "grad_norm"):
        expected = pytest.approx([line[key] for line in theirs], rel=TOLERANCE)
        assert [line[key] for line in ours] == expected
    left = sorted(path.name for path in (folder / "checkpoints").iterdir() if path.is_dir())
    assert left == [f"step-{LAST:08d}"], "a universal form goes with its checkpoint"


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What 1 rank loaded of the states that 2 ranks saved, by case: precision and stage."""
    folder = tmp_path_factory.mktemp("worlds")
    for case in CASES:
        kind, name = case.split("-")
        content = json.loads((default_deepspeed(has_cuda=True).parent / name).read_text())
        params = {"torch_adam": True, "betas": [0.9, 0.95], "eps": 1e-8}
        content |= {"train_batch_size": 4, "optimizer": {"type": "AdamW", "params": params}}
        if name == "zero3.json":  # several states of the optimizer in one group
            content["zero_optimization"]["sub_group_size"] = 20000
        if kind == "fp32":
            content = {k: v for k, v in content.items() if not k.endswith(("_type", "_types"))}
            content["bf16"] = {"enabled": False}
        (folder / case).write_text(json.dumps(content))
    for ranks in (2, 1):
        run_ranks(ranks, Path(__file__).with_name("worlds.py"), folder)
    result: dict[str, dict[str, Any]] = json.loads((folder / "found").read_text(encoding="utf-8"))
    return result


@pytest.mark.parametrize("name", CASES)
def test_every_stage_gives_back_the_state_it_saved(
    found: dict[str, dict[str, Any]], name: str
) -> None:
    """Masters, moments and step counts in the universal form, and weights, bit for bit."""
    of = found[name]
    assert of["num_compared"] > 150 and not of["differing"]
    assert of["weights_differ"] == 0
    assert of["groups"] == of["groups_saved"] and len({g["weight_decay"] for g in of["groups"]}) > 1
    assert of["losses"] == pytest.approx(of["losses_saved"], rel=TOLERANCE)


def test_a_failed_conversion_names_the_checkpoint_and_leaves_nothing(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from phi3v.training.ranks import *\n"
        "def main():\n"
        "    set_environment()\n"
        "    from phi3v.training.checkpoints.convert import convert\n"
        "    convert(Path('step-00000004'), Path('.step-00000004.universal'))\n"
        "run_command(main)\n"
    )
    checkpoint = tmp_path / "step-00000004"
    checkpoint.mkdir()
    share = checkpoint / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    torch.save({"optimizer_state_dict": {}}, share)
    facts = {"step": 4, "world_size": 1, "zero_stage": 3}
    write_manifest(checkpoint, facts, {share.name: SavedFile.of(share)})
    (tmp_path / ".step-00000004.universal.partial").mkdir()
    done = run(BIN / "python", "-c", script, cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert done.returncode == 2, done.stderr
    assert "CheckpointError: step-00000004 of 1 ranks cannot be converted" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000004"]

"""A damaged shard ends every rank with its name and exit code 2, whichever rank reads it."""

import json
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from phi3v.config import RunConfig, load_deepspeed, load_recipe
from phi3v.data import Dataset
from phi3v.data.packing import Position
from phi3v.training.opening import plan_steps
from phi3v.training.ranks import free_port
from phi3v.training.start import deepspeed_file
from tests.commands import TIMEOUT, kill, last_line, metrics, python, start

pytestmark = pytest.mark.slow

RANKS = 2
STEP = 3  # whose second rank reads the damaged record
LIMIT = 45.0  # seconds that a run may take here: a rank that is left alone would stay for minutes


@pytest.fixture
def shards(tmp_path: Path, tiny_shards: Path) -> Path:
    return shutil.copytree(tiny_shards, tmp_path / "shards")


@pytest.fixture
def write_recipe(tmp_path: Path, tiny_model: Path, shards: Path) -> Callable[..., Path]:
    """Write a run's recipe of six steps; keywords are keys of `data` but for rows of `eval`."""

    def write(rows: int = 0, **data: Any) -> Path:
        path = tmp_path / "run.yaml"
        recipe = {
            "run": {"out": str(tmp_path / "run")},
            "model": {"path": str(tiny_model)},
            "data": {"shards": str(shards), "max_tokens": 264, **data},
            "optim": {"lr": 1e-3, "schedule": "constant"},
            "train": {"max_steps": 6, "hang_timeout": 300},
            "eval": {"rows": rows, "every": 2, "max_new_tokens": 2, "blind": False},
        }
        path.write_text(json.dumps(recipe), encoding="utf-8")  # JSON is YAML
        return path

    return write


def run_both(recipe: Path, cwd: Path) -> list[subprocess.CompletedProcess[str]]:
    """What each rank says and ends with, where no launcher ends any."""
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    shared["MASTER_PORT"] = str(free_port())
    numbers = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(RANKS)]
    processes = [start(*python(recipe), cwd=cwd, **shared, **own) for own in numbers]
    try:
        out = [process.communicate(timeout=TIMEOUT) for process in processes]
    finally:
        for process in processes:
            kill(process)
    pairs = zip(processes, out, strict=True)
    return [subprocess.CompletedProcess(p.args, p.returncode, *texts) for p, texts in pairs]


def flip(path: Path, position: int) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        (byte,) = file.read(1)
        file.seek(position)
        file.write(bytes([byte ^ 1]))


def flip_record(shards: Path, split: str, index: int) -> Path:
    """Flip a bit within the pixels of a record; returns its shard."""
    dataset = Dataset(shards, split)
    flip(dataset._shard_path(index), int(dataset._offset[index] + dataset.message_bytes[index] / 2))
    return dataset._shard_path(index)


def record_of_second_rank(recipe: Path, shards: Path) -> int:
    """A record that rank 1 of 2 reads for step STEP, and nobody before."""
    cfg = load_recipe(RunConfig, recipe, [])
    plan = plan_steps(cfg, load_deepspeed(deepspeed_file(cfg), RANKS, []), Dataset(shards, "train"))
    steps = plan.steps(Position())
    for _ in range(STEP):
        step = next(steps)
    return int(step.packs[1][0])


def assert_ended(done: list[subprocess.CompletedProcess[str]], words: str, place: str) -> None:
    first, second = done
    assert (first.returncode, second.returncode) == (2, 2), first.stderr + second.stderr
    assert words in last_line(first, "ShardError") and place in first.stderr
    assert "ShardError" not in second.stderr and "Traceback" not in second.stderr


def test_a_record_that_one_rank_finds_damaged_ends_all(
    write_recipe: Callable[..., Path], shards: Path, tmp_path: Path
) -> None:
    """In the middle of training, where the other waits for it in a collective."""
    recipe = write_recipe()
    index = record_of_second_rank(recipe, shards)
    shard = flip_record(shards, "train", index)
    began = time.monotonic()
    done = run_both(recipe, tmp_path)
    words = f"{shard} is damaged at sample {index} of split 'train': its record has digest "
    assert_ended(done, words, " (rank 1 on ")
    assert len(metrics(tmp_path / "run")) == STEP - 1
    assert time.monotonic() - began < LIMIT


def test_a_held_out_record_that_one_rank_finds_damaged_ends_all(
    write_recipe: Callable[..., Path], shards: Path, tmp_path: Path
) -> None:
    """In an evaluation, where the other waits outside of any collective."""
    shard = flip_record(shards, "validation", 1)
    done = run_both(write_recipe(rows=4), tmp_path)
    assert_ended(done, f"{shard} is damaged at sample 1 of split 'validation'", "ShardError")


@pytest.mark.parametrize("is_damaged", [True, False])
def test_reading_all_files_before_the_first_step_is_shared_and_said(
    write_recipe: Callable[..., Path], shards: Path, tmp_path: Path, is_damaged: bool
) -> None:
    recipe = write_recipe(verify="digest")
    files = sorted(shards.glob("*.arrow"))
    if is_damaged:
        flip(files[-1], -9 + files[-1].stat().st_size)
        done = run_both(recipe, tmp_path)
        assert_ended(done, f"{files[-1]} has SHA-256 ", "the file is damaged or another dataset's")
        assert not (tmp_path / "run" / "metrics.jsonl").exists()
        return
    first, second = run_both(recipe, tmp_path)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    total = sum(file.stat().st_size for file in files)
    assert f"all {total:,} bytes of {len(files)} files are as written (" in first.stderr
    assert "as written" not in second.stderr
    assert len(metrics(tmp_path / "run")) == 6

"""A disk that fills, one that cannot be written to, a shard that is lost: plain words, no loss."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from phi3v.training.checkpoints.store import find_damage
from tests.commands import (
    LAUNCH,
    kill,
    last_line,
    metrics,
    python,
    run,
    start,
    torchrun,
    wait_for,
)

pytestmark = pytest.mark.slow

Write = Callable[..., Path]
LIMITED = """
import os, resource, runpy, sys
train = sys.argv.pop()
if os.environ["RANK"] == "1":
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
runpy.run_path(train, run_name="__main__")
"""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk with room for one checkpoint of the tiny model (15 MB), not for two."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", folder]
    mounted = subprocess.run(command, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no disk can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def remount(disk: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", disk], check=True)


@pytest.fixture
def write_recipe(tmp_path: Path, tiny_model: Path) -> Write:
    """Write a run's recipe: eight steps, a checkpoint every four."""

    def write(out: Path, shards: Path, **values: Any) -> Path:
        path = tmp_path / "run.yaml"
        recipe = {
            "run": {"out": str(out)},
            "model": {"path": str(tiny_model)},
            "data": {"shards": str(shards), "max_tokens": 264},
            "optim": {"lr": 1e-3, "schedule": "constant"},
            "train": {"max_steps": 8},
            "eval": {"rows": 0},
            "checkpoint": {"every": 4, "keep": 1},
        }
        path.write_text(json.dumps(recipe | values), encoding="utf-8")  # JSON is YAML
        return path

    return write


def test_a_full_disk_ends_the_run_plainly_and_room_lets_it_go_on(
    disk: Path, write_recipe: Write, tiny_shards: Path, tmp_path: Path
) -> None:
    recipe, saved = write_recipe(disk / "run", tiny_shards), disk / "run" / "checkpoints"
    done = run(*python(recipe), cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    message = last_line(done, "CheckpointError")
    assert f"{saved}/.step-00000008.partial/" in message
    assert "could not be written: No space left on device; free space there and start" in message
    assert find_damage(saved / "step-00000004") is None
    assert (saved / "latest").read_text() == "step-00000004"
    assert not list(saved.glob(".step*"))

    remount(disk, "size=64m")
    done = run(*python(recipe), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [line["step"] for line in metrics(disk / "run")] == list(range(1, 9))


def test_a_rank_that_cannot_write_ends_all_and_says_so_once(
    write_recipe: Write, tiny_shards: Path, tmp_path: Path
) -> None:
    """The first rank, which waits for the other's files to publish them, hears of it."""
    limited = tmp_path / "limited.py"
    limited.write_text(LIMITED)
    command = torchrun(2, write_recipe(tmp_path / "run", tiny_shards))
    command[command.index(LAUNCH / "train.py")] = limited
    done = run(*command, LAUNCH / "train.py", cwd=tmp_path)
    assert done.returncode == 1, done.stderr  # torchrun makes 1 of every code
    message = next(line for line in done.stderr.splitlines() if line.startswith("CheckpointError"))
    assert "zero_pp_rank_1_mp_rank_00_optim_states.pt could not be written: File too l" in message
    assert 4 <= len(metrics(tmp_path / "run")) < 8
    assert not list((tmp_path / "run" / "checkpoints").glob("*step-*"))


def test_a_read_only_disk_is_named(
    disk: Path, write_recipe: Write, tiny_shards: Path, tmp_path: Path
) -> None:
    remount(disk, "ro")
    done = run(*python(write_recipe(disk / "run", tiny_shards)), cwd=tmp_path)
    assert done.returncode == 2
    assert f"OSError: {disk / 'run'}: Read-only file system; make room or give" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_shard_that_is_lost_while_a_run_trains_is_named(
    write_recipe: Write, tiny_shards: Path, tmp_path: Path
) -> None:
    shards = tmp_path / "shards"
    shutil.copytree(tiny_shards, shards)
    recipe = write_recipe(tmp_path / "run", shards, train={"max_steps": 10_000})
    process = start(*python(recipe), cwd=tmp_path)
    try:
        wait_for(process, (tmp_path / "run" / "checkpoints" / "latest").is_file)
        (shard,) = shards.glob("train-*.arrow")
        os.truncate(shard, 0)
        _, err = process.communicate(timeout=60)
    finally:
        kill(process)
    done = subprocess.CompletedProcess(process.args, process.returncode, "", err)
    assert done.returncode == 2
    assert f"{shard} cannot be read at sample " in last_line(done, "ShardError")
    steps = (tmp_path / "run" / "checkpoints").glob("step-*")
    assert all(find_damage(path) is None for path in steps)

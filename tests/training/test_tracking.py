"""W&B without a network: what a run logged is in its own folder, and nowhere else."""

import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from phi3v.config import RunConfig, build_recipe
from phi3v.training.tracking import Tracker

RECIPE = {
    "run": {"out": "demo"},
    "model": {"path": "models/tiny"},
    "data": {"shards": "shards/demo"},
    "optim": {"lr": 1e-4},
    "train": {"max_steps": 10},
}
LIFE = f"""
import sys
from pathlib import Path
import numpy as np
from phi3v.config import RunConfig, build_recipe
from phi3v.evaluation.report import Example
from phi3v.training.tracking import Tracker

cfg = build_recipe(RunConfig, {RECIPE}, Path("demo.yaml"), [])
tracker = Tracker(cfg, Path(sys.argv[1]), True, "known-id")
for step in map(int, sys.argv[2:]):
    values = {{"loss": 1 / step, "lr": {{"vision": 0.125}}, "mfu": None}}
    tracker.log(step, {{"train": values}})
picture = np.zeros((8, 8, 3), dtype=np.uint8)
shown = Example(picture, "What is it?", "A bag", "A tie", "A hat", False)
answers = [shown, Example(None, "And in words?", "One", "One", None, True)]
tracker.log_evaluation(step, {{"eval": {{"loss": 0.25}}}}, answers)
tracker.finish()
"""
BLOCK_BYTES, HEADER_BYTES, FILE_HEADER_BYTES = 32768, 7, 7
FULL, LAST = 1, 4


@dataclass(frozen=True)
class Lives:
    """A run that was started twice, each step logged both times; where else it might write."""

    folder: Path
    home: Path
    cwd: Path
    outputs: list[str]

    @property
    def files(self) -> list[Path]:
        """What each life recorded, in order."""
        return sorted(self.folder.glob("wandb/offline-run-*/run-*.wandb"))


@pytest.fixture(scope="module")
def lives(tmp_path_factory: pytest.TempPathFactory) -> Lives:
    folder, home, cwd = (tmp_path_factory.mktemp(name) for name in ("demo", "home", "cwd"))
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    environment = kept | {"HOME": str(home)}
    outputs = []
    for steps in (("1", "2"), ("1", "2", "3")):
        command = [sys.executable, "-c", LIFE, str(folder), *steps]
        done = subprocess.run(
            command, cwd=cwd, env=environment, timeout=120, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout + done.stderr)
    return Lives(folder, home, cwd, outputs)


def records(path: Path) -> Iterator[Any]:
    """The records of a .wandb file: a log of LevelDB's form holding protobuf messages."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, message = path.read_bytes(), FILE_HEADER_BYTES, b""
    while position + HEADER_BYTES <= len(data):
        left = BLOCK_BYTES - position % BLOCK_BYTES
        if left < HEADER_BYTES:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        position += HEADER_BYTES
        message += data[position : position + length]
        position += length
        if kind in (FULL, LAST):
            yield Record.FromString(message)
            message = b""


def history(path: Path) -> list[dict[str, Any]]:
    """What was logged, step by step; wandb's own keys left out."""
    rows = []
    for record in records(path):
        if record.WhichOneof("record_type") == "history":
            items = {"/".join(item.nested_key) or item.key: item for item in record.history.item}
            rows.append(
                {
                    key: json.loads(item.value_json)
                    for key, item in items.items()
                    if key.startswith("train/") or key in ("_step", "eval/examples/nrows")
                }
            )
    return rows


@pytest.mark.slow
def test_the_curves_are_in_the_runs_own_file(lives: Lives) -> None:
    first, second = (history(path) for path in lives.files)
    assert first[0] == {"_step": 1, "train/loss": 1.0, "train/lr/vision": 0.125}
    assert first[1]["train/loss"] == 0.5
    assert [row["_step"] for row in second] == [3], "the repeated step is there once"


@pytest.mark.slow
def test_the_table_of_answers_is_there_with_its_pictures(lives: Lives) -> None:
    first, _ = (history(path) for path in lives.files)
    assert first[1]["eval/examples/nrows"] == 2
    (table, _) = sorted(lives.folder.glob("wandb/offline-run-*/files/media/table/eval/*.json"))
    content = json.loads(table.read_text())
    assert content["columns"] == ["image", "prompt", "reference", "prediction", "blind", "right"]
    assert content["data"] == [
        ["Image", "What is it?", "A bag", "A tie", "A hat", False],
        [None, "And in words?", "One", "One", None, True],
    ]
    staged = list((lives.folder / "wandb" / "artifacts").rglob("*"))
    assert any(path.is_file() and path.read_bytes()[:4] == b"\x89PNG" for path in staged)


@pytest.mark.slow
def test_a_restarted_run_is_the_same_run(lives: Lives) -> None:
    runs = [
        record.run
        for path in lives.files
        for record in records(path)
        if record.WhichOneof("record_type") == "run"
    ]
    assert len(runs) == 2
    assert {(run.run_id, run.project, run.display_name) for run in runs} == {
        ("known-id", "phi3v", lives.folder.name)
    }
    config = {item.key: json.loads(item.value_json) for item in runs[0].config.update}
    assert config["optim"]["lr"] == 1e-4


@pytest.mark.slow
def test_nothing_is_written_outside_the_run_folder_or_said(lives: Lives) -> None:
    assert list(lives.home.rglob("*")) == []
    assert list(lives.cwd.iterdir()) == []
    assert [path.name for path in lives.folder.iterdir()] == ["wandb"]
    assert lives.outputs == ["", ""]


@pytest.mark.parametrize(("mode", "is_first"), [("disabled", True), ("offline", False)])
def test_a_disabled_run_and_other_ranks_write_nothing(
    mode: str, is_first: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", mode)
    cfg = build_recipe(RunConfig, RECIPE, Path("demo.yaml"), ["wandb.mode=offline"])
    tracker = Tracker(cfg, tmp_path, is_first)
    tracker.log(1, {"train": {"loss": 1.0}})
    tracker.log_evaluation(1, {"eval": {"loss": 1.0}}, [])
    tracker.finish()
    assert list(tmp_path.iterdir()) == []


def test_the_recipe_can_disable_it_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "")  # set but empty: as if it were not
    cfg = build_recipe(RunConfig, RECIPE, Path("demo.yaml"), ["wandb.mode=disabled"])
    Tracker(cfg, tmp_path, is_first=True).finish()
    assert list(tmp_path.iterdir()) == []

"""W&B without a network: what a run logged is in its own folder, and nowhere else."""

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from phi3v.config import RunConfig, build_recipe
from phi3v.errors import ConfigError
from phi3v.lines import append_line, read_lines
from phi3v.training.tracking import Tracker, check_sinks, open_tracker
from phi3v.training.tracking.jsonl import JsonSink
from phi3v.training.tracking.wandb import names
from tests.commands import BIN, ROOT
from tests.offline import history, of_kind

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
from phi3v.config import RunConfig, build_recipe, to_dict
from phi3v.evaluation.report import Example
from phi3v.training.tracking import open_tracker
from phi3v.training.tracking.sinks import Histogram

cfg = build_recipe(RunConfig, {RECIPE}, Path("demo.yaml"), ["wandb={{tags: [a, b], group: g}}"])
folder, done, *steps = Path(sys.argv[1]), *map(int, sys.argv[2:])
tracker = open_tracker(cfg, folder, done, "known-id")
tracker.log_config(done, {{**to_dict(cfg), "environment": {{"commit": "abc"}}}})
tracker.log_data(lambda: {{"train_tokens_per_sample": Histogram.of(np.array([7, 8, 8, 9]))}})
for step in steps:
    values = {{"loss": 1 / step, "lr": {{"vision": 0.125}}, "mfu": None, "skipped": None}}
    tracker.log_step({{"step": step, **values}})
picture = np.zeros((8, 8, 3), dtype=np.uint8)
seen = Example(picture, "What is it?", "A bag", "A tie", "A hat", False, {{"rouge_l": 0.5}}, "r1")
answers = [seen, Example(None, "In words?", "One", "One", None, True, {{"rouge_l": None}}, "r2")]
scores = {{"rouge_l": {{"value": 0.5, "low": 0.25, "high": 0.75, "n": 2}}}}
tracker.log_evaluation(step, 0.25, scores, answers)
checkpoint = folder / "checkpoints" / f"step-{{step:08d}}"
checkpoint.mkdir(parents=True)
(checkpoint / "manifest.json").write_text("{{}}")
(checkpoint / "weights.pt").write_text("weights")
(folder / "config.yaml").write_text("run: {{}}")
tracker.log_checkpoint(step, checkpoint, ("last", checkpoint.name))
tracker.finish()
"""


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
    for steps in (("0", "1", "2"), ("1", "2", "3")):  # the second goes on after step 1
        command = [sys.executable, "-c", LIFE, str(folder), *steps]
        done = subprocess.run(
            command, cwd=cwd, env=environment, timeout=120, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout + done.stderr)
    return Lives(folder, home, cwd, outputs)


@pytest.mark.slow
def test_the_curves_are_in_the_runs_own_file(lives: Lives) -> None:
    first, second = (history(path) for path in lives.files)
    train = {"train/loss": 1.0, "train/lr/vision": 0.125, "train/skipped": 0}
    assert first[1] == {"_step": 1, **train}
    scores = {"eval/rouge_l": 0.5, "eval/rouge_l_low": 0.25, "eval/rouge_l_high": 0.75}
    scores["eval/rouge_l_n"] = 2
    assert first[2] == {"_step": 2, **train, "train/loss": 0.5, "eval/loss": 0.25, **scores}
    assert [row["_step"] for row in second] == [3], "the repeated step is there once"


@pytest.mark.slow
def test_the_lengths_of_the_samples_are_there_once(lives: Lives) -> None:
    first, second = (history(path) for path in lives.files)
    name = "data/train_tokens_per_sample"
    assert first[0] == {
        "_step": 0,
        f"{name}/_type": "histogram",
        f"{name}/values": [1, 2, 1],
        f"{name}/bins": [6.5, 7.5, 8.5, 9.5],
    }
    assert not any(key.startswith("data/") for row in second for key in row)


@pytest.mark.slow
def test_each_evaluations_table_of_answers_is_there_with_its_pictures(lives: Lives) -> None:
    tables = lives.folder.glob("wandb/offline-run-*/files/media/table/eval/examples/*.json")
    paths = sorted(tables, key=lambda path: path.name)
    assert [path.name.split("_")[0] for path in paths] == ["step-00000002", "step-00000003"]
    content = json.loads(paths[0].read_text())
    told = ["image", "prompt", "reference", "prediction", "blind", "right", "rouge_l", "id"]
    assert content["columns"] == told
    assert content["data"] == [
        ["Image", "What is it?", "A bag", "A tie", "A hat", False, 0.5, "r1"],
        [None, "In words?", "One", "One", None, True, None, "r2"],
    ]
    staged = list((lives.folder / "wandb" / "artifacts").rglob("*"))
    assert any(path.is_file() and path.read_bytes()[:4] == b"\x89PNG" for path in staged)


@pytest.mark.slow
def test_the_checkpoint_is_an_artifact_that_says_where_its_files_are(lives: Lives) -> None:
    logged = [a for a in of_kind(lives.files[1], "artifact") if a.type == "model"]
    (artifact,) = logged
    checkpoint = lives.folder / "checkpoints" / "step-00000003"
    assert artifact.name == f"{lives.folder.name}-checkpoint"
    assert {"last", checkpoint.name} <= set(artifact.aliases)
    assert json.loads(artifact.metadata)["path"] == str(checkpoint)
    stored = {file.path for file in artifact.manifest.contents if file.local_path}
    assert stored == {"config.yaml", "manifest.json"}
    referred = {file.ref for file in artifact.manifest.contents if file.ref}
    assert (checkpoint / "weights.pt").as_uri() in referred


@pytest.mark.slow
def test_a_restarted_run_is_the_same_run(lives: Lives) -> None:
    runs = [run for path in lives.files for run in of_kind(path, "run")]
    assert len(runs) == 2
    assert {(run.run_id, run.project, run.display_name, run.run_group) for run in runs} == {
        ("known-id", "phi3v", lives.folder.name, "g")
    }
    assert all(list(run.tags) == ["a", "b"] for run in runs)
    updates = [item for told in of_kind(lives.files[0], "config") for item in told.update]
    config = {item.key: json.loads(item.value_json) for item in updates if item.key}
    assert config["optim"]["lr"] == 1e-4
    assert config["environment"] == {"commit": "abc"}


@pytest.mark.slow
def test_nothing_is_written_outside_the_run_folder_or_said(lives: Lives) -> None:
    assert list(lives.home.rglob("*")) == []
    assert list(lives.cwd.iterdir()) == []
    ours = {"wandb", "checkpoints", "config.yaml"}
    assert {path.name for path in lives.folder.iterdir()} == ours
    assert lives.outputs == ["", ""]


def documented(kind: str) -> str:
    """The blocks of a kind in docs/tracking.md."""
    page = (ROOT / "docs" / "tracking.md").read_text(encoding="utf-8")
    return "".join(re.findall(rf"```{kind}\n(.*?)```", page, flags=re.DOTALL))


@pytest.mark.slow
def test_the_documented_sync_finds_all_starts_of_the_run(lives: Lives, tmp_path: Path) -> None:
    (command,) = (line for line in documented("bash").splitlines() if "wandb sync" in line)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "products").symlink_to(lives.folder)
    dry = command.replace("wandb sync", f"{BIN / 'wandb'} sync --dry-run")
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    told = subprocess.run(
        ["bash", "-c", dry],
        cwd=tmp_path,
        env=kept | {"HOME": str(tmp_path)},
        timeout=120,
        capture_output=True,
        text=True,
    )
    assert told.returncode == 0, told.stderr
    assert all(path.parent.name in told.stdout + told.stderr for path in lives.files)


def test_the_documented_lines_read_the_metrics_and_the_documented_keys_exist(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    norms = {"loss": 1.5, "grad_norm": 2.0, "grad_norms": {"vision": 0.75}, "tokens_per_second": 9}
    Path("runs/products").mkdir(parents=True)
    append_line(Path("runs/products/metrics.jsonl"), {"step": 7, **norms})
    exec(documented("python"), {})
    assert capsys.readouterr().out.split()[-5:] == ["7", "1.5", "2.0", "0.75", "9"]
    overrides = re.findall(r"'?((?:wandb|tracking)\.\w+=(?:\[.*?\]|\w+))", documented("bash"))
    assert len(overrides) == 4
    for override in overrides:
        recipe(override)


def recipe(*overrides: str) -> RunConfig:
    return build_recipe(RunConfig, RECIPE, Path("demo.yaml"), overrides)


@pytest.mark.parametrize(
    ("variable", "override"),
    [("disabled", "wandb.mode=offline"), ("", "wandb.mode=disabled")],  # empty: as if it were not
)
def test_one_word_disables_it(
    variable: str, override: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", variable)
    tracker = open_tracker(recipe(override), tmp_path, known_id="abc")
    tracker.log_step({"step": 1, "loss": 1.0})
    tracker.log_evaluation(1, 1.0, {}, [])
    tracker.finish()
    assert list(tmp_path.iterdir()) == []
    assert tracker.id == "abc", "the checkpoints of a disabled start still know it"


def test_wandbs_own_variables_win_over_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    section = recipe("wandb={project: p, name: n, group: g, tags: [t]}").wandb
    asked = {"project": "p", "entity": None, "name": "n", "group": "g", "tags": ["t"]}
    for name in ("PROJECT", "ENTITY", "NAME", "RUN_GROUP", "TAGS"):
        monkeypatch.delenv(f"WANDB_{name}", raising=False)
    assert names(section, Path("runs/demo")) == asked
    assert names(recipe().wandb, Path("runs/demo"))["name"] == "demo"
    for name in ("PROJECT", "ENTITY", "NAME", "RUN_GROUP", "TAGS"):
        monkeypatch.setenv(f"WANDB_{name}", f"own {name},too")
    assert names(section, Path("runs/demo")) == {
        **{name: f"own {name.upper()},too" for name in ("project", "entity", "name")},
        "group": "own RUN_GROUP,too",
        "tags": ["own TAGS", "too"],
    }


def test_sinks_that_cannot_work_are_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))  # where keys are
    monkeypatch.setenv("WANDB_SILENT", "true")
    with pytest.raises(ConfigError, match="wandb.mode is 'online', but this machine has no key"):
        check_sinks(recipe("wandb.mode=online"))
    with monkeypatch.context() as patch, pytest.raises(ConfigError, match="'online', but WANDB_AP"):
        patch.setenv("WANDB_API_KEY", "short")
        check_sinks(recipe("wandb.mode=online"))
    with pytest.raises(ConfigError, match="log_checkpoint is 'best', but checkpoint.best names"):
        check_sinks(recipe("wandb.log_checkpoint=best"))
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ConfigError, match="tensorboard is not installed; run pip install tensor"):
        check_sinks(recipe("tracking.sinks=[tensorboard]"))
    check_sinks(recipe())


def test_a_folder_that_cannot_be_written_is_said_once_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path))
    (tmp_path / "wandb").touch()
    (tmp_path / "tensorboard").touch()
    (tmp_path / "events.jsonl").mkdir()
    tracker = open_tracker(recipe("tracking.sinks=[tensorboard, json]"), tmp_path)
    for step in (1, 2):
        tracker.log_step({"step": step, "loss": 1.0})
    tracker.finish()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" is told")[0] for line in lines] == ["W&B", "TensorBoard", "events.jsonl"]
    assert all("training goes on" in line for line in lines)
    assert [str(tmp_path / "wandb") in lines[0], "events.jsonl" in lines[2]] == [True, True]


def test_where_a_step_was_is_no_number_of_its_curves(tmp_path: Path) -> None:
    tracker = open_tracker(recipe("wandb.mode=disabled", "tracking.sinks=[json]"), tmp_path)
    at = {"epoch": 1, "window": 2, "step": 3}
    tracker.log_step({"step": 1, "epoch": 1, "at": at, "ranks": 8, "loss": 1.0})
    tracker.finish()
    (line,) = map(json.loads, (tmp_path / "events.jsonl").read_text().splitlines())
    assert line["values"] == {"epoch": 1, "loss": 1.0}


class Stuck(JsonSink):
    """A sink that answers no more from some step on."""

    def scalars(self, step: int, name: str, values: Mapping[str, float]) -> None:
        threading.Event().wait(timeout=30 if step > 1 else 0)
        super().scalars(step, name, values)


def test_a_sink_that_hangs_is_given_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tracker = Tracker(patience=0.2)
    tracker.add("stuck", lambda: Stuck(tmp_path, 0))
    for step in (1, 2, 3):
        tracker.log_step({"step": step, "loss": 1.0})
    tracker.finish()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("stuck is told nothing more in this start of the run: it did not answer")
    assert [event["step"] for event in read_lines(tmp_path / "events.jsonl")] == [1]

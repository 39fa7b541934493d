"""The demo end to end, cut short: what `make demo` runs."""

import json
import sys
from pathlib import Path

import pytest

from tests.commands import LAUNCH, last_line, metrics, run
from tests.offline import history

STEPS = 6
LEFT = [Path(place, "left") for place in ("runs/demo", "shards/demo", "models/demo")]
Demo = tuple[Path, str]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    """The folder of a short demo, where an earlier one had left something, and what it printed."""
    folder = tmp_path_factory.mktemp("demo")
    for place in LEFT:
        (folder / place).parent.mkdir(parents=True)
        (folder / place).write_text("of an earlier demo")
    values = [f"train.max_steps={STEPS}", "optim.warmup_steps=2", "eval.rows=20", "eval.every=3"]
    done = run(sys.executable, LAUNCH / "demo.py", *values, cwd=folder, WANDB_MODE="offline")
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


@pytest.mark.slow
def test_the_demo_runs_in_any_folder_and_starts_afresh(demo: Demo) -> None:
    folder, printed = demo
    assert len(metrics(folder / "runs/demo")) == STEPS
    assert not any((folder / place).exists() for place in LEFT)
    summary = json.loads((folder / "runs/demo/summary.json").read_text())
    names = ("category_accuracy", "title_exact_match", "price_mape", "parse_rate")
    for name in (*names, "blind_category_accuracy", "constant_category_accuracy"):
        assert summary["metrics"][name].keys() == {"value", "low", "high", "n"}
    assert "report: runs/demo/report.html" in printed
    assert "category_accuracy" in printed and "blind" in printed
    assert (folder / "runs/demo/export/model.safetensors").is_file()
    report = (folder / "runs/demo/report.html").read_text()
    assert report.count("<img") == 12
    assert "demo - models/demo" in printed, "before and after are compared"
    card = (folder / "runs/demo/export/README.md").read_text()
    assert "| category_accuracy | " in card and "blind control" in card


@pytest.mark.slow
def test_wandbs_offline_data_of_the_demo_hold_curves_and_tables_with_pictures(demo: Demo) -> None:
    run_folder = demo[0] / "runs/demo"
    folder = run_folder / "wandb"
    (file,) = folder.glob("offline-run-*/run-*.wandb")
    lines = history(file)
    curve = [line["train/loss"] for line in lines if "train/loss" in line]
    assert curve == [line["loss"] for line in metrics(run_folder)]
    assert [line["_step"] for line in lines if "eval/category_accuracy" in line] == [3, STEPS]
    assert any(key.startswith("train/grad_norms/") for key in lines[-1])
    tables = sorted(folder.glob("offline-run-*/files/media/table/eval/examples/*.json"))
    assert len(tables) == 2
    rows = json.loads(tables[-1].read_text())
    assert len(rows["data"]) == 12 and all(row[0] == "Image" for row in rows["data"])


@pytest.mark.slow
def test_a_mistake_in_an_override_ends_the_demo_with_its_line(tmp_path: Path) -> None:
    done = run(sys.executable, LAUNCH / "demo.py", "data.max_token=5", cwd=tmp_path)
    assert done.returncode == 2
    message = last_line(done, "ConfigError")
    assert "unknown key 'data.max_token'" in message
    assert "did you mean 'data.max_tokens'?" in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "told"),
    [
        (["demo.py", "--help"], "usage: demo.py [-h] [key=value ...]"),
        (["prepare.py"], "error: the following arguments are required: recipe\n"),
        (["evaluate.py", "--shards", "x"], "error: the following arguments are required: MODEL\n"),
    ],
)
def test_a_command_says_what_it_takes_and_calls_no_override_required(
    command: list[str], told: str, tmp_path: Path
) -> None:
    name, *arguments = command
    done = run(sys.executable, LAUNCH / name, *arguments, cwd=tmp_path)
    assert told in done.stdout + done.stderr
    assert done.returncode == (0 if "--help" in arguments else 2)
    assert list(tmp_path.iterdir()) == []

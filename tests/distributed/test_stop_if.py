"""Evaluations of the base and `train.stop_if`, in real runs: killed, stopped, gone on with."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from phi3v.training.tracking.sinks import EVALUATION
from tests.commands import kill, metrics, plain, python, run, start, wait_for

pytestmark = pytest.mark.slow

# No loss is better by 100, so the run ends with the second evaluation after that of the base.
RULE = "train.stop_if={metric: loss, patience: 2, min_delta: 100}"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, tiny_shards: Path, tiny_model: Path) -> Path:
    """12 steps, evaluated every 2 and before the first."""
    path = tmp_path_factory.mktemp("recipe") / "run.yaml"
    values = {
        "run": {"out": "run"},
        "model": {"path": str(tiny_model)},
        "data": {"shards": str(tiny_shards), "max_tokens": 264, "max_views": 32},
        "optim": {"lr": 1e-3, "schedule": "cosine"},
        "train": {"max_steps": 12},
        "eval": {
            "rows": 4,
            "metrics": ["exact_match", "anls"],
            "max_new_tokens": 8,
            "every": 2,
            "at_start": True,
        },
        "checkpoint": {"every": 2, "keep": 9, "best": "anls"},
        "tracking": {"sinks": ["json"]},
    }
    path.write_text(json.dumps(values), encoding="utf-8")  # JSON is YAML
    return path


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory, recipe: Path) -> Path:
    """The folder of a run of two ranks that its rule ended after step 4."""
    cwd = tmp_path_factory.mktemp("stopped")
    done = run(*plain(2, recipe, RULE), cwd=cwd)
    assert done.returncode == 0, done.stderr
    rates = "its learning rates were those of a run of 12 steps"
    ends = f"train.stop_if ends the run after step 4: {why(cwd / 'run')}; {rates}\n"
    assert ends in done.stderr
    assert done.stderr.count("evaluation at step 4: ") == 1
    return cwd / "run"


def evaluated(folder: Path) -> dict[int, float]:
    """The loss of each step that evaluations.jsonl has, which has each once."""
    lines = list(map(json.loads, (folder / "evaluations.jsonl").read_text().splitlines()))
    found = {line["step"]: line["loss"] for line in lines}
    assert len(found) == len(lines)
    return found


def why(folder: Path) -> str:
    """What is said of a run that `RULE` ended."""
    best = f"{evaluated(folder)[0]:.4f} of step 0"
    return f"loss is no better than {best} by more than 100 in 2 evaluations"


def summary(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return found


def test_a_run_that_its_rule_ends_is_finished_and_says_why(stopped: Path) -> None:
    found = summary(stopped)
    assert (found["is_finished"], found["steps"]) == (True, 4)
    assert (found["stopped_by"], found["stop_if"]["min_delta"]) == (why(stopped), 100)
    assert found["evaluation_loss"] == evaluated(stopped)[4]
    assert (stopped / "checkpoints" / "latest").read_text() == "step-00000004"
    rates = [line["lr"]["language"] for line in metrics(stopped)]
    assert rates[3] == pytest.approx(0.75e-3), "a cosine over 12 steps"


def test_the_base_is_the_first_point_of_every_curve_and_no_best_checkpoint(stopped: Path) -> None:
    losses = evaluated(stopped)
    assert list(losses) == [0, 2, 4] and losses[0] > losses[2] > losses[4]
    # By anls all three are 0, or the base the best: only what is saved can be kept.
    assert (stopped / "checkpoints" / "best").read_text() in ("step-00000002", "step-00000004")
    told = map(json.loads, (stopped / "events.jsonl").read_text().splitlines())
    steps = [event["step"] for event in told if event.get("name") == EVALUATION]
    assert steps == [0, 2, 4]
    page = (stopped / "report.html").read_text()
    assert "stopped by" in page and why(stopped) in page


def test_the_same_command_trains_no_step_more_until_the_key_is_changed(
    stopped: Path, recipe: Path
) -> None:
    before = (stopped / "metrics.jsonl").read_text()
    for value in ("train.max_steps=12", "train.max_steps=20"):
        done = run(*plain(2, recipe, RULE, value), cwd=stopped.parent)
        assert done.returncode == 0, done.stderr
        assert "4 steps, stopped by train.stop_if: loss is no better than" in done.stdout
        assert (stopped / "metrics.jsonl").read_text() == before
    done = run(*plain(2, recipe, "train.max_steps=6"), cwd=stopped.parent)
    assert done.returncode == 0, done.stderr
    assert list(evaluated(stopped)) == [0, 2, 4, 6]
    found = summary(stopped)
    assert (found["steps"], found["stopped_by"], found["stop_if"]) == (6, None, None)


def test_a_run_that_is_killed_on_the_way_ends_where_it_would_have(
    recipe: Path, tmp_path: Path
) -> None:
    """Killed after the evaluation that ends it, it goes on with that; before it, makes it anew."""
    folder = tmp_path / "run"
    process = start(*python(recipe, RULE), cwd=tmp_path)
    wait_for(process, lambda: (folder / "checkpoints" / "step-00000002").exists())
    kill(process)
    assert 0 in evaluated(folder) and 4 not in evaluated(folder)
    lines = (folder / "evaluations.jsonl").read_text().splitlines(keepends=True)
    torn = lines[0] + '{"step": 2, "lo'  # the disk was full when it had evaluated step 2
    (folder / "evaluations.jsonl").write_text(torn)
    done = run(*python(recipe, RULE), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    losses = {step: loss for step, loss in evaluated(folder).items() if step <= 4}
    assert list(losses) == [0, 2, 4], "the base is not evaluated again, step 2 is"
    reason = why(folder)
    assert summary(folder)["stopped_by"] == reason
    (folder / "summary.json").unlink()  # killed before it was written
    done = run(*python(recipe, RULE), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(metrics(folder)) == summary(folder)["steps"] == 4
    assert summary(folder)["stopped_by"] == reason


def test_a_signal_during_the_evaluation_of_the_base_loses_nothing(
    recipe: Path, tmp_path: Path
) -> None:
    """There is nothing to save yet, and the base is evaluated by the next start."""
    folder = tmp_path / "run"
    process = start(*python(recipe, "train.max_steps=2"), cwd=tmp_path)
    wait_for(process, lambda: (folder / "data.json").exists())
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 75, err
    assert "before the first step; the same command goes on" in err or "after step 1" in err
    done = run(*python(recipe, "train.max_steps=2"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert list(evaluated(folder)) == [0, 2]

"""TensorBoard and events.jsonl: every record once, however a run was killed and taken up."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from phi3v.config import RunConfig, build_recipe, to_dict
from phi3v.evaluation.report import Example
from phi3v.training.tracking import Tracker, open_tracker
from phi3v.training.tracking.sinks import Histogram

RECIPE = {
    "run": {"out": "demo"},
    "model": {"path": "models/tiny"},
    "data": {"shards": "shards/demo"},
    "optim": {"lr": 1e-4},
    "train": {"max_steps": 10},
    "wandb": {"mode": "disabled"},
    "tracking": {"sinks": ["tensorboard", "json"]},
}
PICTURE = np.full((4, 6, 3), 7, dtype=np.uint8)
SEEN = Example(PICTURE, "a|b\n?", "A bag", "A tie", "A hat", False, {"rouge_l": 0.5}, "r1")
WORDS = Example(None, "In words?", "One", "One", None, True, {"rouge_l": None}, "r2")
SCORES = {"rouge_l": {"value": 0.5, "low": 0.25, "high": None, "n": 2}}
SCORED = {"step": 2, "loss": 2.0, "metrics": SCORES}


@pytest.fixture(autouse=True)
def disabled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)


def begin(folder: Path, done: int, *overrides: str) -> Tracker:
    """Start a run that goes on after a step."""
    cfg = build_recipe(RunConfig, RECIPE, Path("demo.yaml"), overrides)
    tracker = open_tracker(cfg, folder, done)
    tracker.log_config(done, to_dict(cfg))
    tracker.log_data(lambda: {"train_views_per_sample": Histogram.of(np.array([2, 2, 5]))})
    return tracker


def line(step: int, loss: float) -> dict[str, Any]:
    values = {"loss": loss, "grad_norms": {"head": 0.5, "vision": None}, "skipped": None}
    return {"step": step, "is_warmup": step == 1, **values}


def tell(tracker: Tracker, *steps: int, add: float = 0.0) -> None:
    """A loss for each step, and an evaluation after each second one."""
    for step in steps:
        tracker.log_step(line(step, step + add))
        if step % 2 == 0:
            tracker.log_evaluation(step, step + add, SCORES, [SEEN, WORDS])


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    found = [json.loads(text) for text in (folder / "events.jsonl").read_text().splitlines()]
    return [event for event in found if event["event"] == kind]


def board(folder: Path) -> EventAccumulator:
    """What TensorBoard shows."""
    shown = EventAccumulator(str(folder / "tensorboard"), {"images": 0, "scalars": 0, "tensors": 0})
    return shown.Reload()


def curve(shown: EventAccumulator, name: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in shown.Scalars(name)]


@pytest.fixture
def killed(tmp_path: Path) -> Path:
    """A run that was killed in step 4, taken up after step 3, and done at step 5."""
    tracker = begin(tmp_path, 0)
    tell(tracker, 1, 2, 3)
    tracker.log_step(line(4, 4))
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('{"event": "scalars", "st')
    tracker = begin(tmp_path, 3, "train.max_steps=5")
    tracker.log_again(lambda: [line(1, 1), line(2, 2), line(3, 3)], lambda: [SCORED])
    tell(tracker, 4, 5, add=0.25)
    tracker.log_checkpoint(5, tmp_path / "checkpoints" / "step-00000005", ("last",))
    tracker.finish()
    return tmp_path


LOSSES = [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.25), (5, 5.25)]


def test_events_jsonl_has_every_record_once(killed: Path) -> None:
    told = [event for event in events(killed, "scalars") if event["name"] == "train"]
    assert [(event["step"], event["values"]["loss"]) for event in told] == LOSSES
    first = {"loss": 1.0, "grad_norms/head": 0.5, "is_warmup": 1, "skipped": 0.0}
    assert told[0]["values"] == first
    evaluated = [event for event in events(killed, "scalars") if event["name"] == "eval"]
    assert [event["step"] for event in evaluated] == [2, 4]
    scores = {"rouge_l": 0.5, "rouge_l_low": 0.25, "rouge_l_n": 2}
    assert evaluated[1]["values"] == {"loss": 4.25, **scores}
    tables = events(killed, "table")
    assert [table["step"] for table in tables] == [2, 4]
    columns = ["prompt", "reference", "prediction", "blind", "right", "rouge_l", "id"]
    assert tables[0]["columns"] == columns
    assert tables[0]["rows"][1] == ["In words?", "One", "One", None, True, None, "r2"]
    (histogram,) = events(killed, "histogram")
    assert histogram["name"] == "data/train_views_per_sample" and histogram["step"] == 0
    assert histogram["counts"] == [2, 0, 0, 1] and histogram["edges"][0] == 1.5
    configs = events(killed, "config")
    assert [event["values"]["train"]["max_steps"] for event in configs] == [10, 5]
    (artifact,) = events(killed, "artifact")
    assert artifact["folder"].endswith("step-00000005") and artifact["aliases"] == ["last"]


def test_tensorboard_shows_every_record_once(killed: Path) -> None:
    shown = board(killed)
    assert curve(shown, "train/loss") == LOSSES
    assert curve(shown, "train/grad_norms/head") == [(step, 0.5) for step, _ in LOSSES]
    assert curve(shown, "eval/loss") == [(2, 2.0), (4, 4.25)]
    images = [(image.step, image.width) for image in shown.Images("eval/examples/image-01")]
    assert images == [(2, 6), (4, 6)]
    (histogram,) = shown.Histograms("data/train_views_per_sample")
    assert histogram.histogram_value.num == 3 and histogram.step == 0
    texts = Counter(text.step for text in shown.Tensors("eval/examples/text_summary"))
    assert texts == {2: 1, 4: 1}
    table = shown.Tensors("eval/examples/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| 1 | a\\|b ? | A bag | A tie | A hat | False | 0.5 | r1 |" in table.splitlines()


def test_going_back_in_one_start_forgets_the_later_steps(tmp_path: Path) -> None:
    tracker = begin(tmp_path, 0)
    tell(tracker, 1, 2, 3)
    tracker.forget_after(1)
    tell(tracker, 2, 3, add=0.5)
    tracker.finish()
    expected = [(1, 1.0), (2, 2.5), (3, 3.5)]
    assert curve(board(tmp_path), "eval/loss") == [(2, 2.5)]
    told = [event for event in events(tmp_path, "scalars") if event["name"] == "train"]
    assert [(event["step"], event["values"]["loss"]) for event in told] == expected
    assert curve(board(tmp_path), "train/loss") == expected


def test_an_evaluation_that_is_repeated_after_the_last_step_is_told_once(tmp_path: Path) -> None:
    """A run that was killed between its last evaluation and its summary."""
    for done in (0, 2):
        tracker = begin(tmp_path, done)
        tell(tracker, *range(done + 1, 2), 2)
        tracker.finish()
    assert [event["step"] for event in events(tmp_path, "table")] == [2]
    assert curve(board(tmp_path), "eval/loss") == [(2, 2.0)]


def test_a_sink_that_is_new_to_a_run_gets_the_steps_and_scores_before(tmp_path: Path) -> None:
    tracker = begin(tmp_path, 2)
    scored = [SCORED | {"step": 0}, SCORED, SCORED | {"step": 4}]  # of the base, and to come
    tracker.log_again(lambda: [line(1, 1), line(2, 2)], lambda: scored)
    tell(tracker, 3)
    tracker.finish()
    expected = [(1, 1.0), (2, 2.0), (3, 3.0)]
    told = [event for event in events(tmp_path, "scalars") if event["name"] == "train"]
    assert [(event["step"], event["values"]["loss"]) for event in told] == expected
    shown = board(tmp_path)
    assert curve(shown, "train/loss") == expected
    assert curve(shown, "eval/loss") == [(0, 2.0), (2, 2.0)] and not events(tmp_path, "table")


def test_many_different_lengths_share_bins() -> None:
    histogram = Histogram.of(np.arange(1000))
    assert len(histogram.counts) == 64 and histogram.counts.sum() == 1000
    assert (histogram.edges[0], histogram.edges[-1]) == (-0.5, 999.5)

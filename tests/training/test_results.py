"""What a run leaves for people says how fast it was, however often it stopped."""

import json
from pathlib import Path
from typing import Any

import pytest

from phi3v.config import RunConfig, build_recipe, default_deepspeed, load_deepspeed
from phi3v.training.results import best_scores, throughput, write_results
from phi3v.training.run_folder import RunFolder


def step(number: int, seconds: float = 2.0, **changes: Any) -> dict[str, Any]:
    """A line of metrics.jsonl."""
    line = {
        "step": number,
        "epoch": 0,
        "loss": 2.0,
        "samples": 3,
        "tokens": 100,
        "label_tokens": 40,
        "views": 5,
        "step_seconds": seconds,
        "data_wait_seconds": 0.5,
        "tokens_per_second": 100 / seconds,
        "flops": 1e9,
        "mfu": 0.4 / seconds,
        "memory_gb": 1.5,
        "packing": 0.9,
        "balance": 0.8,
        "views_per_second": 5 / seconds,
        "is_warmup": number == 1,
    }
    return line | changes


def test_rates_are_totals_over_the_time_of_the_steps() -> None:
    found = throughput([step(1, 60.0), step(2, 1.0), step(3, 4.0, tokens=400, balance=0.5)])
    assert found == {
        "warmup_steps": 1,
        "steps": 2,
        "samples": 6,
        "tokens": 500,
        "seconds": 5.0,
        "tokens_per_second": 100.0,
        "views_per_second": 2.0,
        "mfu": pytest.approx(2 * 0.4 / 5),
        "packing": pytest.approx(0.9),
        "balance": pytest.approx((0.8 + 4 * 0.5) / 5),
        "data_wait": 0.2,
        "memory_gb": 1.5,
    }


def test_the_first_step_after_a_restart_does_not_count_either() -> None:
    steady = [step(n) for n in range(2, 7)]
    restarted = [step(n, seconds=60.0, is_warmup=True) if n == 4 else step(n) for n in range(2, 7)]
    first = step(1, seconds=60.0)
    found, expected = throughput([first, *restarted]), throughput([first, *steady])
    assert (found["warmup_steps"], found["steps"]) == (2, 4)
    for name in ("tokens_per_second", "views_per_second", "mfu", "balance", "data_wait"):
        assert found[name] == pytest.approx(expected[name])


def test_the_peak_of_memory_may_be_in_a_step_that_does_not_count() -> None:
    assert throughput([step(1, memory_gb=9.0), step(2)])["memory_gb"] == 9.0


def test_mfu_is_null_where_a_step_has_none() -> None:
    assert throughput([step(1), step(2), step(3, mfu=None)])["mfu"] is None


@pytest.mark.parametrize("steps", [[], [step(1)]], ids=["no step", "only a first step"])
def test_a_run_without_steps_that_count_has_no_rates(steps: list[dict[str, Any]]) -> None:
    found = throughput(steps)
    assert (found["warmup_steps"], found["steps"], found["seconds"]) == (len(steps), 0, 0)
    for name in ("tokens_per_second", "views_per_second", "mfu", "packing", "balance", "data_wait"):
        assert found[name] is None


def test_lines_of_a_run_that_was_started_before_steps_were_marked_all_count() -> None:
    lines = [step(number) for number in (1, 2)]
    for line in lines:
        del line["is_warmup"], line["views_per_second"]
    assert throughput(lines)["steps"] == 2


def test_summary_and_report_tell_the_throughput_and_every_dataset(tmp_path: Path) -> None:
    values = {
        "run": {"out": str(tmp_path)},
        "model": {"path": "models/tiny"},
        "data": {"shards": [{"path": "shards/one"}, {"path": "shards/two", "weight": 0.25}]},
        "optim": {"lr": 1e-4},
        "train": {"max_steps": 3},
    }
    cfg = build_recipe(RunConfig, values, Path("run.yaml"), ())
    folder, ds = RunFolder(tmp_path), load_deepspeed(default_deepspeed(has_cuda=False), 2)
    folder.write_origin(cfg, ds, {"samples": 12, "fingerprint": "abc"}, world_size=2)
    lines = [step(number) for number in (1, 2, 3)]
    for line in lines:
        folder.add_metrics(line)
    write_results(folder, cfg, None, step=3, is_finished=True)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["throughput"] == throughput(lines)
    report = (tmp_path / "report.html").read_text()
    assert "<h2>Throughput</h2>" in report and "<td>50</td>" in report  # tokens per second
    assert "shards/one, shards/two x 0.25 (12 samples, abc)" in report


@pytest.mark.parametrize(
    ("best", "order"),
    [("loss", [8, 4]), ("exact_match", [4, 8]), ("price_mape", [8, 4]), ("other", []), (None, [])],
)
def test_the_best_step_has_the_highest_score(best: str | None, order: list[int]) -> None:
    def entry(step: int, loss: float, exact: float, error: float) -> dict[str, Any]:
        values = {"exact_match": {"value": exact}, "price_mape": {"value": error}}
        return {"step": step, "loss": loss, "metrics": values}

    scores = best_scores([entry(4, 2.0, 0.5, 0.3), entry(8, 1.0, 0.25, 0.1)], best)
    assert sorted(scores, key=lambda step: -scores[step]) == order

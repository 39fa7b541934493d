"""What a run leaves for people says how fast it was, however often it stopped."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from phi3v.config import RunConfig, build_recipe, default_deepspeed, load_deepspeed
from phi3v.data import Dataset
from phi3v.errors import Diverged
from phi3v.evaluation.evaluate import Evaluation
from phi3v.evaluation.metrics import Score
from phi3v.evaluation.outcomes import Outcome
from phi3v.evaluation.report import Saved
from phi3v.training import results
from phi3v.training.checkpoints.store import publish
from phi3v.training.opening import describe_data
from phi3v.training.results import (
    best_scores,
    check_diverged,
    divergence,
    epochs,
    facts,
    saved,
    throughput,
    write_results,
)
from phi3v.training.run_folder import RunFolder
from tests.page import Page
from tests.tiny import QUESTION
from tests.training.saved import save_partial


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


@pytest.fixture
def run(tmp_path: Path) -> tuple[RunFolder, RunConfig]:
    """A run of three steps on two datasets, just begun."""
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
    for number in (1, 2, 3):
        folder.add_metrics(step(number))
    return folder, cfg


def test_summary_and_report_tell_the_throughput_and_every_dataset(
    run: tuple[RunFolder, RunConfig],
) -> None:
    folder, cfg = run
    write_results(folder, cfg, None, step=3, is_finished=True)
    summary = json.loads((folder.path / "summary.json").read_text())
    assert summary["throughput"] == throughput([step(number) for number in (1, 2, 3)])
    report = (folder.path / "report.html").read_text()
    assert "<h2>Throughput</h2>" in report and "<td>50</td>" in report  # tokens per second
    assert "shards/one, shards/two x 0.25 (12 samples, abc)" in report


def test_the_settings_tell_what_was_frozen_each_modules_rate_and_the_batch(
    run: tuple[RunFolder, RunConfig],
) -> None:
    folder, cfg = run
    told = facts(folder, cfg)
    batch = json.loads((folder.path / "deepspeed.json").read_text())["train_batch_size"]
    assert (told["frozen"], told["batch"]) == ("nothing", f"{batch} packs, float32")
    cfg = replace(
        cfg,
        model=replace(cfg.model, freeze=("vision", "head")),
        optim=replace(cfg.optim, projector_lr=3e-6),
        debug=replace(cfg.debug, overfit_one_pack=True),
    )
    told = facts(folder, cfg)
    assert told["frozen"] == "vision, head"
    rates = "projector 3e-06, language 0.0001, embeddings 0.0001; cosine"
    assert told["peak learning rate"] == rates
    assert told["shards"].endswith("abc), of which the first pack alone is trained on")


def test_epochs_are_samples_over_those_of_the_datasets_by_their_weights(
    run: tuple[RunFolder, RunConfig],
) -> None:
    _, cfg = run
    folders = [{"splits": {"train": {"samples": n}}} for n in (120, 40)]
    assert epochs(cfg, {"datasets": folders}, 1040) == 8.0  # an epoch: 120 + 0.25 * 40
    assert epochs(cfg, {"samples": 12}, 1040) is None
    overfit = replace(cfg, debug=replace(cfg.debug, overfit_one_pack=True))
    assert epochs(overfit, {"datasets": folders}, 1040) is None


def test_an_evaluation_is_in_the_report_the_answers_and_a_line(
    run: tuple[RunFolder, RunConfig], tiny_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, cfg = run
    dataset = Dataset(tiny_shards, "validation")
    told = Outcome(0, "r<1>", "What?", "A hat", "A cat", None, scores={"anls": 0.8})
    scores = {"anls": Score(0.8, 0.75, 0.85, 1), "blind_anls": Score(0.1, 0.0, 0.2, 1)}
    evaluation = Evaluation(scores, 1.25, [told], dataset)
    folder.add_evaluation(2, loss=evaluation.loss, metrics=evaluation.metrics())
    write_results(folder, cfg, evaluation, step=2, is_finished=False)
    line = "evaluation at step 2: loss 1.250, anls 80.0% (75.0% to 85.0% n=1, blind 10.0% n=1)\n"
    assert capsys.readouterr().err == line
    (answer,) = (folder.path / "predictions.jsonl").read_text().splitlines()
    assert json.loads(answer)["scores"] == {"anls": 0.8}
    report = Page((folder.path / "report.html").read_text())
    for shown in ("anls (higher is better)", "r<1>", "A cat", "75.0%", "config.yaml", "max_steps"):
        assert shown in report.text


def test_data_json_tells_the_folders_splits_and_how_long_samples_are(tiny_shards: Path) -> None:
    (folder,) = describe_data(Dataset(tiny_shards, "train"))["datasets"]
    train, held_out = folder["splits"]["train"], folder["splits"]["validation"]
    assert train["samples"] + held_out["samples"] == 120
    assert train["images"] == train["samples"] == sum(n for _, n in train["histogram"])
    assert folder["rejected"]["count"] == 0
    assert folder["recipe"]["source"]["user"] == QUESTION and folder["licenses"] == []


def test_the_report_names_checkpoints_that_are_there_whole_or_not(
    run: tuple[RunFolder, RunConfig],
) -> None:
    folder, cfg = run
    for number in (1, 2, 3):
        save_partial(folder.checkpoints, number, saved_at="2026-11-21T20:00:00.123456+00:00")
        publish(folder.checkpoints, number)
    (folder.checkpoints / "step-00000002" / "manifest.json").write_text("{}")
    whole = Saved(1, "2026-11-21 20:00:00", 240)
    assert saved(folder) == [
        whole,
        Saved(2, "", 0, ("damaged",)),
        replace(whole, step=3, marks=("latest",)),
    ]


def test_a_run_is_finished_only_when_its_report_is_written(
    run: tuple[RunFolder, RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(results, "write_report", broken)
    with pytest.raises(OSError, match="disk full"):
        write_results(*run, None, step=3, is_finished=True)
    assert not (run[0].path / "summary.json").exists()


@pytest.mark.parametrize(
    ("best", "order"),
    [
        ("loss", [8, 4]),
        ("exact_match", [4, 8]),
        ("price_mape", [8, 4]),
        ("price_mae", [8, 4]),
        ("other", []),
        (None, []),
    ],
)
def test_the_best_step_has_the_highest_score(best: str | None, order: list[int]) -> None:
    def entry(step: int, loss: float, exact: float, error: float) -> dict[str, Any]:
        names = {"exact_match": exact, "price_mape": error, "price_mae": error}
        values = {name: {"value": value} for name, value in names.items()}
        return {"step": step, "loss": loss, "metrics": values}

    scores = best_scores([entry(4, 2.0, 0.5, 0.3), entry(8, 1.0, 0.25, 0.1)], best)
    assert sorted(scores, key=lambda step: -scores[step]) == order


def test_a_step_that_gave_no_number_is_not_the_best() -> None:
    """A loss that is not finite, a metric without rows, a metric asked for only later."""
    entries = [
        {"step": 4, "loss": None, "metrics": {"anls": {"value": None}}},
        {"step": 8, "loss": 3.0, "metrics": {}},
    ]
    assert best_scores(entries, "loss") == {8: -3.0}
    assert best_scores(entries, "anls") == {}


def test_the_base_is_not_the_best_step_for_it_is_no_checkpoint() -> None:
    entries = [{"step": step, "loss": 1.0 + step, "metrics": {}} for step in (0, 4, 8)]
    assert best_scores(entries, "loss") == {4: -5.0, 8: -9.0}


def test_a_run_that_has_evaluated_its_base_alone_has_a_report(
    run: tuple[RunFolder, RunConfig], tiny_shards: Path
) -> None:
    folder, cfg = run
    folder.cut_metrics(0)
    told = Outcome(0, "r", "What?", "A hat", "A cat", None, scores={"anls": 0.8})
    scores = {"anls": Score(0.8, 0.75, 0.85, 1)}
    evaluation = Evaluation(scores, 2.5, [told], Dataset(tiny_shards, "validation"))
    folder.add_evaluation(0, loss=2.5, metrics=evaluation.metrics())
    assert write_results(folder, cfg, evaluation, step=0, is_finished=False) is None
    found = json.loads((folder.path / "summary.json").read_text())
    assert (found["steps"], found["stopped_by"], found["is_finished"]) == (0, None, False)
    assert (folder.path / "report.html").is_file()


# --- divergence ---


def losses_of(*losses: float | None) -> list[dict[str, Any]]:
    return [step(number, loss=loss) for number, loss in enumerate(losses, 1)]


@pytest.mark.parametrize(
    ("losses", "told"),
    [
        ([1.2, 8, 11, 10, 9, 9, 9, 9], "the loss was 1.200 at first, and 9.000 over the last 4"),
        ([1.2, *[9.0] * 40], "the loss was 1.200 at first, and 9.000 over the last 20 steps"),
        ([1.2, 1.0, 1.1, *[6.0, 90.0] * 20], "the loss was 1.200 at first, and 48.000 over the"),
        (
            [6.7, 9.0, 60.0, 90.0, 31.0, 12.0],
            "the loss was 6.700 at first, and 31.000 over the last",
        ),
    ],
    ids=["within a few steps", "at once", "late and wildly", "in a short run"],
)
def test_a_loss_that_ends_far_above_where_it_began_has_diverged(
    losses: list[float], told: str
) -> None:
    assert (divergence(losses_of(*losses)) or "").startswith(told)


@pytest.mark.parametrize(
    "losses",
    [
        [5.3, 4.0, 3.0, 2.0],
        [1.2, *[9.0] * 20, *[1.3] * 20],
        [1.0, *[1.4] * 30],
        [0.01, *[0.05] * 30],
        [0.6, *[0.5, 1.5, 0.9] * 10],
        [1.0, 9.0, 9.0],
        [],
    ],
    ids=["learns", "recovers", "a little", "near 0", "batches that differ", "too few", "none"],
)
def test_a_loss_that_does_not_has_not(losses: list[float]) -> None:
    assert divergence(losses_of(*losses)) is None


def test_steps_that_were_skipped_say_nothing_of_divergence() -> None:
    lines = losses_of(1.0, 1.0, 1.0, None, None, 50.0, 50.0)
    for line in lines[3:]:
        line["skipped"] = "the loss is above 4"
    assert divergence([*lines, *losses_of(1.0)]) is None


def test_a_run_that_diverged_says_so_everywhere(run: tuple[RunFolder, RunConfig]) -> None:
    folder, cfg = run
    assert check_diverged(folder) is None
    for number in range(4, 12):
        folder.add_metrics(step(number, loss=20.0))
    found = write_results(folder, cfg, None, step=11, is_finished=True)
    assert found == "the loss was 2.000 at first, and 20.000 over the last 5 steps"
    assert json.loads((folder.path / "summary.json").read_text())["diverged"] == found
    assert f"this run: {found}" in (folder.path / "report.html").read_text()
    with pytest.raises(Diverged) as caught:
        check_diverged(folder)
    assert caught.value.exit_code == 2
    assert str(caught.value) == (
        f"{folder.path} diverged: {found}; its weights are worse than those it started from. Lower "
        "optim.lr, or warm up longer (optim.warmup_ratio), in another run.out; see "
        f"{folder.path}/report.html"
    )


def test_a_run_that_did_not_diverge_is_not_refused(run: tuple[RunFolder, RunConfig]) -> None:
    folder, cfg = run
    assert write_results(folder, cfg, None, step=3, is_finished=True) is None
    check_diverged(folder)

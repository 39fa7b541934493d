"""What is checked before a run starts anything slow, or writes anything."""

import json
import shutil
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from phi3v.config import RunConfig, build_recipe, check, default_deepspeed, load_deepspeed
from phi3v.config.check import SMOKE_STEPS
from phi3v.data.packing import Position
from phi3v.errors import CheckpointError, ConfigError, Diverged, ShardError
from phi3v.files import write_json
from phi3v.prepare import prepare
from phi3v.processing.processor import own_settings
from phi3v.samples.tiny import CLIP_MEAN, CLIP_STD
from phi3v.training.checkpoints.saving import Progress
from phi3v.training.loop import _is_finished, train
from phi3v.training.opening import Run, describe_data, describe_length, open_run
from phi3v.training.ranks import Ranks
from phi3v.training.run_folder import RunFolder
from phi3v.training.session import (
    Session,
    check_data,
    check_length,
    save,
    tell_start,
    wait_until_saved,
)
from phi3v.training.stopping import StopRequests
from phi3v.training.tracking import Tracker
from phi3v.training.watchdog import Watchdog
from tests.tiny import make_model, product_recipe, write_samples

DEEPSPEED = load_deepspeed(default_deepspeed(has_cuda=False), world_size=2)
RANKS = Ranks(rank=0, world_size=2, local_rank=0, local_size=2)


@pytest.fixture
def values(tiny_model: Path, tiny_shards: Path, tmp_path: Path) -> dict[str, Any]:
    """A recipe that can be run, as YAML would give it."""
    return {
        "run": {"out": str(tmp_path / "run")},
        "model": {"path": str(tiny_model)},
        "data": {"shards": str(tiny_shards), "max_tokens": 264},
        "optim": {"lr": 1e-3},
        "train": {"max_steps": 3},
    }


def opened(values: dict[str, Any], *overrides: str) -> Run:
    cfg = build_recipe(RunConfig, values, Path("demo.yaml"), overrides)
    return open_run(cfg, DEEPSPEED, RANKS)


def refusal(values: dict[str, Any], *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        opened(values, *overrides)
    return str(caught.value)


def test_a_sound_recipe_opens_and_writes_nothing(values: dict[str, Any], tmp_path: Path) -> None:
    assert opened(values).total_steps == 3
    assert list(tmp_path.iterdir()) == []


def test_whole_epochs_are_as_many_steps_as_their_packs_fill(values: dict[str, Any]) -> None:
    run = opened(values | {"train": {"epochs": 3}})
    steps = list(run.plan.steps(Position(), epochs=3))
    assert run.total_steps == len(steps) > 3
    assert {len(step.packs) for step in steps} == {DEEPSPEED.train_batch_size}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "eval.metrics=[blue]",
            "eval.metrics has 'blue', which is no metric; did you mean 'bleu'?",
        ),
        (
            "eval={pattern: '{a}', metrics: [a_mape]}",
            "eval.metrics has 'a_mape', which needs a num",
        ),
        ("eval.pattern='{a'", "eval.pattern '{a' has unbalanced braces"),
    ],
)
def test_metrics_that_could_not_be_computed_at_the_end_are_refused(
    values: dict[str, Any], override: str, message: str
) -> None:
    assert refusal(values, override).startswith(message)
    opened(values, override, "eval.rows=0")  # then they are not computed


def test_an_evaluation_without_rows_is_refused(
    values: dict[str, Any], catalogue: Path, tiny_model: Path, tmp_path: Path
) -> None:
    shards = tmp_path / "shards"
    prepare(product_recipe(catalogue, tiny_model, shards, split={"validation": 1e-12}))
    message = refusal(values, f"data.shards={shards}")
    assert message.startswith(f"{shards} has no rows in split 'validation'; ")
    opened(values, f"data.shards={shards}", "eval.rows=0")


def test_a_split_that_is_not_there_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ShardError, match="has no split 'test', it has: train, validation"):
        opened(values, "eval.split=test")


def test_a_training_split_without_rows_is_refused(values: dict[str, Any], tmp_path: Path) -> None:
    shards = write_samples(tmp_path / "empty", [])
    message = refusal(values, f"data.shards={shards}", "eval.rows=0")
    assert message.startswith(f"{shards} has no rows in split 'train', so there is nothing to ")


def test_a_sample_larger_than_a_pack_is_refused(values: dict[str, Any]) -> None:
    message = refusal(values, "data.max_tokens=20")
    assert " tokens and 5 views, a pack holds data.max_tokens 20 and data.max_views 64; " in message


@pytest.mark.parametrize(
    ("sizes", "what"),
    [({"text_pieces": 100}, "tokenizer"), ({"image_size": 84}, "crop_size")],
)
def test_shards_of_another_model_are_refused(
    values: dict[str, Any], tmp_path: Path, sizes: dict[str, int], what: str
) -> None:
    other = make_model(tmp_path / "other", **sizes)
    message = refusal(values, f"model.path={other}")
    made = json.loads((Path(values["data"]["shards"]) / "manifest.json").read_text())[what]
    own = own_settings(str(other))[what]
    told, found = (f"{v[:12]}..." if isinstance(v, str) else v for v in (made, own))
    assert message == (
        f"shards {values['data']['shards']} were prepared with {what} {told}, {other} has {found}; "
        "prepare them again with this model"
    )


def test_a_base_that_contradicts_the_manifest_is_refused(
    values: dict[str, Any], tmp_path: Path
) -> None:
    base = shutil.copytree(values["model"]["path"], tmp_path / "base")
    path = base / "preprocessor_config.json"
    write_json(path, json.loads(path.read_text()) | {"image_std": [0.5, 0.5, 0.5]})
    message = refusal(values, f"model.path={base}")
    assert " were prepared with image_std [0.26862954, 0.26130258, 0.27577711], " in message
    assert f"{base} has [0.5, 0.5, 0.5]; " in message


def test_a_base_without_image_settings_takes_those_of_the_manifest(
    values: dict[str, Any], tmp_path: Path
) -> None:
    base = shutil.copytree(values["model"]["path"], tmp_path / "base")
    (base / "preprocessor_config.json").unlink()
    run = opened(values, f"model.path={base}")
    assert describe_data(run.dataset)["view_settings"] == {
        "crop_size": 56,
        "image_side": 2,
        "image_mean": list(CLIP_MEAN),
        "image_std": list(CLIP_STD),
    }


def test_a_manifest_that_does_not_say_the_image_settings_is_refused(
    values: dict[str, Any], tmp_path: Path
) -> None:
    shards = shutil.copytree(values["data"]["shards"], tmp_path / "shards")
    manifest = json.loads((shards / "manifest.json").read_text())
    del manifest["image_mean"], manifest["manifest_sha256"]
    write_json(shards / "manifest.json", manifest)
    with pytest.raises(ShardError, match=r"manifest\.json does not say image_mean, so nobody"):
        opened(values, f"data.shards={shards}")


def test_another_recipe_in_the_run_folder_is_refused(values: dict[str, Any]) -> None:
    run = opened(values)
    run.folder.path.mkdir()
    run.folder.write_origin(run.cfg, run.ds, {}, world_size=2)
    opened(values, "train.max_steps=9", "eval.rows=1")
    assert "another recipe: optim.lr was 0.001 and is 1.0; " in refusal(values, "optim.lr=1")


def test_data_that_was_prepared_anew_is_not_gone_on_with(values: dict[str, Any]) -> None:
    run = opened(values)
    check_data(run, {})
    check_data(run, {"fingerprints": {"data": run.dataset.fingerprint}})
    with pytest.raises(CheckpointError) as caught:
        check_data(run, {"fingerprints": {"data": 64 * "f"}})
    assert str(caught.value).startswith(
        f"{run.folder.path} was trained on data with fingerprint ffffffffffff, "
    )


def finish(values: dict[str, Any], **summary: Any) -> RunConfig:
    """A recipe whose run is finished."""
    folder = RunFolder(Path(values["run"]["out"]))
    folder.path.mkdir()
    folder.write_summary({"is_finished": True, "steps": 3, **summary})
    return build_recipe(RunConfig, values, Path("demo.yaml"), [])


@pytest.mark.parametrize(
    ("overrides", "what"),
    [
        (["checkpoint.best=speed"], "which no evaluation gives; take one of loss, exact_match"),
        (["checkpoint.best=loss"], "eval.every is 0, so only the last step has a score"),
        (["checkpoint.best=loss", "eval.rows=0"], "eval.rows is 0, so no step has a score"),
        (
            ["checkpoint.best=loss", "eval.every=3", "checkpoint.every=2"],
            "set checkpoint.every to 3",
        ),
    ],
)
def test_a_best_checkpoint_that_nobody_scores_is_refused(
    values: dict[str, Any], overrides: list[str], what: str
) -> None:
    cfg = build_recipe(RunConfig, values, Path("demo.yaml"), overrides)
    with pytest.raises(ConfigError, match=what):
        check(cfg, DEEPSPEED)


@pytest.mark.parametrize(
    ("overrides", "what"),
    [
        (
            ["train.stop_if={metric: speed, patience: 1}"],
            "train.stop_if.metric is 'speed', which no evaluation gives; take one of loss, exact_",
        ),
        (
            ["train.stop_if={metric: loss, patience: 1}"],
            "train.stop_if asks for evaluations during training, but eval.every is 0; set it abov",
        ),
        (
            ["train.stop_if={metric: loss, patience: 1}", "eval={rows: 0, every: 2}"],
            "train.stop_if asks for evaluations during training, but eval.rows is 0; set it above",
        ),
    ],
)
def test_a_rule_to_stop_by_that_no_evaluation_serves_is_refused(
    values: dict[str, Any], overrides: list[str], what: str
) -> None:
    cfg = build_recipe(RunConfig, values, Path("demo.yaml"), overrides)
    with pytest.raises(ConfigError, match=what):
        check(cfg, DEEPSPEED)


def test_a_run_that_its_rule_stopped_is_finished_as_long_as_the_rule_is_the_same(
    values: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    rule = {"metric": "loss", "patience": 2, "min_delta": 0.0, "above": None, "below": None}
    values["train"] = {"max_steps": 9, "stop_if": {"metric": "loss", "patience": 2}}
    cfg = finish(values, stopped_by="loss is no better", stop_if=rule)
    train(cfg, DEEPSPEED, RANKS, StopRequests())
    told = "3 steps, stopped by train.stop_if: loss is no better (change that key to train on); see"
    assert told in capsys.readouterr().out
    for value in ("null", "{metric: loss, patience: 3}"):
        other = build_recipe(RunConfig, values, Path("demo.yaml"), [f"train.stop_if={value}"])
        assert not _is_finished(open_run(other, DEEPSPEED, RANKS))
    assert _is_finished(opened(values, "train.stop_if=null", "train.max_steps=3"))


def test_a_finished_run_says_so_and_is_not_started(
    values: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = finish(values)
    train(cfg, DEEPSPEED, RANKS, StopRequests())  # would look for other ranks otherwise
    folder = Path(cfg.run.out)
    assert capsys.readouterr().out == (
        f"{folder} is finished: 3 steps; see summary.json, or ask its model by launch/evaluate.py\n"
    )
    assert [path.name for path in folder.iterdir()] == ["summary.json"]
    assert json.loads((folder / "summary.json").read_text())["steps"] == 3


def test_a_finished_run_that_has_more_steps_than_are_asked_for_says_how_many(
    values: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    train(finish(values, steps=4), DEEPSPEED, RANKS, StopRequests())
    assert " is finished: 4 steps, more than the 3 that are asked for (name another run.out); " in (
        capsys.readouterr().out
    )


def test_a_finished_run_that_diverged_is_told_with_the_same_exit_code_again(
    values: dict[str, Any],
) -> None:
    cfg = finish(values, diverged="the loss was 1.200 at first, and 9.000 over the last 2 steps")
    with pytest.raises(Diverged, match="diverged: the loss was 1.200 at first"):
        train(cfg, DEEPSPEED, RANKS, StopRequests())


def test_an_unfinished_run_is_not_cut_to_fewer_steps_than_it_has_done(
    values: dict[str, Any],
) -> None:
    run = opened(values)
    check_length(run, 3)
    with pytest.raises(ConfigError) as caught:
        check_length(run, 4)
    assert str(caught.value) == (
        f"{run.folder.path} has done 4 steps, train.max_steps asks for 3; raise it, or name "
        "another run.out for a shorter run"
    )
    with pytest.raises(ConfigError, match=r"train\.epochs asks for"):
        check_length(opened(values | {"train": {"epochs": 1}}), 1000)


@pytest.mark.parametrize(
    "overrides",
    [
        ("train.max_steps=30", "optim.warmup_steps=30"),
        ("train.max_steps=null", "train.epochs=1", "optim.warmup_steps=50"),
    ],
)
def test_a_warm_up_as_long_as_the_run_is_refused(
    values: dict[str, Any], overrides: tuple[str, ...]
) -> None:
    message = refusal(values, *overrides)
    assert message.startswith(f"optim.warmup_steps is {overrides[-1][-2:]} and the whole run has ")
    assert message.endswith(
        "so that none would have the learning rate; set optim.warmup_steps=null "
        "optim.warmup_ratio=0.03, or train longer"
    )
    opened(values, *overrides[:-1], "optim.warmup_ratio=0.99")


def test_a_smoke_run_may_end_within_its_warm_up(values: dict[str, Any]) -> None:
    opened(values, f"train.max_steps={SMOKE_STEPS}", "optim.warmup_steps=100")
    assert "the whole run has" in refusal(
        values, f"train.max_steps={SMOKE_STEPS + 1}", "optim.warmup_steps=100"
    )


def test_the_length_of_a_run_is_told_with_what_makes_a_short_one_longer(
    values: dict[str, Any],
) -> None:
    run = opened(values | {"train": {"epochs": 2}})
    epoch = run.plan.first_epoch()
    assert epoch.samples == len(run.dataset)
    assert epoch.packs == DEEPSPEED.train_batch_size * epoch.steps and 0.5 < epoch.fill <= 1
    told = (
        f"{epoch.samples} samples in {epoch.packs} packs, {epoch.fill:.0%} full; {epoch.steps} "
        f"steps an epoch of 8 packs each, {2 * epoch.steps} steps in all"
    )
    more = epoch.packs // 2 * 2
    assert describe_length(run) == (
        f"{told}: few to learn from; deepspeed.train_batch_size=2 makes about {more} of them, or "
        "raise train.epochs, or train on more rows"
    )


@pytest.mark.parametrize(
    ("overrides", "end"),
    [
        (["train.max_steps=99"], "99 steps in all: few to learn from, raise train.max_steps"),
        (["train.max_steps=100"], "100 steps in all"),
        (["train.max_steps=20"], "20 steps in all"),
        (
            ["train.max_steps=30", "debug.overfit_one_pack=true"],
            "30 steps on the first pack alone (debug.overfit_one_pack)",
        ),
    ],
)
def test_a_long_run_and_a_smoke_run_are_given_no_advice(
    values: dict[str, Any], overrides: list[str], end: str
) -> None:
    assert describe_length(opened(values, *overrides)).endswith(end)


def test_a_start_says_with_which_step_a_run_goes_on(
    values: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    def told(done: int) -> list[str]:
        tell_start(run, done)
        return capsys.readouterr().err.splitlines()

    run = opened(values)
    place = run.folder.path
    assert told(0) == [describe_length(run)], "a new run goes on with nothing"
    place.mkdir()
    run.folder.write_origin(run.cfg, run.ds, {}, world_size=2)
    assert told(0)[1] == f"{place} goes on with step 1 of 3, for it has no checkpoint"
    assert told(2)[1] == f"{place} goes on with step 3 of 3, after step 2"
    assert told(3)[1] == f"{place} goes on after its last step, 3: with its evaluation"


def test_a_sink_that_cannot_work_is_refused_before_the_ranks_meet(values: dict[str, Any]) -> None:
    message = refusal(values, "wandb.log_checkpoint=best")
    assert message.startswith("wandb.log_checkpoint is 'best', but checkpoint.best names nothing")


def test_waiting_for_a_disk_has_the_time_of_a_start(tmp_path: Path) -> None:
    """A checkpoint of 50 GB takes a slow disk longer than a step may last."""
    limits: list[float] = []
    with closing(Watchdog(60, tmp_path, 0, 90)) as dog:
        dog.settle()
        saver: Any = SimpleNamespace(wait=lambda: limits.append(dog.limit), saved_step=None)
        saver.save = lambda *args, **kwargs: limits.append(dog.limit)
        nobody: Any = None
        run: Any = SimpleNamespace(folder=nobody, ranks=Ranks(1, 2, 1, 2))
        session = Session(run, nobody, saver, Tracker(None), nobody, dog)
        wait_until_saved(session)
        save(session, Progress(3))
        assert (limits, dog.limit) == ([90, 90], 60)

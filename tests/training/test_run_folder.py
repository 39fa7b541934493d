"""A run folder has one owner, one recipe, and one line per step."""

import json
import os
import shutil
import socket
import threading
from pathlib import Path

import pytest
import yaml

from phi3v.config import (
    DeepSpeedConfig,
    RunConfig,
    build_recipe,
    default_deepspeed,
    load_deepspeed,
    to_dict,
)
from phi3v.errors import CheckpointError, ConfigError
from phi3v.training.run_folder import RunFolder, describe_environment

RECIPE = {
    "run": {"out": "runs/demo"},
    "model": {"path": "models/tiny"},
    "data": {"shards": "shards/demo"},
    "optim": {"lr": 1e-4},
    "train": {"max_steps": 10},
}


def recipe(*overrides: str) -> RunConfig:
    return build_recipe(RunConfig, RECIPE, Path("demo.yaml"), overrides)


def deepspeed(world_size: int = 2) -> DeepSpeedConfig:
    return load_deepspeed(default_deepspeed(has_cuda=False), world_size)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """A run that was started with the recipe."""
    folder = RunFolder(tmp_path)
    folder.write_origin(recipe(), deepspeed(), {"fingerprint": "abc"}, world_size=2)
    return folder


# --- the owner ---


def test_a_second_owner_is_told_who_the_first_is(tmp_path: Path) -> None:
    lock = RunFolder(tmp_path / "new").lock()
    with pytest.raises(ConfigError) as caught:
        RunFolder(tmp_path / "new").lock(patience=0)
    assert str(caught.value) == (
        f"run.out {tmp_path / 'new'} is in use by process {os.getpid()} on "
        f"{socket.gethostname()}; wait for its end, stop it, or name another folder"
    )
    lock.close()
    RunFolder(tmp_path / "new").lock().close()


def test_an_owner_removes_what_a_killed_one_was_writing(tmp_path: Path) -> None:
    (tmp_path / ".config.yaml.123.tmp").touch()
    (tmp_path / "metrics.jsonl").touch()
    RunFolder(tmp_path).lock().close()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "metrics.jsonl"]


def test_an_owner_that_is_about_to_end_is_waited_for(tmp_path: Path) -> None:
    first = RunFolder(tmp_path).lock()
    threading.Timer(0.5, first.close).start()
    RunFolder(tmp_path).lock().close()


def test_a_process_that_was_given_up_for_dead_leaves_the_folder_to_the_other(
    tmp_path: Path,
) -> None:
    """Where a lock holds on its own host only, the name in it changes under the first owner."""
    folder = RunFolder(tmp_path)
    lock = folder.lock()
    folder.check_owner()
    (tmp_path / ".lock").write_text("process 7 on node2")
    with pytest.raises(ConfigError, match="was taken over by process 7 on node2; this process"):
        folder.check_owner()
    lock.close()


@pytest.mark.parametrize("name", ["metrics.jsonl", "summary.json", "report.html", "config.yaml"])
def test_a_folder_where_a_file_of_the_run_belongs_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(ConfigError) as caught:
        RunFolder(tmp_path).lock()
    assert str(caught.value) == (
        f"{tmp_path / name} is a folder, where a run has a file; move it away, or name another "
        "run.out"
    )


@pytest.mark.parametrize("name", [".", "checkpoints"])
def test_a_file_where_a_folder_of_the_run_belongs_is_refused(tmp_path: Path, name: str) -> None:
    run = tmp_path / "run"
    wrong = run / name
    wrong.parent.mkdir(exist_ok=True)
    wrong.touch()
    with pytest.raises(ConfigError, match=f"^{wrong} is a file, where a run has a folder; move"):
        RunFolder(run).lock()


def test_a_pipe_where_a_file_of_the_run_belongs_is_called_one(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "report.html")
    with pytest.raises(ConfigError, match="report.html is a pipe, where a run has a file; move"):
        RunFolder(tmp_path).lock()


@pytest.mark.parametrize("name", ["metrics.jsonl", "evaluations.jsonl", "faults.jsonl"])
def test_a_link_in_the_place_of_a_file_that_a_run_adds_to_is_refused(
    tmp_path: Path, name: str
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "notes").write_text("mine\n")
    (tmp_path / "run" / name).symlink_to(tmp_path / "notes")
    with pytest.raises(ConfigError, match=f"{name} is a link, and a run writes to no file of anot"):
        RunFolder(tmp_path / "run").lock()
    assert (tmp_path / "notes").read_text() == "mine\n"


def test_a_lock_that_leads_elsewhere_is_refused(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/.lock").symlink_to(tmp_path / "keys")
    with pytest.raises(ConfigError, match="run/.lock is a link, not a lock that this program made"):
        RunFolder(tmp_path / "run").lock()
    assert (tmp_path / "keys").read_text() == "mine"


def test_a_purge_of_the_lock_does_not_end_a_run(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    lock = folder.lock()
    (tmp_path / ".lock").unlink()
    folder.check_owner()
    with pytest.raises(ConfigError, match="is in use by process"):
        RunFolder(tmp_path).lock(patience=0)
    lock.close()


# --- the recipe ---


def test_a_new_folder_takes_any_recipe(tmp_path: Path) -> None:
    RunFolder(tmp_path / "none").check_recipe(recipe(), deepspeed())


@pytest.mark.parametrize(
    "override",
    [
        "train.max_steps=20",
        "eval={rows: 3, every: 5}",
        "wandb.mode=disabled",
        "checkpoint={every: 7, keep: 1}",
        "train={max_steps: 10, stop_after: 60, hang_timeout: 90}",
        "faults.spike=8",
        "run.out=/moved/demo",
        "deepspeed=a/copy/of/the/same.json",
        "optim.warmup_steps=0",
        "data.shards=/moved/shards",  # a checkpoint tells the fingerprint of its data
        "data.shards=[{path: shards/demo}]",
    ],
)
def test_what_does_not_change_the_training_may_change(folder: RunFolder, override: str) -> None:
    folder.check_recipe(recipe(override), deepspeed())


def test_the_number_of_ranks_may_change(folder: RunFolder) -> None:
    folder.check_recipe(recipe(), deepspeed(world_size=4))


@pytest.mark.parametrize(
    ("overrides", "changes"),
    [
        (["optim.lr=2e-4"], "optim.lr was 0.0001 and is 0.0002"),
        (
            ["run.seed=1", "data.max_tokens=100"],
            "run.seed was 0 and is 1, data.max_tokens was 8192 and is 100",
        ),
        (["model.freeze=[vision]"], 'model.freeze was [] and is ["vision"]'),
        (["optim.head_lr=1e-5", "eval.rows=1"], "optim.head_lr was null and is 1e-05"),
        (["train={epochs: 1}"], "train.epochs was null and is 1"),
        (["optim.warmup_steps=5"], "optim.warmup_steps was null and is 5"),
        (["data.cost.view=2"], "data.cost.view was 0.0 and is 2.0"),
    ],
)
def test_another_recipe_is_refused_with_the_values_of_both_and_a_way_on(
    folder: RunFolder, overrides: list[str], changes: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        folder.check_recipe(recipe(*overrides), deepspeed())
    assert str(caught.value) == (
        f"run.out {folder.path} was started with another recipe: {changes}; take the values back, "
        "or name another run.out; to train on from what this run has learnt: python "
        f"launch/export.py {folder.path} --out DIR, then model.path=DIR in another run.out"
    )


def test_a_finished_run_is_not_taken_for_one_on_other_data(folder: RunFolder) -> None:
    folder.check_data("xyz")
    folder.write_summary({"is_finished": True})
    folder.check_data("abc")
    with pytest.raises(ConfigError, match="on data with fingerprint abc, data.shards now has xyz"):
        folder.check_data("xyz")


def test_a_model_that_was_moved_or_is_named_in_another_way_is_the_same(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Known by the run's own record, and of a run without one by the folder that it names."""
    model, moved = tmp_path / "model", tmp_path / "moved"
    shutil.copytree(tiny_model, model)
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    folder.write_origin(recipe(f"model.path={model}"), deepspeed(), {}, world_size=2)
    monkeypatch.chdir(tmp_path)
    folder.check_recipe(recipe("model.path=model"), deepspeed())
    model.rename(moved)
    folder.check_recipe(recipe(f"model.path={moved}"), deepspeed())
    environment = json.loads((folder.path / "environment.json").read_text())
    del environment["model"]
    (folder.path / "environment.json").write_text(json.dumps(environment))
    with pytest.raises(ConfigError, match="recipe: model.path was "):
        folder.check_recipe(recipe(f"model.path={moved}"), deepspeed())
    model.symlink_to(moved)
    folder.check_recipe(recipe(f"model.path={moved}"), deepspeed())


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_another_model_is_refused_wherever_it_lies(
    name: str, tmp_path: Path, tiny_model: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_model, other)
    content = bytearray((other / name).read_bytes())
    content[-20] ^= 1
    (other / name).write_bytes(content)
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    folder.write_origin(recipe(f"model.path={tiny_model}"), deepspeed(), {}, world_size=2)
    with pytest.raises(ConfigError, match="recipe: model.path was "):
        folder.check_recipe(recipe(f"model.path={other}"), deepspeed())


@pytest.mark.parametrize("name", ["zero3_cpu.json", "eval.json", "deepspeed.json"])
def test_another_deepspeed_json_is_refused_whatever_its_name(
    folder: RunFolder, tmp_path: Path, name: str
) -> None:
    content = json.loads(default_deepspeed(has_cuda=False).read_text())
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / name).write_text(json.dumps(content | {"gradient_clipping": 0.5}))
    with pytest.raises(ConfigError, match=f"recipe: {name}: gradient_clipping was 1.0 and is"):
        folder.check_recipe(recipe(), load_deepspeed(tmp_path / "other" / name, 2))


def test_the_origin_says_what_the_run_is_made_of(folder: RunFolder) -> None:
    def read(name: str) -> dict:
        return json.loads((folder.path / name).read_text(encoding="utf-8"))

    written = yaml.safe_load((folder.path / "config.yaml").read_text(encoding="utf-8"))
    assert written == to_dict(recipe())
    assert read("deepspeed.json") == deepspeed().json
    assert read("data.json") == {"fingerprint": "abc"}
    environment = read("environment.json")
    assert environment == {**describe_environment(world_size=2), "execution": None, "model": None}
    assert environment["ranks"] == 2
    assert environment["host"] == socket.gethostname()
    assert environment["versions"].keys() >= {"torch", "deepspeed", "transformers"}
    optional = {"flash-attn", "liger-kernel"}
    assert all(environment["versions"][name] for name in environment["versions"].keys() - optional)


# --- the steps ---


def test_steps_are_lines_and_those_to_be_repeated_are_dropped(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.read_metrics() == [] and folder.metrics_bytes == 0
    sizes = []
    for number in range(1, 6):
        folder.add_metrics({"step": number, "loss": 1 / number})
        sizes.append(folder.metrics_bytes)
    folder.cut_metrics(sizes[2])
    folder.add_metrics({"step": 4, "loss": None})
    assert [line["step"] for line in folder.read_metrics()] == [1, 2, 3, 4]
    assert folder.read_metrics()[1:2] == [{"step": 2, "loss": 0.5}]


def test_a_line_that_a_crash_cut_off_is_dropped(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.add_metrics({"step": 1, "loss": 2.0})
    size = folder.metrics_bytes
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    assert folder.read_metrics() == [{"step": 1, "loss": 2.0}]
    folder.cut_metrics(size)
    folder.add_metrics({"step": 2, "loss": 1.0})
    assert folder.read_metrics() == [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]


def test_metrics_that_somebody_has_shortened_are_not_gone_on_with(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.add_metrics({"step": 1, "loss": 2.0})
    size = folder.metrics_bytes
    (tmp_path / "metrics.jsonl").unlink()
    with pytest.raises(CheckpointError, match=f"has 0 bytes, its checkpoint .* with {size}; put"):
        folder.cut_metrics(size)


def test_an_evaluation_that_was_repeated_counts_once(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.read_evaluations() == []
    for step, loss in ((4, 2.0), (8, 1.0), (8, 0.5)):
        assert folder.add_evaluation(step, loss=loss, metrics={})["loss"] == loss
    assert [(e["step"], e["loss"]) for e in folder.read_evaluations()] == [(4, 2.0), (8, 0.5)]


def test_an_evaluation_that_was_cut_off_is_missing_and_its_line_is_not_merged(
    tmp_path: Path,
) -> None:
    """By a full disk; at a step that is saved it is made again at the next start."""
    folder = RunFolder(tmp_path)
    folder.add_evaluation(4, loss=2.0, metrics={"anls": {"value": 1.0, "high": 1.0}})
    folder.add_evaluation(8, loss=1.0, metrics={"anls": {"value": 1.0, "high": 1.0}})
    path = tmp_path / "evaluations.jsonl"
    path.write_bytes(path.read_bytes()[:-5])
    assert [entry["step"] for entry in folder.read_evaluations()] == [4]
    folder.add_evaluation(8, loss=1.0, metrics={})
    folder.add_evaluation(12, loss=0.5, metrics={})
    assert [entry["step"] for entry in folder.read_evaluations()] == [4, 8, 12]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_json_cannot_say_is_a_defect(tmp_path: Path, value: float) -> None:
    folder = RunFolder(tmp_path)
    with pytest.raises(ValueError, match="not JSON compliant"):
        folder.add_metrics({"step": 1, "loss": value})
    with pytest.raises(ValueError, match="not JSON compliant"):
        folder.write_summary({"loss": value})
    assert folder.read_metrics() == []
    assert folder.read_summary() is None


def test_the_summary_is_read_as_it_was_written(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write_summary({"steps": 3, "metrics": {}})
    assert folder.read_summary() == {"steps": 3, "metrics": {}}

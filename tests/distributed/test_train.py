"""Training with real DeepSpeed ZeRO-3 on gloo ranks, under every launcher."""

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import psutil
import pytest

from phi3v.data import Dataset
from phi3v.training.ranks import free_port
from tests.commands import (
    TIMEOUT,
    deepspeed,
    kill,
    last_line,
    metrics,
    plain,
    python,
    run,
    start,
    torchrun,
    wait_for,
)

pytestmark = pytest.mark.slow

STEPS = 12
# Measured: 2.7e-7 between 1, 2 and 4 ranks over 12 steps (order of summation only).
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, tiny_shards: Path, tiny_model: Path) -> Path:
    """A run recipe on the tiny shards, 12 steps, everything evaluated in a moment."""
    path = tmp_path_factory.mktemp("recipe") / "run.yaml"
    values = {
        "run": {"out": "run"},
        "model": {"path": str(tiny_model)},
        "data": {"shards": str(tiny_shards), "max_tokens": 264, "max_views": 32},
        "optim": {"lr": 1e-3, "weight_decay": 0.1, "warmup_steps": 100, "schedule": "constant"},
        "train": {"max_steps": STEPS},
        "eval": {"rows": 4, "metrics": ["exact_match"], "max_new_tokens": 8},
        "checkpoint": {"every": 4, "keep": 3},
    }
    path.write_text(json.dumps(values), encoding="utf-8")  # JSON is YAML
    return path


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, recipe: Path) -> Path:
    """The run folder of two ranks under the deepspeed launcher, never interrupted."""
    cwd = tmp_path_factory.mktemp("unbroken")
    done = run(*deepspeed(2, recipe), cwd=cwd, WANDB_MODE="offline")
    assert done.returncode == 0, done.stderr
    return cwd / "run"


def losses(folder: Path) -> list[float]:
    lines = metrics(folder)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    return [line["loss"] for line in lines]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, recipe: Path) -> tuple[Path, set[str]]:
    """The run folder of one rank, and the names of all modules that it imported."""
    cwd, kept = tmp_path_factory.mktemp("alone"), "{every: 2, keep: 2, keep_every: 6, best: loss}"
    values = ["eval.every=4", f"checkpoint={kept}"]
    done = run(*python(recipe, *values), cwd=cwd, PYTHONPROFILEIMPORTTIME="1")
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    return cwd / "run", {line.split("|")[2].strip() for line in lines}


def test_a_rank_imports_nothing_large_that_it_does_not_need(alone: tuple[Path, set[str]]) -> None:
    """Each of these takes a third of a second to two seconds of every start."""
    _, imported = alone
    assert "torch" in imported
    assert not imported & {"pandas", "datasets", "wandb", "torch._inductor.lowering", "sklearn"}


def test_one_rank_gives_the_same_losses_and_keeps_the_checkpoints_it_is_told_to(
    unbroken: Path, alone: tuple[Path, set[str]]
) -> None:
    folder, _ = alone
    assert losses(folder) == pytest.approx(losses(unbroken), abs=TOLERANCE)
    lines = (folder / "evaluations.jsonl").read_text().splitlines()
    evaluated = {entry["step"]: entry["loss"] for entry in map(json.loads, lines)}
    assert list(evaluated) == [4, 8, 12]
    best = min(evaluated, key=evaluated.__getitem__)
    saved = folder / "checkpoints"
    assert (saved / "best").read_text() == f"step-{best:08d}"
    assert [int(path.name[5:]) for path in sorted(saved.glob("step-*"))] == [6, 10, 12]


def test_training_learns_and_leaves_what_the_interface_promises(unbroken: Path) -> None:
    values = losses(unbroken)
    assert values[-1] < values[0] - 1
    for name in ("config.yaml", "deepspeed.json", "environment.json", "data.json"):
        assert (unbroken / name).is_file()
    summary = json.loads((unbroken / "summary.json").read_text())
    names = {"exact_match", "blind_exact_match", "constant_exact_match"}
    assert set(summary["metrics"]) == names
    assert summary["metrics"]["exact_match"].keys() == {"value", "low", "high", "n"}
    assert "<svg" in (unbroken / "report.html").read_text()
    assert list(unbroken.glob("wandb/offline-run-*/*.wandb"))
    assert list(unbroken.rglob("metrics.jsonl")) == [unbroken / "metrics.jsonl"]
    saved = sorted(path.name for path in (unbroken / "checkpoints").glob("step-*"))
    assert saved == ["step-00000004", "step-00000008", "step-00000012"]
    assert (unbroken / "checkpoints" / "latest").read_text() == "step-00000012"


def test_a_run_that_was_killed_and_stopped_goes_on_bit_for_bit(
    unbroken: Path, recipe: Path, tmp_path: Path
) -> None:
    """And takes no shared memory, of which DeepSpeed would have 69 MB a rank on a CPU."""
    folder, command = tmp_path / "run", deepspeed(2, recipe)
    process = start(*command, cwd=tmp_path)
    wait_for(process, (folder / "checkpoints" / "latest").is_file)
    kill(process)
    port = command[command.index("--master_port") + 1]
    assert not list(Path("/dev/shm").glob(f"deepspeed*_{port}_*"))
    done = len(metrics(folder))
    assert 4 <= done < STEPS - 4, "the kill came too late to test anything"

    lines = folder / "metrics.jsonl"
    with lines.open("a") as file:
        file.write('{"cut off": ')
    process = start(*deepspeed(2, recipe), cwd=tmp_path)
    wait_for(process, lambda: "cut off" not in lines.read_text() and metrics(folder)[4:5] != [])
    for rank in psutil.Process(process.pid).children(recursive=True):
        if "--local_rank=1" in rank.cmdline():
            rank.send_signal(signal.SIGUSR1)
    assert_stopped(process, "a signal to another rank after step ", folder)

    (folder / "stop").touch()
    assert_stopped(start(*plain(2, recipe), cwd=tmp_path), "the file ", folder)
    assert not (folder / "stop").exists()

    command = plain(2, recipe, "train.stop_after=1")
    assert_stopped(start(*command, cwd=tmp_path), "train.stop_after 1 s", folder)

    step = len(metrics(folder))
    assert step < STEPS
    damaged = folder / "checkpoints" / f"step-{step:08d}"
    flip_a_byte(next(damaged.glob("*rank_1*optim_states.pt")))
    finished = run(*torchrun(2, recipe), cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert f"{damaged.name} is damaged, an older one is taken: zero_pp_rank_1" in finished.stderr
    assert losses(folder) == losses(unbroken)
    norms = [[line["grad_norm"] for line in metrics(f)] for f in (folder, unbroken)]
    assert norms[0] == norms[1]


@pytest.mark.parametrize("launcher", ["python", "deepspeed", "torchrun"])
def test_ctrl_c_in_a_terminal_saves_and_the_next_start_says_where_it_goes_on(
    recipe: Path, tmp_path: Path, launcher: str
) -> None:
    """It goes to all processes of the command's group; torchrun's ranks are in others."""
    folder, values = tmp_path / "run", ("eval.rows=0", "train.max_steps=2000")
    values += ("optim.warmup_steps=5", "optim.lr=1e-4", "checkpoint.every=2000")
    commands = {"python": python(recipe, *values), "deepspeed": deepspeed(2, recipe, *values)}
    command = commands.get(launcher) or torchrun(2, recipe, *values)
    process = start(*command, cwd=tmp_path)
    try:
        wait_for(process, lambda: (folder / "metrics.jsonl").exists() and metrics(folder) != [])
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=TIMEOUT)  # until the last rank has closed it
    finally:
        kill(process)
    assert err.count("stopped by SIGINT after step ") == 1, err
    assert err.count("Ctrl-C: the run ends after this step, saved; again: at once") == 1
    step = metrics(folder)[-1]["step"]
    assert (folder / "checkpoints" / "latest").read_text() == f"step-{step:08d}"
    if launcher != "python":
        return
    assert process.returncode == 75 and "Traceback" not in err
    again = run(*python(recipe, *values, f"train.max_steps={step + 6}"), cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert f"run goes on with step {step + 1} of {step + 6}, after step {step}\n" in again.stderr


def test_with_nothing_but_damaged_checkpoints_no_run_starts_anew(
    unbroken: Path, recipe: Path, tmp_path: Path
) -> None:
    shutil.copytree(unbroken, tmp_path / "run")
    for optimizer in (tmp_path / "run").rglob("*rank_0*optim_states.pt"):
        flip_a_byte(optimizer)
    done = run(*python(recipe, f"train.max_steps={STEPS + 4}"), cwd=tmp_path)
    assert done.returncode == 2
    message = last_line(done, "CheckpointError")
    assert "is whole (step-00000004, step-00000008, step-00000012); put an intact copy" in message
    assert len(metrics(tmp_path / "run")) == STEPS


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def assert_stopped(process: subprocess.Popen[str], why: str, folder: Path) -> None:
    """It ends with 75, says why in one line, and all its steps are saved."""
    try:
        _, err = process.communicate(timeout=TIMEOUT)
    finally:
        kill(process)
    assert process.returncode == 75, err
    assert err.count(f"stopped by {why}") == 1 and "Traceback" not in err, err
    step = metrics(folder)[-1]["step"]
    assert (folder / "checkpoints" / "latest").read_text() == f"step-{step:08d}"


def test_a_finished_run_says_so_and_another_recipe_is_refused(unbroken: Path, recipe: Path) -> None:
    again = run(*python(recipe), cwd=unbroken.parent)
    assert again.returncode == 0 and "is finished" in again.stdout
    other = run(*python(recipe, "optim.lr=3e-3"), cwd=unbroken.parent)
    assert other.returncode == 2
    assert "optim.lr" in last_line(other, "ConfigError")


def test_a_run_that_diverged_is_written_whole_and_does_not_end_as_finished(
    recipe: Path, tmp_path: Path
) -> None:
    values = ("optim.lr=1", "optim.warmup_steps=0", "eval.rows=0")  # losses of 20 to 110 after 6.7
    done = run(*plain(2, recipe, *values), cwd=tmp_path)
    assert done.returncode == 2
    assert last_line(done, "Diverged").startswith("Diverged: run diverged: the loss was ")
    assert f" after step {STEPS}, see run/report.html" in done.stderr
    assert "finished" not in done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["is_finished"] and summary["diverged"].startswith("the loss was ")
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == f"step-{STEPS:08d}"


def test_a_world_size_that_does_not_divide_the_batch_is_refused(
    recipe: Path, tmp_path: Path
) -> None:
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3"}
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    done = run(*python(recipe), cwd=tmp_path, **rank, **meeting)
    assert done.returncode == 2
    message = last_line(done, "ConfigError")
    assert "train_batch_size 8 is not divisible by 1 pack x 3 ranks" in message


def test_packs_with_and_without_images_never_leave_a_rank_waiting(
    recipe: Path, tmp_path: Path, mixed_shards: Path
) -> None:
    """Text-only rows make packs without images; every parameter is gathered (threshold 0)."""
    config = json.loads((Path(__file__).parents[2] / "ds_configs/zero3_cpu.json").read_text())
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    (tmp_path / "zero3.json").write_text(json.dumps(config))
    values = [f"data.shards={mixed_shards}", "data.max_tokens=80", "data.window=4", "eval.rows=0"]
    done = run(
        *plain(2, recipe, *values, "--deepspeed_config", "zero3.json"), cwd=tmp_path, timeout=90
    )
    assert done.returncode == 0, done.stderr
    views = [line["views"] for line in metrics(tmp_path / "run")]
    samples = [line["samples"] for line in metrics(tmp_path / "run")]
    assert len(views) == STEPS
    assert any(v < 3 * s for v, s in zip(views, samples, strict=True)), "no pack was without images"


def test_whole_epochs_train_on_every_sample_once(recipe: Path, tmp_path: Path) -> None:
    """The last step has fewer packs than ranks ask for; empty ones fill it."""
    values = ["train={epochs: 1}", "eval.rows=0", "optim.warmup_steps=0"]
    done = run(*plain(2, recipe, *values), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = metrics(tmp_path / "run")
    data = json.loads((tmp_path / "run" / "data.json").read_text())
    assert sum(line["samples"] for line in lines) == data["samples"]
    assert sum(line["label_tokens"] for line in lines) == data["label_tokens"]


def test_several_datasets_are_mixed_by_weight(
    recipe: Path, tmp_path: Path, tiny_shards: Path, mixed_shards: Path
) -> None:
    """An epoch holds every sample of the first, and half of the other's."""
    parts = json.dumps([{"path": str(tiny_shards)}, {"path": str(mixed_shards), "weight": 0.5}])
    values = [f"data.shards={parts}", "train={epochs: 1}", "eval.rows=2", "optim.warmup_steps=0"]
    done = run(*plain(2, recipe, *values), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    first, other = (len(Dataset(folder, "train")) for folder in (tiny_shards, mixed_shards))
    assert sum(line["samples"] for line in metrics(tmp_path / "run")) == first + other // 2
    data = json.loads((tmp_path / "run" / "data.json").read_text())
    assert data["shards"] == f"{tiny_shards}, {mixed_shards}"


def test_one_pack_is_overfitted_and_steps_are_profiled(recipe: Path, tmp_path: Path) -> None:
    values = ["debug={overfit_one_pack: true, profile_steps: [2, 3], deterministic: true}"]
    values += ["model.checkpointing=selective", "eval.rows=0", "optim.warmup_steps=0"]
    done = run(*plain(2, recipe, *values), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = metrics(tmp_path / "run")
    assert len({(line["samples"], line["tokens"], line["views"]) for line in lines}) == 1
    assert lines[-1]["loss"] < 0.35 * lines[0]["loss"]
    written = sorted(path.name for path in (tmp_path / "run" / "profile").iterdir())
    ranks = [f"step-0000000{step}-rank{rank}.json.gz" for step in (2, 3) for rank in (0, 1)]
    assert [name for name in written if name.endswith(".gz")] == ranks
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment["execution"]["checkpointing"] == "selective"


def test_without_a_recipe_the_sample_products_are_made_and_trained_on(tmp_path: Path) -> None:
    values = [
        "train.max_steps=2",
        "optim.warmup_steps=0",
        "eval.rows=2",
        "eval.metrics=[parse_rate]",
    ]
    done = run(*plain(2, *values), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(metrics(tmp_path / "runs" / "products")) == 2
    for made in ("data/products/products.csv", "models/tiny/config.json", "shards/products"):
        assert (tmp_path / made).exists()

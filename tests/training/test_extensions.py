"""What DeepSpeed compiles is built ahead of time; a run loads that, or is refused at its start."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

from phi3v.config import DeepSpeedConfig, default_deepspeed, load_deepspeed
from phi3v.errors import ConfigError
from phi3v.training import extensions
from phi3v.training.extensions import (
    EXTENSIONS,
    build_extensions,
    load_extensions,
    needed_extensions,
    settle_lock,
)
from tests.commands import ROOT, last_line, run

SHIPPED = sorted(default_deepspeed(has_cuda=True).parent.glob("*.json"))
OWN_ADAM = {"optimizer.params": {"betas": [0.9, 0.95]}}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path) -> Iterator[Path]:
    """Where extensions are looked for: nothing is built there."""
    os.environ["TORCH_EXTENSIONS_DIR"] = str(tmp_path / "extensions")
    yield tmp_path / "extensions"


def shipped(name: str, **overrides: object) -> DeepSpeedConfig:
    changes = {key.replace("__", "."): value for key, value in overrides.items()}
    return load_deepspeed(default_deepspeed(has_cuda=True).with_name(name), 2, changes)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_no_shipped_json_has_anything_compiled(path: Path) -> None:
    assert needed_extensions(load_deepspeed(path, 8)) == []


@pytest.mark.parametrize(
    ("name", "overrides", "needed"),
    [
        ("zero3.json", {"optimizer__params": {}}, ["fused_adam"]),
        ("zero2.json", {"optimizer__params": {"torch_adam": False}}, ["fused_adam"]),
        ("zero3_offload.json", {"optimizer__params": {}}, ["cpu_adam"]),
        ("zero3.json", {"optimizer": {"type": "Adam"}}, ["fused_adam"]),
        ("zero3.json", {"optimizer": {"type": "Lion"}}, ["fused_lion"]),
        ("zero3_offload.json", {"optimizer": {"type": "Lion"}}, ["cpu_lion"]),
        ("zero3.json", {"optimizer": {"type": "Adagrad"}}, []),
        ("zero3_offload.json", {"optimizer": {"type": "Adagrad"}}, ["cpu_adagrad"]),
        (
            "zero3.json",
            {"zero_optimization__offload_param": {"device": "nvme", "nvme_path": "/nvme"}},
            ["async_io"],
        ),
        ("zero3.json", {"zero_optimization__zero_quantized_weights": True}, ["quantizer"]),
    ],
)
def test_what_a_json_has_compiled_is_known(
    name: str, overrides: dict[str, object], needed: list[str]
) -> None:
    assert [extension.name for extension in needed_extensions(shipped(name, **overrides))] == needed


def test_the_names_are_those_of_deepspeeds_builders() -> None:
    for name, extension in EXTENSIONS.items():
        place = f"cpu.{name}" if name.startswith("cpu") else name
        module = import_module(f"deepspeed.ops.op_builder.{place}")
        assert getattr(module, extension.builder).NAME == name == extension.name


def test_a_run_whose_optimizer_is_not_built_is_refused_with_the_command(folder: Path) -> None:
    ds = shipped("zero3_offload.json", optimizer__params={})
    with pytest.raises(ConfigError) as refusal:
        load_extensions(ds)
    text = str(refusal.value)
    assert "asks for DeepSpeed's own offloaded AdamW (extension cpu_adam)" in text
    assert f"it is not built in {folder / 'cpu_adam'}" in text
    assert f"run `python launch/build.py {ds.path}` once, which needs a C++ compiler" in text
    assert 'or set "torch_adam": true' in text


def built_for(folder: Path, **changes: object) -> None:
    """A module that claims to be built for this machine, but for the changes."""
    place = folder / "fused_adam"
    place.mkdir(parents=True)
    (place / "fused_adam.so").touch()
    stamp = {**extensions._circumstances(), "vectors": [], "capabilities": []}
    (place / "built.json").write_text(json.dumps(stamp | changes))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"torch": "2.5.0"}, "was built for torch 2.5.0, this is "),
        ({"deepspeed": "0.15.0"}, "was built for deepspeed 0.15.0, this is "),
        ({"vectors": ["avx1024"]}, "was built on a processor with avx1024, which this one lacks"),
        ({}, "cannot be loaded: "),  # an empty file is not a module
    ],
)
def test_a_module_that_was_built_for_something_else_is_refused(
    folder: Path, changes: dict[str, object], reason: str
) -> None:
    built_for(folder, **changes)
    with pytest.raises(ConfigError, match=reason):
        load_extensions(shipped("zero3.json", optimizer__params={}))


@pytest.mark.parametrize("name", ["fused_adam", "fused_adam/fused_adam.so"])
def test_a_module_that_others_could_have_put_there_is_not_run(folder: Path, name: str) -> None:
    built_for(folder)
    (folder / name).chmod(0o777)
    said = f"^{folder / name} holds compiled code that is run, and everybody can write to it .mode"
    for action in (load_extensions, build_extensions):
        with pytest.raises(ConfigError, match=said):
            action(shipped("zero3.json", optimizer__params={}))


def test_building_without_a_compiler_is_refused() -> None:
    os.environ["CXX"] = "no-such-compiler"
    with pytest.raises(ConfigError, match="no a C\\+\\+ compiler \\(no-such-compiler\\)"):
        build_extensions(shipped("zero3_offload.json", optimizer__params={}))


def test_building_what_deepspeed_has_not_for_the_device_is_refused() -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    with pytest.raises(ConfigError, match="which DeepSpeed does not have for cpu"):
        build_extensions(shipped("zero3.json", optimizer={"type": "Lion"}))


def test_building_into_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    os.environ["TORCH_EXTENSIONS_DIR"] = str(tmp_path / "file")
    with pytest.raises(ConfigError, match="cannot be written to: .*TORCH_EXTENSIONS_DIR"):
        build_extensions(shipped("zero3_offload.json", optimizer__params={}))


# --- locks ---


@pytest.fixture
def lock(folder: Path) -> Path:
    place = folder / "fused_adam"
    place.mkdir(parents=True)
    (place / "lock").touch()
    return place / "lock"


def test_the_lock_of_a_builder_of_this_machine_that_is_gone_is_removed_at_once(
    lock: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    owner = {"host": socket.gethostname(), "process": gone.pid}
    lock.with_name("owner.json").write_text(json.dumps(owner))
    settle_lock(lock.parent)
    assert not lock.exists()
    assert f"{lock} is removed" in capsys.readouterr().err


def test_a_lock_that_may_be_another_machines_is_waited_for_until_it_is_too_old(
    lock: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lock.with_name("owner.json").write_text(json.dumps({"host": "elsewhere", "process": 1}))
    began = time.monotonic()
    settle_lock(lock.parent, limit=0.6)
    assert time.monotonic() - began > 0.5 and not lock.exists()
    said = capsys.readouterr().err
    assert "waiting for another machine, or a build that was killed" in said
    assert f"{lock} is removed" in said


def test_an_old_lock_is_removed_without_waiting(lock: Path) -> None:
    old = time.time() - 3600
    os.utime(lock, (old, old))
    began = time.monotonic()
    settle_lock(lock.parent)
    assert not lock.exists() and time.monotonic() - began < 5


def test_compilers_that_outlive_their_builder_are_waited_for(
    lock: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lock.with_name("owner.json").write_text(
        json.dumps({"host": socket.gethostname(), "process": 2**22 + 1})
    )
    compiler = subprocess.Popen(["sleep", "1"], cwd=lock.parent)
    settle_lock(lock.parent)
    assert compiler.poll() == 0 and not lock.exists()
    assert f"waiting for process {compiler.pid} in {lock.parent}" in capsys.readouterr().err


def test_a_builder_that_does_not_end_is_named(lock: Path) -> None:
    builder = subprocess.Popen(["sleep", "60"], cwd=lock.parent)
    try:
        with pytest.raises(ConfigError, match=f"process {builder.pid} has been building in "):
            settle_lock(lock.parent, limit=0.1)
    finally:
        builder.kill()
        builder.wait()
    assert lock.exists()


# --- the command ---


@pytest.mark.slow
def test_a_run_takes_what_the_command_has_built_and_looks_at_no_lock(
    tmp_path: Path, folder: Path, tiny_model: Path, tiny_shards: Path
) -> None:
    """The one test that compiles: DeepSpeed's FusedAdam as it is on a CPU, half a minute."""
    content = json.loads(default_deepspeed(has_cuda=False).read_text())
    content["optimizer"]["params"].pop("torch_adam")
    (tmp_path / "own.json").write_text(json.dumps(content))
    values = [f"run.out={tmp_path / 'run'}", f"model.path={tiny_model}"]
    values += [f"data.shards={tiny_shards}", "train.max_steps=2", "eval.rows=0"]
    train = [sys.executable, ROOT / "launch/train.py", ROOT / "launch/recipes/demo.yaml"]
    train += ["--deepspeed_config", "own.json", "optim.warmup_steps=1", *values]
    build = [sys.executable, ROOT / "launch/build.py", "own.json"]
    place = {"TORCH_EXTENSIONS_DIR": str(folder)}

    refused = run(*train, cwd=tmp_path, **place)
    assert refused.returncode == 2
    assert "it is not built in" in last_line(refused, "ConfigError")

    built = run(*build, cwd=tmp_path, **place)
    assert built.returncode == 0, built.stderr
    file = folder / "fused_adam" / "fused_adam.so"
    assert f"own.json: {file}" in built.stdout
    again = run(*build, cwd=tmp_path, **place)
    assert again.returncode == 0 and "ninja" not in again.stdout + again.stderr

    (file.parent / "lock").touch()  # of a build that was killed: DeepSpeed would wait for ever
    done = run(*train, cwd=tmp_path, CXX="no-such-compiler", **place)
    assert done.returncode == 0, done.stderr
    assert (file.parent / "lock").exists()

"""The device of a process, on machines that are told of: each refusal names both sides."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch

from phi3v import devices
from phi3v.devices import (
    check_shared_memory,
    check_visible,
    has_cuda,
    take_device,
)
from phi3v.errors import ConfigError

OLD = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\n"
OPEN = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\n"


@pytest.fixture(autouse=True)
def machine(tmp_path: Path) -> Iterator[Path]:
    """A machine without a GPU, a driver, Slurm and wishes; its driver's file, to be written."""
    (tmp_path / "dev").mkdir()
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    with (
        mock.patch.dict(os.environ, kept, clear=True),
        mock.patch("torch.cuda.is_available", lambda: False),
        mock.patch.object(devices, "DRIVER", tmp_path / "version"),
        mock.patch.object(devices, "NODES", tmp_path / "dev"),
        mock.patch.object(torch.version, "cuda", "13.0"),
    ):
        yield tmp_path / "version"


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """Two GPUs that torch sees; those that were made the current device."""
    taken: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    return taken


def test_a_rank_takes_the_gpu_of_its_local_rank(gpus: list[torch.device]) -> None:
    assert take_device(1, 2) == torch.device("cuda", 1)
    assert gpus == [torch.device("cuda", 1)]


def test_a_single_process_takes_the_first_gpu(gpus: list[torch.device]) -> None:
    assert take_device() == torch.device("cuda", 0)
    assert gpus == [torch.device("cuda", 0)]


def test_the_cpu_is_taken_where_it_is_asked_for_by_name(gpus: list[torch.device]) -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    assert not has_cuda()
    assert take_device(7, 8) == torch.device("cpu")
    assert gpus == []


def test_a_machine_without_a_gpu_computes_on_the_cpu() -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = "0,1"  # the deepspeed launcher's, wherever it runs
    os.environ["SLURM_GPUS_ON_NODE"] = "0"
    assert take_device(1, 2) == torch.device("cpu")


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (
            {"CUDA_VISIBLE_DEVICES": "2,3"},
            r"8 ranks were started on \S+, but torch sees 2 GPUs \(CUDA_VISIBLE_DEVICES is '2,3'\);"
            r" start 2 ranks there \(deepspeed --num_gpus 2, torchrun --nproc_per_node 2, ",
        ),
        ({}, r"torch sees 2 GPUs \(CUDA_VISIBLE_DEVICES is None\)"),
    ],
)
def test_more_ranks_than_gpus_are_refused(
    gpus: list[torch.device], variables: dict[str, str], message: str
) -> None:
    os.environ.update(variables)
    with pytest.raises(ConfigError, match=message):
        take_device(1, 8)
    assert gpus == []


def test_one_visible_gpu_for_each_task_of_srun_is_refused(
    gpus: list[torch.device], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    os.environ.update(SLURM_STEP_ID="0", CUDA_VISIBLE_DEVICES="0")
    message = (
        r"each of the 4 ranks of \S+ sees one GPU \(CUDA_VISIBLE_DEVICES is '0'\), by srun's "
        r"--gpus-per-task or --gpu-bind, .*; give srun --gpus-per-node=4 in their place, and unset "
        "SLURM_GPUS_PER_TASK SLURM_GPU_BIND"
    )
    with pytest.raises(ConfigError, match=message):
        take_device(3, 4)


@pytest.mark.parametrize(
    ("driver", "cuda", "variables", "found", "remedy"),
    [
        (OLD, "13.0", {}, "535.104.05, for CUDA 12 and older", "CUDA 13 needs a driver of 580 or "),
        (OLD, None, {}, "for CUDA 12 and older", "install torch's build for CUDA 12 (docs/install"),
        (OPEN, None, {}, "580.65.06, for CUDA 13", "install torch's build for CUDA 13 (docs/inst"),
        (OPEN, "13.0", {"CUDA_VISIBLE_DEVICES": ""}, "580", "unset CUDA_VISIBLE_DEVICES, which "),
        (OPEN, "13.0", {"CUDA_VISIBLE_DEVICES": "-1"}, "580", "unset CUDA_VISIBLE_DEVICES, which "),
        (OPEN, "13.0", {}, "580.65.06", "start the container with --nv (apptainer) or --gpus all"),
        ("?", "13.0", {}, "driver of unknown version", "start the container with --nv"),
        (None, None, {"SLURM_JOB_GPUS": "0"}, "SLURM_JOB_GPUS=0", "install torch's build for CUDA"),
        (None, "12.6", {"SLURM_STEP_GPUS": "2,3"}, "SLURM_STEP_GPUS=2,3", "start the container"),
        (None, "12.6", {"SLURM_GPUS_ON_NODE": "2"}, "SLURM_GPUS_ON_NODE=2", "start the container"),
    ],
)
def test_a_gpu_that_torch_does_not_see_is_refused(
    machine: Path,
    driver: str | None,
    cuda: str | None,
    variables: dict[str, str],
    found: str,
    remedy: str,
) -> None:
    if driver is not None:
        machine.write_text(driver)
    os.environ.update(variables)
    with mock.patch.object(torch.version, "cuda", cuda), pytest.raises(ConfigError) as caught:
        take_device()
    build = f"built for CUDA {cuda}" if cuda else "a build for the CPU alone"
    visible = variables.get("CUDA_VISIBLE_DEVICES")
    side = f"torch {torch.__version__}, {build}, CUDA_VISIBLE_DEVICES {visible!r}"
    text = str(caught.value)
    assert re.match(rf"\S+ has a GPU \(.*{re.escape(found)}", text), text
    assert f"torch sees no GPU ({side}); {remedy}" in text
    assert text.endswith(", or set DS_ACCELERATOR=cpu to compute on the CPU")
    os.environ["DS_ACCELERATOR"] = "cpu"
    assert take_device() == torch.device("cpu")


def test_device_nodes_alone_speak_for_a_gpu(tmp_path: Path) -> None:
    for name in ("nvidia0", "nvidia1", "nvidiactl"):
        (tmp_path / "dev" / name).touch()
    with pytest.raises(ConfigError, match=r"has a GPU \(2 of .*/dev/nvidia\*\), but torch sees no"):
        check_visible()


def test_cuda_that_is_asked_for_must_be_there_and_others_are_unknown() -> None:
    os.environ["DS_ACCELERATOR"] = "cuda"
    with pytest.raises(ConfigError, match=r"is to use CUDA \(DS_ACCELERATOR\), but torch sees no "):
        check_visible()
    os.environ["DS_ACCELERATOR"] = "xpu"
    with pytest.raises(ConfigError, match="DS_ACCELERATOR is 'xpu', and this program computes on "):
        check_visible()


def test_too_little_shared_memory_for_several_gpus_is_refused(
    gpus: list[torch.device], tmp_path: Path
) -> None:
    folder = tmp_path / "shm"
    with mock.patch.object(devices, "SHARED_MEMORY", folder):
        check_shared_memory(1)
        message = (
            rf"{folder} of \S+ has 0 bytes free, and its 8 ranks need 536,870,912 there to reach "
            "each other; start the container with --shm-size=16g or --ipc=host, or remove what"
        )
        with pytest.raises(ConfigError, match=message):
            check_shared_memory(8)
        folder.mkdir()
        check_shared_memory(8)


def test_ranks_on_a_cpu_need_no_shared_memory(tmp_path: Path) -> None:
    with mock.patch.object(devices, "SHARED_MEMORY", tmp_path / "none"):
        check_shared_memory(8)

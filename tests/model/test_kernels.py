"""Fused kernels are made where they can be made; elsewhere it is said why not."""

import os
import sysconfig
from pathlib import Path

import pytest
import torch

from phi3v.config.schema import ModelSection
from phi3v.errors import ConfigError
from phi3v.model import execution, kernels
from phi3v.model.execution import choose_execution
from phi3v.model.kernels import kernel_obstacle

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def section(kernels: str) -> ModelSection:
    return ModelSection(path="unused", kernels=kernels)  # type: ignore[arg-type]


@pytest.fixture
def _no_kernel_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes before the kernel itself, on any device."""
    monkeypatch.setattr(kernels, "_failure", lambda device: None)


@pytest.mark.slow
def test_a_kernel_is_made_and_run(tmp_path: Path) -> None:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path)
    torch._dynamo.reset()
    assert kernel_obstacle(CPU) is None
    assert list(tmp_path.rglob("*.so"))


@pytest.mark.usefixtures("_no_kernel_is_made")
@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
def test_a_machine_with_all_that_a_kernel_needs_has_no_obstacle(device: torch.device) -> None:
    assert kernel_obstacle(device) is None


@pytest.mark.usefixtures("_no_kernel_is_made")
def test_a_machine_without_a_compiler_says_so(tmp_path: Path) -> None:
    os.environ["PATH"] = str(tmp_path)
    reason = "no compiler: no gcc or clang on PATH; install gcc, or set CC"
    assert kernel_obstacle(CUDA) == reason
    os.environ["CC"] = "xlc"
    assert kernel_obstacle(CUDA) == "no compiler: no xlc on PATH; install gcc, or set CC"


@pytest.mark.usefixtures("_no_kernel_is_made")
def test_a_python_without_headers_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sysconfig, "get_paths", lambda scheme: {"include": str(tmp_path)})
    obstacle = kernel_obstacle(CUDA)
    assert obstacle == f"no {tmp_path / 'Python.h'}; install Python's headers (python3-dev)"


@pytest.mark.usefixtures("_no_kernel_is_made")
@pytest.mark.parametrize("variable", ["TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"])
def test_a_cache_that_cannot_be_written_to_is_named(variable: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    os.environ[variable] = str(tmp_path / "file")
    obstacle = f"{variable} {tmp_path / 'file'} cannot be written to; name another folder"
    assert kernel_obstacle(CUDA) == obstacle


def test_what_a_compiler_says_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(function: object) -> object:
        raise AssertionError("libcuda.so cannot found!\nPlease make sure GPU is set up")

    monkeypatch.setattr(torch, "compile", fail)
    reason = "a first kernel failed: AssertionError: libcuda.so cannot found!"
    assert kernel_obstacle(CPU) == reason


def test_kernels_that_cannot_be_made_leave_a_run_eager_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(execution, "kernel_obstacle", lambda device: "no compiler")
    monkeypatch.setattr(execution, "choose_attention", lambda *_: "phi3v_sdpa")
    chosen = choose_execution(section("auto"), CUDA, torch.bfloat16)
    assert not chosen.compiled and chosen.eager_because == "no compiler"
    assert "compiled False, eager_because no compiler" in str(chosen)
    with pytest.raises(ConfigError, match="model.kernels=compiled cannot be had .*: no compiler"):
        choose_execution(section("compiled"), CPU)


def test_kernels_that_can_be_made_are_taken_on_cuda_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execution, "kernel_obstacle", lambda device: None)
    monkeypatch.setattr(execution, "choose_attention", lambda *_: "phi3v_sdpa")
    chosen = choose_execution(section("auto"), CUDA, torch.bfloat16)
    assert chosen.compiled and "eager_because" not in str(chosen)
    assert not choose_execution(section("eager"), CUDA, torch.bfloat16).compiled
    assert not choose_execution(section("auto"), CPU).compiled

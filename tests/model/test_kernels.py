"""Fused kernels are made where they can be made; elsewhere it is said why not."""

import os
import sysconfig
import tempfile
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


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """The machine's folder for kernels, and that of the home folder, which are not there yet."""
    for name in ("tmp", "home"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    for name in (*kernels.CACHES, "XDG_CACHE_HOME"):
        os.environ.pop(name, None)
    os.environ["HOME"] = str(tmp_path / "home")
    return tmp_path / "tmp" / f"phi3v-{os.getuid()}", tmp_path / "home" / ".cache" / "phi3v"


def test_kernels_are_never_kept_where_torch_would_take_a_folder_of_anybody(
    places: tuple[Path, Path],
) -> None:
    """torch sets the variable itself where it is imported, to a folder that it did not make."""
    torchs = places[0].with_name("torchinductor_me")
    torchs.mkdir()
    torchs.chmod(0o777)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(torchs)
    os.environ["TRITON_CACHE_DIR"] = str(torchs / "triton" / "0")
    kernels.private_caches()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(places[0] / "inductor")
    assert os.environ["TRITON_CACHE_DIR"] == str(places[0] / "triton")


def test_where_somebody_was_there_before_they_are_kept_in_the_home_folder(
    places: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    places[0].mkdir()
    places[0].chmod(0o777)
    kernels.private_caches()
    assert os.environ["TRITON_CACHE_DIR"] == str(places[1] / "triton")
    assert (places[1] / "triton").stat().st_mode & 0o777 == 0o700
    assert capsys.readouterr().err == (
        f"compiled kernels are kept in {places[1]}: {places[0]} is not used, everybody can write "
        "to it (mode 777)\n"
    )
    kernels.private_caches()
    assert os.environ["TRITON_CACHE_DIR"] == str(places[1] / "triton")


def test_without_any_such_folder_each_is_named_with_what_to_set(places: tuple[Path, Path]) -> None:
    places[0].touch()
    os.environ["HOME"] = "/dev/null"
    refused = (
        f"there is no folder for compiled kernels: {places[0]} is not used, it cannot be made "
        r"\(File exists\); /dev/null/.cache/phi3v is not used, it cannot be made \(Not a directory"
        r"\); remove the first, make HOME \(/dev/null\) a folder that you can write to, or set "
        "TORCHINDUCTOR_CACHE_DIR and TRITON_CACHE_DIR to folders of your own$"
    )
    with pytest.raises(ConfigError, match=f"^{refused}"):
        kernels.private_caches()


@pytest.mark.parametrize("variable", kernels.CACHES)
def test_a_folder_that_was_named_and_is_open_to_others_is_refused(
    variable: str, places: tuple[Path, Path], tmp_path: Path
) -> None:
    os.environ[variable] = str(tmp_path / "shared")
    kernels.private_caches()
    assert os.environ[variable] == str(tmp_path / "shared"), "the user's own holds"
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o777)
    refused = f"^{variable} names {tmp_path}/shared, whose files are run, and everybody can write "
    with pytest.raises(ConfigError, match=refused):
        kernels.private_caches()

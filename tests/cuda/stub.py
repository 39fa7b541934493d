"""Load a CUDA that is not there into torch's CPU build, and run a module in it.

    stub = build(folder)                                                 # with g++, some seconds
    python -m tests.cuda.stub STUB tests.cuda.passes ARGUMENTS...

In a process of its own, and before torch is imported: torch makes its hooks once.
"""

import ctypes
import runpy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

SOURCE = Path(__file__).parent / "stub.cpp"
ROOT = Path(__file__).parents[2]


def torch_folder() -> Path:
    """Where torch is installed, found without importing it."""
    spec = find_spec("torch")
    assert spec and spec.submodule_search_locations
    return Path(next(iter(spec.submodule_search_locations)))


def build(folder: Path) -> Path:
    """Compile the stub against the torch that is installed."""
    root, library = torch_folder(), folder / "stub.so"
    command = ["g++", "-shared", "-fPIC", "-O1", "-std=c++20", f"-I{root}/include", str(SOURCE)]
    command += ["-o", str(library), f"-L{root}/lib", "-lc10", "-ltorch_cpu"]
    subprocess.run(command, check=True)
    return library


def run(stub: Path, module: str, *arguments: str) -> str:
    """What a module that runs beside the stub prints."""
    command = [sys.executable, "-m", "tests.cuda.stub", str(stub), module, *arguments]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def load(stub: Path) -> None:
    """Give torch the stub's hooks, and let it take its device for initialised."""
    assert "torch" not in sys.modules, "the stub comes before torch"
    libraries = torch_folder() / "lib"
    for library in (libraries / "libtorch_global_deps.so", libraries / "libtorch_cpu.so", stub):
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    import torch

    torch.cuda._lazy_init = lambda: None
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor([...], device="cuda") over the host


if __name__ == "__main__":
    load(Path(sys.argv[1]))
    sys.argv = sys.argv[2:]
    runpy.run_module(sys.argv[0], run_name="__main__")

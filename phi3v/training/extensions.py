"""Optimizers that DeepSpeed compiles: built ahead of time, loaded by a run, never compiled by it.

    build_extensions(ds)    # launch/build.py: once, on a machine that has the compilers
    load_extensions(ds)     # a run, before the engine is built

The shipped JSONs need none: torch's fused AdamW comes with torch. DeepSpeed's own FusedAdam and
CPUAdam are compiled; a run whose JSON asks for one that is not built is refused before it loads
any weights.

Surprising: DeepSpeed's loader starts ninja in every rank of every start, takes a lock in the
extension's folder, and waits without a limit for a lock that a killed build has left. A run goes
around it: what was built is imported and put where the loader looks first, so a start needs no
compiler, writes nothing, and meets no lock. Locks matter to `build_extensions` alone.
"""

import glob
import os
import platform
import shutil
import socket
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import torch

from phi3v.config import DeepSpeedConfig
from phi3v.devices import has_cuda
from phi3v.errors import ConfigError
from phi3v.files import write_json
from phi3v.printing import print
from phi3v.private import weakness
from phi3v.stored import parse_file

BUILT = "built.json"  # beside a finished extension: what it was built for
OWNER = "owner.json"  # beside a lock of ours: who builds
LOCK = "lock"  # torch's
LOCK_SECONDS = 900.0  # the slowest extension, async_io, takes 175 s on two cores
POLL_SECONDS = 0.5
VECTORS = ("sse", "ssse", "avx", "fma", "bmi", "amx", "f16c")  # what -march=native may have used


@dataclass(frozen=True)
class Extension:
    """One of DeepSpeed's: the name of its module, of its builder, and what compiles it."""

    name: str
    builder: str
    needs: str


HOST = "a C++ compiler (g++) and ninja"
DEVICE = "nvcc of torch's CUDA version, CUDA_HOME, g++ and ninja"
EXTENSIONS = {
    extension.name: extension
    for extension in (
        Extension("fused_adam", "FusedAdamBuilder", DEVICE),
        Extension("fused_lion", "FusedLionBuilder", DEVICE),
        Extension("quantizer", "QuantizerBuilder", DEVICE),
        Extension("cpu_adam", "CPUAdamBuilder", HOST),
        Extension("cpu_adagrad", "CPUAdagradBuilder", HOST),
        Extension("cpu_lion", "CPULionBuilder", HOST),
        Extension("async_io", "AsyncIOBuilder", f"{HOST}, and libaio with its headers"),
    )
}


def needed_extensions(ds: DeepSpeedConfig) -> list[Extension]:
    """The extensions that DeepSpeed would compile for a JSON.

    Source: DeepSpeed runtime/engine.py `_configure_basic_optimizer`, runtime/zero/stage3.py and
    partition_parameters.py.
    """
    names = []
    optimizer = ds.optimizer_type.lower()
    if optimizer == "adam":
        optimizer = "adamw"
    kind = "cpu" if ds.steps_on_host else "fused"
    if optimizer == "adamw" and not ds.takes_torch_adam:
        names.append(f"{kind}_adam")
    if optimizer == "lion" or (optimizer == "adagrad" and ds.steps_on_host):
        names.append(f"{kind}_{optimizer}")
    if ds.offloads_to_nvme:
        names.append("async_io")
    if ds.quantizes_weights:
        names.append("quantizer")
    return [EXTENSIONS[name] for name in names]


def load_extensions(ds: DeepSpeedConfig) -> None:
    """Hand DeepSpeed what was built for a JSON; nothing is compiled, and no lock is looked at.

    Raises: ConfigError if an extension is not built, was built for something else, or lies where
    others can write.
    """
    for extension in needed_extensions(ds):
        _check_private(_file(extension))
        obstacle = _obstacle(extension)
        if obstacle:
            raise ConfigError(
                f"{ds.path} asks for {_reason(ds, extension)}, and {obstacle}; run `python "
                f"launch/build.py {ds.path}` once, which needs {extension.needs}{_way_out(ds)}"
            )
        _hand_over(extension)


def build_extensions(ds: DeepSpeedConfig) -> list[Path]:
    """Compile what a JSON asks for and is not built yet; returns the modules' files.

    Raises: ConfigError without the compilers, if the folder cannot be written to, or if another
    build of the same extension does not end.
    """
    return [_build(ds, extension) for extension in needed_extensions(ds)]


def extensions_folder() -> Path:
    """Where compiled extensions are: TORCH_EXTENSIONS_DIR, or a folder beside this Python's."""
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path(sys.prefix, "torch_extensions"))


def _reason(ds: DeepSpeedConfig, extension: Extension) -> str:
    """What in the JSON asks for an extension."""
    if extension.name == "async_io":
        return "offloading to NVMe"
    if extension.name == "quantizer":
        return "quantized weights"
    where = "offloaded " if ds.steps_on_host else ""
    return f"DeepSpeed's own {where}{ds.optimizer_type} (extension {extension.name})"


def _way_out(ds: DeepSpeedConfig) -> str:
    """What needs no compiler, if there is such a thing for the optimizer."""
    if ds.optimizer_type.lower() not in ("adam", "adamw") or ds.takes_torch_adam:
        return ""
    return ', or set "torch_adam": true in optimizer.params for torch\'s own'


def _file(extension: Extension) -> Path:
    return extensions_folder() / extension.name / f"{extension.name}.so"


def _check_private(file: Path) -> None:
    """Refuse a module that somebody else could have put there: to import it is to run it.

    The owner of this Python is trusted, who could change the program itself.

    Raises: ConfigError naming the folder and why.
    """
    for path in (file.parent, file):
        if reason := weakness(path, like=Path(sys.prefix)):
            raise ConfigError(
                f"{path} holds compiled code that is run, and {reason}; remove it and build it "
                "again with launch/build.py, or set TORCH_EXTENSIONS_DIR to a folder of your own "
                "that nobody else can write to (chmod 700)"
            )


def _circumstances() -> dict[str, str]:
    """What a compiled module depends on, besides the processor."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "deepspeed": version("deepspeed"),
        "machine": platform.machine(),
    }


def _obstacle(extension: Extension) -> str | None:
    """Why an extension cannot be loaded here, or None."""
    path = _file(extension)
    try:
        built = parse_file(path.with_name(BUILT))
    except (OSError, ValueError):
        return f"it is not built in {path.parent}"
    if not path.is_file():
        return f"{path} is gone"
    for name, here in _circumstances().items():
        if built.get(name) != here:
            return f"{path} was built for {name} {built.get(name)}, this is {here}"
    lacking = sorted(set(built["vectors"]) - set(_vectors()))
    if lacking:
        return f"{path} was built on a processor with {' '.join(lacking)}, which this one lacks"
    found = _capabilities()
    if built["capabilities"] and not set(found) <= set(built["capabilities"]):
        return (
            f"{path} was built for compute capability {', '.join(built['capabilities'])}, this GPU "
            f"has {', '.join(found)}"
        )
    return None


def _vectors() -> list[str]:
    """The vector instructions of this machine's processor, as Linux names them."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("flags"):
                return sorted({flag for flag in line.split() if flag.startswith(VECTORS)})
    return []


def _capabilities() -> list[str]:
    """Compute capabilities of the GPUs that torch sees, each once."""
    count = torch.cuda.device_count() if has_cuda() else 0
    pairs = {torch.cuda.get_device_capability(index) for index in range(count)}
    return [f"{major}.{minor}" for major, minor in sorted(pairs)]


def _hand_over(extension: Extension) -> None:
    """Import a built module, and let DeepSpeed's builder find it as one that it has loaded."""
    from deepspeed.ops.op_builder.builder import OpBuilder

    if extension.name not in OpBuilder._loaded_ops:
        OpBuilder._loaded_ops[extension.name] = _import(extension)


def _import(extension: Extension) -> ModuleType:
    path = _file(extension)
    spec = spec_from_file_location(extension.name, path)
    assert spec is not None and spec.loader is not None
    try:
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as error:
        raise ConfigError(
            f"{path} cannot be loaded: {error}; remove {path.parent} and build it again with "
            "launch/build.py"
        ) from None
    return module


def _build(ds: DeepSpeedConfig, extension: Extension) -> Path:
    """Build one extension, unless it is there."""
    from deepspeed.accelerator import get_accelerator

    path = _file(extension)
    _check_private(path)
    if _obstacle(extension) is None:
        return path
    builder = get_accelerator().create_op_builder(extension.builder)
    if builder is None or builder.NAME != extension.name:
        raise ConfigError(
            f"{ds.path} asks for {_reason(ds, extension)}, which DeepSpeed does not have for "
            f"{get_accelerator()._name}; choose another optimizer"
        )
    _check_compilers(ds, extension)
    _claim(path.parent)
    try:
        path.with_name(BUILT).unlink(missing_ok=True)
        builder.load(verbose=True)
    except (OSError, RuntimeError, ImportError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"{extension.name} could not be built in {path.parent}: {reason}; it needs "
            f"{extension.needs}, and the compiler's own words are above"
        ) from None
    finally:
        path.with_name(OWNER).unlink(missing_ok=True)
    stamp: dict[str, object] = {**_circumstances(), "vectors": _vectors()}
    stamp["capabilities"] = _capabilities() if extension.needs == DEVICE else []
    path.chmod(0o755)
    write_json(path.with_name(BUILT), stamp)
    return path


def _check_compilers(ds: DeepSpeedConfig, extension: Extension) -> None:
    missing = []
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        missing.append(f"a C++ compiler ({os.environ.get('CXX', 'c++')})")
    if extension.needs == DEVICE and has_cuda():
        home = os.environ.get("CUDA_HOME")
        if shutil.which("nvcc") is None and not (home and Path(home, "bin/nvcc").is_file()):
            missing.append(f"nvcc of CUDA {torch.version.cuda} (CUDA_HOME is {home or 'not set'})")
    if missing:
        raise ConfigError(
            f"{ds.path} asks for {_reason(ds, extension)}, and this machine has no "
            f"{' and no '.join(missing)} to build it; install that{_way_out(ds)}"
        )


def _claim(folder: Path) -> None:
    """Make an extension's folder ours: no dead lock in it, and a note of who builds."""
    try:
        os.environ["TORCH_EXTENSIONS_DIR"] = str(folder.parent)
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o755, exist_ok=True)
        settle_lock(folder)
        owner = Owner(socket.gethostname(), os.getpid())
        write_json(folder / OWNER, asdict(owner))
    except OSError as error:
        raise ConfigError(
            f"{folder} cannot be written to: {error.strerror}; make it writable, or set "
            "TORCH_EXTENSIONS_DIR to a folder that is"
        ) from None


@dataclass(frozen=True)
class Owner:
    """The process that builds an extension."""

    host: str
    process: int


def settle_lock(folder: Path, limit: float = LOCK_SECONDS) -> None:
    """Wait for another build of an extension, and remove the lock of one that was killed.

    A lock is dead when its owner was a process of this machine and is gone, or when nobody here
    works in the folder and the lock is older than `limit` seconds: a folder may be shared with
    machines whose processes cannot be seen from here. A builder outlived by its compilers is
    waited for, since ninja must not meet a second build.

    Raises: ConfigError if a process of this machine holds it for longer than `limit`.
    """
    lock, announced = folder / LOCK, False
    while lock.exists():
        worker, age = _worker(folder), _age(lock)
        if worker is None and (_is_abandoned(folder) or age > limit):
            print(f"{lock} is removed: its build ended {age:.0f} s ago or later", file=sys.stderr)
            lock.unlink(missing_ok=True)
            return
        if worker is not None and age > limit:
            raise ConfigError(
                f"process {worker} has been building in {folder} for {age:.0f} s; end it and "
                "start again"
            )
        if not announced:
            who = f"process {worker}" if worker else "another machine, or a build that was killed"
            print(f"waiting for {who} in {folder}, {limit:.0f} s at most", file=sys.stderr)
            announced = True
        time.sleep(POLL_SECONDS)


def _age(lock: Path) -> float:
    """Seconds since a lock was made, by the clock of its file system; 0 if it has just gone."""
    probe = lock.with_name(f".clock-{os.getpid()}")
    try:
        probe.touch()
        return max(0.0, probe.stat().st_mtime - lock.stat().st_mtime)
    except FileNotFoundError:
        return 0.0
    finally:
        probe.unlink(missing_ok=True)


def _is_abandoned(folder: Path) -> bool:
    """Whether the process that noted itself as the builder was one of this machine, and is gone."""
    try:
        owner = Owner(**parse_file(folder / OWNER))
    except (OSError, ValueError, TypeError):
        return False
    return owner.host == socket.gethostname() and not Path("/proc", str(owner.process)).exists()


def _worker(folder: Path) -> int | None:
    """A process of this machine that has the lock open or works in the folder, other than this."""
    places = [folder, folder / LOCK]
    for link in glob.glob("/proc/[0-9]*/fd/*") + glob.glob("/proc/[0-9]*/cwd"):
        process = int(link.split("/")[2])
        try:
            is_there = any(os.path.samefile(link, place) for place in places)
        except OSError:  # the process or the lock has just gone, or belongs to another user
            continue
        if is_there and process != os.getpid():
            return process
    return None

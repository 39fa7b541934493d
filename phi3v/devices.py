"""On which device this process computes: the one place that chooses it.

    device = take_device(local_rank, local_size)     # before any process group, by every command

A CUDA device where torch sees one, the CPU elsewhere. Where there is a GPU that torch does not see,
nothing goes on on the CPU in silence: `check_visible` refuses, unless the CPU is asked for by name,
DS_ACCELERATOR=cpu, as DeepSpeed has it.
"""

import os
import re
import shutil
import socket
from pathlib import Path

import torch

from phi3v.errors import ConfigError

DRIVER = Path("/proc/driver/nvidia/version")  # the kernel's driver, seen in containers as well
NODES = Path("/dev")  # of nvidia0, nvidia1, ...
SHARED_MEMORY = Path("/dev/shm")
SLURM_GPUS = {"SLURM_JOB_GPUS": "", "SLURM_STEP_GPUS": "", "SLURM_GPUS_ON_NODE": "0"}  # with none
# The first driver that runs programs of a major CUDA version (NVIDIA's CUDA compatibility guide).
MIN_DRIVERS = {11: 450, 12: 525, 13: 580}
# NCCL's segments take 4 to 10 MB for each channel of a pair. Below this DeepSpeed's env_report
# warns, and NCCL's manual gives a container 1 GB.
NCCL_BYTES = 512 * 2**20
BY_NAME = "or set DS_ACCELERATOR=cpu to compute on the CPU"


def has_cuda() -> bool:
    """Whether this process computes on CUDA devices."""
    return os.environ.get("DS_ACCELERATOR") != "cpu" and torch.cuda.is_available()


def take_device(local_rank: int = 0, local_size: int = 1) -> torch.device:
    """The device of a rank of this host, made the current one; a second call changes nothing.

    Until a process has set its device everything it sends without saying where goes by way of
    device 0, which NCCL refuses for all ranks but one.

    Raises: ConfigError if there are more ranks on this host than devices.
    """
    check_visible()
    if not has_cuda():
        return torch.device("cpu")
    _check_count(local_size, torch.cuda.device_count())
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def name_of(device: torch.device) -> str | None:
    """What tells a GPU from those of all hosts: its UUID; None for the CPU, which ranks share."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else None


def check_visible() -> None:
    """Refuse a machine with a GPU on which torch sees none, unless the CPU was asked for by name.

    Raises: ConfigError naming what was found on both sides, and what to install or unset.
    """
    asked = os.environ.get("DS_ACCELERATOR")
    if asked not in (None, "cpu", "cuda"):
        raise ConfigError(
            f"DS_ACCELERATOR is {asked!r}, and this program computes on cuda or cpu; set it to one "
            "of these, or unset it to take what there is"
        )
    if asked == "cpu" or torch.cuda.is_available():
        return
    found = _traces()
    if found or asked:
        side = f"has a GPU ({', '.join(found)})" if found else "is to use CUDA (DS_ACCELERATOR)"
        raise ConfigError(
            f"{socket.gethostname()} {side}, but torch sees no GPU ({_torch_side()}); {_remedy()}, "
            f"{BY_NAME}"
        )


def check_shared_memory(local_size: int) -> None:
    """Refuse a /dev/shm in which the GPUs of this host could not reach each other by NCCL.

    Ranks on the CPU speak by gloo, which takes sockets.
    Raises: ConfigError with the bytes that are free and those that are needed.
    """
    if local_size == 1 or not has_cuda():
        return
    is_there = SHARED_MEMORY.is_dir()
    free = shutil.disk_usage(SHARED_MEMORY).free if is_there else 0
    if free < NCCL_BYTES:
        raise ConfigError(
            f"{SHARED_MEMORY} of {socket.gethostname()} has {free:,} bytes free, and its "
            f"{local_size} ranks need {NCCL_BYTES:,} there to reach each other; start the "
            "container with --shm-size=16g or --ipc=host, or remove what fills it"
        )


def _check_count(local_size: int, count: int) -> None:
    if local_size <= count:
        return
    seen = f"CUDA_VISIBLE_DEVICES is {os.environ.get('CUDA_VISIBLE_DEVICES')!r}"
    if count == 1 and "SLURM_STEP_ID" in os.environ:
        raise ConfigError(
            f"each of the {local_size} ranks of {socket.gethostname()} sees one GPU ({seen}), by "
            "srun's --gpus-per-task or --gpu-bind, and must see those of all; give srun "
            f"--gpus-per-node={local_size} in their place, and unset SLURM_GPUS_PER_TASK "
            "SLURM_GPU_BIND before it, as slurm/train.sh does"
        )
    raise ConfigError(
        f"{local_size} ranks were started on {socket.gethostname()}, but torch sees {count} "
        f"GPU{'s' if count > 1 else ''} ({seen}); start {count} ranks there (deepspeed --num_gpus "
        f"{count}, torchrun --nproc_per_node {count}, srun --ntasks-per-node={count}), or unset "
        "CUDA_VISIBLE_DEVICES"
    )


def _traces() -> list[str]:
    """What speaks for a GPU on this machine, whatever torch sees."""
    found = []
    if DRIVER.is_file():
        found.append(_describe_driver(_driver_version()))
    nodes = sorted(NODES.glob("nvidia[0-9]*"))
    if nodes:
        found.append(f"{len(nodes)} of {NODES}/nvidia*")
    for name, none in SLURM_GPUS.items():
        if os.environ.get(name, none) not in ("", none):
            found.append(f"{name}={os.environ[name]}")
    return found


def _driver_version() -> str:
    """The number of the kernel's NVIDIA driver, such as 535.104.05; "" where it is not told."""
    text = DRIVER.read_text(errors="replace") if DRIVER.is_file() else ""
    number = re.search(r"\b\d{3,}\.\d+(\.\d+)?\b", text)
    return number.group() if number else ""


def _describe_driver(version: str) -> str:
    newest = _newest_cuda(version)
    cuda = f", for CUDA {newest} and older" if newest else ""
    return f"NVIDIA driver {version or 'of unknown version'}{cuda}"


def _newest_cuda(driver: str) -> int | None:
    """The newest major CUDA version that a driver runs, as far as MIN_DRIVERS goes."""
    if not driver:
        return None
    major = int(driver.split(".")[0])
    return max((cuda for cuda, least in MIN_DRIVERS.items() if major >= least), default=None)


def _torch_side() -> str:
    cuda = torch.version.cuda
    build = f"built for CUDA {cuda}" if cuda else "a build for the CPU alone"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return f"torch {torch.__version__}, {build}, CUDA_VISIBLE_DEVICES {visible!r}"


def _remedy() -> str:
    """What to do, by the likeliest of the causes that can be told from here."""
    driver, visible = _driver_version(), os.environ.get("CUDA_VISIBLE_DEVICES")
    newest, cuda = _newest_cuda(driver), torch.version.cuda
    if cuda is None:
        build = f"CUDA {newest}" if newest else "CUDA"
        return f"install torch's build for {build} (docs/install.md)"
    if visible is not None and not re.match(r"\d|GPU-|MIG-", visible):
        return "unset CUDA_VISIBLE_DEVICES, which hides them all"
    major = int(cuda.split(".")[0])
    if driver and (newest is None or newest < major):
        older = f"torch's build for CUDA {newest} (docs/install.md)" if newest else "an older torch"
        least = MIN_DRIVERS.get(major)
        return f"CUDA {major} needs a driver of {least} or newer: install {older}, or that driver"
    if not any(NODES.glob("nvidia[0-9]*")):
        return (
            "start the container with --nv (apptainer) or --gpus all (docker), or mend the driver"
        )
    return "`nvidia-smi` and `python -c 'import torch; torch.cuda.init()'` say what is wrong"

"""Running the project's own commands as a user does: real processes, own ports, nothing left."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from phi3v.training.ranks import RANK_VARIABLES, free_port

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
BIN = Path(sys.executable).parent
TIMEOUT = 180  # seconds; a run here takes about 15


def environment() -> dict[str, str]:
    """Ours without what would make a child take itself for a rank, and offline."""
    kept = {k: v for k, v in os.environ.items() if k not in RANK_VARIABLES}
    return kept | {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}


def start(*command: object, cwd: Path, **variables: str) -> subprocess.Popen[str]:
    """Start a command in a process group of its own."""
    return subprocess.Popen(
        [str(part) for part in command],
        cwd=cwd,
        env=environment() | variables,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for(process: subprocess.Popen[str], is_there: Callable[[], bool]) -> None:
    """Wait until a command has done something; it must not end before."""
    deadline = time.monotonic() + TIMEOUT
    while not is_there():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1]
        time.sleep(0.05)


def kill(process: subprocess.Popen[str]) -> None:
    """End a command and everything it started; torchrun's ranks are in sessions of their own."""
    if process.poll() is not None:
        return
    family = psutil.Process(process.pid)
    for member in [*family.children(recursive=True), family]:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()


def run(
    *command: object, cwd: Path, timeout: float = TIMEOUT, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    process = start(*command, cwd=cwd, **variables)
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        kill(process)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def deepspeed(ranks: int, *arguments: object) -> list[object]:
    """The command line of training under the deepspeed launcher."""
    port = ["--num_gpus", ranks, "--master_port", free_port()]
    return [BIN / "deepspeed", *port, LAUNCH / "train.py", *arguments]


def torchrun(ranks: int, *arguments: object) -> list[object]:
    """The command line of training under torchrun, which finds a port itself."""
    found = ["--nproc_per_node", ranks, "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    return [BIN / "torchrun", *found, LAUNCH / "train.py", *arguments]


def ranks(number: int, program: Path, *arguments: object) -> list[object]:
    """The command line of a program on ranks without a launcher, which takes 3 s of a processor."""
    script = [ROOT / "tests/ranks.sh", number, free_port()]
    return ["bash", *script, sys.executable, program, *arguments]


def plain(number: int, *arguments: object) -> list[object]:
    """The command line of training on ranks without a launcher."""
    return ranks(number, LAUNCH / "train.py", *arguments)


def run_ranks(number: int, program: Path, *arguments: object) -> None:
    """Run a program of ours on ranks, from the project's root; it must succeed."""
    done = run(*ranks(number, program, *arguments), cwd=ROOT, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr


def python(*arguments: object) -> list[object]:
    """The command line of training on one rank."""
    return [sys.executable, LAUNCH / "train.py", *arguments]


def metrics(run_folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    text = (run_folder / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def last_line(done: subprocess.CompletedProcess[str], kind: str) -> str:
    """The one line of an error of ours on stderr."""
    lines = [line for line in done.stderr.splitlines() if line.startswith(f"{kind}: ")]
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return lines[0]

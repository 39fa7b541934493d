"""Killing a run again and again from outside, at moments that its folder shows.

    hits = survive(draw_kills(20, chance), command, folder, chance, start_seconds=8.0)
    # then start the command once more, to the end

Every kill is a SIGKILL, and the command is started again at once, while what is left of the start
before may still be dying; by the next kill it must be gone, by itself. The processes of a start are
known by a variable that all of them inherit, so an orphan is found whoever has adopted it.
"""

import contextlib
import random
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

import psutil

from phi3v.training.checkpoints.store import MANIFEST, partial_name, step_name
from tests.commands import start

MARK = "PHI3V_TEST_START"
RANK, FAMILY = "train.py", "family"
VICTIMS = {  # by launcher, what a start consists of: the names of the programs
    "torchrun": (RANK, "torchrun", FAMILY),
    "deepspeed": (RANK, "deepspeed", "deepspeed.launcher.launch", FAMILY),
    "python": (RANK,),
}
DELAYS = {"step": 0.15, "save": 0.05, "rename": 0.01, "conversion": 0.1}  # seconds at most
POLL_SECONDS = 0.001
PATIENCE_SECONDS = 120.0  # for a moment to come; some 10 on an idle machine
GONE_SECONDS = 30.0  # for the rest of a start to end; some 3 on an idle machine


@dataclass(frozen=True)
class Kill:
    """Who of a start under which launcher is killed, and when."""

    launcher: str
    victim: str
    moment: str


@dataclass(frozen=True)
class Hit:
    """What a kill met: seconds after the start, the programs it ended, what was in the folder."""

    kill: Kill
    seconds: float
    killed: tuple[str, ...]
    state: str


def draw_kills(number: int, chance: random.Random) -> list[Kill]:
    """Kills in random order: moments in equal shares, and every victim if there are 10 or more."""
    launchers = ("torchrun", "torchrun", "deepspeed")  # the latter takes longer to start
    pairs = cycle((launcher, victim) for launcher in launchers for victim in VICTIMS[launcher])
    moments = list(islice(cycle(("start-up", "step", "save", "rename")), number))
    chance.shuffle(moments)
    kills = [Kill(*next(pairs), moment) for moment in moments]
    chance.shuffle(kills)
    return kills


def survive(
    kills: Sequence[Kill],
    command: Callable[[str], list[object]],
    folder: Path,
    chance: random.Random,
    start_seconds: float,
) -> list[Hit]:
    """Start the run of a folder once for each kill; returns when nothing is left of them.

    command        that starts the run, by the launcher's name
    start_seconds  from a start to its first step, if nobody disturbs it
    """
    hits: list[Hit] = []
    started: list[subprocess.Popen[str]] = []
    marks = [f"{folder}, start {number}" for number in range(len(kills))]
    try:
        for mark, kill in zip(marks, kills, strict=True):
            began, own = time.time(), {MARK: mark}
            process = start(*command(kill.launcher), cwd=folder.parent, **own)
            started.append(process)
            if kill.moment == "start-up":
                wait_within(chance.uniform(0, start_seconds), folder)
            else:
                assert_gone(marks[: len(hits)])  # what is seen next is this start's doing
                wait_until(moment(kill.moment, folder, chance, began), process)
                time.sleep(chance.uniform(0, DELAYS[kill.moment]))
            seconds = round(time.time() - began, 2)
            hits.append(Hit(kill, seconds, strike(kill, mark, chance), describe(folder)))
            print(len(hits), hits[-1], flush=True)
        assert_gone(marks)
    finally:
        end(marked(marks))
        errors = [process.communicate()[1] for process in started]
        print(*errors[-1:])  # is seen where a test fails
    return hits


def moment(name: str, folder: Path, chance: random.Random, began: float) -> Callable[[], bool]:
    """Whether a moment of the start made at `began` has come, to be asked again and again."""
    checkpoints = folder / "checkpoints"
    step = count_steps(folder) + chance.randint(1, 2)
    partial, final = checkpoints / partial_name(step), checkpoints / step_name(step)
    return {
        "step": lambda: count_steps(folder) >= step,
        "save": lambda: partial.exists() or final.exists(),
        "rename": lambda: (partial / MANIFEST).exists() or final.exists(),
        "conversion": lambda: any(
            changed(path) > began for path in checkpoints.glob(".step-*.universal*")
        ),
    }[name]


def changed(path: Path) -> float:
    """When a file or folder was changed last, as time.time(); 0 if it has gone."""
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_ctime
    return 0.0


def count_steps(folder: Path) -> int:
    """Lines of metrics.jsonl."""
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def wait_until(has_come: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not has_come():
        assert process.poll() is None, f"the start ended by itself, exit code {process.returncode}"
        assert time.monotonic() < deadline, "the moment of the kill did not come"
        time.sleep(POLL_SECONDS)


def wait_within(seconds: float, folder: Path) -> None:
    """Wait, but no longer than to the next step: a start may be faster than the measured one."""
    end, steps = time.monotonic() + seconds, count_steps(folder)
    while time.monotonic() < end and count_steps(folder) <= steps:
        time.sleep(POLL_SECONDS)


def strike(kill: Kill, mark: str, chance: random.Random) -> tuple[str, ...]:
    """Kill; anybody where the victim is not there yet. Returns the programs that were killed."""
    family = marked([mark])
    assert family, "the start ended by itself"
    victims = [process for process in family if program(process) == kill.victim]
    if kill.victim != FAMILY:
        family = [chance.choice(victims or family)]
    killed = tuple(program(process) for process in family)
    end(family)
    return killed


def end(processes: Sequence[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def marked(marks: Sequence[str]) -> list[psutil.Process]:
    """The processes of some starts, whoever their parents are."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(MARK) in marks and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def program(process: psutil.Process) -> str:
    """What a python process runs: the name of its script or module."""
    with contextlib.suppress(psutil.Error):
        words = [word for word in process.cmdline()[1:] if not word.startswith("-")]
        return Path(words[0]).name if words else process.name()
    return "gone"


def assert_gone(marks: Sequence[str]) -> None:
    """Nothing is left of these starts, or will be in a while, without anybody's help."""
    deadline = time.monotonic() + GONE_SECONDS
    while left := [(process.pid, program(process)) for process in marked(marks)]:
        assert time.monotonic() < deadline, f"still there after a kill: {left}"
        time.sleep(0.1)


def describe(folder: Path) -> str:
    """What is being done in a run folder, as far as its hidden names tell."""
    names = [path.name for path in folder.glob("checkpoints/.*")]
    kinds = {name.partition(".step-")[2][9:] or "temporary file" for name in names}
    if list(folder.glob("checkpoints/.step-*.partial/manifest.json")):
        kinds.add("manifest")
    return ", ".join(sorted(kinds))

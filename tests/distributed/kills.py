"""Killing a run again and again from outside, at moments that its folder shows.

    kills = draw_kills(20, chance)
    hits = survive(kills, command, folder, chance, start_seconds=8.0)
    # start the command once more, to the end

Every kill is a SIGKILL, and the command is started again at once, while what is left of the start
before may still be dying; by the next kill it must be gone, by itself. The processes of a start are
known by a variable that all of them inherit, so an orphan is found whoever has adopted it.

Surprising: who is killed while it loads DeepSpeed's compiled extension leaves a lock beside it, on
which the runs of other tests would wait; so these runs have a copy of their own (`own_extensions`).
"""

import contextlib
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import psutil

from phi3v.training.checkpoints.convert import universal_name
from phi3v.training.checkpoints.store import MANIFEST, partial_name, step_name, steps_saved
from tests.commands import start

MARK = "PHI3V_TEST_START"
RANK, FAMILY = "train.py", "family"
VICTIMS = {  # by launcher, what a start consists of: the names of the programs
    "torchrun": (RANK, "torchrun", FAMILY),
    "deepspeed": (RANK, "deepspeed", "deepspeed.launcher.launch", FAMILY),
    "python": (RANK,),
}
MOMENTS = ("start-up", "step", "save", "rename")
DELAYS = {"step": 0.15, "save": 0.05, "rename": 0.01, "conversion": 0.1}  # seconds at most
POLL_SECONDS = 0.001
PATIENCE_SECONDS = 120.0  # for a moment to come; some 10 on an idle machine
GONE_SECONDS = 30.0  # for the rest of a family to end; some 3


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
    """Kills in random order: moments in equal shares, and all victims if there are 10 or more."""
    launchers = ("torchrun", "torchrun", "deepspeed")  # the latter takes longer to start
    pairs = [(launcher, victim) for launcher in launchers for victim in VICTIMS[launcher]]
    kills = [Kill(*pair, MOMENTS[k % 4]) for k, pair in zip(range(number), cycle(pairs))]  # noqa: B905
    chance.shuffle(kills)
    return kills


def own_extensions(folder: Path) -> dict[str, str]:
    """The variables for runs whose locks on compiled extensions are nobody else's."""
    built = Path(sys.prefix, "torch_extensions")
    if built.is_dir():
        shutil.copytree(built, folder, ignore=shutil.ignore_patterns("lock"))
    return {"TORCH_EXTENSIONS_DIR": str(folder)}


def survive(
    kills: Sequence[Kill],
    command: Callable[[str], list[object]],
    folder: Path,
    chance: random.Random,
    start_seconds: float,
    **variables: str,
) -> list[Hit]:
    """Start the run of a folder once for each kill; returns when all of them are gone.

    command        to start, by the launcher's name
    start_seconds  from a start to its first step, if nobody disturbs it
    """
    hits = list[Hit]()
    with contextlib.ExitStack() as before:
        for number, kill in enumerate(kills):
            mark = f"{folder}, start {number}"
            is_there = moment(kill.moment, folder, chance, start_seconds)
            process = start(*command(kill.launcher), cwd=folder.parent, **{MARK: mark}, **variables)
            with contextlib.ExitStack() as own:
                own.enter_context(ending(process, mark))
                began = time.monotonic()
                wait_until(is_there, process)
                time.sleep(chance.uniform(0, DELAYS.get(kill.moment, 0)))
                seconds = round(time.monotonic() - began, 2)
                hits.append(Hit(kill, seconds, strike(kill, mark, chance), describe(folder)))
                print(hits[-1], flush=True)
                before.close()
                before.push(own.pop_all())
    return hits


@contextlib.contextmanager
def ending(process: subprocess.Popen[str], mark: str) -> Iterator[None]:
    """See to it that a start has ended by itself a while after it was killed; else end it."""
    try:
        yield
        deadline = time.monotonic() + GONE_SECONDS
        while left := marked(mark):
            assert time.monotonic() < deadline, f"{[program(p) for p in left]} of {mark} lived on"
            time.sleep(0.1)
    finally:
        for member in marked(mark):
            kill(member)
        process.communicate()


def moment(
    name: str, folder: Path, chance: random.Random, start_seconds: float
) -> Callable[[], bool]:
    """Whether a moment has come; asked again and again of a start that is about to be made."""
    checkpoints = folder / "checkpoints"
    step = count_steps(folder) + chance.randint(1, 2)  # one that was never made before
    partial, final = checkpoints / partial_name(step), checkpoints / step_name(step)
    if name == "start-up":
        due = time.monotonic() + chance.uniform(0, start_seconds)
        return lambda: time.monotonic() >= due
    if name == "step":
        return lambda: count_steps(folder) >= step
    if name == "save":
        return lambda: partial.exists() or final.exists()
    if name == "rename":
        return lambda: (partial / MANIFEST).exists() or final.exists()
    assert name == "conversion"
    universal = checkpoints / f"{universal_name(steps_saved(checkpoints)[-1])}.partial"
    ...

"""What else befalls a run than kills: disks that fail, torn lines, a dead log, a rank that stands.

    for hazard in draw_hazards(100, chance):
        print(befall(hazard, run, chance))
    # then start the command once more, to the end

A start meets one hazard and ends: by it, by the refusal that it must answer it with, or, where it
is to go on in spite of it, by SIGTERM some steps later.
"""

import errno
import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

from tests.commands import environment
from tests.distributed.kills import (
    DELAYS,
    MARK,
    RANK,
    assert_gone,
    count_steps,
    end,
    marked,
    program,
)

KINDS = (
    *("kill", "full disk", "failing write", "failing read", "torn line", "block of nuls"),
    *("full log", "dead reader", "stopped rank", "closed terminal"),
)
ERRORS = {
    "full disk": (errno.ENOSPC, "w"),
    "failing write": (errno.EIO, "w"),
    "failing read": (errno.EIO, "r"),
}
LASTING = ("full log", "dead reader")  # which a run must not even notice
CALLS = {"w": 60, "r": 30}  # of a rank on files of the run folder, in two or three steps
STEPS = 4  # after which a hazard that was drawn too late for this start is given up
PATIENCE_SECONDS = 180.0
WORDS = re.compile(r"^\w*Error: ", re.MULTILINE)


@dataclass(frozen=True)
class Soaked:
    """A run that hazards befall: its command, its folder, the compiled disk.c, where logs go."""

    command: Callable[[], list[object]]
    folder: Path
    disk: Path
    logs: Path


@dataclass(frozen=True)
class Outcome:
    """How a start ended."""

    hazard: str
    code: int
    steps: int
    line: str


def draw_hazards(number: int, chance: random.Random) -> list[str]:
    """Hazards in random order and about equal shares."""
    shuffled = chance.sample(KINDS, len(KINDS))
    drawn = list(islice(cycle(shuffled), number))
    chance.shuffle(drawn)
    return drawn


def befall(hazard: str, run: Soaked, chance: random.Random, number: int) -> Outcome:
    """Start the run, let one hazard befall it, and see that it ends as it should."""
    mark, steps = f"{run.folder}, hazard {number}", count_steps(run.folder)
    log = run.logs / f"{number}.txt"
    process = _start(hazard, run, chance, {MARK: mark}, log)
    try:
        if hazard in ERRORS:
            _wait(lambda: count_steps(run.folder) >= steps + STEPS, process, may_end=True)
        else:
            wanted = steps + chance.randint(1, 2) + (2 if hazard in LASTING else 0)
            _wait(lambda: count_steps(run.folder) >= wanted, process, may_end=False)
            time.sleep(chance.uniform(0, DELAYS["step"]))
        is_over = process.poll() is not None
        if not is_over:
            _strike(hazard, mark, chance)
        process.wait(timeout=PATIENCE_SECONDS)
        assert_gone([mark])
    finally:
        end(marked([mark]))
        process.wait()
    if hazard in ("torn line", "block of nuls"):
        _tear(hazard, run.folder, chance)
    said = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    _check(hazard, process.returncode, said, is_over)
    line = WORDS.search(said)
    shown = said[line.start() :].partition("\n")[0] if line else ""
    return Outcome(hazard, process.returncode, count_steps(run.folder) - steps, shown)


def _start(
    hazard: str, run: Soaked, chance: random.Random, variables: dict[str, str], log: Path
) -> "subprocess.Popen[bytes]":
    if hazard in ERRORS:
        number, calls = ERRORS[hazard]
        first = chance.randint(1, CALLS[calls])
        last = first if chance.random() < 0.5 and hazard != "full disk" else 1 << 30
        variables = variables | {
            "LD_PRELOAD": str(run.disk),
            "PHI3V_DISK_FOLDER": str(run.folder),
            "PHI3V_DISK_CALLS": calls,
            "PHI3V_DISK_ERRNO": str(number),
            "PHI3V_DISK_FIRST": str(first),
            "PHI3V_DISK_LAST": str(last),
        }
    reader, writer = os.pipe()
    stderr = {
        "full log": lambda: os.open("/dev/full", os.O_WRONLY),
        "dead reader": lambda: os.dup(writer),
    }.get(hazard, lambda: os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND))()
    os.close(reader)
    os.close(writer)
    try:
        return subprocess.Popen(
            [str(part) for part in run.command()],
            cwd=run.folder.parent,
            env=environment() | variables,
            stdin=subprocess.DEVNULL,
            stdout=stderr,
            stderr=stderr,
            start_new_session=True,
        )
    finally:
        os.close(stderr)


def _wait(has_come: Callable[[], bool], process: "subprocess.Popen[bytes]", may_end: bool) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not has_come():
        if process.poll() is not None:
            assert may_end, f"a start ended by itself, exit code {process.returncode}"
            return
        assert time.monotonic() < deadline, "the moment of the hazard did not come"
        time.sleep(0.002)


def _strike(hazard: str, mark: str, chance: random.Random) -> None:
    """End a start: what has befallen it, or what it was to go on in spite of, or would have met."""
    family = marked([mark])
    ranks = [process for process in family if program(process) == RANK]
    if hazard == "stopped rank":
        chance.choice(ranks).suspend()
    elif hazard == "closed terminal":
        for process in ranks:
            process.send_signal(signal.SIGHUP)
    elif hazard in LASTING:
        chance.choice(ranks).send_signal(signal.SIGTERM)
    elif hazard == "kill":
        end([chance.choice(ranks)])
    else:
        end(family)


def _tear(hazard: str, folder: Path, chance: random.Random) -> None:
    """What a crash of the machine makes of the ends of files that are appended to."""
    for path in sorted(folder.glob("*.jsonl")):
        if path.name == "predictions.jsonl":  # has its name when it is whole
            continue
        lines = path.read_bytes().splitlines(keepends=True) or [b'{"step": 1}\n']
        torn = lines[-1][: chance.randint(1, len(lines[-1]) - 1)]
        if hazard == "block of nuls":
            torn = torn[: chance.randint(0, len(torn))] + b"\0" * chance.randint(1, 5000)
        with path.open("ab") as file:
            file.write(torn)


def _check(hazard: str, code: int, said: str, is_over: bool) -> None:
    """A refusal is one in words; who was asked to stop has saved; a hang is no success."""
    if hazard in ERRORS and is_over:
        assert code == 2 and WORDS.search(said) and "Traceback" not in said, (hazard, code, said)
    elif hazard in LASTING or hazard == "closed terminal":
        assert code == 75, (hazard, code, said)
    elif hazard == "stopped rank":
        assert code != 0 and "nothing was finished for" in said, (hazard, code, said)

"""What only GPUs can show, what is cheapest and tells most first: one table of true and false.

    python benchmarks/gpu.py [SECTION ...]      (make gpu)

Each section runs in a process of its own, or as one on every GPU, and is ended at its limit. Rows
are printed as they are found and kept in --out, with the log of every section. The command ends at
the first falsehood.

Exit code: 0 all is true; 1 something is false; 2 there is no GPU, or the command line is wrong;
3 nothing is false, but the budget was over or a package is missing before all was seen.
"""

import argparse
import contextlib
import faulthandler
import importlib
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import Any

import psutil
import torch
from gpu_table import FALSE, NOT_RUN, SKIPPED, Findings, Row, Table
from timing import ROOT, describe_machine

from phi3v.devices import has_cuda
from phi3v.errors import ConfigError
from phi3v.files import write_json
from phi3v.lines import read_lines
from phi3v.training.ranks import RANK_VARIABLES, free_port, run_command, set_environment
from phi3v.training.run_folder import package_versions

TOY_RANKS = 2
POLL_SECONDS = 0.05
STACKS_SECONDS = 5.0  # before its limit a section writes its stacks to its log


@dataclass(frozen=True)
class Section:
    """A part of the table: the function of its name in a module beside this one.

    limit      seconds that it may take
    ranks      one, all, or under the launcher even where all are one
    needs      packages without which it cannot run
    on_cpu     whether any of it runs without CUDA
    """

    name: str
    module: str
    about: str
    limit: float
    ranks: str = "one"
    needs: tuple[str, ...] = ()
    on_cpu: bool = True


# In the order in which they run: what is cheapest and tells most is first.
ZERO, SHARDS = ("deepspeed",), ("deepspeed", "datasets", "rapidfuzz")
SECTIONS = (
    Section(
        "start", "gpu_ranks", "ranks on devices of their own, collectives", 90, "launched", ZERO
    ),
    Section("kernels", "gpu_checks", "backends, kernels, losses, recomputation agree", 120),
    Section("data", "gpu_checks", "loader and views give the same as without CUDA", 60),
    Section("waits", "gpu_checks", "the host waits nowhere in a micro-step", 60, on_cpu=False),
    Section(
        "inputs", "gpu_training", "the shipped commands make a model and shards", 90, needs=SHARDS
    ),
    Section(
        "train",
        "gpu_training",
        "20 steps, a save, a stop, a resume; on one and all",
        200,
        needs=SHARDS,
    ),
    Section(
        "jsons", "gpu_ranks", "every shipped DeepSpeed JSON makes two steps", 120, "all", SHARDS
    ),
    Section(
        "memory", "gpu_memory", "what is kept beside the formula, at full size", 90, on_cpu=False
    ),
    Section("save", "gpu_speed", "steps during a save beside steps without", 90, "all", ZERO),
    Section("attention", "gpu_speed", "attention kernels beside each other", 60),
    Section("steps", "gpu_speed", "steps under ZeRO-3 beside a plain loop", 180, "all", ZERO),
    Section("padded", "gpu_speed", "the usual padded recipe on the same samples", 120),
    Section("longest", "gpu_speed", "the longest text that a step takes", 120, "all", ZERO),
)
BY_NAME = {section.name: section for section in SECTIONS}
MAKES_INPUTS = {"train": "inputs", "jsons": "inputs"}


def main() -> None:
    arguments = parse()
    if arguments.child:
        work(arguments)
        return
    if not has_cuda() and not arguments.toy:
        raise ConfigError(
            f"torch {torch.__version__} sees no CUDA device here, and this command is about GPUs; "
            "run it where there is one, or add --toy to see that it runs"
        )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what it started ends with it
    arguments.out.mkdir(parents=True, exist_ok=True)
    table = Table(arguments.out, describe(arguments.toy))
    print("\n".join(f"{name}: {value}" for name, value in table.machine.items()), flush=True)
    with tempfile.TemporaryDirectory(prefix="gpu-") as folder:
        run_sections(table, arguments, Path(folder))
    conclude(table, arguments)


def parse() -> argparse.Namespace:
    sections = "\n".join(f"  {s.name:10} {s.about}; {s.limit:.0f} s at most" for s in SECTIONS)
    parser = argparse.ArgumentParser(
        description=f"{__doc__}\nSections, in their order:\n{sections}",
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("sections", nargs="*", metavar="SECTION", help="default: all")
    parser.add_argument("--budget", type=float, default=480, help="seconds of all (%(default)s)")
    parser.add_argument("--partial", action="store_true", help="exit code 0 for 3")
    parser.add_argument("--keep-going", action="store_true", help="do not end at a falsehood")
    parser.add_argument("--ranks", type=int, help="GPUs to use; default: all")
    parser.add_argument("--steps", type=int, default=6, help="timed steps of each kind")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument(
        "--toy", action="store_true", help="toy size on CPU ranks: it runs, no more"
    )
    for name in ("--child", "--local_rank"):  # of a section's process; the latter the launcher's
        parser.add_argument(name, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    unknown = set(arguments.sections) - BY_NAME.keys()
    if unknown:
        parser.error(f"unknown section {min(unknown)}; there are {' '.join(BY_NAME)}")
    if arguments.toy and has_cuda():
        parser.error("--toy is for machines without a GPU; here is one, leave it out")
    available = TOY_RANKS if arguments.toy else torch.cuda.device_count()
    if arguments.ranks is None:
        arguments.ranks = available
    elif not 1 <= arguments.ranks <= available and not arguments.child:
        parser.error(f"--ranks {arguments.ranks}, and there are {available}")
    return arguments


def describe(is_toy: bool) -> dict[str, Any]:
    """What the table was made on."""
    machine: dict[str, Any] = {"machine": describe_machine(), "devices": _devices(is_toy)}
    machine["CUDA of torch"] = torch.version.cuda
    versions = package_versions() | {"triton": find_spec("triton") and _triton()}
    machine["versions"] = ", ".join(f"{name} {version}" for name, version in versions.items())
    machine["command"] = " ".join(sys.argv[1:])
    return machine


def _triton() -> str:
    return importlib.metadata.version("triton")


def _devices(is_toy: bool) -> str:
    """Names, memory and driver as the driver tells them: no context is made in this process."""
    if is_toy:
        return "CPU ranks at toy size in float32 (--toy): the times mean nothing"
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        lines = subprocess.run(
            query, capture_output=True, text=True, check=True
        ).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError) as error:
        return f"{torch.cuda.device_count()}, and nvidia-smi does not run: {error}"
    counts = ((name, len(list(group))) for name, group in groupby(lines))
    return "; ".join(f"{count} x {name}" for name, count in counts)


def run_sections(table: Table, arguments: argparse.Namespace, folder: Path) -> None:
    """Run what was asked for until the budget is over or, unless it may go on, something false."""
    wanted = set(arguments.sections or BY_NAME)
    wanted |= {MAKES_INPUTS[name] for name in wanted & MAKES_INPUTS.keys()}
    deadline = time.monotonic() + arguments.budget
    runnable = [s for s in SECTIONS if s.name in wanted and can_run(s, table, arguments.toy)]
    for group in together(runnable, arguments.toy):
        names = ",".join(section.name for section in group)
        left = deadline - time.monotonic()
        if left <= 0:
            why = f"the budget of {arguments.budget:g} s was over"
            table.add(Row(names, "the section", "", why, NOT_RUN))
            continue
        run_group(group, left, table, arguments, folder)
        if table.falsehoods and not arguments.keep_going:
            return


def can_run(section: Section, table: Table, is_toy: bool) -> bool:
    """Whether it can; says why not."""
    missing = [package for package in section.needs if find_spec(package) is None]
    why = f"no {', '.join(missing)}" if missing else "needs CUDA"
    if missing:
        table.lacks_something = True
    elif section.on_cpu or not is_toy:
        return True
    table.add(Row(section.name, "the section", "", f"skipped: {why}", SKIPPED))
    return False


def together(sections: Sequence[Section], is_toy: bool) -> Iterator[list[Section]]:
    """The sections that share a process; at toy size, where a start is most of them, all can."""
    if not is_toy:
        yield from ([section] for section in sections)
        return
    for is_alone in (True, False):
        if group := [s for s in sections if (s.ranks == "one") is is_alone]:
            yield group


def run_group(
    group: Sequence[Section],
    left: float,
    table: Table,
    arguments: argparse.Namespace,
    folder: Path,
) -> None:
    """Run some sections in one process, or one a rank, and add what they find to the table."""
    names = ",".join(section.name for section in group)
    limit = min(left, sum(section.limit for section in group))
    log, found = arguments.out / f"{names}.log", folder / f"{names}.jsonl"
    order = folder / f"{names}.json"
    content = {"sections": names, "folder": str(folder), "found": str(found), "limit": limit}
    write_json(order, content)
    command = child_command(group[0], order, arguments)
    with (
        log.open("w", encoding="utf-8") as output,
        started(command, output, arguments.toy) as child,
    ):
        code = watch(child, found, limit, table, arguments.keep_going)
    if table.falsehoods and not arguments.keep_going or code == 0:
        return
    if code is None and limit == left:
        why = f"the budget of {arguments.budget:g} s was over"
        table.add(Row(names, "the rest of the section", "", why, NOT_RUN))
    elif code is None:
        seen = f"it did not; {log} has its stacks"
        table.add(Row(names, "the section", f"ends within {limit:.0f} s", seen, FALSE))
    else:
        seen = f"exit code {code}: {last_line(log)} (see {log})"
        table.add(Row(names, "the section", "ends without an error", seen, FALSE))


def child_command(section: Section, order: Path, arguments: argparse.Namespace) -> list[str]:
    """This script as a section's process, under the launcher where it is several."""
    script = [__file__, "--child", order, "--out", arguments.out, "--steps", arguments.steps]
    script += ["--ranks", arguments.ranks, *(["--toy"] if arguments.toy else [])]
    launcher: list[object] = []
    if section.ranks == "launched" or (section.ranks == "all" and arguments.ranks > 1):
        # As a module: a package that was only laid on PYTHONPATH has no script.
        launcher = ["-m", "deepspeed.launcher.runner", "--num_gpus", arguments.ranks]
        launcher += ["--master_port", free_port()]
    return [sys.executable, *map(str, launcher), *map(str, script)]


@contextlib.contextmanager
def started(command: Sequence[str], output: Any, is_toy: bool) -> Iterator[subprocess.Popen[bytes]]:
    """A process, at whose end everything that it started is ended."""
    kept = {k: v for k, v in os.environ.items() if k not in RANK_VARIABLES}
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    kept |= {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}
    if is_toy:
        kept |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(
        command, stdout=output, stderr=output, stdin=subprocess.DEVNULL, env=kept
    )
    try:
        yield child
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            family = psutil.Process(child.pid)
            for member in [*family.children(recursive=True), family]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    member.kill()
        child.wait()


def watch(
    child: subprocess.Popen[bytes], found: Path, limit: float, table: Table, keeps_going: bool
) -> int | None:
    """Add rows as they come; the exit code, None where the process was to be ended before."""
    deadline, known = time.monotonic() + limit, 0
    while True:
        code = child.poll()  # before the rows, so that none is missed
        rows = read_lines(found)[known:]
        for row in rows:
            table.add(Row(**row))
        known += len(rows)
        if code is not None or time.monotonic() > deadline:
            return code
        if table.falsehoods and not keeps_going:
            return None
        time.sleep(POLL_SECONDS)


def last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "no word")


def conclude(table: Table, arguments: argparse.Namespace) -> None:
    """Print the sum of it, and leave with the exit code."""
    table.write()
    print(f"{table.summary}; see {table.folder / 'table.txt'}", flush=True)
    for row in table.falsehoods:
        print(f"FALSE: {row.section}, {row.check}: {row.seen}", file=sys.stderr)
    if table.falsehoods:
        sys.exit(1)
    sys.exit(3 if table.lacks_something and not arguments.partial else 0)


def work(arguments: argparse.Namespace) -> None:
    """Be the process of some sections, or one rank of it."""
    order = json.loads(Path(arguments.child).read_text(encoding="utf-8"))
    faulthandler.dump_traceback_later(max(1.0, order["limit"] - STACKS_SECONDS), exit=False)
    orphan = threading.Timer(order["limit"] + STACKS_SECONDS, os._exit, (1,))
    orphan.daemon = True  # where nobody is left to end this process at its limit
    orphan.start()
    ranks = set_environment()
    from fullsize import Bench, full, toy

    scale = toy() if arguments.toy else full(ranks.local_rank)
    bench = Bench(
        scale, Path(order["folder"]), arguments.out, arguments.steps, ranks, arguments.ranks
    )
    for name in order["sections"].split(","):
        section = BY_NAME[name]
        findings = Findings(Path(order["found"]), name, ranks.is_first, not arguments.toy)
        getattr(importlib.import_module(section.module), name)(bench, findings)
        bench.free()
    faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    run_command(main)

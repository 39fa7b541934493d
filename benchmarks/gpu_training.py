"""The sections of gpu.py that run the project's commands as a user does: inputs, train.

products.py, tiny_model.py, prepare.py -> shards
train.py: 20 steps at one go; the same stopped in the middle and resumed; the same on one GPU
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fullsize import Bench
from gpu_table import Findings
from timing import ROOT

from phi3v.config import default_deepspeed
from phi3v.errors import Stopped
from phi3v.files import write_json
from phi3v.lines import read_lines
from phi3v.training.ranks import RANK_VARIABLES, free_port

ROWS = 120  # of the catalogue
MODEL, SHARDS, CATALOGUE = "models/tiny", "shards/products", "data/products"
STEPS, SAVED_EVERY, STOPPED_AFTER = 20, 5, 7
POLL_SECONDS = 0.01
FALLS = 1.0  # at least, of a loss that begins at the logarithm of the vocabulary: 6.8
# Relative, of a step's loss. On a CPU everything is added in one order on the same ranks, and one
# rank and two were 2.7e-7 apart after 12 steps. On a GPU the gradients of attention and embeddings
# are added in no fixed order, in bf16: a weight that is rounded to the other side is 4e-3 off.
# A resume that lost its place in the data was off by 7.5e-2.
ANEW = {"cpu": 0.0, "cuda": 1e-2}
OTHER_RANKS = {"cpu": 1e-4, "cuda": 2e-2}


def inputs(bench: Bench, findings: Findings) -> None:
    """The catalogue, a model that can spell it, its shards: by the shipped commands."""
    sizes = ("--width=384", "--mlp_width=1024", "--vision_width=256")  # heads of published widths
    commands = (
        ("products.py", CATALOGUE, f"--rows={ROWS}"),
        ("tiny_model.py", MODEL, *(sizes if bench.scale.is_full else ())),
        ("prepare.py", ROOT / "launch/recipes/products.yaml"),
    )
    for script, *arguments in commands:
        done = _started([sys.executable, ROOT / "launch" / script, *arguments], bench.folder)
        words = done.end().splitlines()
        why = "" if done.code == 0 or not words else f": {words[-1].strip()}"
        findings.check(script, done.code == 0, "exit code 0", f"exit code {done.code}{why}")


@dataclass
class Command:
    """A command that was started, and how it ended."""

    process: subprocess.Popen[str]
    log: Path

    def end(self) -> str:
        """Wait for it; returns what it wrote."""
        self.process.wait()
        return self.log.read_text(encoding="utf-8", errors="replace")

    @property
    def code(self) -> int | None:
        return self.process.poll()


def _started(command: Sequence[object], cwd: Path) -> Command:
    """A command of the project; its variables must not pass for those of a rank."""
    environment = {k: v for k, v in os.environ.items() if k not in RANK_VARIABLES}
    log = cwd / f"command-{time.monotonic_ns()}.log"
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            [str(part) for part in command],
            cwd=cwd,
            env=environment,
            stdout=output,
            stderr=output,
            text=True,
        )
    return Command(process, log)


def recipe_values(folder: Path, out: Path, deepspeed: Path, steps: int) -> dict[str, Any]:
    """A run on the shards, nothing evaluated."""
    return {
        "run": {"out": str(out)},
        "model": {"path": str(folder / MODEL)},
        "data": {"shards": str(folder / SHARDS), "max_tokens": 264, "max_views": 32},
        "optim": {"lr": 1e-3, "weight_decay": 0.1, "warmup_steps": 5, "schedule": "constant"},
        "train": {"max_steps": steps},
        "eval": {"rows": 0},
        "checkpoint": {"every": SAVED_EVERY, "keep": 2},
        "wandb": {"mode": "disabled"},
        "deepspeed": str(deepspeed),
    }


@dataclass(frozen=True)
class Trainings:
    """Runs of launch/train.py on the same packs, each in a folder of its own."""

    folder: Path
    deepspeed: Path

    def start(self, name: str, ranks: int) -> Command:
        recipe = self.folder / f"{name}.yaml"
        write_json(recipe, recipe_values(self.folder, self.run(name), self.deepspeed, STEPS))
        port = ["--master_port", free_port()]
        launcher = ["-m", "deepspeed.launcher.runner", "--num_gpus", ranks, *port]
        script = [ROOT / "launch/train.py", recipe]
        return _started([sys.executable, *launcher, *script], self.folder)

    def run(self, name: str) -> Path:
        return self.folder / "runs" / name

    def losses(self, name: str) -> list[float]:
        return [line["loss"] for line in read_lines(self.run(name) / "metrics.jsonl")]


def train(bench: Bench, findings: Findings) -> None:
    """20 steps on all ranks; stopped and resumed; on one rank."""
    runs, ranks = Trainings(bench.folder, _small_batch(bench)), bench.num_ranks
    device = bench.scale.device.type
    began = time.perf_counter()
    whole = runs.start("whole", ranks)
    wait_until(lambda: len(runs.losses("whole")) >= 1, whole)
    first_step = time.perf_counter() - began
    is_whole = _check_end(findings, f"{STEPS} steps on {ranks} ranks", whole, 0, runs, "whole")
    findings.measured("start", f"{first_step:.1f} s from the command to the end of the first step")
    if not is_whole:
        return
    losses = runs.losses("whole")
    seen = f"{losses[0]:.3f} -> {losses[-1]:.3f}"
    findings.check("the loss falls", losses[-1] < losses[0] - FALLS, f"by {FALLS}", seen)
    if _stop(runs, ranks, findings):
        resumed = runs.start("broken", ranks)
        if _check_end(findings, "resumed", resumed, 0, runs, "broken"):
            _compare(findings, "resumed as unbroken", runs, "broken", ANEW[device])
    if ranks == 1:
        findings.skipped("one rank as all", "needs 2 GPUs")
        return
    alone = runs.start("alone", 1)
    if _check_end(findings, f"{STEPS} steps on 1 rank", alone, 0, runs, "alone"):
        _compare(findings, f"1 rank as {ranks}", runs, "alone", OTHER_RANKS[device])


def _small_batch(bench: Bench) -> Path:
    """The default JSON with a batch of 4 packs or a little more, that one rank can make too."""
    path = default_deepspeed(bench.scale.is_full)
    content = json.loads(path.read_text(encoding="utf-8"))
    content["train_batch_size"] = bench.num_ranks * -(-4 // bench.num_ranks)
    write_json(bench.folder / path.name, content)
    return bench.folder / path.name


def _stop(runs: Trainings, ranks: int, findings: Findings) -> bool:
    """Let a run be stopped by its stop file in the middle."""
    command = runs.start("broken", ranks)
    wait_until(lambda: len(runs.losses("broken")) >= STOPPED_AFTER, command)
    (runs.run("broken") / "stop").touch()
    words, done = command.end(), len(runs.losses("broken"))
    saved = sorted(path.name for path in (runs.run("broken") / "checkpoints").glob("step-*"))
    seen = f"exit code {command.code} after step {done}, saved are {', '.join(saved)}"
    is_stopped = command.code == Stopped.exit_code and done < STEPS
    is_stopped &= f"step-{done:08d}" in saved and len(saved) > 1
    wanted = f"exit code {Stopped.exit_code} before step {STEPS}, which is saved, and one before"
    findings.check("stopped in the middle", is_stopped, wanted, seen)
    if not is_stopped:
        print(words)  # to the section's log
    return is_stopped


def wait_until(is_there: Callable[[], bool], command: Command) -> None:
    """Wait for something that a command does, or for its end."""
    while command.code is None and not is_there():
        time.sleep(POLL_SECONDS)


def _check_end(
    findings: Findings, name: str, command: Command, code: int, runs: Trainings, run: str
) -> bool:
    """Whether a run ended as it should, with all its losses."""
    words = command.end()
    losses = runs.losses(run)
    is_true = command.code == code and len(losses) == STEPS
    last = "" if is_true else f": {(words.splitlines() or ['no word'])[-1].strip()}"
    seen = f"exit code {command.code}, {len(losses)} losses{last}"
    findings.check(name, is_true, f"exit code {code}, {STEPS} losses", seen)
    if not is_true:
        print(words)
    return is_true


def _compare(findings: Findings, name: str, runs: Trainings, run: str, limit: float) -> None:
    """Losses of a run beside those of the unbroken one on all ranks."""
    apart = [
        abs(a - b) / abs(b) for a, b in zip(runs.losses(run), runs.losses("whole"), strict=True)
    ]
    before, after = max(apart[:STOPPED_AFTER]), max(apart[STOPPED_AFTER:])
    wanted = (
        f"{limit:.0e} apart at most: bf16, sums in no fixed order" if limit else "the same bits"
    )
    seen = f"{before:.1e} apart to step {STOPPED_AFTER}, {after:.1e} after it"
    findings.check(name, max(before, after) <= limit, wanted, seen)

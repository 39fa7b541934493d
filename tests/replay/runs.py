"""Run folders as training leaves them, without training: the plan's steps, each with a loss."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from phi3v.config import RunConfig, build_recipe, default_deepspeed, load_deepspeed
from phi3v.data.packing import PlannedStep, Position
from phi3v.lines import append_line
from phi3v.replay.steps import counts
from phi3v.training.opening import Run, describe_data, open_run
from phi3v.training.ranks import Ranks
from phi3v.training.run_folder import RunFolder

RANKS = Ranks(rank=0, world_size=2, local_rank=0, local_size=2)


def open_recipe(folder: Path, model: Path, shards: Any, *overrides: str) -> Run:
    """A run on shards, 8 packs a step, 4 steps an epoch."""
    values = {
        "run": {"out": str(folder)},
        "model": {"path": str(model)},
        "data": {"shards": shards, "max_tokens": 264},
        "optim": {"lr": 1e-3},
        "train": {"max_steps": 12},
        "eval": {"rows": 0},
    }
    cfg = build_recipe(RunConfig, values, Path("run.yaml"), overrides)
    ds = load_deepspeed(default_deepspeed(has_cuda=False), world_size=RANKS.world_size)
    return open_run(cfg, ds, RANKS)


def write_run(
    run: Run, num_steps: int = 9, left_out: Sequence[Position] = (), has_places: bool = True
) -> list[PlannedStep]:
    """Write the folder of a run that has done so many steps; returns them.

    has_places  whether metrics.jsonl says where the steps are, as it did not always
    """
    run.folder.path.mkdir(parents=True)
    run.folder.write_origin(run.cfg, run.ds, describe_data(run.dataset), RANKS.world_size)
    steps = (step for step in run.plan.steps(Position()) if step.at not in left_out)
    taken = list(islice(steps, num_steps))
    for number, step in enumerate(taken, 1):
        line: dict[str, Any] = {"step": number, "loss": 3.0 - number / 10, "grad_norm": 1.5}
        if has_places:
            line |= {"at": asdict(step.at), "ranks": RANKS.world_size}
        append_line(run.folder.path / "metrics.jsonl", line | counts(run.dataset, step.packs))
    if left_out:
        run.folder.faults.add_rollback(0, left_out)
    return taken


def edit_line(folder: RunFolder, step: int, **values: Any) -> None:
    """Change what metrics.jsonl says of a step; None removes a key."""
    lines = folder.read_metrics()
    lines[step - 1] |= values
    kept = [{k: v for k, v in line.items() if v is not None} for line in lines]
    text = "".join(json.dumps(line) + "\n" for line in kept)
    (folder.path / "metrics.jsonl").write_text(text, encoding="utf-8")

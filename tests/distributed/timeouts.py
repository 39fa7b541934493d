"""Run on ranks: how long collectives of every process group may take, in a run that starts.

timeouts.py FOLDER OUT    for every JSON of FOLDER a run of its own, up to its engine; OUT: seconds
                          of every group before and after the first step, and in patience

FOLDER also holds the run recipe, run.yaml. The first rank writes OUT, a JSON file.
"""

import json
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

from phi3v.training.ranks import Ranks, run_command, set_environment

SLOW_SECONDS = 3.0


def main(folder: Path, out: Path) -> None:
    ranks = set_environment()
    from phi3v.training import zero

    zero.start_process_group(60.0)
    found = {path.name: of_run(path, ranks) for path in sorted(folder.glob("*.json"))}
    found["waited"] = wait_for_first(ranks)
    if ranks.is_first:
        out.write_text(json.dumps(found))
    zero.leave_together()


def of_run(path: Path, ranks: Ranks) -> dict[str, list[float]]:
    from phi3v.training import session, zero
    from phi3v.training.loop import run_steps
    from phi3v.training.opening import open_run
    from phi3v.training.start import load_run
    from phi3v.training.stopping import StopRequests
    from phi3v.training.watchdog import Watchdog

    values = [f"deepspeed={path}", f"run.out={path.with_suffix('')}"]
    cfg, ds = load_run(path.with_name("run.yaml"), values, ranks)
    run = open_run(cfg, ds, ranks)
    zero.first_rank_does(run.folder.lock, ranks.is_first)
    dog = Watchdog(100.0, run.folder.path, ranks.rank, 200.0, zero.set_timeouts)
    with closing(dog):
        opened, done = session.start(run, StopRequests(), dog)
        seconds = {"start": group_seconds(opened.engine)}
        run_steps(opened, done)
        seconds["steps"] = group_seconds(opened.engine)
        with dog.patience():
            seconds["patience"] = group_seconds(opened.engine)
        seconds["after"] = group_seconds(opened.engine)
        opened.tracker.finish()
        opened.engine.destroy()
    return seconds


def group_seconds(engine: Any) -> list[float]:
    """Of every group that torch knows, and of every one that hangs on the engine."""
    import torch
    from torch.distributed import ProcessGroup, distributed_c10d

    groups = set(distributed_c10d._world.pg_map)
    for part in (engine, engine.optimizer):
        groups |= {value for value in vars(part).values() if isinstance(value, ProcessGroup)}
    return sorted(
        group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups
    )


def wait_for_first(ranks: Ranks) -> bool:
    """Whether ranks can wait for the first one for longer than any collective may take."""
    from phi3v.training import zero

    zero.MARGIN_SECONDS = 0.0
    zero.set_timeouts(SLOW_SECONDS / 3)
    zero.first_rank_does_slowly("a test", lambda: time.sleep(SLOW_SECONDS), ranks, lambda: None)
    return True


if __name__ == "__main__":
    run_command(lambda: main(Path(sys.argv[1]), Path(sys.argv[2])))

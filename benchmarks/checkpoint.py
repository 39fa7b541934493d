"""How long a checkpoint holds training up: ours, torch's asynchronous save, and torch.save.

    python benchmarks/checkpoint.py
    python benchmarks/checkpoint.py --gib 0.01 --repeats 1

ours        phi3v.training.checkpoints.writer, guarded: copied and written by a thread
alone       the same without a guard: the state is copied before the call returns
async_save  torch.distributed.checkpoint.async_save as it is, a gloo group of one rank
kept        the same with a stager that keeps its memory (pinned where there is CUDA)
staged      the same with a stager that copies in a thread, waited for before the step
torch.save  to a path

stall   until the call returns, and at the end of the work until the optimizer may step
work    matrices multiplied in between, as a forward and backward pass would, the same for all;
        what a thread takes from it shows beside torch.save, which has none
behind  from there until all of it is on the disk (fsync)

The state is what a rank has under ZeRO-3: flat float32 partitions with two moments each. Sides take
turns, each repeat starts when the disk is quiet, files are removed. All are warm, as a run is after
its first checkpoint; what the first one costs ours is printed before, without and with `prepare`.
"""

import argparse
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from timing import Times, describe_machine, ratios
from torch.distributed.checkpoint import async_save
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncSaveResponse

from phi3v.devices import has_cuda
from phi3v.files import sync_tree
from phi3v.training.ranks import set_environment

SHARES = np.array([16, 8, 4, 2, 1, 1]) / 32 / 3  # of the bytes, a partition each
Wait = Callable[[], object]
# Saves to a folder; returns what waits until the state may change, and until it is on the disk.
Side = Callable[[Path], tuple[Wait, Wait]]
PHASES = ("stall", "work", "behind")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--gib", type=float, default=1, help="of state")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--products", type=int, default=400, help="of matrices, 1 ms each")
    arguments = parser.parse_args()
    set_environment()
    warnings.filterwarnings("ignore", module="torch.distributed.checkpoint")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    state = make_state(arguments.gib)
    print(f"{describe_machine()}; load {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() as folder:
        print_first(state, Path(folder))
        print(f"{arguments.gib:g} GiB: median (quartiles) of {arguments.repeats}")
        sides = make_sides(state)
        print_times(measure(sides, Path(folder), arguments.repeats, arguments.products))
    print(f"load {os.getloadavg()[0]:.1f}")
    dist.destroy_process_group()


def make_state(gib: float) -> dict[str, Any]:
    """What DeepSpeed hands over to be saved, of so many bytes in all."""
    device = "cuda" if has_cuda() else "cpu"
    partitions = [torch.randn(int(share * gib * 2**28), device=device) for share in SHARES]
    moments = {
        number: {"step": torch.tensor(1.0), "exp_avg": part.clone(), "exp_avg_sq": part.square()}
        for number, part in enumerate(partitions)
    }
    return {"fp32_flat_groups": dict(enumerate(partitions)), "optimizer_state_dict": moments}


def make_sides(state: dict[str, Any]) -> dict[str, Side]:
    is_pinned = has_cuda()
    return {
        "ours": ours(state, is_guarded=True),
        "alone": ours(state),
        "async_save": asynchronous(state),
        "kept": asynchronous(state, StagingOptions(is_pinned, False, False, is_pinned)),
        "staged": asynchronous(state, StagingOptions(is_pinned, False, True, is_pinned)),
        "torch.save": lambda folder: plain(state, folder),
    }


def ours(state: dict[str, Any], is_guarded: bool = False, is_prepared: bool = False) -> Side:
    from phi3v.training.checkpoints.writer import Writer  # reads the environment at import

    writer = Writer(state["fp32_flat_groups"][0].device)
    if is_guarded:
        writer.guard(torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))]))
    if is_prepared:
        writer.prepare(state)
        writer.finish()

    def save(folder: Path) -> tuple[Wait, Wait]:
        writer.begin(folder)
        writer.save(state, str(folder / "state.pt"))
        writer.end(lambda files: None)
        return writer.settle, writer.finish

    return save


def asynchronous(state: dict[str, Any], options: StagingOptions | None = None) -> Side:
    stager = DefaultStager(options) if options else None

    def save(folder: Path) -> tuple[Wait, Wait]:
        saved = async_save(state, checkpoint_id=folder, async_stager=stager)
        if isinstance(saved, AsyncSaveResponse):
            return saved.staging_completion.result, saved.upload_completion.result
        return lambda: None, saved.result

    return save


def plain(state: dict[str, Any], folder: Path) -> tuple[Wait, Wait]:
    torch.save(state, folder / "state.pt")
    return lambda: None, lambda: sync_tree(folder)


def print_first(state: dict[str, Any], folder: Path) -> None:
    """What a run's first save costs ours, copied before it returns."""
    for name, is_prepared in (("first", False), ("prepared", True)):
        seconds = save_once(ours(state, is_prepared=is_prepared), folder / name, products=0)
        print(f"{name:10} stall {seconds[0, 0] * 1e3:.2f} ms")


def measure(
    sides: Mapping[str, Side], folder: Path, repeats: int, products: int
) -> dict[str, list[Times]]:
    """The phases of each side, in turn, after one save each that is not counted."""
    seconds = np.zeros((repeats + 1, len(sides), len(PHASES), 2))
    for repeat in seconds:
        for number, side in enumerate(sides.values()):
            repeat[number] = save_once(side, folder / "checkpoint", products)
    of_sides = seconds[1:].transpose(1, 2, 3, 0)  # side, phase, clock, repeat
    return {
        name: [Times(*clocks) for clocks in phases]
        for name, phases in zip(sides, of_sides, strict=True)
    }


def save_once(side: Side, folder: Path, products: int) -> np.ndarray:
    """Seconds of the phases, by the clock and of the processor."""
    matrix = torch.ones(384, 384)
    folder.mkdir()
    os.sync()
    clocks = [read_clocks()]
    settle, finish = side(folder)
    clocks.append(read_clocks())
    for _ in range(products):
        matrix @ matrix
    clocks.append(read_clocks())
    settle()
    clocks.append(read_clocks())
    finish()
    clocks.append(read_clocks())
    shutil.rmtree(folder)
    call, work, settling, behind = np.diff(clocks, axis=0)
    return np.stack([call + settling, work, behind])


def read_clocks() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def print_times(times: Mapping[str, list[Times]]) -> None:
    for name, phases in times.items():
        for phase, taken in zip(PHASES, phases, strict=True):
            print(f"{name:10} {phase:6} {taken}")
    for ours in ("ours", "alone"):
        for name in ("async_save", "kept", "staged", "torch.save"):
            print(f"{name:10} over {ours} {ratios(times[name][0], times[ours][0])}")


if __name__ == "__main__":
    main()

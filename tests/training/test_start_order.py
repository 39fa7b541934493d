"""The order of calls at a start on GPUs that are not there: rank 3 of 8, recorded.

An object that is sent before the device is set goes by way of GPU 0, which NCCL refuses for every
rank but one; no machine without GPUs would notice.
"""

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed
import pytest
import torch
from torch.distributed import HashStore

from phi3v.config import RunConfig, build_recipe, default_deepspeed, load_deepspeed
from phi3v.devices import take_device
from phi3v.training import loop, meeting, zero
from phi3v.training.opening import Run, open_run
from phi3v.training.ranks import Ranks
from phi3v.training.stopping import StopRequests

RANKS = Ranks(rank=3, world_size=8, local_rank=3, local_size=8)
OWN = torch.device("cuda", 3)
JOINS = ("meet", "init_process_group", "init_distributed", "share_mistakes")
VARIABLES = {
    "RANK": "3",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "3",
    "LOCAL_SIZE": "8",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "1",
}


class Reached(Exception):
    """The start has come as far as a test looks."""


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """Eight GPUs and eight ranks that are recorded, in the order of the calls."""
    found: list[tuple[str, Any]] = []

    def record(where: Any, name: str) -> None:
        monkeypatch.setattr(where, name, lambda *args, **kwargs: found.append((name, args)))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H100 80GB HBM3")
    uuid = SimpleNamespace(uuid="GPU-3")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: uuid)
    monkeypatch.setattr(zero, "meet", lambda *args: found.append(("meet", args)) or HashStore())
    record(torch.cuda, "set_device")
    record(deepspeed, "init_distributed")
    record(zero, "share_mistakes")
    record(torch.distributed, "barrier")
    record(torch.distributed, "init_process_group")
    record(zero, "from_first_rank")
    monkeypatch.setattr(torch.distributed, "get_rank", lambda group=None: 3)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)
    return found


def recipe(tiny_model: Path, tiny_shards: Path, folder: Path) -> tuple[RunConfig, Any]:
    tree = {
        "run": {"out": str(folder / "run")},
        "model": {"path": str(tiny_model), "kernels": "eager", "attention": "sdpa"},
        "data": {"shards": str(tiny_shards), "max_tokens": 264},
        "optim": {"lr": 1e-3},
        "train": {"max_steps": 3},
    }
    ds = load_deepspeed(default_deepspeed(has_cuda=True), world_size=8)
    return build_recipe(RunConfig, tree, Path("run.yaml"), []), ds


def test_the_device_comes_first_then_the_group_then_collectives(
    calls: list[tuple[str, Any]],
    tiny_model: Path,
    tiny_shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stop(run: Run, *others: Any) -> Any:
        calls.append(("start", run.device))
        raise Reached

    monkeypatch.setattr(loop, "start", stop)
    cfg, ds = recipe(tiny_model, tiny_shards, tmp_path)
    with pytest.raises(Reached):
        loop.train(cfg, ds, RANKS, StopRequests())
    names = [name for name, _ in itertools.groupby(name for name, _ in calls)]
    assert names == ["set_device", *JOINS, "from_first_rank", "start"], names
    assert {args for name, args in calls if name == "set_device"} == {(OWN,)}
    assert calls[-1] == ("start", OWN)


def test_a_process_group_never_starts_without_a_device(calls: list[tuple[str, Any]]) -> None:
    """Whoever starts one: benchmarks and tests do without open_run."""
    assert zero.start_process_group() == OWN
    assert [name for name, _ in calls] == ["set_device", *JOINS]


def test_the_runs_device_is_the_one_that_was_taken(
    calls: list[tuple[str, Any]], tiny_model: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    cfg, ds = recipe(tiny_model, tiny_shards, tmp_path)
    assert open_run(cfg, ds, RANKS).device == OWN == take_device(3, 8)
    assert calls[0] == ("set_device", (OWN,))


def test_the_gpu_is_compared_with_the_other_ranks(calls: list[tuple[str, Any]]) -> None:
    assert meeting.name_of(OWN) == "GPU-3"

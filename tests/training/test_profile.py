"""A profiled step leaves a readable trace; the others leave nothing."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from phi3v.training.profile import profiled

NAME = "step-00000010-rank0"


def train(width: int = 8) -> None:
    """A small training step."""
    layer = nn.Linear(width, width)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    torch.relu(layer(torch.randn(4, width))).sum().backward()
    optimizer.step()


def operators(path: Path) -> set[str]:
    """The names of a trace's events."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        trace: dict[str, Any] = json.load(file)
    return {event["name"] for event in trace["traceEvents"] if "name" in event}


def test_a_listed_step_leaves_its_operators_forward_and_backward(tmp_path: Path) -> None:
    with profiled(tmp_path / "profile", 10, (5, 10), rank=0):
        train()
    found = operators(tmp_path / "profile" / f"{NAME}.json.gz")
    assert {"aten::addmm", "aten::relu", "aten::threshold_backward"} <= found
    assert "Optimizer.step#SGD.step" in found


def test_the_first_rank_adds_a_table_in_order_of_time(tmp_path: Path) -> None:
    with profiled(tmp_path, 10, (10,), rank=0):
        train(width=512)
    lines = (tmp_path / f"{NAME}.txt").read_text(encoding="utf-8").splitlines()
    shares = [float(line.split()[1].rstrip("%")) for line in lines if "aten::" in line]
    assert len(shares) > 5 and shares == sorted(shares, reverse=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_trace_holds_the_kernels_of_the_device(tmp_path: Path) -> None:
    with profiled(tmp_path, 10, (10,), rank=0), torch.device("cuda"):
        train()
    assert "cudaLaunchKernel" in operators(tmp_path / f"{NAME}.json.gz")


def test_other_ranks_write_a_trace_of_their_own_and_no_table(tmp_path: Path) -> None:
    with profiled(tmp_path, 10, (10,), rank=3):
        train()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000010-rank3.json.gz"]


def test_a_step_that_is_not_listed_is_not_recorded(tmp_path: Path) -> None:
    with profiled(tmp_path / "profile", 11, (5, 10), rank=0):
        assert not torch.autograd.profiler._is_profiler_enabled
        train()
    assert list(tmp_path.iterdir()) == []


def test_a_second_recording_replaces_the_first(tmp_path: Path) -> None:
    for step in (train, lambda: torch.cumsum(torch.ones(3), 0)):
        with profiled(tmp_path, 10, (10,), rank=0):
            step()
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{NAME}.json.gz", f"{NAME}.txt"]
    found = operators(tmp_path / f"{NAME}.json.gz")
    assert "aten::cumsum" in found and "aten::addmm" not in found


def test_a_step_that_fails_says_so_and_leaves_what_was_there(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), profiled(tmp_path / "profile", 10, (10,), rank=0):
        1 / 0  # noqa: B018
    assert list(tmp_path.iterdir()) == []

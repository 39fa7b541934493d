"""Collectives of every process group give up with the run: DeepSpeed's groups on two real ranks."""

import json
from pathlib import Path
from typing import Any

import pytest

from phi3v.training.zero import MARGIN_SECONDS
from tests.commands import ROOT, run_ranks

pytestmark = pytest.mark.slow

CASES: dict[str, dict[str, Any]] = {
    "zero1": {"stage": 1},
    "zero2": {"stage": 2},
    "zero3": {"stage": 3},
    "hpz": {"stage": 3, "zero_hpz_partition_size": 2},
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, tiny_shards: Path, tiny_model: Path) -> Any:
    folder = tmp_path_factory.mktemp("timeouts")
    recipe = {
        "run": {"out": "run"},
        "model": {"path": str(tiny_model)},
        "data": {"shards": str(tiny_shards), "max_tokens": 264},
        "optim": {"lr": 1e-3},
        "train": {"max_steps": 1},
        "wandb": {"mode": "disabled"},
    }
    (folder / "run.yaml").write_text(json.dumps(recipe))
    shipped = json.loads((ROOT / "ds_configs" / "zero3_cpu.json").read_text())
    for name, zero in CASES.items():
        text = json.dumps(shipped | {"zero_optimization": zero})
        (folder / f"{name}.json").write_text(text)
    run_ranks(2, ROOT / "tests/distributed/timeouts.py", folder, folder / "found")
    return json.loads((folder / "found").read_text())


@pytest.mark.parametrize("case", CASES)
def test_every_group_has_the_time_of_the_run(found: Any, case: str) -> None:
    seconds = found[f"{case}.json"]
    assert len(seconds["start"]) > 1, "DeepSpeed has made no group of its own"
    assert set(seconds["start"]) == set(seconds["patience"]) == {200 + MARGIN_SECONDS}
    assert set(seconds["steps"]) == set(seconds["after"]) == {100 + MARGIN_SECONDS}


def test_a_first_rank_may_take_longer_than_any_collective(found: Any) -> None:
    assert found["waited"]

"""Steps that would spoil the weights, in real runs: skipped on all ranks, left out for good."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from phi3v.data import Dataset
from phi3v.prepare import prepare
from phi3v.training.faults import spike_limit
from tests.commands import ROOT, last_line, metrics, plain, python, run
from tests.tiny import recipe as dataset_recipe
from tests.tiny import turn, write_jsonl

pytestmark = pytest.mark.slow

STRANGE = "row 7"
# Four epochs: in one of them the strange row comes after step 16, before which nothing is a spike.
STEPS = 44
SPIKE = 2.0


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """Forty rows that are all alike, and one whose answer is noise."""
    folder = tmp_path_factory.mktemp("strange")
    noise = "".join(random.Random(0).choices("qxzjkvw", k=60))
    rows = [turn("Which one?", "the same as ever", id=f"row {k}") for k in range(40)]
    rows[7] = turn("Which one?", noise, id=STRANGE)
    source = write_jsonl(folder / "rows.jsonl", rows)
    prepare(dataset_recipe(tiny_model, folder / "shards", {"path": str(source)}))
    return folder / "shards"


@pytest.fixture(scope="module")
def run_recipe(tmp_path_factory: pytest.TempPathFactory, shards: Path, tiny_model: Path) -> Path:
    """Two packs a step, ten steps an epoch; the strange row comes once in each."""
    folder = tmp_path_factory.mktemp("recipe")
    json_ = json.loads((ROOT / "ds_configs" / "zero3_cpu.json").read_text())
    (folder / "ds.json").write_text(json.dumps(json_ | {"train_batch_size": 2}))
    longest = int(Dataset(shards, "train").tokens.max())
    values = {
        "run": {"out": "run"},
        "model": {"path": str(tiny_model)},
        "data": {"shards": str(shards), "max_tokens": longest},
        "optim": {"lr": 2e-3, "schedule": "constant"},
        "train": {"max_steps": STEPS},
        "eval": {"rows": 0},
        "checkpoint": {"every": 4, "keep": 2},
        "faults": {"spike": SPIKE},
        "deepspeed": str(folder / "ds.json"),
    }
    (folder / "run.yaml").write_text(json.dumps(values))
    return folder / "run.yaml"


def faults(folder: Path) -> list[dict[str, Any]]:
    text = (folder / "faults.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_a_spike_is_skipped_on_all_ranks_and_written_down(run_recipe: Path, tmp_path: Path) -> None:
    done = run(*plain(2, run_recipe), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines, found = metrics(tmp_path / "run"), faults(tmp_path / "run")
    skipped = [line for line in lines if line["skipped"]]
    assert [line["step"] for line in skipped] == [fault["step"] for fault in found]
    assert found and all(STRANGE in sum(fault["samples"], []) for fault in found)
    kept: list[float] = []
    for line in lines:
        assert (line["loss"] > spike_limit(kept, SPIKE)) == bool(line["skipped"])
        assert (line["grad_norm"] is None) == bool(line["skipped"])
        if not line["skipped"]:
            kept.append(line["loss"])
    assert f"step {found[0]['step']} is skipped: the loss is above " in done.stderr
    # Which steps are skipped depends on the folder's path; after the last there is none to look at.
    followed = [line for line in skipped if line["step"] < STEPS]
    for line in followed:  # had it moved the weights, the next loss would show
        after = lines[line["step"]]
        assert after["loss"] < 1.5 * lines[line["step"] - 2]["loss"], "the step had an effect"


def test_after_a_bad_step_the_run_goes_back_and_leaves_its_packs_out(
    run_recipe: Path, tmp_path: Path
) -> None:
    done = run(*python(run_recipe, "faults.rollback_after=1"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines, found = metrics(tmp_path / "run"), faults(tmp_path / "run")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert not any(line["skipped"] for line in lines)
    bad = [fault for fault in found if "reason" in fault]
    back = [fault for fault in found if "back_to" in fault]
    assert bad and [fault["at"] for fault in bad] == [at for f in back for at in f["left_out"]]
    for fault, rollback in zip(bad, back, strict=True):
        assert rollback["back_to"] < fault["step"]
    assert f"going back to step {back[0]['back_to']}" in done.stderr


def test_weights_that_do_not_recover_end_the_run_plainly(run_recipe: Path, tmp_path: Path) -> None:
    done = run(*python(run_recipe, "optim.lr=1e30", "checkpoint.every=1"), cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    message = last_line(done, "CheckpointError")
    assert "were skipped, and going back has not helped; " in message
    assert "faults.jsonl has their reasons and samples" in message
    reasons = {fault["reason"] for fault in faults(tmp_path / "run") if "reason" in fault}
    assert reasons <= {"the loss is not finite", "the gradient is not finite"}

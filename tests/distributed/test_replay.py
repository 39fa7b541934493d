"""Steps taken again with real DeepSpeed: the run's numbers, and which sample made a loss jump."""

import json
import random
import shutil
import sys
from pathlib import Path

import pytest

from phi3v.data import Dataset
from phi3v.prepare import prepare
from tests.commands import LAUNCH, ROOT, last_line, metrics, plain, ranks, run
from tests.tiny import recipe as dataset_recipe
from tests.tiny import turn, write_jsonl

pytestmark = pytest.mark.slow

REPLAY = LAUNCH / "replay.py"
STRANGE = "row 7"
STEPS = 32


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A run of 2 ranks; of forty rows that are all alike one has noise for an answer.

    Two packs a step, ten steps an epoch: the strange row comes once in each.
    """
    folder = tmp_path_factory.mktemp("replay")
    noise = "".join(random.Random(0).choices("qxzjkvw", k=60))
    rows = [turn("Which one?", "the same as ever", id=f"row {k}") for k in range(40)]
    rows[7] = turn("Which one?", noise, id=STRANGE)
    source = write_jsonl(folder / "rows.jsonl", rows)
    prepare(dataset_recipe(tiny_model, folder / "shards", {"path": str(source)}))
    longest = int(Dataset(folder / "shards", "train").tokens.max())
    ds = json.loads((ROOT / "ds_configs/zero3_cpu.json").read_text())
    (folder / "ds.json").write_text(json.dumps(ds | {"train_batch_size": 2}))
    values = {
        "run": {"out": "run"},
        "model": {"path": str(tiny_model)},
        "data": {"shards": "shards", "max_tokens": longest},
        "optim": {"lr": 2e-3, "schedule": "constant"},
        "train": {"max_steps": STEPS},
        "eval": {"rows": 0},
        "checkpoint": {"every": 8, "keep": 4},
        "faults": {"spike": 2.0},
        "deepspeed": str(folder / "ds.json"),
    }
    (folder / "run.yaml").write_text(json.dumps(values))
    done = run(*plain(2, folder / "run.yaml"), cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def strange_step(folder: Path) -> int:
    """The step that was skipped for the strange row."""
    (fault, *_) = map(json.loads, (folder / "run/faults.jsonl").read_text().splitlines())
    line = metrics(folder / "run")[fault["step"] - 1]
    assert STRANGE in sum(fault["samples"], [])
    assert (line["at"], line["ranks"]) == (fault["at"], 2) and line["skipped"]
    return int(fault["step"])


def test_as_many_ranks_give_the_very_numbers_beyond_a_step_that_was_skipped(
    trained: Path, tmp_path: Path
) -> None:
    """The run folder stays as it is, and nothing is left beside it."""
    before, last = contents(trained / "run"), min(strange_step(trained) + 1, STEPS)
    command = ranks(2, REPLAY, "run", "--step", last, "--check")
    done = run(*command, cwd=trained, TMPDIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    # DeepSpeed says there that it skips a step.
    *steps, verdict = [line for line in done.stdout.splitlines() if "[Rank 0]" not in line]
    first = next(int(line.split()[1].rstrip(":")) for line in steps)
    assert first % 8 == 1 and first > 8 and len(steps) == last - first + 1
    assert all(line.count("the same bits") + line.count("(the same)") == 2 for line in steps)
    assert any("gradient norm not finite, in metrics.jsonl not finite" in line for line in steps)
    assert verdict == f"{len(steps)} steps of run: the same bits as in metrics.jsonl"
    assert contents(trained / "run") == before and not list(tmp_path.glob("phi3v-replay-*"))


def test_one_rank_agrees_and_names_the_sample_that_carries_the_spike(
    trained: Path, tmp_path: Path
) -> None:
    before, step = contents(trained / "run"), strange_step(trained)
    command = [sys.executable, REPLAY, "run", "--step", step, "--check", "--bisect"]
    done = run(*command, cwd=trained, TMPDIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    head = next(n for n, line in enumerate(lines) if line.split()[:1] == ["adds"])
    assert f"  {STRANGE} (shards, train[7]; " in lines[head + 1]
    assert lines[head + 1].endswith("rows.jsonl, row 8)")
    end = lines.index(f"the largest gradient is that of {STRANGE}")
    adds = [float(line.split()[0]) for line in lines[head + 1 : end]]
    assert len(adds) > 1 and adds == sorted(adds, reverse=True)
    assert adds[0] > 100 * max(adds[1], 1e-9)
    found = float(lines[head - 2].split("one by one ")[1].split(",")[0])
    assert found == pytest.approx(metrics(trained / "run")[step - 1]["loss"], rel=1e-5)
    assert (
        " off at most, 0.0001 agree; with 1 rank instead of 2, a step's samples one by one"
        in lines[-1]
    )
    assert contents(trained / "run") == before and not list(tmp_path.glob("phi3v-replay-*"))


def test_numbers_that_are_not_the_runs_end_in_exit_code_1(trained: Path, tmp_path: Path) -> None:
    """From the base model on, where no checkpoint before the step is kept."""
    shutil.copytree(trained / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints")
    path = tmp_path / "run/metrics.jsonl"
    lines = metrics(tmp_path / "run")
    lines[1]["loss"] *= 1.001
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = [sys.executable, REPLAY, tmp_path / "run", "--step", 3, "--check"]
    done = run(*command, cwd=trained)
    assert done.returncode == 1
    assert "from its base model, 3 steps to take" in done.stderr
    assert last_line(done, "Disagreement").startswith(
        f"Disagreement: 1 of 3 steps of {tmp_path}/run, from step 2 on, give other numbers than "
    )
    assert done.stdout.splitlines()[1].split("(")[1].startswith("1.0e-03 off)")

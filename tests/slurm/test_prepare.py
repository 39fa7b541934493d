"""slurm/prepare.sh on a real two-node cluster: job arrays give the bytes of one process."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from phi3v.prepare import prepare
from tests.commands import ROOT
from tests.tiny import recipe, turn, write_jsonl

from .conftest import Cluster

pytestmark = pytest.mark.slow
SCRIPT = ROOT / "slurm" / "prepare.sh"
SECONDS = 120  # for four jobs one after the other; measured: 40
PARTS = 2


def submit(cluster: Cluster, folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in (SCRIPT, *arguments)],
        cwd=folder,
        env=cluster.environment | {"PHI3V_PYTHON": sys.executable, "PHI3V_SBATCH": "--time=00:05"},
        timeout=30,
        capture_output=True,
        text=True,
    )


def wait_for_end(cluster: Cluster, job: str) -> str:
    """The state in which a job ends."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        shown = cluster.run("scontrol", "show", "job", "--oneliner", job).split()
        state = next(word for word in shown if word.startswith("JobState=")).partition("=")[2]
        if state not in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"):
            return state
        time.sleep(0.5)
    raise AssertionError(f"job {job} has not ended: {' '.join(shown)}")


@pytest.fixture
def folder(tmp_path: Path, tiny_model: Path) -> Path:
    """A checkout with rows and a recipe for them."""
    (tmp_path / "launch").symlink_to(ROOT / "launch")
    lines = [turn(f"Question {k}?", f"Answer {k}", id=f"r{k}") for k in range(700)]
    write_jsonl(tmp_path / "rows.jsonl", lines)
    (tmp_path / "r.yaml").write_text(
        f"source: {{path: rows.jsonl}}\nmodel: {tiny_model}\nout: shards/rows\n"
        "split: {validation: 0.1}\nshard_bytes: 100000\n"
    )
    return tmp_path


def test_arrays_of_parts_give_the_bytes_of_one_process(
    cluster: Cluster, folder: Path, tiny_model: Path
) -> None:
    assert "slurm/prepare.sh 64 shop.yaml\n" in (ROOT / "docs/data.md").read_text()
    done = submit(cluster, folder, PARTS, "r.yaml", "split.seed=3")
    assert done.returncode == 0, done.stderr
    logs = "slurm-*.out"
    state = wait_for_end(cluster, done.stdout.split()[-1])
    assert state == "COMPLETED", [path.read_text() for path in folder.glob(logs)]
    assert len(list(folder.glob(logs))) == 2 * PARTS + 2
    cfg = recipe(
        tiny_model,
        folder / "one",
        {"path": "rows.jsonl"},
        split={"validation": 0.1, "seed": 3},
        shard_bytes=100000,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert len(prepare(cfg)["splits"]["train"]["shards"]) > 4
    for path in (folder / "one").iterdir():
        assert path.read_bytes() == (folder / "shards/rows" / path.name).read_bytes(), path.name


def test_a_mistake_ends_the_chain_and_the_rest_never_runs(cluster: Cluster, folder: Path) -> None:
    done = submit(cluster, folder, PARTS, "r.yaml", "source.path=gone.jsonl")
    numbers = [word.strip(",;") for word in done.stdout.splitlines()[-2].split()]
    scan, last = numbers[1], done.stdout.split()[-1]
    assert wait_for_end(cluster, last) == "CANCELLED"
    text = (folder / f"slurm-{scan}_1.out").read_text()
    assert "ConfigError: source.path gone.jsonl does not exist; check the path" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "call it as slurm/prepare.sh PARTS RECIPE.yaml [key=value ...], got ''"),
        (("r.yaml", 4), "call it as slurm/prepare.sh PARTS RECIPE.yaml"),
        ((4, "gone.yaml"), "recipe gone.yaml does not exist; name a YAML file"),
    ],
)
def test_a_mistaken_call_is_refused(folder: Path, arguments: tuple[object], message: str) -> None:
    done = subprocess.run(
        [str(part) for part in (SCRIPT, *arguments)],
        cwd=folder,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert done.returncode == 2
    assert message in done.stderr

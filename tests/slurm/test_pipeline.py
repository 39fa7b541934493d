"""slurm/pipeline.sh on a real cluster: rows to scores, each job after the success of the last.

The programs are small ones: what counts here is what the jobs call, and when.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import ROOT

from .conftest import Cluster
from .programs import put

pytestmark = pytest.mark.slow
SCRIPT = ROOT / "slurm" / "pipeline.sh"
TELL = """
import os, sys
with open("calls.txt", "a") as file:
    print(os.path.basename(sys.argv[0]), *sys.argv[1:], file=file)
"""
# Asked to stop in its first start, as if its time were up
STOPPED_ONCE = """
if "SLURM_RESTART_COUNT" not in os.environ:
    print("stopped after step 3")
    sys.exit(75)
"""


def call(cluster: Cluster, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    variables = {"PHI3V_PYTHON": sys.executable, "PHI3V_SBATCH": "--time=5"}
    return subprocess.run(
        [SCRIPT, *arguments],
        cwd=folder,
        env=cluster.environment | variables,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("prepare.py", "train.py", "evaluate.py"):
        put(tmp_path, TELL + (STOPPED_ONCE if name == "train.py" else ""), name)
    (tmp_path / "rows.yaml").write_text("source: {path: rows.csv}\nmodel: m\nout: shards/a\n")
    recipe = (ROOT / "launch/recipes/demo.yaml").read_text()
    (tmp_path / "run.yaml").write_text(recipe.replace("shards/products", "shards/a"))
    return tmp_path


def test_a_training_that_is_requeued_keeps_the_evaluation_waiting(
    cluster: Cluster, folder: Path
) -> None:
    values = ("run.out=runs/a b", "data.shards=[{path: shards/a}, {path: shards/b}]")
    done = call(cluster, folder, "1", "rows.yaml", "run.yaml", *values)
    assert done.returncode == 0, done.stderr
    number = done.stdout.split()[-1]
    ended = cluster.end(folder, number)
    assert ended.state == "COMPLETED", (folder / f"slurm-{number}.out").read_text()
    calls = (folder / "calls.txt").read_text().splitlines()
    assert [line.split()[0] for line in calls[:4]] == 4 * ["prepare.py"]
    assert calls[4:] == 2 * [f"train.py run.yaml {' '.join(values)}"] + [
        "evaluate.py runs/a b --shards shards/a",
        "evaluate.py runs/a b --shards shards/b",
    ]


def test_a_failed_training_cancels_the_evaluation(cluster: Cluster, folder: Path) -> None:
    put(folder, "import sys; sys.exit(2)")
    done = call(cluster, folder, "1", "rows.yaml", "run.yaml")
    assert cluster.end(folder, done.stdout.split()[-1]).state == "CANCELLED"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("rows.yaml", "run.yaml"), "call it as slurm/pipeline.sh PARTS PREPARE.yaml RUN.yaml"),
        (
            ("1", "rows.yaml", "run.yaml", "data.shards=shards/b"),
            "ConfigError: rows.yaml prepares shards/a, but run.yaml trains on shards/b; make out",
        ),
    ],
)
def test_a_mistake_is_told_before_anything_is_submitted(
    cluster: Cluster, folder: Path, arguments: tuple[str, ...], message: str
) -> None:
    done = call(cluster, folder, *arguments)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""

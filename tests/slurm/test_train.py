"""slurm/train.sh on a real two-node cluster: with small programs, and with launch/train.py."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.commands import ROOT, metrics

from .conftest import Cluster, Job
from .programs import SCRIPT, on_two_nodes, put

pytestmark = pytest.mark.slow

MEETING = """
import sys
import torch, torch.distributed
from phi3v.training.ranks import run_command, set_environment

def main():
    ranks = set_environment()
    torch.distributed.init_process_group("gloo")
    total = torch.tensor(ranks.rank)
    torch.distributed.all_reduce(total)
    if ranks.is_first:
        print(f"world={ranks.world_size} sum={int(total)} arguments={sys.argv[1:]}")
    torch.distributed.destroy_process_group()

if __name__ == "__main__":
    run_command(main)
"""

MISTAKE = """
from phi3v.errors import ConfigError
from phi3v.training.ranks import run_command, set_environment

def main():
    set_environment()
    raise ConfigError("train.max_steps must be int, got 'ten'")

run_command(main)
"""

LOCAL_VIEW = """
import os
names = ("SLURM_LOCALID", "CUDA_VISIBLE_DEVICES", "RANK", "SLURM_CPUS_PER_TASK")
print("task", *(os.environ.get(name, "unset") for name in names))
"""


def submit(cluster: Cluster, folder: Path, *options: str, arguments: tuple[str, ...] = ()) -> Job:
    return cluster.submit(folder, *on_two_nodes(*options, arguments=arguments))


def test_ranks_on_two_nodes_meet_and_get_the_arguments(cluster: Cluster, tmp_path: Path) -> None:
    put(tmp_path, MEETING)
    arguments = ("recipe with space.yaml", "train.max_steps=2")
    job = submit(cluster, tmp_path, arguments=arguments)
    assert (job.state, job.exit_code) == ("COMPLETED", "0:0"), job.output
    assert f"world=2 sum=1 arguments={list(arguments)}" in job.output


def test_ranks_under_plain_srun_find_their_meeting_point(cluster: Cluster, tmp_path: Path) -> None:
    output = cluster.run("srun", "-N2", sys.executable, str(put(tmp_path, MEETING)))
    assert "world=2 sum=1" in output


def test_exit_code_2_of_the_ranks_is_the_jobs_and_one_rank_reports(
    cluster: Cluster, tmp_path: Path
) -> None:
    put(tmp_path, MISTAKE)
    job = submit(cluster, tmp_path)
    assert (job.state, job.exit_code) == ("FAILED", "2:0"), job.output
    assert job.output.count("ConfigError: train.max_steps must be int, got 'ten'\n") == 1
    assert "Traceback" not in job.output


@pytest.mark.parametrize("binding", [(), ("--gpus-per-task=1",), ("--gpu-bind=single:1",)])
def test_each_rank_sees_all_gpus_of_its_node(
    cluster: Cluster, tmp_path: Path, binding: tuple[str, ...]
) -> None:
    put(tmp_path, LOCAL_VIEW)
    gpus = () if "--gpus-per-task=1" in binding else ("--gpus-per-node=2",)
    job = submit(cluster, tmp_path, "--ntasks-per-node=2", "--cpus-per-task=1", *gpus, *binding)
    assert job.state == "COMPLETED", job.output
    logs = tmp_path.glob("slurm-*/start-0/rank-*.log")
    tasks = sorted(line for log in logs for line in log.read_text().splitlines())
    assert tasks == 2 * ["task 0 0,1 unset 1"] + 2 * ["task 1 0,1 unset 1"]


@pytest.mark.parametrize("gpus", ["--gpus-per-node=2", "--gres=gpu:2", "--exclusive"])
def test_a_task_count_that_differs_from_the_gpus_is_refused(
    cluster: Cluster, tmp_path: Path, gpus: str
) -> None:
    put(tmp_path, LOCAL_VIEW)
    job = submit(cluster, tmp_path, gpus)
    assert job.exit_code == "2:0"
    assert job.output == (
        "slurm/train.sh: 1 tasks per node but 2 GPUs per node; "
        "call sbatch with --ntasks-per-node=2\n"
    )


def test_gpus_that_torch_does_not_see_are_refused_unless_the_cpu_is_asked_for(
    cluster: Cluster, tmp_path: Path
) -> None:
    """The cluster's GPUs are null devices, of use to nobody."""
    put(tmp_path, MEETING)
    options = ("--ntasks-per-node=2", "--gpus-per-node=2")
    job = submit(cluster, tmp_path, *options)
    assert job.exit_code == "2:0", job.output
    assert job.output.count("ConfigError: ") == 1, job.output
    assert "SLURM_GPUS_ON_NODE=2), but torch sees no GPU (torch " in job.output
    job = cluster.submit(tmp_path, *on_two_nodes(*options, DS_ACCELERATOR="cpu"))
    assert job.state == "COMPLETED", job.output
    assert "world=4 sum=6" in job.output


def test_a_folder_that_is_no_checkout_and_a_missing_python_are_refused(tmp_path: Path) -> None:
    """Before the script asks Slurm for anything: so no cluster is needed here."""
    environment = {"PATH": os.environ["PATH"], "SLURM_SUBMIT_DIR": str(tmp_path)}

    def refusal() -> str:
        ended = subprocess.run(["bash", SCRIPT], env=environment, capture_output=True, text=True)
        assert (ended.returncode, ended.stdout) == (2, "")
        return ended.stderr

    assert refusal() == (
        f"slurm/train.sh: no launch/train.py in {tmp_path}; call sbatch from the checkout\n"
    )
    put(tmp_path, MEETING)
    assert refusal() == (
        f"slurm/train.sh: no python at .venv/bin/python in {tmp_path}; "
        "run make setup, or export PHI3V_PYTHON=/path/to/python\n"
    )
    for image in ("phi3v.sif", "phi3v.sqsh"):
        environment["PHI3V_CONTAINER"] = image
        assert refusal() == (
            f"slurm/train.sh: no image at {image} in {tmp_path}; "
            "docs/install.md says how to build it\n"
        )


APPTAINER = """#!/usr/bin/env bash
# exec --nv --bind MOUNTS --pwd FOLDER IMAGE PROGRAM: says where it is, and runs the program there.
echo "$1 $2 $3 $4 $5 $6 $7" >>"$6/entered"
cd "$6" && shift 8 && exec "$PHI3V_TEST_PYTHON" "$@"
"""


def test_ranks_in_a_container_get_the_checkout_and_the_arguments(
    cluster: Cluster, tmp_path: Path
) -> None:
    """The image's python3 is this environment's here, called by a stand-in for apptainer."""
    put(tmp_path, MEETING)
    (tmp_path / "phi3v.sif").touch()
    program = tmp_path / "bin/apptainer"
    program.parent.mkdir()
    program.write_text(APPTAINER)
    program.chmod(0o755)
    variables = {
        "PATH": f"{program.parent}:{os.environ['PATH']}",
        "PHI3V_CONTAINER": "phi3v.sif",
        "PHI3V_PYTHON": "python3",
        "PHI3V_TEST_PYTHON": sys.executable,
        "PHI3V_MOUNTS": "/data",
    }
    job = cluster.submit(tmp_path, *on_two_nodes(arguments=("a.yaml",), **variables))
    assert (job.state, job.exit_code) == ("COMPLETED", "0:0"), job.output
    assert "world=2 sum=1 arguments=['a.yaml']" in job.output
    mounts = f"{tmp_path}:{tmp_path},/data:/data"
    entered = f"exec --nv --bind {mounts} --pwd {tmp_path} {tmp_path / 'phi3v.sif'}"
    assert (tmp_path / "entered").read_text().splitlines() == 2 * [entered]


def test_a_preempted_run_is_requeued_and_trains_to_its_end(
    cluster: Cluster, tmp_path: Path, tiny_shards: Path, tiny_model: Path
) -> None:
    """The README's command: the real launch/train.py, two nodes of one rank each."""
    (tmp_path / "launch").symlink_to(ROOT / "launch")
    values = (f"model.path={tiny_model}", f"data.shards={tiny_shards}", "train.max_steps=40")
    short = ("run.out=run", "eval.rows=0", "wandb.mode=disabled", "optim.warmup_steps=5")
    arguments = ("launch/recipes/demo.yaml", *values, *short)
    job = cluster.start(tmp_path, *on_two_nodes(arguments=arguments))
    deadline = time.monotonic() + 60
    while not (tmp_path / "run/metrics.jsonl").exists() or not metrics(tmp_path / "run"):
        assert time.monotonic() < deadline, "the job does not train"
        time.sleep(0.1)
    other = tmp_path / "other"
    other.mkdir()
    cluster.submit(other, "-N2", "--exclusive", "--partition=urgent", "--wrap=true")
    ended = cluster.end(tmp_path, job, seconds=150)
    assert (ended.state, ended.restarts) == ("COMPLETED", 1), ended.output
    assert "slurm/train.sh: preempted; back to the queue\n" in ended.output
    assert [line["step"] for line in metrics(tmp_path / "run")] == list(range(1, 41))
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment["ranks"] == 2

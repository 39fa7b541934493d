"""slurm/train.sh when a job is preempted, told to stop, loses a node or its network."""

import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import Cluster
from .programs import COUNTER, TIED, counted, on_two_nodes, put

pytestmark = pytest.mark.slow

STEPS = 40  # ten a second
EARLY = """
import signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)  # which the first to leave causes for the others
time.sleep(1)
print("stopped after step 7")
sys.exit(75)
"""


def start(cluster: Cluster, folder: Path, steps: int = STEPS, **variables: str) -> str:
    """Start a job that counts, and wait until it has counted a bit."""
    put(folder, COUNTER)
    job = cluster.start(folder, *on_two_nodes(arguments=(str(steps),), **variables))
    wait_until(lambda: len(counted(folder)) >= 5)
    return job


def assert_went_on(cluster: Cluster, folder: Path, job: str) -> str:
    """The job ends well in its second start, having done each step once; its output."""
    ended = cluster.end(folder, job)
    assert (ended.state, ended.exit_code) == ("COMPLETED", "0:0"), ended.output
    steps = counted(folder)
    assert steps == list(range(1, len(steps) + 1))
    assert ended.restarts == 1
    folders = sorted(path.name for path in (folder / f"slurm-{job}").glob("start-*"))
    assert folders == ["start-0", "start-1"]
    return ended.output


def wait_until(is_so: Callable[[], bool], seconds: float = 40) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, "it has not come"
        time.sleep(0.1)


def test_a_preempted_job_saves_makes_room_at_once_and_goes_on(
    cluster: Cluster, tmp_path: Path
) -> None:
    """Slurm itself would let the 10 s of grace pass, and fail a job that has ended before."""
    job = start(cluster, tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    urgent = ("-N2", "--exclusive", "--partition=urgent", "--wrap=true")
    assert cluster.submit(other, *urgent).state == "COMPLETED"
    output = assert_went_on(cluster, tmp_path, job)
    assert "slurm/train.sh: preempted; back to the queue\n" in output
    assert output.count("stopped after step") == 1  # rank 0's; rank 1's is in its own log
    assert "stopped after step" in (tmp_path / f"slurm-{job}/start-0/rank-1.log").read_text()


def test_a_requeued_job_goes_on(cluster: Cluster, tmp_path: Path) -> None:
    job = start(cluster, tmp_path)
    cluster.run("scontrol", "requeue", job)
    assert_went_on(cluster, tmp_path, job)


def test_a_cancelled_job_saves_and_stays_cancelled(cluster: Cluster, tmp_path: Path) -> None:
    job = start(cluster, tmp_path)
    cluster.run("scancel", job)
    assert cluster.end(tmp_path, job).state == "CANCELLED"
    time.sleep(1)  # would be in the queue again
    shown = cluster.show(job)
    assert (shown["JobState"], shown["Restarts"]) == ("CANCELLED", "0")
    assert "stopped after step" in (tmp_path / f"slurm-{job}/start-0/rank-1.log").read_text()


def test_a_job_that_shall_not_be_requeued_ends_with_75(cluster: Cluster, tmp_path: Path) -> None:
    job = start(cluster, tmp_path, PHI3V_REQUEUE="no")
    cluster.run("scancel", "--signal=TERM", job)
    ended = cluster.end(tmp_path, job)
    assert (ended.state, ended.exit_code, ended.restarts) == ("FAILED", "75:0", 0)
    assert "not requeued because of PHI3V_REQUEUE=no; submit the same command" in ended.output


def test_a_job_that_comes_no_further_is_not_requeued_for_ever(
    cluster: Cluster, tmp_path: Path
) -> None:
    put(tmp_path, EARLY)
    job = cluster.start(tmp_path, *on_two_nodes("--hold"))
    logs = tmp_path / f"slurm-{job}"
    logs.mkdir()
    (logs / "steps").write_text("step 6\nstep 7\nstep 7\nstep 7\n")  # of starts before
    cluster.run("scontrol", "release", job)
    ended = cluster.end(tmp_path, job)
    assert (ended.exit_code, ended.restarts) == ("75:0", 0)
    message = "the last 4 starts all ended at step 7; not requeued; see slurm-"
    assert message in ended.output


def test_a_failure_is_not_requeued_and_is_in_the_jobs_log(cluster: Cluster, tmp_path: Path) -> None:
    """Whichever rank failed."""
    put(tmp_path, "import os, time\nif os.environ['SLURM_PROCID'] == '1': 1 / 0\ntime.sleep(60)")
    ended = cluster.submit(tmp_path, *on_two_nodes())
    assert (ended.state, ended.restarts) == ("FAILED", 0)
    assert "start-0/rank-1.log:\nTraceback" in ended.output
    assert "\nZeroDivisionError: division by zero\n" in ended.output


def test_a_nodes_death_brings_the_job_back_to_the_queue(cluster: Cluster, tmp_path: Path) -> None:
    """Once srun hears of the ranks' death; or, where it does not, once Slurm misses the node."""
    put(tmp_path, TIED)
    job = cluster.start(tmp_path, *on_two_nodes())
    log = tmp_path / f"slurm-{job}/start-0/rank-1.log"
    wait_until(lambda: log.exists() and "met" in log.read_text())
    cluster.node("kill", "node2")
    try:
        wait_until(lambda: int(cluster.show(job)["Restarts"]) == 1, seconds=120)
    finally:
        cluster.node("start", "node2")
    ended = cluster.end(tmp_path, job)
    assert (ended.state, ended.restarts) == ("COMPLETED", 1), ended.output


@pytest.fixture(scope="module")
def limited(cabled_cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A job with a limit of two minutes, so that its signal, 120 s before, is due at once.

    Slurm looks every 30 s: it runs beside the next test, on the node whose cable is not cut.
    """
    folder = tmp_path_factory.mktemp("limited")
    put(folder, COUNTER)
    options = on_two_nodes("-N1", "--nodelist=node1", "--time=2", arguments=("900",))
    return folder, cabled_cluster.start(folder, *options)


def test_a_cut_link_brings_the_job_back_and_ends_its_orphans(
    limited: tuple[Path, str], cabled_cluster: Cluster, tmp_path: Path
) -> None:
    """The rank behind the cut runs on until Slurm reaches its node again."""
    cluster = cabled_cluster
    job = start(cluster, tmp_path, steps=900)
    cluster.link("node2", "down")
    cluster.wait(job, "PENDING", "COMPLETING")
    lonely = tmp_path / "counted-1"
    before = lonely.read_text()
    wait_until(lambda: lonely.read_text() != before)
    cluster.link("node2", "up")
    cluster.wait(job, "RUNNING", restarts=1)
    assert "stopped after" in (tmp_path / f"slurm-{job}/start-0/rank-1.log").read_text()
    (tmp_path / "enough").touch()
    assert_went_on(cluster, tmp_path, job)


def test_a_job_stops_before_its_time_limit_and_goes_on(
    limited: tuple[Path, str], cabled_cluster: Cluster
) -> None:
    folder, job = limited
    cabled_cluster.wait(job, "RUNNING", restarts=1)
    (folder / "enough").touch()
    output = assert_went_on(cabled_cluster, folder, job)
    assert "slurm/train.sh: the ranks have saved and stopped; back to the queue\n" in output


def test_a_port_that_is_taken_is_passed_over(cluster: Cluster, tmp_path: Path) -> None:
    put(tmp_path, "import os; print('port', os.environ['MASTER_PORT'])")
    job = cluster.start(tmp_path, *on_two_nodes("--hold"))
    port = 20000 + int(job) % 10000
    with socket.create_server(("127.0.0.1", port)):
        cluster.run("scontrol", "release", job)
        ended = cluster.end(tmp_path, job)
    assert f"port {port + 1}\n" in ended.output

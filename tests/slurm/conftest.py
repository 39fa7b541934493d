"""Real two-node Slurms on this machine, each for one test session: `cluster.sh` starts and ends."""

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from phi3v.training.ranks import RANK_VARIABLES

CLUSTER, HOSTS = (Path(__file__).with_name(name) for name in ("cluster.sh", "hosts.sh"))
SECONDS = 60  # that a job or the cluster's start may take; most need 1 to 10
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")


@dataclass(frozen=True)
class Job:
    """A job that has ended: Slurm's verdict and what it wrote."""

    state: str
    exit_code: str  # "2:0": exit code 2, no signal
    restarts: int
    output: str


@dataclass(frozen=True)
class Cluster:
    """Runs Slurm's commands against the test cluster."""

    folder: Path
    environment: dict[str, str]

    def run(self, *command: str, cwd: Path | None = None) -> str:
        """The command's standard output; whether it succeeded is not asked."""
        return subprocess.run(
            command,
            cwd=cwd,
            env=self.environment,
            timeout=SECONDS,
            stdout=subprocess.PIPE,
            text=True,
        ).stdout

    def start(self, folder: Path, *arguments: str) -> str:
        """Submit a job from the folder with sbatch's arguments; its number."""
        output = f"--output={folder / 'job.txt'}"
        number = self.run("sbatch", "--parsable", output, *arguments, cwd=folder).strip()
        assert number, f"sbatch refused {arguments}"
        return number

    def show(self, number: str) -> dict[str, str]:
        """What Slurm says of a job, by its names: JobState, Restarts, ..."""
        shown = self.run("scontrol", "show", "job", "--oneliner", number).split()
        return dict(word.split("=", 1) for word in shown if "=" in word)

    def wait(self, number: str, *states: str, restarts: int = 0, seconds: int = SECONDS) -> None:
        """Wait until a job that was restarted so often is in one of the states.

        Asks four times a second: `sbatch --wait` asks after 2, 10 and then 42 seconds.
        """
        deadline = time.monotonic() + seconds
        while (job := self.show(number))["JobState"] not in states or (
            int(job["Restarts"]) < restarts
        ):
            assert time.monotonic() < deadline, f"no {states} after {seconds} s: {job}"
            assert job["JobState"] not in ENDED, f"the job has ended before {states}: {job}"
            time.sleep(0.25)

    def end(self, folder: Path, number: str, seconds: int = SECONDS) -> Job:
        """Wait for the end of a job that was started from the folder."""
        self.wait(number, *ENDED, seconds=seconds)
        job = self.show(number)
        output = folder / "job.txt"
        text = output.read_text() if output.exists() else ""
        return Job(job["JobState"], job["ExitCode"], int(job["Restarts"]), text)

    def submit(self, folder: Path, *arguments: str) -> Job:
        """Submit a job and wait for its end."""
        return self.end(folder, self.start(folder, *arguments))

    def node(self, command: str, node: str) -> None:
        """Kill or start a node's daemon."""
        subprocess.run([CLUSTER, command, self.folder, node], check=True, timeout=SECONDS)

    def link(self, node: str, state: str) -> None:
        """Cut ("down") or mend ("up") a host's cable."""
        subprocess.run([HOSTS, "link", self.folder, node, state], check=True, timeout=SECONDS)


@pytest.fixture(scope="session")
def session_cluster() -> Iterator[Cluster]:
    need_root("munged", "slurmctld", "slurmd", "sbatch", packages="slurm-wlm munge")
    with running() as cluster:
        yield cluster


@pytest.fixture
def cluster(session_cluster: Cluster) -> Iterator[Cluster]:
    """Two nodes, told apart by their ports; what a failed test leaves is no other's."""
    yield session_cluster
    session_cluster.run("scancel", "--user", "root")


@pytest.fixture(scope="session")
def cabled_cluster() -> Iterator[Cluster]:
    """Two nodes on two hosts, whose cables can be cut."""
    need_root("munged", "slurmctld", "slurmd", "sbatch", packages="slurm-wlm munge")
    need_hosts()
    with running("hosts") as cluster:
        yield cluster


def need_root(*programs: str, packages: str) -> None:
    """Skip the test where it cannot run."""
    path = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"])
    missing = [program for program in programs if shutil.which(program, path=path) is None]
    if missing:
        pytest.skip(f"no {', '.join(missing)} here; apt-get install {packages}")
    if os.geteuid() != 0:
        pytest.skip("hosts and nodes of a test must be started by root")


def need_hosts() -> None:
    """Skip the test where no network namespaces can be made."""
    need_root("ip", packages="iproute2")
    with tempfile.TemporaryDirectory(prefix="hosts-") as folder:
        made = subprocess.run([HOSTS, "up", folder], capture_output=True, text=True)
        if made.returncode:
            pytest.skip(f"no network namespaces here: {made.stderr.strip()}")
        subprocess.run([HOSTS, "down", folder], check=True)


def clean_environment() -> dict[str, str]:
    """Ours without what would make a child take itself for a rank or part of another job."""
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("SLURM", "PHI3V")) and name not in RANK_VARIABLES
    }


@contextmanager
def running(*mode: str) -> Iterator[Cluster]:
    """A cluster from its start to its end."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    inherited = clean_environment()
    log = folder / "cluster.txt"  # a file, not a pipe: the daemons would keep a pipe open
    try:
        with log.open("w") as file:
            command = [CLUSTER, "up", folder, *mode]
            up = subprocess.run(command, stdout=file, stderr=file, timeout=SECONDS, env=inherited)
        assert up.returncode == 0, f"the test cluster did not start:\n{_logs(folder)}"
        yield Cluster(folder, {**inherited, "SLURM_CONF": str(folder / "slurm.conf")})
    finally:
        subprocess.run([CLUSTER, "down", folder], timeout=SECONDS, check=True)
        shutil.rmtree(folder)


def _logs(folder: Path) -> str:
    logs = [folder / "cluster.txt", folder / "munged.warnings", *sorted(folder.glob("*.log"))]
    return "\n".join(f"{log.name}:\n{log.read_text()[-2000:]}" for log in logs if log.exists())

"""A real two-node Slurm on this machine, for one test session: `cluster.sh` starts and ends it."""

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from phi3v.training.ranks import RANK_VARIABLES

SCRIPT = Path(__file__).with_name("cluster.sh")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
SECONDS = 60  # that a job or the cluster's start may take; both need 1 to 10


@dataclass(frozen=True)
class Job:
    """A job that has ended: Slurm's verdict and what it wrote."""

    state: str
    exit_code: str  # "2:0": exit code 2, no signal
    output: str


@dataclass(frozen=True)
class Cluster:
    """Runs Slurm's commands against the test cluster."""

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

    def submit(self, folder: Path, *arguments: str) -> Job:
        """Submit a job from the folder with sbatch's arguments and wait for its end.

        Asks four times a second: `sbatch --wait` asks after 2, 10 and then 42 seconds.
        """
        output = folder / "job.txt"
        number = self.run("sbatch", "--parsable", f"--output={output}", *arguments, cwd=folder)
        deadline = time.monotonic() + SECONDS
        while True:
            shown = self.run("scontrol", "show", "job", "--oneliner", number.strip()).split()
            job = dict(word.split("=", 1) for word in shown if "=" in word)
            if job["JobState"] not in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"):
                return Job(job["JobState"], job["ExitCode"], output.read_text())
            assert time.monotonic() < deadline, f"the job has not ended: {' '.join(shown)}"
            time.sleep(0.25)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    path = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"])
    missing = [program for program in PROGRAMS if shutil.which(program, path=path) is None]
    if missing:
        pytest.skip(f"no {', '.join(missing)} here; apt-get install slurm-wlm munge")
    if os.geteuid() != 0:
        pytest.skip("a test cluster's slurmd must run as root")
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("SLURM") and name not in RANK_VARIABLES
    }
    log = folder / "cluster.txt"  # a file, not a pipe: the daemons would keep a pipe open
    try:
        with log.open("w") as file:
            up = subprocess.run(
                [SCRIPT, "up", folder], stdout=file, stderr=file, timeout=SECONDS, env=inherited
            )
        assert up.returncode == 0, f"the test cluster did not start:\n{_logs(folder)}"
        yield Cluster({**inherited, "SLURM_CONF": str(folder / "slurm.conf")})
    finally:
        subprocess.run([SCRIPT, "down", folder], timeout=SECONDS, check=True)
        shutil.rmtree(folder)


def _logs(folder: Path) -> str:
    logs = [folder / "cluster.txt", folder / "munged.warnings", *sorted(folder.glob("*.log"))]
    return "\n".join(f"{log.name}:\n{log.read_text()[-2000:]}" for log in logs if log.exists())

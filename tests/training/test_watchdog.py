"""Ends that real ranks come to: kills, signals, hangs and defects under the launchers.

The ranks do what training does (listen, meet over gloo, agree each step, stop) and no more.
"""

import base64
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from signal import SIGHUP, SIGINT, SIGUSR1

import psutil
import pytest

from phi3v.training import watchdog
from phi3v.training.ranks import free_port
from tests.commands import LAUNCH, deepspeed, kill, start, torchrun
from tests.training.bare import BARE

pytestmark = pytest.mark.slow

# Measured 1 to 4 on an idle machine; the launchers themselves take 30 to send SIGKILL.
SECONDS = 12.0

PROGRAM = (
    BARE
    + """
import os, time
from datetime import timedelta
from pathlib import Path
import torch
from phi3v.errors import Stopped
from phi3v.training import ranks, watchdog
from phi3v.training.stopping import StopRequests

def main():
    requests = StopRequests()
    requests.listen()
    watchdog.end_with_launcher()
    own = ranks.set_environment()
    Path(f"ready-{own.rank}").touch()
    if mode == "late":
        time.sleep(60)
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=50))
    if mode == "hang":
        watchdog.DUMP_SECONDS = 3
        time.sleep(own.rank / 2)  # the second notices later, when the first has written its stacks
        dog = watchdog.Watchdog(1.0, Path("run"), own.rank)
        if own.is_first:
            lost_rank()
    total = torch.zeros(1)
    while not total:
        total.fill_(float(requests.reason() is not None))
        torch.distributed.all_reduce(total)
        Path(f"step-{own.rank}").touch()
        time.sleep(0.01)
        if mode == "defect" and own.rank == 1:
            raise ValueError("rank 1 has a defect")
        if mode == "busy" and own.rank == 1:
            os.kill(os.getpid(), 9)
        if mode == "busy":
            lost_rank()
    if mode == "slow":
        time.sleep(3)  # to save
    torch.distributed.barrier()
    if not own.is_first:
        time.sleep(1.2)  # the launcher looks once a second, and sends SIGTERM
    raise Stopped("stopped by a test and saved")

def lost_rank():
    time.sleep(60)

mode = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
if __name__ == "__main__":
    ranks.run_command(main)
"""
)


def launch(ranks: int, *arguments: object) -> list[object]:
    """The command that deepspeed starts on each node; it spares the seconds of deepspeed itself."""
    nodes = base64.urlsafe_b64encode(json.dumps({"localhost": list(range(ranks))}).encode())
    found = [f"--world_info={nodes.decode()}", f"--master_port={free_port()}", "--node_rank=0"]
    module = [sys.executable, "-m", "deepspeed.launcher.launch"]
    return [*module, *found, LAUNCH / "train.py", *arguments]


class Family:
    """Two ranks and their launchers, started in a folder."""

    def __init__(self, launcher: Callable[..., list[object]], folder: Path, mode: str) -> None:
        script = folder / "program.py"
        script.write_text(PROGRAM)
        command = [script if part == LAUNCH / "train.py" else part for part in launcher(2, mode)]
        self.front = start(*command, cwd=folder, PYTHONPATH=str(LAUNCH.parent))
        self.folder = folder

    def wait_for(self, *names: str) -> None:
        deadline = time.monotonic() + 60
        while not all((self.folder / name).exists() for name in names):
            assert self.front.poll() is None, self.front.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        self.members = psutil.Process(self.front.pid).children(recursive=True)

    def ranks(self) -> list[psutil.Process]:
        """The processes that run the program itself."""
        return [member for member in self.members if "-m" not in member.cmdline()]

    def end(self, seconds: float = SECONDS) -> str:
        """What they wrote, after all of them have ended within these seconds."""
        deadline = time.monotonic() + seconds
        said = self.front.communicate(timeout=seconds)[1]  # all of them hold the pipe open
        _, alive = psutil.wait_procs(self.members, timeout=deadline - time.monotonic())
        assert not alive, f"still there after {seconds} s: {alive}"
        return said

    def close(self) -> None:
        for member in getattr(self, "members", []):
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        kill(self.front)


@pytest.fixture
def family(tmp_path: Path) -> Iterator[Callable[..., Family]]:
    """Starts a family, and leaves none of it."""
    started: list[Family] = []

    def begin(launcher: Callable[..., list[object]], mode: str = "") -> Family:
        started.append(Family(launcher, tmp_path, mode))
        return started[-1]

    yield begin
    for one in started:
        one.close()


@pytest.mark.parametrize(("launcher", "mode"), [(deepspeed, "late"), (launch, ""), (torchrun, "")])
def test_ranks_end_when_their_launcher_is_killed(
    family: Callable[..., Family], launcher: Callable[..., list[object]], mode: str
) -> None:
    """Also the one above the one that started them, and before they have met."""
    run = family(launcher, mode)
    run.wait_for(*("ready-0", "ready-1") if mode else ("step-0", "step-1"))
    run.front.kill()
    said = run.end()
    line = f"its launcher (process {run.front.pid}) is gone; it ends at once"
    assert f"rank 0: {line}" in said and f"rank 1: {line}" in said
    assert "Traceback" not in said


def test_a_killed_rank_takes_the_others_down(family: Callable[..., Family]) -> None:
    run = family(torchrun)
    run.wait_for("step-0", "step-1")
    run.ranks()[1].kill()
    run.end()
    assert run.front.returncode == 1


def test_a_rank_at_work_ends_as_well_when_another_was_killed(
    family: Callable[..., Family],
) -> None:
    """It is in no collective that could fail, and only counts the launcher's SIGTERM."""
    run = family(launch, "busy")
    run.wait_for("step-0")
    assert "rank 0: another rank of this node has ended" in run.end()


def test_a_signal_to_one_rank_ends_all_of_them_with_75(family: Callable[..., Family]) -> None:
    """The second rank leaves later, and is sent SIGTERM by the launcher in the meantime."""
    run = family(launch)
    run.wait_for("step-0", "step-1")
    run.ranks()[1].send_signal(SIGUSR1)
    said = run.end()
    assert run.front.returncode == 75
    assert said.count("stopped by a test and saved\n") == 1
    assert "Traceback" not in said and "another rank" not in said


@pytest.mark.parametrize("launcher", [deepspeed, torchrun])
def test_ctrl_c_leaves_the_ranks_the_time_to_save(
    family: Callable[..., Family], launcher: Callable[..., list[object]]
) -> None:
    """`deepspeed` itself ends at once, and nobody is left to ask but the `launch` below it."""
    run = family(launcher, "slow")
    run.wait_for("step-0", "step-1")
    os.killpg(run.front.pid, SIGINT)  # as a terminal does
    said = run.end()
    assert said.count("Ctrl-C: the run ends after this step, saved; again: at once") == 1
    assert said.count("stopped by a test and saved\n") == 1
    assert "is gone" not in said and "rank 1" not in said


@pytest.mark.parametrize("launcher", [deepspeed, torchrun])
def test_a_terminal_that_is_closed_leaves_the_ranks_the_time_to_save(
    family: Callable[..., Family], launcher: Callable[..., list[object]]
) -> None:
    """Both launchers of deepspeed end at once; torchrun passes the signal on."""
    run = family(launcher, "slow")
    run.wait_for("step-0", "step-1")
    os.killpg(run.front.pid, SIGHUP)  # as a terminal does
    said = run.end()
    assert said.count("stopped by a test and saved\n") == 1
    assert "is gone" not in said and "rank 1" not in said


@pytest.mark.parametrize("launcher", [deepspeed, torchrun])
def test_a_second_ctrl_c_waits_for_nothing(
    family: Callable[..., Family], launcher: Callable[..., list[object]]
) -> None:
    run = family(launcher, "slow")
    run.wait_for("step-0", "step-1")
    for _ in range(2):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.front.pid, SIGINT)
        time.sleep(0.5)
    assert "stopped by a test and saved" not in run.end()


def test_a_defect_of_one_rank_is_told_first_and_ends_all(family: Callable[..., Family]) -> None:
    run = family(launch, "defect")
    run.wait_for("step-1")
    said = run.end()
    assert run.front.returncode == 1
    assert said.count("Traceback") == 1
    assert "rank 1 failed:\nTraceback (most recent call last):\n" in said
    assert "ValueError: rank 1 has a defect\n" in said


def test_a_hang_ends_in_the_stacks_of_every_rank(family: Callable[..., Family]) -> None:
    run = family(torchrun, "hang")
    run.wait_for("ready-0", "ready-1")
    said = run.end(30)
    for rank, place in ((0, "lost_rank"), (1, "all_reduce")):
        stacks = (run.folder / "run" / "stacks" / f"rank-0000{rank}.txt").read_text()
        assert f"rank {rank}: nothing was finished for 1 s, longer than train.hang_timeout" in said
        assert stacks.startswith(f"rank {rank}: nothing was finished for 1 s")
        assert f" in {place}\n" in stacks and f" in {place}\n" in said


ALONE = (
    BARE
    + """
import ctypes, time
from contextlib import closing
from pathlib import Path
from phi3v.training.watchdog import Watchdog

with closing(Watchdog({timeout}, Path(sys.argv[1]), 0, {start_timeout})) as dog:
    {body}
time.sleep(0.3)
print("left")
"""
)


def run_alone(
    folder: Path, timeout: float, body: str, start_timeout: float = 0.0
) -> "subprocess.CompletedProcess[str]":
    program = ALONE.format(timeout=timeout, start_timeout=start_timeout, body=body)
    return subprocess.run(
        [sys.executable, "-c", program, folder], capture_output=True, text=True, timeout=60
    )


def test_beats_and_patience_keep_a_process_alive_and_a_closed_watchdog_is_none(
    tmp_path: Path,
) -> None:
    """Silence ends at each beat, patience lasts, and at the end nothing is watched."""
    body = "[(time.sleep(0.1), dog.beat()) for _ in range(8)]; p = dog.patience(); p.__enter__(); "
    body += "time.sleep(0.6); p.__exit__(None, None, None)"
    done = run_alone(tmp_path, 0.25, "dog.settle(); " + body, start_timeout=5)
    assert (done.returncode, done.stdout, done.stderr) == (0, "left\n", "")
    assert not list(tmp_path.iterdir())


def test_a_start_may_take_longer_than_a_step_until_it_is_over(tmp_path: Path) -> None:
    body = "time.sleep(1); print('started', file=sys.stderr); dog.settle(); time.sleep(60)"
    done = run_alone(tmp_path, 0.3, body, start_timeout=5)
    assert done.returncode == 1 and done.stderr.startswith("started\n"), done.stderr
    assert "longer than train.hang_timeout 0.3 s; its stacks" in done.stderr


def test_a_start_that_hangs_is_ended_as_well(tmp_path: Path) -> None:
    done = run_alone(tmp_path, 0.2, "time.sleep(60)", start_timeout=0.6)
    assert done.returncode == 1
    assert "longer than train.start_timeout 0.6 s; its stacks" in done.stderr


def test_whoever_is_told_of_the_limit_hears_of_every_change(tmp_path: Path) -> None:
    told: list[float] = []
    with closing(watchdog.Watchdog(60, tmp_path, 0, 90, told.append)) as dog:
        assert dog.limit == 90
        with dog.patience():
            pass
        dog.settle()
        dog.settle()
        with dog.patience():
            assert dog.limit == 90
    assert told == [90, 90, 60, 90, 60]


def test_a_start_is_never_shorter_than_a_step(tmp_path: Path) -> None:
    with closing(watchdog.Watchdog(60, tmp_path, 0, 30)) as dog:
        assert dog.limit == 60


def test_a_process_that_never_lets_the_gil_go_is_ended_with_its_stack(tmp_path: Path) -> None:
    done = run_alone(tmp_path, 1.0, "time.sleep(0.3); ctypes.PyDLL(None).sleep(40)")
    assert (done.returncode, done.stdout) == (1, "")
    assert "Timeout (0:00:01)!" in done.stderr and "in <module>" in done.stderr


@pytest.mark.parametrize("marks", [{"TORCHELASTIC_RUN_ID": "1"}, {}])
def test_a_rank_whose_launcher_died_before_it_looked_ends_at_once(
    tmp_path: Path, marks: dict[str, str]
) -> None:
    """And a program that nobody launched stays when it is adopted: nohup, a closed terminal."""
    program = (
        f"{BARE}\nimport os, time; from phi3v.training.watchdog import end_with_launcher\n"
        "while os.getppid() == PARENT: time.sleep(0.01)\n"
        "end_with_launcher(); print('alive', flush=True)"
    )
    shell = f'{sys.executable} -c "$(printf \'%s\' "$0" | sed s/PARENT/$$/)" & sleep 0.1'
    done = subprocess.run(
        ["sh", "-c", shell, program], env=os.environ | marks, capture_output=True, text=True
    )
    assert done.stdout == ("" if marks else "alive\n")
    assert ("rank 0: its launcher was gone before it had started" in done.stderr) == bool(marks)


@pytest.mark.parametrize("marks", [{"TORCHELASTIC_RUN_ID": "1"}, {}])
def test_a_rank_whose_launcher_is_dying_while_it_looks_ends_at_once(marks: dict[str, str]) -> None:
    """A launcher that was killed is the parent for as long as its memory is being freed.

    That takes 0.1 s for 400 MB, in which the rank, on a busy machine, may not have its turn.
    """
    rank = (
        f"{BARE}\nimport os; from phi3v.training.watchdog import end_with_launcher\n"
        "print('ready', flush=True); parent = os.getppid(); command = f'/proc/{parent}/cmdline'\n"
        "while os.getppid() == parent and open(command).read(): pass\n"
        "assert os.getppid() == parent, 'too late'\n"
        "end_with_launcher(); print('alive', flush=True)"
    )
    launcher = (
        "import os, signal, subprocess, sys\n"
        "rank = subprocess.Popen([sys.executable, '-c', sys.argv[1]], stdout=subprocess.PIPE)\n"
        "rank.stdout.readline(); memory = bytearray(b'x') * 400_000_000\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    command, environment = [sys.executable, "-c", launcher, rank], os.environ | marks
    for _ in range(10):
        done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True)
        if "too late" not in done.stderr:
            break
    ends = "rank 0: its launcher was gone before it had started"
    assert (ends in done.stderr) == bool(marks) and "too late" not in done.stderr

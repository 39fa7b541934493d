"""Ranks from each launcher's variables, and how a command ends; the commands are real processes."""

import errno
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed

from phi3v import devices
from phi3v.errors import ConfigError, Stopped
from phi3v.training.ranks import (
    RANK_VARIABLES,
    Ranks,
    free_port,
    run_command,
    set_environment,
)
from tests.training.bare import BARE

DEEPSPEED = {
    "RANK": "3",
    "WORLD_SIZE": "5",
    "LOCAL_RANK": "1",
    "LOCAL_SIZE": "2",
    "CROSS_RANK": "1",
    "CROSS_SIZE": "3",
    "MASTER_ADDR": "10.0.0.7",
    "MASTER_PORT": "29500",
}
TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "5",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "GROUP_RANK": "1",
    "GROUP_WORLD_SIZE": "3",
    "MASTER_ADDR": "10.0.0.7",
    "MASTER_PORT": "29500",
}
ONE_HOST = TORCHRUN | {"LOCAL_WORLD_SIZE": "5", "LOCAL_RANK": "3"}
ONE_HOST |= {"GROUP_RANK": "0", "GROUP_WORLD_SIZE": "1"}
STEP = {  # as srun sets them for the fourth of 5 tasks on 3 nodes
    "SLURM_JOB_ID": "123456",
    "SLURM_NTASKS": "9",  # the job's, not the step's
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "gpu[07,09-10]",
    "SLURM_STEP_NUM_NODES": "3",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
}
STEP_WITH_ADDRESS = STEP | {"MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "29500"}
BATCH_SCRIPT = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
SALLOC_SHELL = BATCH_SCRIPT | {
    "SLURM_STEP_ID": "4294967290",
    "SLURM_STEP_NODELIST": "gpu07",
    "SLURM_STEP_NUM_NODES": "1",
    "SLURM_STEP_NUM_TASKS": "1",
    "SLURM_STEP_TASKS_PER_NODE": "1",
    "SLURM_NODEID": "0",
}


@pytest.fixture(autouse=True)
def _bare_machine(tmp_path: Path) -> Iterator[None]:
    """A machine without CUDA and launcher variables; all is as it was afterwards."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    threads = torch.get_num_threads()
    with (
        mock.patch.dict(os.environ, kept, clear=True),
        mock.patch("torch.cuda.is_available", lambda: False),
        mock.patch.object(devices, "DRIVER", tmp_path / "driver"),
        mock.patch.object(devices, "NODES", tmp_path),
        warnings.catch_warnings(),
    ):
        yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("launcher", [DEEPSPEED, TORCHRUN, STEP_WITH_ADDRESS])
def test_each_launcher_gives_the_same_ranks_and_variables(launcher: dict[str, str]) -> None:
    os.environ.update(launcher)
    ranks = set_environment()
    assert ranks == Ranks(rank=3, world_size=5, local_rank=1, local_size=2)
    assert not ranks.is_first
    values = ("3", "5", "1", "2", "2", "1", "3", "10.0.0.7", "29500")
    assert {name: os.environ[name] for name in RANK_VARIABLES} == dict(
        zip(RANK_VARIABLES, values, strict=True)
    )


@pytest.mark.parametrize("variables", [{}, BATCH_SCRIPT, SALLOC_SHELL])
def test_outside_a_launcher_there_is_one_rank_on_this_machine(variables: dict[str, str]) -> None:
    os.environ.update(variables)
    ranks = set_environment()
    assert ranks == Ranks(rank=0, world_size=1, local_rank=0, local_size=1)
    assert ranks.is_first
    assert not {"MASTER_ADDR", "MASTER_PORT"} & os.environ.keys(), "it meets nobody"


@pytest.mark.parametrize("variables", [{}, DEEPSPEED, TORCHRUN, STEP_WITH_ADDRESS])
def test_a_second_call_changes_nothing(variables: dict[str, str]) -> None:
    os.environ.update(variables)
    ranks = set_environment()
    environment, filters = dict(os.environ), list(warnings.filters)
    assert set_environment() == ranks
    assert dict(os.environ) == environment
    assert list(warnings.filters) == filters


def test_ranks_without_an_address_meet_at_the_first_nodes_address(tmp_path: Path) -> None:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(
        '#!/bin/sh\necho "$@" > "$0.asked"\necho "NodeName=gpu07 NodeAddr=10.0.0.7 Port=6818"\n'
    )
    scontrol.chmod(0o755)
    os.environ.update(STEP, PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    set_environment()
    assert (tmp_path / "scontrol.asked").read_text() == "show node --oneliner gpu07\n"
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("10.0.0.7", "23456")


@pytest.mark.parametrize("families", [{"AF_INET6"}, {"AF_INET"}, set()])
def test_a_port_is_found_on_a_machine_with_one_kind_of_loopback(
    families: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Missing(socket.socket):
        def bind(self, address: Any) -> None:
            if self.family.name not in families:
                raise OSError(errno.EADDRNOTAVAIL, "Cannot assign requested address")
            super().bind(address)

    monkeypatch.setattr(socket, "socket", Missing)
    if families:
        assert free_port() > 1024
        return
    with pytest.raises(ConfigError, match=" has neither 127.0.0.1 nor ::1, by which its ranks are"):
        free_port()


@pytest.mark.parametrize(("variables", "found"), [(TORCHRUN, None), (ONE_HOST, "lo"), ({}, "lo")])
def test_ranks_of_one_host_speak_over_its_loopback(
    variables: dict[str, str], found: str | None
) -> None:
    os.environ.update(variables)
    set_environment()
    assert os.environ.get("GLOO_SOCKET_IFNAME") == found


def without(variables: dict[str, str], name: str) -> dict[str, str]:
    return {key: value for key, value in variables.items() if key != name}


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "0"}, "WORLD_SIZE must be set to an integer, got None in the environment; "),
        (without(DEEPSPEED, "LOCAL_RANK"), "LOCAL_RANK must be set to an integer, got None"),
        (without(TORCHRUN, "LOCAL_WORLD_SIZE"), "LOCAL_SIZE or LOCAL_WORLD_SIZE must be set"),
        (DEEPSPEED | {"RANK": "ten"}, "RANK must be set to an integer, got 'ten'"),
        (DEEPSPEED | {"RANK": "5"}, "rank 5 of 5 ranks, local rank 1 of 2 on this node, is no "),
        (DEEPSPEED | {"LOCAL_RANK": "2"}, "rank 3 of 5 ranks, local rank 2 of 2 on this node"),
        (DEEPSPEED | {"LOCAL_WORLD_SIZE": "4"}, "LOCAL_WORLD_SIZE is 4 in the environment, but "),
        (without(DEEPSPEED, "MASTER_PORT"), "MASTER_PORT is not set, and 5 ranks need one place"),
        (without(STEP, "SLURM_STEP_NUM_TASKS"), "SLURM_STEP_NUM_TASKS must be set"),
        (STEP | {"WORLD_SIZE": "9"}, r"was started as rank 3 of 5 and WORLD_SIZE should be 5; "),
        (STEP | {"PATH": ""}, "`scontrol show node --oneliner gpu07` gives no NodeAddr; export "),
        ({"WORLD_SIZE": "8"}, "WORLD_SIZE is 8 in the environment, but this process was started "),
    ],
)
def test_contradictions_are_refused(variables: dict[str, str], message: str) -> None:
    os.environ.update(variables)
    with pytest.raises(ConfigError, match=re.escape(message)):
        set_environment()


def test_a_machine_without_cuda_gets_one_thread_per_rank() -> None:
    torch.set_num_threads(2)
    set_environment()
    assert (torch.get_num_threads(), os.environ["OMP_NUM_THREADS"]) == (1, "1")
    assert os.environ["DS_ACCELERATOR"] == "cpu"
    assert os.environ["TOKENIZERS_PARALLELISM"] == "false"


def test_what_the_user_set_is_kept() -> None:
    chosen = {"OMP_NUM_THREADS": "3", "DS_ACCELERATOR": "cpu", "TOKENIZERS_PARALLELISM": "true"}
    chosen |= {"TORCHINDUCTOR_COMPILE_THREADS": "4"}
    os.environ.update(chosen)
    torch.set_num_threads(2)
    set_environment()
    assert {name: os.environ[name] for name in chosen} == chosen
    assert torch.get_num_threads() == 2


def cores(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(number)))
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


@pytest.mark.parametrize(
    ("variables", "number", "threads"),
    [
        ({}, 12, "12"),
        (DEEPSPEED, 12, "6"),  # the launcher's ranks share what it may use
        (DEEPSPEED, 1, "1"),
        (STEP_WITH_ADDRESS, 12, "6"),
        # srun has given this task its own cores, or has bound none of them
        (STEP_WITH_ADDRESS | {"SLURM_CPUS_PER_TASK": "12"}, 12, "12"),
        (STEP_WITH_ADDRESS | {"SLURM_CPUS_PER_TASK": "12"}, 96, "12"),
        (DEEPSPEED | {"OMP_NUM_THREADS": "3"}, 12, "3"),
        (DEEPSPEED | {"DS_ACCELERATOR": "cpu"}, 12, "1"),
    ],
)
def test_ranks_on_gpus_share_the_cores_of_their_host(
    variables: dict[str, str], number: int, threads: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cores(monkeypatch, number)
    os.environ.update(variables)
    set_environment()
    assert os.environ["OMP_NUM_THREADS"] == threads


def test_the_allocator_and_the_compiler_get_their_defaults_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cores(monkeypatch, 2)
    set_environment()
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    assert os.environ["TORCHINDUCTOR_COMPILE_THREADS"] == "1"
    assert "DS_ACCELERATOR" not in os.environ


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_an_allocator_that_was_set_is_left_alone(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cores(monkeypatch, 2)
    os.environ[name] = "max_split_size_mb:512"
    set_environment()
    found = {key: value for key, value in os.environ.items() if key.endswith("ALLOC_CONF")}
    assert found == {name: "max_split_size_mb:512"}


def test_a_gpu_that_torch_does_not_see_is_refused_before_the_cpu_is_taken(tmp_path: Path) -> None:
    (tmp_path / "driver").write_text("Kernel Module  535.104.05  Sat Aug 19\n")
    with pytest.raises(ConfigError, match=r"has a GPU \(NVIDIA driver 535.104.05, for CUDA 12 "):
        set_environment()
    os.environ["DS_ACCELERATOR"] = "cpu"
    assert set_environment().is_first


def test_the_build_tool_of_extensions_is_looked_for_beside_python() -> None:
    os.environ["PATH"] = "/usr/bin"
    set_environment()
    assert os.environ["PATH"].split(os.pathsep) == [str(Path(sys.prefix, "bin")), "/usr/bin"]


def test_compiled_kernels_are_kept_where_nobody_else_writes(tmp_path: Path) -> None:
    with mock.patch("tempfile.tempdir", str(tmp_path)):
        set_environment()
    folder = tmp_path / f"phi3v-{os.getuid()}"
    assert folder.stat().st_mode & 0o777 == 0o700
    for variable, name in (("TORCHINDUCTOR_CACHE_DIR", "inductor"), ("TRITON_CACHE_DIR", "triton")):
        assert os.environ[variable] == str(folder / name)
        assert (folder / name).stat().st_mode & 0o777 == 0o700
    assert os.environ["TORCH_EXTENSIONS_DIR"] == str(Path(sys.prefix, "torch_extensions"))


def test_only_the_warning_about_renamed_collectives_is_silenced() -> None:
    warnings.simplefilter("error")
    set_environment()
    tensors = torch.zeros(1), torch.zeros(1)
    with pytest.raises(ValueError, match="process group has not been initialized"):
        torch.distributed.all_gather_into_tensor(*tensors)
    with pytest.raises(ValueError, match="process group has not been initialized"):
        torch.distributed.reduce_scatter_tensor(*tensors)
    with pytest.raises(FutureWarning):
        warnings.warn("another future", FutureWarning, stacklevel=1)


def test_ctrl_c_ends_a_command_with_130_and_defects_keep_their_traceback() -> None:
    with pytest.raises(SystemExit) as ending:
        run_command(mock.Mock(side_effect=KeyboardInterrupt))
    assert ending.value.code == 130
    with pytest.raises(ZeroDivisionError):
        run_command(lambda: print(1 / 0))


@pytest.fixture
def handlers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Signal handlers are as they were afterwards, and nobody has spoken before."""
    monkeypatch.setattr("phi3v.training.ranks._speaking", threading.Lock())
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.parametrize(("rank", "said"), [("0", "saved, go on\n"), ("1", "")])
@pytest.mark.usefixtures("handlers")
def test_a_stopped_run_ends_with_75_whatever_signal_follows_and_one_rank_says_so(
    rank: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    os.environ["RANK"] = rank
    with pytest.raises(SystemExit) as ending:
        run_command(mock.Mock(side_effect=Stopped("saved, go on")))
    assert ending.value.code == 75
    assert capsys.readouterr().err == said
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        assert signal.getsignal(number) == signal.SIG_IGN


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
@pytest.mark.usefixtures("handlers")
def test_a_disk_that_cannot_be_written_to_is_one_line_and_code_2(
    number: int, capsys: pytest.CaptureFixture[str]
) -> None:
    error = OSError(number, os.strerror(number), "runs/a/metrics.jsonl")
    with pytest.raises(SystemExit) as ending:
        run_command(mock.Mock(side_effect=error))
    assert ending.value.code == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert f"Error: runs/a/metrics.jsonl: {os.strerror(number)}; make room or give the " in line
    assert "the last checkpoint and all finished files are intact" in line
    with pytest.raises(FileNotFoundError):
        run_command(lambda: print(Path("no-such-file").read_text()))


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.EIO, "look after the disk or the server that it is on, then start the same"),
        (errno.ESTALE, "look after the disk or the server that it is on, then start the same"),
        (errno.EMFILE, "raise the limit of open files (ulimit -n), then start the same"),
        (errno.ENOMEM, "free memory, or take fewer workers, then start the same"),
        (errno.EISDIR, "something of another kind has the name of a file or folder of this"),
        (errno.ENOTDIR, "something of another kind has the name of a file or folder of this"),
    ],
)
@pytest.mark.usefixtures("handlers")
def test_what_is_the_machines_is_one_line_with_advice_that_fits(
    number: int, advice: str, capsys: pytest.CaptureFixture[str]
) -> None:
    error = OSError(number, os.strerror(number), "runs/a/data.json")
    with pytest.raises(SystemExit) as ending:
        run_command(mock.Mock(side_effect=error))
    assert ending.value.code == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert f"Error: runs/a/data.json: {os.strerror(number)}; {advice}" in line


FAILING = """
import threading, time
import torch.distributed
from phi3v.errors import ShardError
from phi3v.training import ranks

ranks.GRACE_SECONDS = {grace}
ranks.STAGGER_SECONDS = 0

def main():
    {preparation}
    print("started")
    raise {error}

if __name__ == "__main__":
    ranks.run_command(main)
"""
LINE = "ShardError: a shard is missing\n"


MISTAKE = 'ShardError("a shard\\nis missing")'
ECHO = 'RuntimeError("[pair.cc] Read error [127.0.0.1]:7047: Connection reset by peer")'


def start_failing(
    rank: str, grace: float = 60, preparation: str = "pass", error: str = MISTAKE
) -> "subprocess.Popen[str]":
    script = BARE + FAILING.format(grace=grace, preparation=preparation, error=error)
    return subprocess.Popen(
        [sys.executable, "-u", "-c", script],
        env=os.environ | {"RANK": rank},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "grace"),
    [
        pytest.param("0", 60, id="rank 0 at once"),
        pytest.param("1", 0.1, id="another after its grace"),
        pytest.param("ten", 0.1, id="also when the rank itself is wrong"),
    ],
)
def test_an_error_ends_in_one_line_and_code_2(rank: str, grace: float) -> None:
    process = start_failing(rank, grace)
    assert process.communicate(timeout=50) == ("started\n", LINE)
    assert process.returncode == 2


@pytest.mark.slow
def test_a_rank_that_the_launcher_ends_in_its_grace_says_nothing() -> None:
    process = start_failing("1")
    assert process.stdout is not None and process.stdout.readline() == "started\n"
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=50) == ("", "")
    assert process.returncode == 2


@pytest.mark.slow
def test_neither_a_process_group_nor_a_thread_holds_a_failed_command_back() -> None:
    process = start_failing(
        "0",
        preparation="ranks.os.environ.update(WORLD_SIZE='1', LOCAL_RANK='0', LOCAL_SIZE='1'); "
        "ranks.set_environment(); store = torch.distributed.HashStore(); "
        "torch.distributed.init_process_group('gloo', store=store, rank=0, world_size=1); "
        "threading.Thread(target=time.sleep, args=(600,)).start()",
    )
    assert process.communicate(timeout=50) == ("started\n", LINE)
    assert process.returncode == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("grace", "error", "headline"),
    [
        pytest.param(60, "ValueError('odd')", "rank 1 failed:\n", id="a defect at once"),
        pytest.param(
            0.1,
            ECHO,
            "rank 1 ends because another rank is gone, which is the cause:\n",
            id="the echo of another's death after a grace",
        ),
    ],
)
def test_a_defect_ends_a_rank_with_its_traceback_whatever_threads_it_has(
    grace: float, error: str, headline: str
) -> None:
    preparation = "threading.Thread(target=time.sleep, args=(600,)).start()"
    os.environ["WORLD_SIZE"] = "2"
    process = start_failing("1", grace, preparation, error)
    out, err = process.communicate(timeout=50)
    assert (process.returncode, out) == (1, "started\n")
    assert err.startswith(f"{headline}Traceback (most recent call last):\n")


@pytest.mark.slow
def test_an_echo_says_nothing_when_the_launcher_ends_the_rank_in_its_grace() -> None:
    os.environ["WORLD_SIZE"] = "2"
    process = start_failing("1", error=ECHO)
    assert process.stdout is not None and process.stdout.readline() == "started\n"
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=50) == ("", "")
    assert process.returncode == 1

"""Requests to stop: what is heard, and what hearing them leaves undisturbed."""

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from phi3v.errors import ConfigError
from phi3v.training.stopping import SIGNALS, StopRequests


@pytest.fixture
def requests() -> Iterator[StopRequests]:
    """Requests that listen; pytest's own handlers are back afterwards."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:  # under nohup, SIGHUP would stay ignored
        signal.signal(number, signal.SIG_DFL)
    requests = StopRequests()
    requests.listen()
    yield requests
    for number, handler in before.items():
        signal.signal(number, handler)


def test_nothing_is_asked_until_someone_asks(requests: StopRequests, tmp_path: Path) -> None:
    requests.watch(tmp_path, None)
    assert requests.reason() is None


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_heard_and_another_changes_nothing(
    requests: StopRequests, number: signal.Signals
) -> None:
    os.kill(os.getpid(), number)
    assert requests.reason() == number.name
    for second in set(SIGNALS) - {signal.SIGINT}:
        os.kill(os.getpid(), second)
    assert requests.reason() == number.name


def test_a_signal_does_not_cut_a_librarys_system_call_short(requests: StopRequests) -> None:
    """As a read of a pipe, which without SA_RESTART would fail with EINTR."""
    reader, writer = os.pipe()

    def interrupt() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.05)
        os.write(writer, b"whole")

    thread = threading.Timer(0.05, interrupt)
    thread.start()
    buffer = ctypes.create_string_buffer(5)
    count = ctypes.CDLL(None).read(reader, buffer, 5)
    thread.join()
    os.close(reader)
    os.close(writer)
    assert (count, buffer.raw) == (5, b"whole")
    assert requests.reason() == "SIGTERM"


def test_the_stop_file_is_heard_and_can_be_cleared(requests: StopRequests, tmp_path: Path) -> None:
    requests.watch(tmp_path, 3600)
    (tmp_path / "stop").touch()
    assert requests.reason() == f"the file {tmp_path}/stop"
    requests.clear_file()
    assert requests.reason() is None
    assert not (tmp_path / "stop").exists()
    requests.clear_file()


def test_a_folder_in_the_place_of_the_stop_file_asks_as_well(
    requests: StopRequests, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """mkdir for touch. What cannot be removed would stop every start: it is refused at the next."""
    (tmp_path / "stop").mkdir()
    requests.watch(tmp_path, None)
    assert requests.reason() == f"the file {tmp_path}/stop"
    requests.clear_file()
    assert requests.reason() is None and not (tmp_path / "stop").exists()
    (tmp_path / "stop" / "notes").mkdir(parents=True)
    requests.clear_file()
    assert capsys.readouterr().err == (
        f"{tmp_path}/stop could not be removed (Directory not empty); do so, or the next start "
        "stops at once\n"
    )
    with pytest.raises(ConfigError, match=f"^{tmp_path}/stop is a folder with something in it"):
        requests.watch(tmp_path, None)


def test_the_time_budget_counts_from_the_start_of_the_process(
    requests: StopRequests, tmp_path: Path
) -> None:
    age = time.time() - psutil.Process().create_time()
    requests.watch(tmp_path, age + 0.2)
    assert requests.reason() is None
    time.sleep(0.25)
    assert requests.reason() == f"train.stop_after {age + 0.2:g} s"


@pytest.mark.parametrize("number", SIGNALS)
def test_a_forked_child_and_a_started_program_can_still_be_ended(
    requests: StopRequests, number: signal.Signals
) -> None:
    child = os.fork()
    if child == 0:
        time.sleep(30)
        os._exit(0)
    program = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(30)"])
    time.sleep(0.1)
    os.kill(child, number)
    program.send_signal(number)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -number
    assert program.wait() == -number
    assert requests.reason() is None


def test_who_was_started_to_outlive_the_terminal_does_not_hear_it_close(tmp_path: Path) -> None:
    """As `nohup` starts a command: SIGHUP stays ignored."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        requests = StopRequests()
        requests.listen()
        os.kill(os.getpid(), signal.SIGHUP)
        assert requests.reason() is None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


LISTEN = """
import time
from phi3v.training.stopping import StopRequests
StopRequests().listen()
print("listens", flush=True)
time.sleep(30)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variables", "second", "code"),
    [
        ({}, signal.SIGINT, 130),
        ({"TORCHELASTIC_RUN_ID": "1"}, signal.SIGTERM, 130),
        ({}, signal.SIGTERM, None),
    ],
    ids=["again", "again by torchrun", "as deepspeed does beside the first"],
)
def test_a_second_ctrl_c_ends_a_process_at_once(
    variables: dict[str, str], second: signal.Signals, code: int | None
) -> None:
    """Also where torchrun passes it on as SIGTERM; deepspeed sends that one after the first."""
    program = [sys.executable, "-c", LISTEN]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(program, env=os.environ | variables, text=True, **pipes) as process:
        assert process.stdout and process.stderr and process.stdout.readline() == "listens\n"
        process.send_signal(signal.SIGINT)
        process.stderr.readline()
        assert process.stderr.readline().startswith("Ctrl-C: the run ends after this step, saved")
        process.send_signal(second)
        try:
            assert process.wait(timeout=1.0) == code
        except subprocess.TimeoutExpired:
            assert code is None
        process.kill()

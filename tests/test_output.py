"""What is printed may be lost, and nothing else with it."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from phi3v.output import say
from tests.commands import ROOT

# Imports of the package take three seconds; the module itself needs none of them.
BEGIN = f"exec(compile(open({str(ROOT / 'phi3v' / 'output.py')!r}).read(), 'output.py', 'exec'))"
PRINTING = """
import logging, sys, warnings
from pathlib import Path

fill_closed()
sys.stdout, sys.stderr = keep_printing(sys.stdout), keep_printing(sys.stderr)
from tqdm import tqdm
log = logging.getLogger("deepspeed")
log.addHandler(logging.StreamHandler(sys.stdout))
for number in tqdm(range(2000), mininterval=0):
    print("to stdout", number, flush=number % 2 == 0)
    print("to stderr", number, file=sys.stderr)
    say(f"said {number}")
    shout(f"shouted {number}")
    log.error("logged")
    warnings.warn(f"warned {number}")
opened = open("data", "w")
opened.write("whole")
opened.close()
Path("done").touch()
"""


def run(folder: Path, how: str, program: str = PRINTING, unbuffered: str = "") -> int:
    """Run a program by a shell, with stdout and stderr as `how` says; its exit code."""
    (folder / "program.py").write_text(f"{BEGIN}\n{program}" if program != RESULT else program)
    line = f'"{sys.executable}" program.py {how}'
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": unbuffered}
    shell = ["bash", "-c", f"{line}; exit ${{PIPESTATUS[0]}}"]
    return subprocess.run(shell, cwd=folder, env=environment, timeout=60).returncode


@pytest.mark.parametrize(
    "how",
    [
        ">/dev/full 2>&1",
        "2>&1 | true",
        "2>&1 | head -c 20000 >/dev/null",
        ">&- 2>&-",
        "2>&- | true",
        "</dev/null >/dev/full 2>&-",
    ],
)
def test_nothing_that_cannot_be_printed_ends_a_process(tmp_path: Path, how: str) -> None:
    """Neither a full disk, nor a reader that is gone or goes, nor a closed descriptor."""
    assert run(tmp_path, how) == 0
    assert (tmp_path / "done").exists()
    assert (tmp_path / "data").read_text() == "whole", "what was printed went into a file of data"


FULL = """
import sys

sys.stderr = keep_printing(sys.stderr)
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (8, resource.RLIM_INFINITY))
print("1: said", file=sys.stderr)
print("2: lost", file=sys.stderr)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print("3: said", file=sys.stderr)
"""


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_log_goes_on_when_there_is_room_again(tmp_path: Path, unbuffered: str) -> None:
    assert run(tmp_path, "2>log", FULL, unbuffered) == 0
    assert (tmp_path / "log").read_text() == "1: said\n3: said\n"


def test_a_line_is_said_or_lost(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    say("a line")
    assert capsys.readouterr() == ("", "a line\n")
    monkeypatch.setattr(sys, "stderr", None)
    say("lost, and not said on stdout")
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stderr", full)
        say("lost")
        with pytest.raises(OSError) as caught:
            full.flush()
        assert caught.value.errno == errno.ENOSPC, "this disk is full"
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())
    say("lost, for the stream is closed")
    assert capsys.readouterr().out == ""


RESULT = """
import sys
from phi3v.training.ranks import run_command

def main():
    for number in range(5000):
        print("a line of the result", number)
    print("told besides", file=sys.stderr)

run_command(main)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "code", "said"),
    [
        ("2>said | head -n 1 >/dev/null", 141, ""),
        (
            "2>said >/dev/full",
            2,
            "OSError: a file of this command, or its stdout: No space left on device; make room",
        ),
        ("2>/dev/full | cat >/dev/null", 0, None),
        ("2>said >&-", 0, "told besides"),
    ],
)
def test_a_result_that_does_not_get_there_is_told_but_to_a_reader_that_has_enough(
    tmp_path: Path, how: str, code: int, said: str | None
) -> None:
    assert run(tmp_path, how, RESULT) == code
    if said is not None:
        text = (tmp_path / "said").read_text()
        assert text.startswith(said) and text.count("\n") == bool(said), text

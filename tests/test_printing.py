"""What is printed, or written on a page, cannot play with the terminal or browser that shows it."""

import ast
import io
import os
import signal
import sys
import threading
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phi3v import errors, printing
from phi3v.evaluation import wishes
from phi3v.page import heading, html_page
from phi3v.printing import LINES, printable
from phi3v.progress import progress
from phi3v.training import ranks
from phi3v.training.console import say
from phi3v.training.ranks import run_command
from tests.commands import LAUNCH, ROOT, run

EVIL = "a\x1b]0;owned\x07\x1b[2J\x7f\x85\x9b31m\u202egnp.exe\u2066\u200b\u200e\ufeff\u2028\r\ud83db"
ERRORS = [
    value
    for value in vars(errors).values()
    if isinstance(value, type) and issubclass(value, errors.Phi3VError)
]
MODULES = sorted([*(ROOT / "phi3v").rglob("*.py"), *LAUNCH.rglob("*.py")])
# Who writes without `printing.print`, and why that is clean.
OWN_WAYS = {
    "phi3v/printing.py": "is it",
    "phi3v/output.py": "tqdm.write of what is printable, above the live line",
    "phi3v/evaluation/wishes.py": "an answer, printable on a terminal",
}


def assert_clean(text: str, keep: str = LINES) -> None:
    odd = [c for c in text if unicodedata.category(c)[0] in "C" and c not in keep]
    assert not odd and not {"\u2028", "\u2029"} & set(text), text
    text.encode()


@given(st.text())
def test_what_is_printable_is_clean_and_utf8_can_hold_it(text: str) -> None:
    shown = printable(text)
    assert_clean(shown, keep="")
    assert printable(shown) == shown
    assert all(c in shown for c in text if c.isprintable())


def test_odd_characters_are_shown_by_number_and_any_script_as_it_is() -> None:
    assert printable("\x1b[31m\u202e\ud800\n") == r"\x1b[31m\u202e\ud800\n"
    plain = "caf\u00e9 \u65e5\u672c\u8a9e \u0645\u0631\u062d\u0628\u0627 \U0001f600 1\u00a0234"
    assert printable(plain) == plain
    assert printable("a\nb\tc\u200d", LINES) == "a\nb\tc\\u200d"


@pytest.fixture
def ending(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a command changes when it ends is as it was afterwards."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(ranks, "_speaking", threading.Lock())
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.parametrize("kind", ERRORS, ids=lambda kind: kind.__name__)
@pytest.mark.usefixtures("ending")
def test_every_error_leaves_a_command_clean(
    kind: type[errors.Phi3VError], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run_command(mock.Mock(side_effect=kind(f"row {EVIL} is odd")))
    said = capsys.readouterr().err
    assert r"\x1b]0;owned\x07" in said and r"\u202egnp.exe" in said
    assert_clean(said)
    assert kind is errors.Stopped or said.count("\n") == 1


@pytest.mark.usefixtures("ending")
def test_no_error_leaves_a_command_with_the_password_of_an_address(
    capsys: pytest.CaptureFixture[str],
) -> None:
    error = errors.ConfigError("source.path 'https://me:s3/cr@t@x.org/a' is no file")
    with pytest.raises(SystemExit):
        run_command(mock.Mock(side_effect=error))
    assert capsys.readouterr().err == "ConfigError: source.path 'https://x.org/a' is no file\n"


@pytest.mark.usefixtures("ending")
def test_a_full_disk_is_said_clean_whatever_the_file_is_called(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        run_command(mock.Mock(side_effect=OSError(28, os.strerror(28), f"{EVIL}\n.json")))
    said = capsys.readouterr().err
    assert r"\x1b]0;owned" in said and said.count("\n") == 1
    assert_clean(said)


DEFECT = """
from phi3v.training.ranks import run_command
def main():
    print("ready")
    raise ValueError("\\x1b[2J\\u202e\\ud83d")
if __name__ == "__main__":
    run_command(main)
"""


@pytest.mark.slow
@pytest.mark.parametrize("world_size", ["1", "2"])
def test_a_defect_keeps_its_traceback_and_is_clean(tmp_path: Path, world_size: str) -> None:
    script = tmp_path / "defect.py"
    script.write_text(DEFECT)
    rank = {"RANK": "0", "WORLD_SIZE": world_size}
    done = run(sys.executable, script, cwd=tmp_path, PYTHONPATH=str(ROOT), **rank)
    assert done.returncode == 1
    assert "Traceback" in done.stderr and r"ValueError: \x1b[2J\u202e\ud83d" in done.stderr
    assert_clean(done.stderr)


def test_lines_and_bars_are_clean(capsys: pytest.CaptureFixture[str]) -> None:
    printing.print(EVIL, 7, sep="|", file=sys.stderr)
    say(EVIL)
    with progress(None, f"check {EVIL}", "B", total=3, mininterval=0, delay=0) as bar:
        bar.update(3)
    said = capsys.readouterr().err
    assert said.count(r"\x1b]0;owned\x07") >= 3
    assert_clean(said, keep=LINES + "\r")  # with which the bar returns to its start


def test_an_answer_is_clean_on_a_terminal_and_exact_in_a_file(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for is_terminal, shown in ((True, "a\\x1b[2J\n"), (False, "a\x1b[2J\n")):
        out = io.StringIO()
        monkeypatch.setattr(out, "isatty", lambda answer=is_terminal: answer)
        monkeypatch.setattr(sys, "stdout", out)
        wishes._say("a\x1b[2J\n")
        monkeypatch.undo()
        assert out.getvalue() == shown


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_prints_by_the_function_that_cleans(path: Path) -> None:
    name, tree = str(path.relative_to(ROOT)), ast.parse(path.read_text(encoding="utf-8"))
    if name in OWN_WAYS:
        return
    nodes = list(ast.walk(tree))
    imported = {
        alias.name
        for node in nodes
        if isinstance(node, ast.ImportFrom) and node.module == "phi3v.printing"
        for alias in node.names
    }
    for node in nodes:
        if isinstance(node, ast.Name) and node.id == "print":
            assert "print" in imported, f"{name}:{node.lineno} prints past phi3v.printing"
        if isinstance(node, ast.Call) and ast.unparse(node.func) in (
            *("sys.stdout.write", "sys.stderr.write", "sys.__stderr__.write", "tqdm.write"),
            *("builtins.print", "sys.stdout.buffer.write", "sys.stderr.buffer.write"),
        ):
            raise AssertionError(f"{name}:{node.lineno} prints past phi3v.printing")


def test_a_page_is_clean_wherever_its_text_comes_from() -> None:
    page = html_page(EVIL, heading(EVIL, [(EVIL, EVIL)], below=f"<p>{EVIL}\n\u0645\u200c</p>"))
    assert_clean(page, keep=LINES + "\u200c\u200d")
    assert page.count(r"\u202egnp.exe") == 5
    assert "\u0645\u200c" in page

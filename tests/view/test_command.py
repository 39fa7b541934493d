"""launch/view.py as a user runs it: what it prints, and how it ends."""

import sys
from pathlib import Path

import pytest

from tests.commands import LAUNCH, last_line, run

COMMAND = LAUNCH / "view.py"


@pytest.mark.slow
def test_it_writes_the_page_and_says_how_large_it_is(shards: Path, tmp_path: Path) -> None:
    done = run(sys.executable, COMMAND, shards, "--out", "new/view.html", "--rows", 3, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    page = (tmp_path / "new/view.html").read_text(encoding="utf-8")
    assert done.stdout == f"new/view.html: {len(page.encode()) / 1e3:,.0f} kB\n"
    assert page.count("<article") == 3


@pytest.mark.slow
def test_a_wrong_folder_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    done = run(sys.executable, COMMAND, "nothing", "--out", "view.html", cwd=tmp_path)
    assert done.returncode == 2
    assert "nothing holds no manifest.json" in last_line(done, "ShardError")
    assert not (tmp_path / "view.html").exists()

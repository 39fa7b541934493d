"""launch/prepare.py as a user runs it: what it prints, and how it ends."""

import json
import runpy
import sys
from pathlib import Path

import pytest

from phi3v.errors import ShardError
from tests.commands import LAUNCH, run
from tests.tiny import turn, write_jsonl

COMMAND = LAUNCH / "prepare.py"
MADE = """out train: 9 samples, {tokens} tokens, {share}% of them trained, {size} MB
1 of 10 rows rejected, see out/rejected.jsonl:
  1 x an answer is empty
"""


@pytest.fixture
def folder(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: nine good rows and a bad one, and their recipe."""
    rows = [turn(f"Question {k}", f"Answer {k}") for k in range(9)]
    write_jsonl(tmp_path / "rows.jsonl", [*rows, turn("Hi", "")])
    text = f"source: {{path: rows.jsonl}}\nmodel: {tiny_model}\nout: out\nmax_rejected: 0.1\n"
    (tmp_path / "recipe.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str, script: Path = COMMAND) -> None:
    """Run a command in this process, 5 seconds faster; its errors are raised."""
    monkeypatch.setattr(sys, "argv", [str(script), *arguments])
    runpy.run_path(str(script))["main"]()


def test_a_dataset_is_made_once_and_verified(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    call(monkeypatch, "recipe.yaml")
    first = capsys.readouterr()
    manifest = json.loads((folder / "out/manifest.json").read_text())
    split = manifest["splits"]["train"]
    share = f"{100 * split['label_tokens'] / split['tokens']:.1f}"
    size = f"{split['shards'][0]['bytes'] / 1e6:.2f}"
    assert first.out == MADE.format(tokens=split["tokens"], share=share, size=size)
    call(monkeypatch, "recipe.yaml")
    assert capsys.readouterr().out == f"out is up to date\n{first.out}"
    call(monkeypatch, "recipe.yaml", "--verify")
    assert capsys.readouterr().out == "out: every file is what the manifest says\n"
    shard = folder / "out/train-00000.arrow"
    shard.write_bytes(shard.read_bytes().replace(b"Answer 7", b"Answer 8"))
    with pytest.raises(ShardError, match="^out/train-00000.arrow has SHA-256 "):
        call(monkeypatch, "--verify", "recipe.yaml")


def test_parts_and_their_merges_say_what_is_next(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for step, line in [
        ("--part=1/2", "scan: part 1 of 2 is done; after the last part: --merge\n"),
        ("--part=2/2", "scan: part 2 of 2 is done; after the last part: --merge\n"),
        ("--merge", "the split is made, 1 shards are to be written: run the parts again\n"),
        ("--part=1/1", "write: part 1 of 1 is done; after the last part: --merge\n"),
        ("--merge", "out train: 9 samples, "),
        ("--part=1/2", "out is up to date\n"),
        ("--merge", "out is up to date\n"),
    ]:
        call(monkeypatch, "recipe.yaml", step)
        assert capsys.readouterr().out.startswith(line)


@pytest.mark.slow
def test_success_is_exit_code_0_and_nothing_on_stderr(folder: Path) -> None:
    done = run(sys.executable, COMMAND, "recipe.yaml", "out=shards/other", cwd=folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("shards/other train: 9 samples, ")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("argument", "line"),
    [
        ("--verify", "ShardError: out holds no manifest.json, so it is no dataset; make it with "),
        ("max_rejected=0.05", "ConfigError: 1 of 10 rows of rows.jsonl cannot be used, max_reject"),
    ],
)
def test_a_mistake_is_exit_code_2_and_one_line_on_stderr(
    folder: Path, argument: str, line: str
) -> None:
    done = run(sys.executable, COMMAND, "recipe.yaml", argument, cwd=folder)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1 and done.stderr.startswith(line)
    assert not (folder / "out").exists()

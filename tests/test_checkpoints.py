"""launch/checkpoints.py shows a run's checkpoints and finds the damaged ones."""

import os
import runpy
import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from phi3v.errors import CheckpointError
from phi3v.files import sha256
from phi3v.training.checkpoints import listing
from phi3v.training.checkpoints.store import (
    MADE_FROM,
    SavedFile,
    find_damage,
    partial_name,
    publish,
    read_manifest,
    retain,
    write_manifest,
)
from tests.commands import LAUNCH, last_line, run
from tests.training.saved import flip, save_universal

COMMAND = LAUNCH / "checkpoints.py"


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """A run with checkpoints of steps 5, 10 and 15, the first the best, each of 1 MB."""
    folder = tmp_path / "run" / "checkpoints"
    for step in (5, 10, 15):
        partial = folder / partial_name(step)
        partial.mkdir(parents=True)
        (partial / "a.pt").write_bytes(bytes([step]) * 1_000_000)
        facts = {
            "step": step,
            "world_size": 2,
            "zero_stage": 3,
            "position": {"epoch": 1, "window": 2},
            "saved_at": "2031-02-03T04:05:06.789+00:00",
        }
        write_manifest(partial, facts, {"a.pt": SavedFile.of(partial / "a.pt")})
        publish(folder, step)
    retain(folder, 3, 0, {5: 1.0})
    return tmp_path / "run"


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """The command's main, in this process."""
    main = runpy.run_path(str(COMMAND))["main"]

    def call(*arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", ["checkpoints.py", *map(str, arguments)])
        main()

    return call


Capture = pytest.CaptureFixture[str]


def test_the_list_has_a_line_for_each(
    trained: Path, command: Callable[..., None], capsys: Capture
) -> None:
    folder = trained / "checkpoints"
    os.truncate(folder / "step-00000010/a.pt", 3)
    (folder / "step-00000015/manifest.json").unlink()
    command("list", trained)
    rows = [line.split(maxsplit=5) for line in capsys.readouterr().out.splitlines()]
    about = ["2031-02-03T04:05:06", "2", "3", "0.001"]
    truncated = "damaged: a.pt has 3 bytes, manifest.json says 1,000,000"
    assert rows[1:] == [
        ["5", *about, "whole by sizes, best"],
        ["10", *about, truncated],
        ["15", "-", "-", "-", "-", "damaged: manifest.json is missing, latest"],
    ]


def test_one_is_inspected_the_newest_by_default(
    trained: Path, command: Callable[..., None], capsys: Capture
) -> None:
    newest = trained / "checkpoints/step-00000015"
    command("inspect", trained)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{newest}: whole by sizes, latest"
    assert {"step: 15", "position.window: 2", "zero_stage: 3", "format: 1"} <= set(lines)
    assert lines[-2:] == [
        "files: 1, 0.001 GB",
        f"         1,000,000  {sha256(newest / 'a.pt')}  a.pt",
    ]
    (trained / "checkpoints/step-00000010/a.pt").unlink()
    command("inspect", trained, "--step", 10)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("/step-00000010: damaged: a.pt is missing")
    assert "step: 10" in lines


@pytest.mark.slow
def test_every_byte_is_verified_and_a_damaged_one_ends_in_exit_code_2(trained: Path) -> None:
    folder = trained / "checkpoints"
    with (folder / "step-00000010/a.pt").open("r+b") as file:
        file.seek(999_999)
        file.write(b"!")
    done = run(sys.executable, COMMAND, "verify", trained, cwd=trained)
    assert done.returncode == 2
    lines = done.stdout.splitlines()
    assert lines[::2] == ["step-00000005: whole", "step-00000015: whole"]
    assert lines[1].startswith("step-00000010: damaged: a.pt has SHA-256 ")
    assert last_line(done, "CheckpointError") == (
        f"CheckpointError: 1 of 3 checkpoints in {folder} are damaged; a run passes over them (a "
        ".universal one it makes again), bring the files back from a copy or remove the folders"
    )
    assert len(done.stderr.splitlines()) == 1


def test_whole_checkpoints_are_verified_one_or_all(
    trained: Path, command: Callable[..., None], capsys: Capture
) -> None:
    command("verify", trained)
    lines = ["step-00000005: whole", "step-00000010: whole", "step-00000015: whole"]
    assert capsys.readouterr().out.splitlines() == lines
    (trained / "checkpoints/step-00000015/a.pt").unlink()
    command("verify", trained, "--step", 10)
    assert capsys.readouterr().out.splitlines() == lines[1:2]
    with pytest.raises(CheckpointError, match="^1 of 1 checkpoints in .* are damaged"):
        command("verify", trained, "--step", 15)


def test_a_form_for_any_number_of_ranks_is_listed_and_verified_after_its_checkpoint(
    trained: Path, command: Callable[..., None], capsys: Capture
) -> None:
    universal = save_universal(trained / "checkpoints", 10)
    command("list", trained)
    rows = [line.split(maxsplit=5) for line in capsys.readouterr().out.splitlines()[1:]]
    assert [row[0] for row in rows] == ["5", "10", "10", "15"]
    assert rows[2][1:] == ["2031-02-03T04:05:07", "any", "3", "0.000", "whole by sizes"]
    command("verify", trained)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:3] == ["step-00000010: whole", ".step-00000010.universal: whole"]
    flip(universal / "fp32.pt")
    with pytest.raises(CheckpointError, match="^1 of 2 checkpoints in .* are damaged"):
        command("verify", trained, "--step", 10)
    line = capsys.readouterr().out.splitlines()[1]
    assert line.startswith(".step-00000010.universal: damaged: fp32.pt has SHA-256 ")


def test_a_form_of_another_checkpoint_is_listed_as_of_no_use(
    trained: Path, command: Callable[..., None], capsys: Capture
) -> None:
    universal = save_universal(trained / "checkpoints", 10)
    facts = read_manifest(universal) | {MADE_FROM: "ab" * 32}
    files = {name: SavedFile(**file) for name, file in facts.pop("files").items()}
    write_manifest(universal, facts, files)
    command("list", trained, "--step", 10)
    (row,) = capsys.readouterr().out.splitlines()[2:]
    assert row.endswith("damaged: it was made from another step-00000010 than this one")


def test_one_that_its_run_removes_while_it_is_read_is_no_damage(
    trained: Path,
    command: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:

    def remove_then_read(checkpoint: Path, files: Iterable[str]) -> str | None:
        if checkpoint.name == "step-00000005":
            shutil.rmtree(checkpoint)
        return find_damage(checkpoint, files)

    monkeypatch.setattr(listing, "find_damage", remove_then_read)
    command("verify", trained)
    assert capsys.readouterr().out.splitlines()[0] == "step-00000005: removed by its run meanwhile"


@pytest.mark.parametrize("action", ["list", "inspect", "verify"])
def test_without_run_or_checkpoints_or_that_step_there_is_one_plain_line(
    trained: Path, command: Callable[..., None], tmp_path: Path, action: str
) -> None:
    (tmp_path / "fresh").mkdir()
    messages = {
        (tmp_path / "none",): f"there is no run folder {tmp_path}/none; name the run.out of a "
        "recipe",
        (tmp_path / "fresh",): f"{tmp_path}/fresh/checkpoints holds no checkpoint; train the run "
        "first",
        (trained, "--step", 7): f"{trained}/checkpoints has no checkpoint of step 7, it has: 5, "
        "10, 15",
    }
    for arguments, message in messages.items():
        with pytest.raises(CheckpointError) as caught:
            command(action, *arguments)
        assert str(caught.value) == message

"""What an export may replace, and that there is a whole one at every moment."""

import json
import os
import shutil
from pathlib import Path

import pytest

from phi3v.errors import CheckpointError, ConfigError
from phi3v.export import export, target
from tests.export.runs import read


@pytest.fixture(scope="module")
def exported(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of step 2; do not write into it."""
    out = tmp_path_factory.mktemp("target") / "out"
    export(made, out, step=2)
    return out


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_folder_of_the_same_run_is_replaced(
    made: Path,
    exported: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    can_exchange: bool,
) -> None:
    out = shutil.copytree(exported, tmp_path / "out")
    (out / "old").write_text("")
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "half").write_text("of an export that was interrupted")
    monkeypatch.chdir(made.parent)
    if not can_exchange:
        monkeypatch.setattr(target, "_exchange", lambda one, other: False)
    export(Path(made.name), out)  # the same run by another name
    assert read(out / "phi3v_export.json")["checkpoint"] == "step-00000003"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert {path.name for path in out.iterdir()} == {path.name for path in exported.iterdir()}


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="needs Linux")
def test_two_folders_change_places_in_one_step(tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text("")
    assert target._exchange(tmp_path / "one", tmp_path / "other")
    assert (tmp_path / "one" / "other").is_file() and (tmp_path / "other" / "one").is_file()
    assert not target._exchange(tmp_path / "one", tmp_path / "none")


def test_a_folder_of_another_run_is_refused(made: Path, exported: Path, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path / "dogs")
    before = (exported / "phi3v_export.json").read_bytes()
    with pytest.raises(ConfigError) as caught:
        export(tmp_path / "dogs", exported)
    assert str(caught.value) == (
        f"--out {exported} exists and was exported from another run, animals; name another "
        "folder, or remove it"
    )
    assert (exported / "phi3v_export.json").read_bytes() == before


def test_what_is_the_users_own_is_refused(made: Path, tmp_path: Path) -> None:
    folder, file, link = tmp_path / "thesis", tmp_path / "thesis.txt", tmp_path / "link"
    folder.mkdir()
    file.write_text("words")
    (folder / "chapter.txt").write_text("more words")
    (folder / "phi3v_export.json").write_text(json.dumps(["not ours"]))
    link.symlink_to(tmp_path / "nowhere")
    for out in (folder, file, link):
        with pytest.raises(ConfigError) as caught:
            export(made, out)
        assert str(caught.value) == (
            f"--out {out} exists and is not an export; name another folder, or remove it"
        )
    assert file.read_text() == "words"
    assert sorted(path.name for path in folder.iterdir()) == ["chapter.txt", "phi3v_export.json"]


def test_an_empty_folder_is_as_good_as_none(made: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    export(made, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").is_file()


def test_the_marker_tells_no_path(made: Path, exported: Path) -> None:
    text = (exported / "phi3v_export.json").read_text()
    assert str(made.parent) not in text and '"run": "animals"' in text


def test_what_is_not_there_is_refused(made: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as no_run:
        export(tmp_path / "none", tmp_path / "out")
    assert str(no_run.value) == (
        f"{tmp_path / 'none'} holds no config.yaml, so it is no run folder; name the folder of a "
        "run (run.out of its recipe)"
    )
    with pytest.raises(CheckpointError, match="has no checkpoint of step 1, it has: 2, 3"):
        export(made, tmp_path / "out", step=1)
    assert not (tmp_path / "out").exists()

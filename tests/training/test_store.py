"""What a checkpoint is, every kind of damage to one, and which one is found."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from phi3v import reading
from phi3v.errors import CheckpointError, MachineError
from phi3v.files import sha256
from phi3v.training.checkpoints import store
from phi3v.training.checkpoints.store import (
    MANIFEST,
    SavedFile,
    find_damage,
    find_step,
    named_step,
    publish,
    read_manifest,
    read_pointer,
    step_name,
    steps_saved,
    write_manifest,
)
from tests.training.saved import FILES, flip, foreign, save, save_partial


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def swap(first: Path, second: Path) -> None:
    first_bytes = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(first_bytes)


def test_a_checkpoint_says_what_it_is(tmp_path: Path) -> None:
    checkpoint = save_partial(tmp_path, 50, world_size=2, position={"epoch": 1, "window": 3})
    publish(tmp_path, 50)
    manifest = read_manifest(tmp_path / "step-00000050")
    assert not checkpoint.exists()
    assert manifest["step"] == 50 and manifest["world_size"] == 2 and manifest["format"] == 1
    assert manifest["position"] == {"epoch": 1, "window": 3}
    digest = sha256(tmp_path / "step-00000050/zero/c.pt")
    assert manifest["files"]["zero/c.pt"] == {"bytes": 120, "sha256": digest}
    assert list(manifest["files"]) == sorted(FILES)


def test_checkpoints_are_listed_in_order_and_nothing_else_is_one(tmp_path: Path) -> None:
    save(tmp_path, 100, 8)
    foreign(tmp_path)
    assert steps_saved(tmp_path) == [8, 100]
    assert steps_saved(tmp_path / "none") == []


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda c: truncate(c / "b.pt"), "b.pt has 40 bytes, manifest.json says 80"),
    "emptied": (lambda c: os.truncate(c / "b.pt", 0), "b.pt has 0 bytes, manifest.json says 80"),
    "longer": (lambda c: os.truncate(c / "b.pt", 81), "b.pt has 81 bytes, manifest.json says 80"),
    "flipped": (lambda c: flip(c / "zero/c.pt"), "zero/c.pt has SHA-256 "),
    "first byte": (lambda c: flip(c / "a.pt", 0), "a.pt has SHA-256 "),
    "last byte": (lambda c: flip(c / "a.pt", -1), "a.pt has SHA-256 "),
    "removed": (lambda c: (c / "zero/c.pt").unlink(), "zero/c.pt is missing"),
    "folder removed": (lambda c: shutil.rmtree(c / "zero"), "zero/c.pt is missing"),
    "swapped": (lambda c: swap(c / "a.pt", c / "b.pt"), "a.pt has SHA-256 "),
    "manifest truncated": (lambda c: truncate(c / MANIFEST), "manifest.json is not valid JSON"),
    "manifest emptied": (lambda c: os.truncate(c / MANIFEST, 0), "manifest.json is not valid JSON"),
    "manifest removed": (lambda c: (c / MANIFEST).unlink(), "manifest.json is missing"),
    "manifest no JSON": (
        lambda c: (c / MANIFEST).write_bytes(b"\xff\xfe\x00"),
        "manifest.json is not valid JSON",
    ),
    "manifest of another thing": (
        lambda c: (c / MANIFEST).write_text("[1]"),
        "manifest.json is a list, not an object of JSON",
    ),
    "manifest of another version": (
        lambda c: edit(c, format=2),
        "manifest.json has format 2, this program reads 1",
    ),
    "manifest edited": (
        lambda c: edit(c, position=7),
        "manifest.json is not what was written (its own SHA-256 differs)",
    ),
    "another step's name": (lambda c: rename(c, 4), "manifest.json is that of step 5"),
    "empty": (empty, "manifest.json is missing"),
    "a folder for a file": (
        lambda c: make_folder(c / MANIFEST),
        "manifest.json is a folder, not a file",
    ),
}
BY_DIGEST_ONLY = ("flipped", "first byte", "last byte", "swapped")


def edit(checkpoint: Path, **values: object) -> None:
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    (checkpoint / MANIFEST).write_text(json.dumps(manifest | values))


def rename(checkpoint: Path, step: int) -> Path:
    return checkpoint.rename(checkpoint.with_name(step_name(step)))


@pytest.mark.parametrize("kind", DAMAGES)
def test_every_kind_of_damage_is_found_and_named(tmp_path: Path, kind: str) -> None:
    checkpoint = save(tmp_path, 5)
    damage, message = DAMAGES[kind]
    moved = damage(checkpoint)
    found = find_damage(moved if isinstance(moved, Path) else checkpoint)
    assert found is not None and found.startswith(message)


@pytest.mark.parametrize("kind", DAMAGES)
def test_the_newest_that_is_whole_by_sizes_is_found(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path, 3)
    DAMAGES[kind][0](save(tmp_path, 5))
    is_passed = kind not in BY_DIGEST_ONLY
    assert find_step(tmp_path, None) == ("step-00000003" if is_passed else "step-00000005")
    assert (DAMAGES[kind][1] in capsys.readouterr().err) == is_passed


def test_a_whole_checkpoint_has_no_damage_and_extra_files_are_none(tmp_path: Path) -> None:
    checkpoint = save(tmp_path, 5)
    assert find_damage(checkpoint) is None
    (checkpoint / "notes.txt").write_text("mine")
    assert find_damage(checkpoint) is None


def test_a_flip_of_any_byte_of_the_manifest_changes_no_fact_unseen(tmp_path: Path) -> None:
    checkpoint = save(tmp_path, 5)
    manifest = read_manifest(checkpoint)
    for position in range((checkpoint / MANIFEST).stat().st_size):
        flip(checkpoint / MANIFEST, position)
        assert find_damage(checkpoint, ()) or read_manifest(checkpoint) == manifest
        flip(checkpoint / MANIFEST, position)
    assert find_damage(checkpoint) is None


def test_only_the_files_asked_for_are_read(tmp_path: Path) -> None:
    checkpoint = save(tmp_path, 5)
    flip(checkpoint / "b.pt")
    assert find_damage(checkpoint, ["a.pt", "zero/c.pt"]) is None
    assert (find_damage(checkpoint, ["a.pt", "b.pt"]) or "").startswith("b.pt has SHA-256")
    assert find_damage(checkpoint, ["d.pt"]) == "d.pt is not listed in manifest.json"
    (checkpoint / "zero/c.pt").unlink()  # sizes are those of all
    assert find_damage(checkpoint, ["a.pt"]) == "zero/c.pt is missing"


def test_a_damaged_manifest_is_refused_with_what_to_do(tmp_path: Path) -> None:
    (save(tmp_path, 5) / MANIFEST).unlink()
    with pytest.raises(CheckpointError) as caught:
        read_manifest(tmp_path / "step-00000005")
    assert str(caught.value) == (
        f"{tmp_path}/step-00000005 is damaged: manifest.json is missing; bring it back from a "
        "copy, or take another step"
    )


def test_a_step_or_the_newest_is_found_whatever_latest_says(tmp_path: Path) -> None:
    save(tmp_path, 4, 8, 100)
    (tmp_path / "latest").write_text("step-00000004")
    assert find_step(tmp_path, 8) == "step-00000008"
    assert find_step(tmp_path, None) == "step-00000100"


def test_a_step_is_named_by_its_number_or_as_the_best(tmp_path: Path) -> None:
    save(tmp_path, 4, 8)
    assert (named_step(tmp_path, None), named_step(tmp_path, "8")) == (None, 8)
    (tmp_path / "best").write_text("step-00000004")
    assert named_step(tmp_path, "best") == 4


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "best",
            "has no best checkpoint, for checkpoint.best of the run's recipe names no score, ",
        ),
        ("last", "--step must be a number or best, got 'last'"),
        ("-1", "--step must be a number or best, got '-1'"),
    ],
)
def test_a_step_that_nothing_has_is_refused(tmp_path: Path, name: str, message: str) -> None:
    save(tmp_path, 4, 8)
    with pytest.raises(CheckpointError) as caught:
        named_step(tmp_path, name)
    assert message in str(caught.value)
    assert name != "best" or str(caught.value).endswith("; name a step: 4, 8")


def test_a_step_that_was_not_saved_is_refused_with_those_that_were(tmp_path: Path) -> None:
    save(tmp_path, 4, 8)
    with pytest.raises(CheckpointError) as caught:
        find_step(tmp_path, 5)
    assert str(caught.value) == f"{tmp_path} has no checkpoint of step 5, it has: 4, 8"


@pytest.mark.parametrize("step", [None, 5])
def test_a_folder_without_checkpoints_is_refused(tmp_path: Path, step: int | None) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(CheckpointError) as caught:
            find_step(folder, step)
        assert str(caught.value) == f"{folder} holds no checkpoint; train the run first"


def test_where_none_is_whole_every_damage_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (save(tmp_path, 4) / "a.pt").unlink()
    truncate(save(tmp_path, 8) / "b.pt")
    damages = {8: "b.pt has 40 bytes, manifest.json says 80", 4: "a.pt is missing"}
    listed = "; ".join(f"step-0000000{step}, damaged: {what}" for step, what in damages.items())
    todo = "bring the files back from a copy, or name another step or run"
    with pytest.raises(CheckpointError) as caught:
        find_step(tmp_path, None)
    assert str(caught.value) == f"{tmp_path} holds no whole checkpoint ({listed}); {todo}"
    with pytest.raises(CheckpointError, match="holds no whole checkpoint of step 4 .*a.pt is"):
        find_step(tmp_path, 4)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["/dev/zero", "../../secret.txt"])
def test_a_manifest_that_names_a_file_elsewhere_is_damaged(tmp_path: Path, name: str) -> None:
    """Its seal has no key: whoever writes one can say what he likes, and /dev/zero has no end."""
    write_manifest(tmp_path, {"step": 5}, {name: SavedFile(0, "0" * 64)})
    said = f"{MANIFEST} names '{name}', which is not in the checkpoint's folder"
    assert find_damage(tmp_path) == said


@pytest.mark.parametrize("file", [{"bytes": "1", "sha256": ""}, {"bytes": 1}, [1], 7])
def test_a_manifest_of_other_values_than_ours_is_damaged(tmp_path: Path, file: object) -> None:
    save(tmp_path, 5)
    content = json.loads((tmp_path / "step-00000005" / MANIFEST).read_text())
    manifest = {"format": content["format"], "step": 5, "files": {"a.pt": file}}
    seal = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    text = json.dumps(manifest | {"manifest_sha256": seal})
    (tmp_path / "step-00000005" / MANIFEST).write_text(text)
    said = f"{MANIFEST} does not say the size and digest of 'a.pt'"
    assert find_damage(tmp_path / "step-00000005") == said


def test_what_is_not_a_file_is_never_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.pt")
    write_manifest(tmp_path, {"step": 5}, {"a.pt": SavedFile(0, "0" * 64)})
    assert find_damage(tmp_path) == "a.pt is not a file"


def test_a_checkpoint_that_the_machine_cannot_read_is_not_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the run would go on from an older one."""
    checkpoint = save(tmp_path, 3)
    monkeypatch.setattr(reading, "PAUSES", (0.0,))
    failures = [errno.EIO]

    def failing(path: Path, *_: object) -> str:
        if failures:
            raise OSError(failures[0], os.strerror(failures.pop()), str(path))
        return sha256(path)

    monkeypatch.setattr(store, "sha256", failing)
    assert find_damage(checkpoint) is None and not failures
    failures[:] = [errno.ESTALE, errno.ESTALE]
    with pytest.raises(MachineError, match="cannot be read .Stale file handle, 2 times"):
        find_damage(checkpoint)


def test_a_manifest_that_the_machine_cannot_read_is_not_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(path: Path, *_: object) -> str:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))

    checkpoint = save(tmp_path, 3)
    monkeypatch.setattr(Path, "open", failing)
    with pytest.raises(MachineError, match=f"{MANIFEST} cannot be read .Stale file handle"):
        find_damage(checkpoint)


def test_a_pointer_of_any_size_is_read_as_a_name(tmp_path: Path) -> None:
    (tmp_path / "latest").write_text("x" * 100_000)
    assert len(read_pointer(tmp_path, "latest") or "") == 256

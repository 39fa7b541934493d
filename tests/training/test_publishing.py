"""Checkpoints are whole or invisible, wherever a crash cuts in; what is wanted stays."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from phi3v.errors import CheckpointError
from phi3v.training.checkpoints.saving import leave_marker
from phi3v.training.checkpoints.store import (
    MANIFEST,
    SavedFile,
    find_damage,
    partial_name,
    publish,
    read_pointer,
    remove,
    remove_leftovers,
    retain,
    step_name,
    steps_saved,
)
from tests.training.saved import (
    FILES,
    flip,
    foreign,
    names,
    save,
    save_partial,
    save_universal,
)

OPERATIONS = ("rename", "replace", "unlink", "rmdir", "mkdir", "fsync")


class Killed(BaseException):
    """The process is gone: nothing that follows in it touches the disk."""


class Disk:
    """Lets `allowed` operations of this process through, then kills it; notes what was done."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, allowed: int | None = None) -> None:
        self.left, self.done = allowed, list[str]()
        for name in OPERATIONS:
            monkeypatch.setattr(os, name, self._guard(name, getattr(os, name)))

    def _guard(self, name: str, operation: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(*args: Any, **kwargs: Any) -> Any:
            if self.left == 0:
                raise Killed
            self.left = None if self.left is None else self.left - 1
            target = args[1] if name in ("rename", "replace") else args[0]
            if name == "fsync":
                target = os.readlink(f"/proc/self/fd/{target}")
            self.done.append(f"{name} {Path(target).name}")
            return None if name == "fsync" else operation(*args, **kwargs)

        return guarded


def test_everything_is_on_the_disk_before_the_name_and_latest_comes_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 5, content="old")
    partial = save_partial(tmp_path, 5, "new")
    (tmp_path / "latest").unlink()
    disk = Disk(monkeypatch)
    publish(tmp_path, 5)
    named = disk.done.index("rename step-00000005")
    flushed = {f"fsync {Path(name).name}" for name in (*FILES, MANIFEST, "zero", partial.name)}
    assert flushed <= set(disk.done[:named])
    assert disk.done[named - 1] == "rename .step-00000005.old"
    assert disk.done[named + 1] == f"fsync {tmp_path.name}"
    kept = [entry for entry in disk.done if not entry.startswith("unlink .latest")]
    assert kept[-2:] == ["replace latest", f"fsync {tmp_path.name}"]
    assert "rmdir .step-00000005.old" in disk.done[named:]


def test_a_partial_checkpoint_with_a_file_missing_gets_no_name(tmp_path: Path) -> None:
    save(tmp_path, 5, content="old")
    (save_partial(tmp_path, 5, "new") / "a.pt").unlink()
    with pytest.raises(CheckpointError) as caught:
        publish(tmp_path, 5)
    assert str(caught.value) == (
        f"{tmp_path}/.step-00000005.partial cannot be published: a.pt is missing; check the disk, "
        "then start the run again"
    )
    assert find_damage(tmp_path / "step-00000005") is None


def test_latest_names_the_newest_and_not_an_older_one_saved_after_it(tmp_path: Path) -> None:
    save(tmp_path, 10)
    assert (tmp_path / "latest").read_text() == "step-00000010"
    save(tmp_path, 20, 15)
    assert (tmp_path / "latest").read_text() == "step-00000020"
    remove(tmp_path, 20)
    assert (tmp_path / "latest").read_text() == "step-00000015"


def test_a_folder_named_latest_is_said_and_hinders_no_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "latest").mkdir()
    save(tmp_path, 10)
    assert find_damage(tmp_path / "step-00000010") is None
    assert f"{tmp_path / 'latest'} is a folder, where a file names a checkpoint; move it away" in (
        capsys.readouterr().err
    )


def before_publishing(folder: Path, is_republished: bool) -> None:
    """Checkpoints of steps 1 and 2, and one of step 2 (again) or 3 about to be published."""
    save(folder, 1, 2, content="old")
    save_universal(folder, 2)
    save_partial(folder, 2 if is_republished else 3, "new")


def assert_universal_fits(folder: Path) -> None:
    """The universal form of step 2, if it is there, is whole and made from what is there."""
    universal = folder / ".step-00000002.universal"
    assert not universal.exists() or find_damage(universal) is None


def crashes(
    tmp_path: Path, prepare: Callable[[Path], object], act: Callable[[Path], object]
) -> Iterator[Path]:
    """Folders in which `act` was killed before its 1st, 2nd, ... operation, and one where never."""
    for allowed in range(200):
        folder = tmp_path / f"{prepare.__name__}-{allowed}"
        folder.mkdir()
        prepare(folder)
        with pytest.MonkeyPatch.context() as monkeypatch:
            disk = Disk(monkeypatch, allowed)
            try:
                act(folder)
            except Killed:
                pass
            is_through = disk.left != 0
        yield folder
        if is_through:
            return
    raise AssertionError("never came to its end")


def assert_visible_are_whole(folder: Path) -> None:
    for step in steps_saved(folder):
        assert find_damage(folder / step_name(step)) is None


@pytest.mark.parametrize("is_republished", [False, True])
def test_a_crash_anywhere_in_publishing_leaves_the_old_or_the_new_state(
    tmp_path: Path, is_republished: bool
) -> None:
    step = 2 if is_republished else 3

    def prepared(folder: Path) -> None:
        before_publishing(folder, is_republished)

    num_crashes = 0
    for folder in crashes(tmp_path, prepared, lambda folder: publish(folder, step)):
        num_crashes += 1
        assert_visible_are_whole(folder)
        states = [folder / step_name(2), folder / ".step-00000002.old", folder / partial_name(2)]
        assert any(find_damage(state) is None for state in states)
        remove_leftovers(folder)
        assert steps_saved(folder) == sorted({1, 2, step})
        assert_visible_are_whole(folder)
        assert (folder / "latest").read_text() == step_name(step)
        assert not [name for name in names(folder) if name.endswith((".partial", ".old", ".tmp"))]
        assert_universal_fits(folder)
    assert num_crashes > 10


def test_a_second_crash_while_the_first_is_settled_loses_nothing_either(tmp_path: Path) -> None:
    def prepared(folder: Path) -> None:
        before_publishing(folder, is_republished=True)

    for number, crashed in enumerate(crashes(tmp_path, prepared, lambda f: publish(f, 2))):

        def copied(folder: Path, crashed: Path = crashed) -> None:
            shutil.copytree(crashed, folder, dirs_exist_ok=True)

        second = tmp_path / f"second-{number}"
        second.mkdir()
        for folder in crashes(second, copied, remove_leftovers):
            assert_visible_are_whole(folder)
            remove_leftovers(folder)
            assert steps_saved(folder) == [1, 2]
            assert_visible_are_whole(folder)
            assert (folder / "latest").read_text() == "step-00000002"
            assert_universal_fits(folder)
            shutil.rmtree(folder)


def test_without_leftovers_nothing_changes(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    before = foreign(tmp_path)
    remove_leftovers(tmp_path)
    assert names(tmp_path) == before
    remove_leftovers(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_what_was_being_written_or_removed_goes(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (save_partial(tmp_path, 2) / MANIFEST).unlink()
    for name in (".step-00000001.removed", ".step-00000004.universal"):
        (tmp_path / name / "x").mkdir(parents=True)
    for name in (".step-00000001.universal", ".step-00000001.universal.partial"):
        (tmp_path / name).mkdir()
    (tmp_path / ".latest.123.tmp").write_text("step-0")
    remove_leftovers(tmp_path)
    assert names(tmp_path) == [".step-00000001.universal", "latest", "step-00000001"]


def test_a_partial_one_of_which_not_every_byte_reached_the_disk_gets_no_name(
    tmp_path: Path,
) -> None:
    save(tmp_path, 1)
    flip(save_partial(tmp_path, 2) / "a.pt")
    remove_leftovers(tmp_path)
    assert names(tmp_path) == ["latest", "step-00000001"]


@pytest.mark.parametrize("is_partial_whole", [False, True])
def test_one_set_aside_takes_its_name_back_if_no_whole_other_can(
    tmp_path: Path, is_partial_whole: bool
) -> None:
    save(tmp_path, 2, content="old").rename(tmp_path / ".step-00000002.old")
    partial = save_partial(tmp_path, 2, "new")
    if not is_partial_whole:
        (partial / "a.pt").unlink()
    remove_leftovers(tmp_path)
    assert names(tmp_path) == ["latest", "step-00000002"]
    assert find_damage(tmp_path / "step-00000002") is None
    content = (tmp_path / "step-00000002/b.pt").read_text()
    assert content.startswith("new" if is_partial_whole else "old")


@pytest.mark.parametrize("damage", [os.unlink, flip])
@pytest.mark.parametrize("hidden", [".step-00000002.old", ".step-00000002.partial"])
def test_the_only_whole_state_of_a_step_is_never_removed(
    tmp_path: Path, hidden: str, damage: Callable[[Path], None]
) -> None:
    damage(save(tmp_path, 2, content="old") / "a.pt")
    save_partial(tmp_path, 2, "new").rename(tmp_path / hidden)
    remove_leftovers(tmp_path)
    assert names(tmp_path) == ["latest", "step-00000002"]
    assert find_damage(tmp_path / "step-00000002") is None


def test_a_damaged_one_without_a_whole_state_stays_visible(tmp_path: Path) -> None:
    (save(tmp_path, 2) / "a.pt").unlink()
    (tmp_path / "step-00000002").rename(tmp_path / ".step-00000002.old")
    remove_leftovers(tmp_path)
    assert names(tmp_path) == ["step-00000002"]


@pytest.mark.parametrize("latest", ["step-00000009", "step-00000001", "", "\udcff", None])
def test_latest_is_set_right(tmp_path: Path, latest: str | None) -> None:
    save(tmp_path, 1, 2)
    (tmp_path / "latest").unlink()
    if latest is not None:
        (tmp_path / "latest").write_bytes(latest.encode(errors="surrogateescape"))
    remove_leftovers(tmp_path)
    assert (tmp_path / "latest").read_text() == "step-00000002"


@pytest.mark.parametrize(
    ("keep", "keep_every", "scores", "kept", "best"),
    [
        (1, 0, {}, [60], None),
        (2, 0, {}, [50, 60], None),
        (9, 0, {}, [10, 20, 30, 40, 50, 60], None),
        (1, 20, {}, [20, 40, 60], None),
        (1, 0, {10: 0.1, 20: 0.9, 60: 0.5}, [20, 60], 20),
        (1, 0, {10: 0.9, 20: 0.9}, [20, 60], 20),
        (1, 0, {10: float("nan"), 20: -3.0, 30: float("-inf")}, [20, 60], 20),
        (1, 0, {70: 0.9, 60: 0.5}, [60], 60),
        (2, 30, {10: 1.0}, [10, 30, 50, 60], 10),
    ],
)
def test_the_newest_every_kth_and_the_best_stay(
    tmp_path: Path,
    keep: int,
    keep_every: int,
    scores: dict[int, float],
    kept: list[int],
    best: int | None,
) -> None:
    save(tmp_path, 10, 20, 30, 40, 50, 60)
    (tmp_path / ".step-00000010.universal").mkdir()
    retain(tmp_path, keep, keep_every, scores)
    assert steps_saved(tmp_path) == kept
    assert read_pointer(tmp_path, "best") == (None if best is None else step_name(best))
    assert (tmp_path / ".step-00000010.universal").exists() == (10 in kept)
    assert (tmp_path / "latest").read_text() == "step-00000060"


def test_damaged_ones_count_for_nothing_and_go_when_enough_whole_ones_are_newer(
    tmp_path: Path,
) -> None:
    save(tmp_path, 10, 20, 30, 40, 50)
    for step in (10, 20, 50):
        (tmp_path / step_name(step) / "a.pt").unlink()
    retain(tmp_path, 3, 0, {})  # two are whole: none goes
    assert steps_saved(tmp_path) == [10, 20, 30, 40, 50]
    retain(tmp_path, 1, 20, {50: 1.0, 20: 0.9, 30: 0.8})
    assert steps_saved(tmp_path) == [20, 30, 40, 50]  # a kth, the best whole, the newest whole
    assert read_pointer(tmp_path, "best") == "step-00000030"


def test_what_is_not_ours_is_never_removed(tmp_path: Path) -> None:
    save(tmp_path, 1, 2, 3)
    before = foreign(tmp_path)
    retain(tmp_path, 1, 0, {})
    assert names(tmp_path) == [n for n in before if n not in ("step-00000001", "step-00000002")]


def test_a_crash_anywhere_in_removing_leaves_no_half_checkpoint_visible(tmp_path: Path) -> None:
    def prepared(folder: Path) -> None:
        save(folder, 1, 2, 3)
        save_universal(folder, 1)

    for folder in crashes(tmp_path, prepared, lambda folder: retain(folder, 1, 0, {2: 1.0})):
        assert_visible_are_whole(folder)
        assert {2, 3} <= set(steps_saved(folder))
        universal = folder / ".step-00000001.universal"
        assert not universal.exists() or find_damage(universal) is None, "alone, or half of it"
        remove_leftovers(folder)
        retain(folder, 1, 0, {2: 1.0})
        assert names(folder) == ["best", "latest", "step-00000002", "step-00000003"]


def test_a_checkpoint_may_get_its_name_the_moment_the_last_marker_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first rank's thread looks for it while another rank is still in the call."""
    partial = tmp_path / partial_name(2)
    partial.mkdir()
    replace = os.replace

    def replace_and_publish(source: Path, target: Path) -> None:
        replace(source, target)
        partial.rename(tmp_path / step_name(2))

    monkeypatch.setattr(os, "replace", replace_and_publish)
    leave_marker(partial, 1, {"weights.pt": SavedFile(3, "abc")})
    (left,) = (tmp_path / step_name(2)).iterdir()
    assert json.loads(left.read_text()) == {"weights.pt": {"bytes": 3, "sha256": "abc"}}

"""Where others could put a file that we run is told by its reason."""

import os
from pathlib import Path

import pytest

from phi3v.private import make_private, weakness

ROOT_ONLY = pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")
NOBODY = 65534


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "own").mkdir(mode=0o700)
    return tmp_path / "own"


def test_a_folder_of_ones_own_has_no_weakness_and_one_that_is_not_there_neither(
    folder: Path,
) -> None:
    assert weakness(folder) is None
    assert weakness(folder / "later") is None


def test_a_folder_that_is_made_is_ours_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        assert make_private(tmp_path / "a") is None
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(
    ("mode", "reason"),
    [
        (0o702, "everybody can write to it (mode 702)"),
        (0o1777, "everybody can write to it (mode 1777)"),
    ],
)
def test_a_folder_that_others_can_write_to_is_told(folder: Path, mode: int, reason: str) -> None:
    folder.chmod(mode)
    assert weakness(folder) == reason
    assert make_private(folder) == reason, "it is not mended: there may be files of others in it"


@ROOT_ONLY
def test_a_folder_of_a_group_is_told_but_for_a_users_own(folder: Path) -> None:
    folder.chmod(0o770)
    assert weakness(folder) is None, "root's own group"
    os.chown(folder, -1, 12345)
    assert weakness(folder) == "its group can write to it (mode 770)"


@ROOT_ONLY
def test_a_folder_of_another_user_is_told_through_a_link_too(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folder)
    os.chown(folder, NOBODY, -1)
    for path in (folder, tmp_path / "link"):
        assert str(weakness(path)).startswith("it belongs to user ")


@ROOT_ONLY
def test_a_link_of_another_user_is_told(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folder)
    os.chown(tmp_path / "link", NOBODY, -1, follow_symlinks=False)
    assert str(weakness(tmp_path / "link")).startswith("it belongs to user ")


def test_a_folder_that_others_can_replace_is_told(folder: Path, tmp_path: Path) -> None:
    """As in a /tmp without the sticky bit."""
    tmp_path.chmod(0o777)
    reason = f"everybody can put another in its place, for {tmp_path} is open to all"
    assert weakness(folder) == reason
    tmp_path.chmod(0o1777)
    assert weakness(folder) is None


def test_a_folder_in_this_pythons_may_be_as_open_as_that_is(folder: Path) -> None:
    (folder / "ext").mkdir()
    (folder / "ext").chmod(0o777)
    assert weakness(folder / "ext", like=folder) == "everybody can write to it (mode 777)"
    folder.chmod(0o1777)
    assert weakness(folder / "ext", like=folder) is None


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert make_private(tmp_path / "file" / "a" / "b") == "it cannot be made (Not a directory)"

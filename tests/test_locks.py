"""One owner of a folder, on any file system, whatever others have put at the lock's name."""

import errno
import fcntl
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from phi3v import locks
from phi3v.errors import ConfigError
from phi3v.locks import locked, take, this_process

NOBODY = 65534
HOLD = """
import sys, time
from pathlib import Path
from phi3v.locks import take
lock = take(Path(sys.argv[1]))
print("locked", flush=True)
time.sleep(60)
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "lock"


def test_a_lock_has_one_owner_or_any_number_that_share_it(path: Path) -> None:
    with locked(path, is_shared=True), locked(path, is_shared=True):
        with pytest.raises(ConfigError) as caught:
            take(path, name="out shards")
    assert str(caught.value) == (
        f"out shards is in use by process {os.getpid()} on {socket.gethostname()}; wait for its "
        "end, stop it, or name another folder"
    )
    with locked(path), pytest.raises(ConfigError, match=f"^{path.parent} is in use by process "):
        take(path, is_shared=True)
    take(path).close()


def test_an_owner_is_waited_for_as_long_as_is_asked(path: Path) -> None:
    first = take(path)
    threading.Timer(0.3, first.close).start()
    with locked(path, waits=True):
        pass


# --- what others have put there ---


@pytest.mark.parametrize("content", ["ssh-ed25519 AAAA me@home\n", ""])
def test_a_link_is_not_followed(path: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "authorized_keys").write_text(content)
    path.symlink_to(tmp_path / "authorized_keys")
    with pytest.raises(ConfigError, match=f"^{path} is a link, not a lock that this program made"):
        take(path)
    assert (tmp_path / "authorized_keys").read_text() == content and path.is_symlink()


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda path: path.write_text("ssh-ed25519 AAAA me@home\n"), "a file of something else"),
        (lambda path: path.write_bytes(b"process 1 on a " + b"x" * 999), "a file of something"),
        (lambda path: path.mkdir(), "a folder"),
        (lambda path: os.mkfifo(path), "no file"),
    ],
)
def test_what_is_no_lock_is_refused_and_left_as_it_is(
    path: Path, make: object, problem: str
) -> None:
    assert callable(make)
    make(path)
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(ConfigError, match=f"^{path} is {problem}.*; move it away, or name another"):
        take(path)
    assert before is None or path.read_bytes() == before


def test_a_file_with_two_names_is_refused(path: Path, tmp_path: Path) -> None:
    path.write_text("process 1 on node1\n")
    (tmp_path / "other").hardlink_to(path)
    with pytest.raises(ConfigError, match="is another name of some other file, not a lock"):
        take(path)
    assert path.read_text() == "process 1 on node1\n"


@pytest.fixture
def of_nobody(path: Path) -> Path:
    """A lock that another user has left, which we may write to."""
    if os.geteuid():
        pytest.skip("only root can give a file to another user")
    path.write_text("process 7 on node2\n")
    os.chown(path, NOBODY, -1)
    return path


def test_anothers_lock_file_is_replaced_and_not_written_to(of_nobody: Path) -> None:
    with of_nobody.open() as before:
        with locked(of_nobody, is_shared=True):
            assert of_nobody.read_text() == "process 7 on node2\n"
        lock = take(of_nobody)
        lock.check()
        assert before.read() == "process 7 on node2\n"
    assert of_nobody.stat().st_uid == os.geteuid()
    assert of_nobody.read_text().startswith(this_process())
    lock.close()


def test_a_folder_of_another_user_that_everybody_may_write_to_is_refused(path: Path) -> None:
    if os.geteuid():
        pytest.skip("only root can give a folder to another user")
    os.chown(path.parent, NOBODY, -1)
    path.parent.chmod(0o777)
    with pytest.raises(ConfigError, match="belongs to user nobody, and everybody may write to it"):
        take(path)
    assert not path.exists()
    path.parent.chmod(0o770)  # of a group, or given to a container's root
    take(path).close()


# --- purges ---


def test_a_lock_that_was_removed_is_taken_anew_and_still_keeps_others_out(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lock = take(path)
    lock.check()
    path.unlink()
    lock.check()
    assert capsys.readouterr().err == (
        f"{path} was removed, as a purge of old files does, and is taken anew\n"
    )
    with pytest.raises(ConfigError, match="is in use by process"):
        take(path)
    lock.check()
    lock.close()
    take(path).close()


def test_of_two_owners_after_a_purge_the_first_ends(path: Path) -> None:
    lock = take(path)
    path.unlink()
    other = take(path)
    with pytest.raises(
        ConfigError, match=f"^{path} was removed, and {path.parent} is in use by pr"
    ):
        lock.check()
    other.check()
    for one in (lock, other):
        one.close()


def test_a_lock_that_is_removed_while_it_is_taken_is_none(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between opening a file and holding its lock its name may go to another file."""
    first, flock = take(path), fcntl.flock

    def purge_and_flock(handle: int, kind: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        path.unlink()
        first.close()
        flock(handle, kind)

    monkeypatch.setattr(fcntl, "flock", purge_and_flock)
    lock = take(path)
    assert os.path.samestat(path.stat(), os.fstat(lock.handle))
    lock.close()


def test_a_lock_is_made_young_each_hour(path: Path) -> None:
    lock = take(path)
    for age, is_touched in ((3500, False), (3700, True)):
        then = time.time() - age
        os.utime(path, (then, then))
        lock.check()
        assert (path.stat().st_mtime > then + 1) == is_touched
    lock.close()


def test_a_disk_that_fails_is_told_with_the_lock_that_was_looked_at(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = take(path)

    def pread(handle: int, size: int, at: int) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pread", pread)
    with pytest.raises(OSError, match="Input/output error") as caught:
        lock.check()
    assert caught.value.filename == str(path)
    lock.close()


def test_a_folder_that_was_removed_is_told(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    lock = take(tmp_path / "run" / "lock")
    (tmp_path / "run" / "lock").unlink()
    (tmp_path / "run").rmdir()
    with pytest.raises(ConfigError, match=f"^{tmp_path / 'run'} was removed while process "):
        lock.check()


# --- file systems without locks ---


@pytest.fixture(params=[errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def no_locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Lustre without its flock option."""

    def flock(handle: int, kind: int) -> None:
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(locks, "_told", set())


@pytest.mark.usefixtures("no_locks")
def test_without_locks_work_goes_on_which_is_said_once(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path.write_text("process 7 on node2\nsince 12.25\n")
    for _ in range(2):
        lock = take(path)
        lock.check()
    assert capsys.readouterr().err == (
        f"{path.parent} is on a file system without locks: see to it that nobody else works there; "
        "the last one here was process 7 on node2\n"
    )
    path.write_text("process 7 on node2\n")
    with pytest.raises(ConfigError, match="was taken over by process 7 on node2; this process end"):
        lock.check()


@pytest.mark.usefixtures("no_locks")
def test_without_locks_a_process_of_this_host_that_lives_is_believed(path: Path) -> None:
    other = psutil.Process(os.getppid())
    note = f"process {other.pid} on {socket.gethostname()}, start 0 of job 17"
    path.write_text(f"{note}\nsince {other.create_time():.2f}\n")
    with pytest.raises(ConfigError, match=f"is in use by {note}; wait for its end"):
        take(path)
    path.write_text(f"{note}\nsince {other.create_time() - 60:.2f}\n")  # its number was another's
    take(path).close()


@pytest.mark.slow
def test_the_lock_of_a_killed_process_is_gone(path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None and owner.stdout.readline() == "locked\n"
        with pytest.raises(ConfigError, match=f"in use by process {owner.pid} on "):
            take(path)
        owner.kill()
        owner.wait(timeout=10)
    take(path).close()

"""Which checkpoints a folder holds, and which one a run goes on from."""

from pathlib import Path

import pytest

from phi3v.errors import CheckpointError
from phi3v.training.checkpoint import Progress, find_step, newest, restore, steps_saved


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Checkpoints of steps 4, 8 and 100, the last two with something beside them."""
    for name in ("step-00000100", "step-00000004", "step-00000008", ".step-00000104.partial"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-00000008.copy").mkdir()
    (tmp_path / "latest").write_text("step-00000100\n")
    return tmp_path


def test_only_whole_checkpoints_count_in_order_of_steps(folder: Path) -> None:
    assert steps_saved(folder) == [4, 8, 100]


def test_a_step_or_the_newest_is_found(folder: Path) -> None:
    assert find_step(folder, 8) == "step-00000008"
    assert find_step(folder, None) == "step-00000100"


def test_latest_decides_where_to_go_on(folder: Path) -> None:
    (folder / "latest").write_text("step-00000008")
    assert find_step(folder, None) == "step-00000008"


def test_without_latest_the_last_one_is_the_newest(folder: Path) -> None:
    (folder / "latest").unlink()
    assert find_step(folder, None) == newest(folder) == "step-00000100"


def test_a_step_that_was_not_saved_is_refused_with_those_that_were(folder: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        find_step(folder, 5)
    assert str(caught.value) == f"{folder} has no checkpoint of step 5, it has: 4, 8, 100"


def test_a_folder_without_checkpoints_is_refused_but_a_run_starts_there(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        for step in (None, 5):
            with pytest.raises(CheckpointError) as caught:
                find_step(folder, step)
            assert str(caught.value) == f"{folder} holds no checkpoint; train the run first"
        assert restore(engine=None, folder=folder) == Progress(step=0)


def test_a_latest_that_leads_nowhere_is_refused_with_what_there_is(folder: Path) -> None:
    (folder / "latest").write_text("step-00000012")
    message = (
        f"{folder / 'latest'} names step-00000012, which is not there; write the name of another "
        "checkpoint into it (step-00000004, step-00000008, step-00000100)"
    )
    for attempt in (lambda: find_step(folder, None), lambda: restore(None, folder)):
        with pytest.raises(CheckpointError) as caught:
            attempt()
        assert str(caught.value) == message
    assert find_step(folder, 8) == "step-00000008"

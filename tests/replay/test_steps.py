"""The samples of any step of a run, found by its folder and its shards, or refused by name."""

import json
import shutil
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phi3v.data.packing import Position
from phi3v.errors import ConfigError, Phi3VError, ShardError
from phi3v.replay.steps import open_step
from phi3v.training.opening import Run
from phi3v.training.run_folder import RunFolder
from tests.replay.runs import edit_line, open_recipe, write_run
from tests.tiny import make_model


@pytest.fixture
def run(tmp_path: Path, tiny_model: Path, tiny_shards: Path) -> Run:
    return open_recipe(tmp_path / "run", tiny_model, str(tiny_shards))


def packs(found: Sequence[np.ndarray]) -> list[list[int]]:
    return [pack.tolist() for pack in found]


@pytest.mark.parametrize("has_places", [True, False], ids=["placed", "of a version before"])
def test_every_step_has_the_samples_that_the_run_had(run: Run, has_places: bool) -> None:
    """Over two epochs, with a step left out, whether its line says where it is or not."""
    left_out = [Position(0, 0, 2)]
    taken = write_run(run, 9, left_out, has_places)
    assert taken[-1].at.epoch == 2
    for number, step in enumerate(taken, 1):
        opened = open_step(run.folder.path, number)
        assert opened.planned.at == step.at and opened.number == number
        assert packs(opened.planned.packs) == packs(step.packs)


def test_a_run_of_one_pack_has_it_in_every_place(
    tmp_path: Path, tiny_model: Path, tiny_shards: Path
) -> None:
    run = open_recipe(tmp_path / "run", tiny_model, str(tiny_shards), "debug.overfit_one_pack=true")
    (first, *_) = write_run(run, 3)
    folder, found = run.folder, []
    for number in (1, 2, 3):
        (dataset, pack) = (run.dataset, first.packs[0])
        sizes = {
            name: 8 * int(getattr(dataset, name)[pack].sum())
            for name in ("tokens", "label_tokens", "views")
        }
        edit_line(folder, number, at=vars(Position()), samples=8 * len(pack), **sizes)
        found.append(packs(open_step(folder.path, number).planned.packs))
    assert found == [[first.packs[0].tolist()] * 8] * 3


def test_looking_needs_no_lock_and_leaves_the_folder_as_it_is(run: Run) -> None:
    """A run that trains holds the lock, and may be in the middle of a line."""
    write_run(run)
    with closing(run.folder.lock()):
        with (run.folder.path / "metrics.jsonl").open("a") as file:
            file.write('{"step": 10, "lo')
        before = {path: path.read_bytes() for path in run.folder.path.iterdir()}
        open_step(run.folder.path, 9)
        assert {path: path.read_bytes() for path in run.folder.path.iterdir()} == before


def test_shards_and_model_may_lie_elsewhere(
    run: Run, tmp_path: Path, tiny_model: Path, tiny_shards: Path
) -> None:
    taken = write_run(run)
    for name, source in (("shards", tiny_shards), ("model", tiny_model)):
        shutil.copytree(source, tmp_path / "new" / name)
    new = tmp_path / "new"
    values = [f"data.shards={new / 'shards'}", f"model.path={new / 'model'}"]
    opened = open_step(run.folder.path, 4, values)
    assert packs(opened.planned.packs) == packs(taken[3].packs)
    assert [part.folder for part in opened.dataset.datasets] == [new / "shards"]
    assert opened.cfg.model.path == str(new / "model")


def refused(kind: type[Phi3VError], *arguments: Any) -> str:
    with pytest.raises(kind) as caught:
        open_step(*arguments)
    assert caught.value.exit_code == 2
    return str(caught.value)


@pytest.mark.parametrize("number", [-1, 0, 10])
def test_a_step_that_was_not_taken_is_refused(run: Run, number: int) -> None:
    write_run(run, 9)
    assert refused(ConfigError, run.folder.path, number) == (
        f"--step {number} is none that {run.folder.path} has taken: its metrics.jsonl has 9 steps "
        "so far, counted from 1"
    )
    (run.folder.path / "metrics.jsonl").unlink()
    assert "its metrics.jsonl has no step so far" in refused(ConfigError, run.folder.path, 1)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    message = refused(ConfigError, tmp_path, 1)
    assert message.startswith(f"{tmp_path} holds no config.yaml, so it is no run folder; ")


def test_no_other_key_may_be_set(run: Run) -> None:
    write_run(run)
    message = refused(ConfigError, run.folder.path, 1, ["optim.lr=1"])
    assert message == (
        "'optim.lr=1' cannot be given: a step is looked at as its run took it; only data.shards "
        "and model.path may say where the run's shards and model lie now"
    )


def test_shards_that_are_gone_or_other_ones_are_refused(
    run: Run, tmp_path: Path, tiny_shards: Path
) -> None:
    write_run(run)
    other = tmp_path / "other"
    gone = refused(ShardError, run.folder.path, 1, [f"data.shards={other}"])
    assert gone.startswith(f"{run.folder.path} was trained on the shards {other}, which are not ")
    assert gone.endswith("; data.shards=DIR says where they lie now")
    shutil.copytree(tiny_shards, other)
    manifest = json.loads((other / "manifest.json").read_text())
    (other / "manifest.json").write_text(json.dumps(manifest | {"fingerprint": 64 * "f"}))
    changed = refused(ShardError, run.folder.path, 1, [f"data.shards={other}"])
    assert changed.startswith(
        f"{run.folder.path} was trained on data with fingerprint {manifest['fingerprint'][:12]}, "
        f"{other} now has ffffffffffff; "
    )
    with (other / "train-00000.arrow").open("ab") as file:
        file.write(b"x")
    assert " bytes, the manifest says " in refused(
        ShardError, run.folder.path, 1, [f"data.shards={other}"]
    )


def test_a_base_model_that_is_gone_or_another_one_is_refused(
    run: Run, tmp_path: Path, tiny_model: Path
) -> None:
    write_run(run)
    hint = "; model.path=DIR says where the run's base model lies now"
    gone = refused(ConfigError, run.folder.path, 1, [f"model.path={tmp_path / 'gone'}"])
    assert str(tmp_path / "gone") in gone and gone.endswith(hint)
    alike = make_model(tmp_path / "alike", layers=2)
    found = refused(ConfigError, run.folder.path, 1, [f"model.path={alike}"])
    assert found.startswith(f"{run.folder.path} started from a model with digest ")
    assert f", {alike} now has " in found and found.endswith(hint)


def test_a_gap_in_what_was_written_is_refused(run: Run) -> None:
    write_run(run)
    path = run.folder.path / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:2] + lines[3:]))
    message = refused(ConfigError, run.folder.path, 5)
    assert message.startswith(f"{path} has no line of step 3, though it has one of step 5; ")


@pytest.mark.parametrize("has_places", [True, False], ids=["placed", "of a version before"])
def test_what_does_not_fit_the_plan_is_refused_and_never_guessed(
    run: Run, has_places: bool
) -> None:
    taken = write_run(run, has_places=has_places)
    tokens = int(sum(run.dataset.tokens[pack].sum() for pack in taken[3].packs))
    edit_line(run.folder, 4, tokens=tokens + 1)
    step = 4 if has_places else 6  # by counting, every step up to it must fit
    message = refused(ConfigError, run.folder.path, step)
    assert f" {tokens + 1:,} tokens," in message and f" {tokens:,} tokens," in message
    known = "is not the one that its recipe plans at " if has_places else "which samples it had is "
    assert known in message


def test_a_place_that_the_plan_does_not_have_is_refused(run: Run) -> None:
    write_run(run)
    edit_line(run.folder, 4, at=vars(Position(0, 7, 0)))
    assert "Position(epoch=0, window=7, step=0)" in refused(ConfigError, run.folder.path, 4)


def test_steps_after_a_rollback_are_counted_without_those_left_out(run: Run) -> None:
    """Were they not honoured, the sizes of a later step would be those of another."""
    write_run(run, 9, [Position(0, 0, 2)], has_places=False)
    (RunFolder(run.folder.path).faults.path).unlink()
    assert "counting does not find them" in refused(ConfigError, run.folder.path, 9)

"""A run keeps its best checkpoint, and is taken up with the random numbers that were to come."""

import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from phi3v.config import RunConfig, build_recipe, default_deepspeed, load_deepspeed
from phi3v.data import Dataset
from phi3v.evaluation.evaluate import Evaluation
from phi3v.evaluation.metrics import Score
from phi3v.training.checkpoints import resuming, saving
from phi3v.training.checkpoints.resuming import choose, restore
from phi3v.training.checkpoints.saving import Progress
from phi3v.training.checkpoints.store import read_pointer, step_name, steps_saved
from phi3v.training.opening import Run
from phi3v.training.ranks import Ranks
from phi3v.training.run_folder import RunFolder
from phi3v.training.session import Session, open_saver, record, save, wait_until_saved
from phi3v.training.tracking import Tracker
from phi3v.training.watchdog import Watchdog
from tests.training.engines import Engine

pytestmark = pytest.mark.usefixtures("group_of_one")
ONE = Ranks(rank=0, world_size=1, local_rank=0, local_size=1)


@pytest.fixture
def run(tmp_path: Path, tiny_shards: Path) -> Run:
    """A run of one rank that keeps one checkpoint, and the best."""
    values = {
        "run": {"out": str(tmp_path)},
        "model": {"path": "models/tiny"},
        "data": {"shards": str(tiny_shards)},
        "optim": {"lr": 1e-4},
        "train": {"max_steps": 9},
        "eval": {"metrics": ["anls"]},
        "checkpoint": {"every": 1, "keep": 1, "best": "anls"},
    }
    cfg = build_recipe(RunConfig, values, Path("run.yaml"), ())
    folder, ds = RunFolder(tmp_path), load_deepspeed(default_deepspeed(has_cuda=False), 1)
    dataset = Dataset(tiny_shards, "train")
    folder.write_origin(cfg, ds, {"samples": 12, "fingerprint": "abc"}, world_size=1)
    nobody: Any = None
    return Run(cfg, ds, ONE, folder, dataset, nobody, 9, torch.device("cpu"), nobody)


def nothing() -> None:
    pass


@pytest.fixture
def dog(tmp_path: Path) -> Iterator[Watchdog]:
    dog = Watchdog(60, tmp_path, 0, 60)
    yield dog
    dog.close()


def start(run: Run, dog: Watchdog) -> Session:
    """What a start of the run saves with."""
    nobody: Any = None
    saver = open_saver(run, Engine(), None, nothing)
    return Session(run, saver.engine, saver, Tracker(None), nobody, dog)


def test_the_best_checkpoint_stays_while_newer_ones_come_and_go_after_a_restart_too(
    run: Run, dog: Watchdog, tiny_shards: Path
) -> None:
    held_out: Any = Dataset(tiny_shards, "validation")

    def saved(session: Session, step: int, anls: float) -> list[int]:
        """What is there after a step that was saved and evaluated."""
        save(session, Progress(step))
        wait_until_saved(session)
        found = Evaluation({"anls": Score(anls, 0.0, 1.0, 8)}, 1.0, [], held_out)
        record(session, found, Progress(step))
        return steps_saved(run.folder.checkpoints)

    session = start(run, dog)
    assert saved(session, 1, anls=0.2) == [1]
    assert saved(session, 2, anls=0.9) == [1, 2], "of 2 nothing is known before it is there"
    assert saved(session, 3, anls=0.1) == [2, 3]
    session = start(run, dog)
    assert saved(session, 4, anls=0.3) == [2, 4]
    assert read_pointer(run.folder.checkpoints, "best") == step_name(2)


def draws() -> list[float]:
    """The next random numbers of every source."""
    return [random.random(), float(np.random.rand()), float(torch.rand(()))]


def test_after_a_resume_the_next_random_numbers_are_those_of_the_run_that_went_on(
    run: Run, dog: Watchdog
) -> None:
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(0)
    before = draws()
    session = start(run, dog)
    save(session, Progress(1))
    wait_until_saved(session)
    expected = draws()
    assert all(a != b for a, b in zip(before, expected, strict=True))
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(0)  # as a start does
    choice, engine = choose(run.folder.checkpoints, ONE, nothing), Engine()
    done = restore(engine, choice, ONE)
    assert (done.step, engine.loaded) == (1, [step_name(1)])
    assert draws() == expected


def test_the_random_state_of_the_device_is_saved_and_restored(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = {"state": torch.tensor([1, 2, 3])}
    for module in (saving, resuming):
        monkeypatch.setattr(module, "has_cuda", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: device["state"])
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state: device.update(state=state))
    states = saving.random_states()
    device["state"] = torch.tensor([4, 5, 6])
    resuming.set_random_states(states)
    assert device["state"].tolist() == [1, 2, 3]


def test_the_scripts_beside_checkpoints_are_no_way_to_the_files_of_others(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("mine")
    (tmp_path / "zero_to_fp32.py").symlink_to(tmp_path / "notes")
    os.mkfifo(tmp_path / "zero_to_torch.py")
    saving.remove_scripts(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes"]

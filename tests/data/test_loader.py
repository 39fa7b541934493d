"""The steps of a run: the same for any number of ranks, resumable, complete; no thread stays."""

import threading
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from phi3v.data import Dataset
from phi3v.data.codecs import Codec, CodecName
from phi3v.data.loader import Loader, Step
from phi3v.data.packing import Budget, PackPlan, Position
from phi3v.errors import ShardError
from tests.tiny import make_sample, write_samples

PACKS = 4  # of a step
START = Position()
GRIDS = [[], [(1, 1)], [(1, 2)]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """29 samples in several shards."""
    samples = [make_sample(f"s{k}", 3 + k % 7, GRIDS[k % 3]) for k in range(29)]
    return write_samples(tmp_path_factory.mktemp("loader"), samples, shard_bytes=30_000)


def make_loader(folder: Path, rank: int = 0, ranks: int = 1, seed: int = 0) -> Loader:
    dataset = Dataset(folder, "train")
    budget = Budget(max_tokens=40, max_views=9, window=10)
    plan = PackPlan(dataset.fingerprint, seed, dataset.tokens, dataset.views, budget)
    return Loader(dataset, plan, PACKS, rank, ranks)


def first_steps(loader: Loader, count: int, start: Position = START) -> list[Step]:
    steps = loader.steps(start)
    try:
        return list(islice(steps, count))
    finally:
        steps.close()


def names(step: Step) -> list[tuple[str, ...]]:
    return [batch.ids for batch in step.batches]


def loader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "loader"]


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_share_the_packs_that_one_rank_would_take(folder: Path, ranks: int) -> None:
    alone = first_steps(make_loader(folder), 9)
    shared = [first_steps(make_loader(folder, rank, ranks), 9) for rank in range(ranks)]
    for number, step in enumerate(alone):
        parts = [names(of_rank[number]) for of_rank in shared]
        assert all(len(part) == PACKS // ranks for part in parts)
        together = [part[k] for k in range(PACKS // ranks) for part in parts]
        assert together == names(step)  # round by round, rank by rank
        assert {of_rank[number].after for of_rank in shared} == {step.after}


def test_batches_hold_the_samples_of_the_packs(folder: Path) -> None:
    step = first_steps(make_loader(folder), 1)[0]
    assert len(step.packs) == PACKS
    for pack, batch in zip(step.packs, step.batches, strict=True):
        assert batch.ids == tuple(f"s{sample}" for sample in pack)


@pytest.mark.parametrize("name", ["zstd", "png"])
def test_exact_codecs_give_the_same_batches(tmp_path: Path, name: CodecName) -> None:
    samples = [make_sample(f"s{k}", 3 + k % 7, GRIDS[k % 3]) for k in range(12)]
    raw = make_loader(write_samples(tmp_path / "raw", samples))
    encoded = make_loader(write_samples(tmp_path / name, samples, codec=Codec(name)))
    for one, other in zip(*(first_steps(loader, 3) for loader in (raw, encoded)), strict=True):
        assert names(one) == names(other)
        for left, right in zip(one.batches, other.batches, strict=True):
            assert all(map(torch.equal, left.canvases, right.canvases))


def test_a_loader_started_behind_any_step_goes_on_with_the_next(folder: Path) -> None:
    whole = first_steps(make_loader(folder), 9)
    for number in range(8):
        rest = first_steps(make_loader(folder), 8 - number, whole[number].after)
        assert [names(step) for step in rest] == [names(step) for step in whole[number + 1 :]]
        assert [step.after for step in rest] == [step.after for step in whole[number + 1 :]]
        assert [step.epoch for step in rest] == [step.epoch for step in whole[number + 1 :]]


def test_another_number_of_ranks_goes_on_with_the_same_step(folder: Path) -> None:
    after, following = first_steps(make_loader(folder, 0, 2), 2)[0].after, 1
    expected = names(first_steps(make_loader(folder), 2)[following])
    shared = [first_steps(make_loader(folder, rank, 4), 1, after)[0] for rank in range(4)]
    assert [names(step)[0] for step in shared] == expected


@pytest.mark.parametrize("epochs", [1, 2])
@pytest.mark.parametrize("ranks", [1, 4])
def test_whole_epochs_show_every_sample_and_fill_the_last_step_with_empty_packs(
    folder: Path, epochs: int, ranks: int
) -> None:
    loaders = [make_loader(folder, rank, ranks) for rank in range(ranks)]
    runs = [list(loader.steps(Position(), epochs)) for loader in loaders]
    packs = loaders[0].plan.count(epochs)
    assert packs % PACKS, "the last step would be full by chance"
    seen = [name for steps in runs for step in steps for ids in names(step) for name in ids]
    assert sorted(seen) == sorted([f"s{k}" for k in range(29)] * epochs)
    assert {len(steps) for steps in runs} == {-(-packs // PACKS)}
    last = [ids for steps in runs for ids in names(steps[-1])]
    assert last.count(()) == PACKS - packs % PACKS
    assert len(runs[0][-1].packs) == PACKS
    assert runs[0][-1].after == Position(epochs, 0)


def test_a_step_says_how_long_it_was_waited_for(folder: Path) -> None:
    loader = make_loader(folder)
    collect = loader.dataset._mapped

    def slow(index: int):
        time.sleep(0.02)
        return collect(index)

    loader.dataset._mapped = slow  # type: ignore[method-assign]
    step = first_steps(loader, 1)[0]
    assert step.wait_seconds > 0.02 * sum(map(len, step.packs))


def test_a_damaged_shard_stops_the_consumer_with_its_name(tmp_path: Path) -> None:
    samples = [make_sample(f"s{k}", 3) for k in range(20)]
    folder = write_samples(tmp_path, samples)
    path = folder / "train-00000.arrow"
    path.write_bytes(path.read_bytes()[:300] + bytes(path.stat().st_size - 300))
    with pytest.raises(ShardError, match="train-00000.arrow cannot be read at sample"):
        list(make_loader(folder).steps(Position(), epochs=1))
    assert not loader_threads()


@pytest.mark.parametrize("taken", [1, 3])
def test_no_thread_is_left_when_the_consumer_stops(folder: Path, taken: int) -> None:
    steps = make_loader(folder).steps(Position())
    for _ in range(taken):
        next(steps)
    assert loader_threads()
    steps.close()
    assert not loader_threads()


def test_no_thread_is_left_when_the_epochs_end_or_the_consumer_fails(folder: Path) -> None:
    assert list(make_loader(folder).steps(Position(), epochs=1))
    assert not loader_threads()
    with pytest.raises(ZeroDivisionError):
        for _ in make_loader(folder).steps(Position()):
            1 / 0  # noqa: B018
    assert not loader_threads()


def test_no_more_than_a_few_steps_are_read_ahead(folder: Path) -> None:
    """Two wait in the queue and one in the reader's hand: memory is bounded."""
    loader = make_loader(folder)
    read: list[int] = []
    collect = loader.dataset._mapped

    def counted(index: int):
        read.append(index)
        return collect(index)

    loader.dataset._mapped = counted  # type: ignore[method-assign]
    steps = loader.steps(Position())
    first = next(steps)
    time.sleep(0.2)
    ahead = len(read) - sum(map(len, first.packs))
    steps.close()
    following = first_steps(make_loader(folder), 4)[1:]
    assert ahead == sum(len(pack) for step in following for pack in step.packs)


def test_packs_of_a_step_are_arrays_of_sample_numbers(folder: Path) -> None:
    for step in make_loader(folder).steps(Position(), epochs=1):
        assert all(pack.dtype == np.int64 for pack in step.packs)

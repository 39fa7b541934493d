"""The steps of a run: the same for any number of ranks, resumable, complete; no thread stays."""

import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from phi3v.data import Dataset
from phi3v.data.batch import Batch, collate
from phi3v.data.codecs import Codec, CodecName
from phi3v.data.loader import AHEAD, Loader, OnePack, Step
from phi3v.data.mixture import Mixture, open_datasets
from phi3v.data.packing import Budget, Plan, PlannedStep, Position
from phi3v.errors import ShardError
from phi3v.sample import Sample
from tests.tiny import make_sample, write_samples

PACKS = 4  # of a step
START = Position()
GRIDS = [[], [(1, 1)], [(1, 2)]]
BUDGET = Budget(max_tokens=40, max_views=9, window=10)


def some_samples(count: int, seed: int = 0) -> list[Sample]:
    return [make_sample(f"s{k}", 3 + k % 7, GRIDS[k % 3], seed) for k in range(count)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """29 samples in several shards."""
    return write_samples(tmp_path_factory.mktemp("loader"), some_samples(29), shard_bytes=30_000)


def make_plan(dataset: Dataset | Mixture, packs: int = PACKS) -> Plan:
    costs = dataset.tokens.astype(float)
    return Plan(
        fingerprint=dataset.fingerprint,
        seed=0,
        tokens=dataset.tokens,
        views=dataset.views,
        costs=costs,
        budget=BUDGET,
        packs_per_step=packs,
        window_steps=2,
        parts=dataset.parts,
    )


def make_loader(folder: Path, rank: int = 0, ranks: int = 1, packs: int = PACKS) -> Loader:
    dataset = Dataset(folder, "train")
    return Loader(dataset, make_plan(dataset, packs), rank, ranks)


def kept(step: Step) -> Step:
    """A step whose batches outlive it: their tensors are copied."""
    batches = [
        Batch(
            batch.input_ids.clone(),
            batch.labels.clone(),
            batch.segment_lengths,
            tuple(canvas.clone() for canvas in batch.canvases),
            batch.ids,
        )
        for batch in step.batches
    ]
    return Step(step.packs, batches, step.at, step.after, step.wait_seconds)


def first_steps(loader: Loader, count: int, start: Position = START) -> list[Step]:
    with closing(loader.steps(start)) as steps:
        return [kept(step) for step in islice(steps, count)]


def names(step: Step) -> list[tuple[str, ...]]:
    return [batch.ids for batch in step.batches]


def assert_equal(one: Batch, other: Batch) -> None:
    assert (one.ids, one.segment_lengths) == (other.ids, other.segment_lengths)
    assert torch.equal(one.input_ids, other.input_ids) and torch.equal(one.labels, other.labels)
    for canvas, expected in zip(one.canvases, other.canvases, strict=True):
        assert torch.equal(canvas, expected)


def assert_goes_on(rest: list[Step], expected: list[Step]) -> None:
    assert len(rest) == len(expected)
    for step, other in zip(rest, expected, strict=True):
        assert (step.at, step.after) == (other.at, other.after)
        for one, two in zip(step.batches, other.batches, strict=True):
            assert_equal(one, two)


def loader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("loader")]


def watch(loader: Loader, act: Callable[[int], Any]) -> None:
    """Do something with the number of every sample before it is read, in the thread that reads."""
    read = loader.dataset.read_into

    def watched(index: int, buffer: Any) -> Sample:
        act(index)
        return read(index, buffer)

    loader.dataset.read_into = watched  # type: ignore[method-assign]


# --- which packs, in which order ---


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


def test_batches_are_the_samples_of_the_packs_laid_end_to_end(folder: Path) -> None:
    loader = make_loader(folder)
    dataset = Dataset(folder, "train")
    for step in first_steps(loader, 5):
        assert len(step.packs) == len(step.batches) == PACKS
        for pack, batch in zip(step.packs, step.batches, strict=True):
            assert pack.dtype == np.int64
            assert_equal(batch, collate([dataset[int(sample)] for sample in pack]))


@pytest.mark.parametrize("name", ["zstd", "png"])
def test_exact_codecs_give_the_same_batches(tmp_path: Path, name: CodecName) -> None:
    raw = make_loader(write_samples(tmp_path / "raw", some_samples(12)))
    encoded = make_loader(write_samples(tmp_path / name, some_samples(12), codec=Codec(name)))
    assert_goes_on(first_steps(encoded, 3), first_steps(raw, 3))


def test_a_mixture_is_loaded_as_a_dataset_is(tmp_path: Path, folder: Path) -> None:
    other = write_samples(tmp_path, some_samples(5, seed=1), codec=Codec("zstd"))
    mixture = open_datasets([folder, other], "train", weights=[1, 2])
    seen: list[int] = []
    for step in Loader(mixture, make_plan(mixture), 0, 1).steps(START, epochs=1):
        for pack, batch in zip(step.packs, step.batches, strict=True):
            assert_equal(batch, collate([mixture[int(sample)] for sample in pack]))
            seen += pack.tolist()
    assert sorted(seen) == sorted([*range(29), *range(29, 34), *range(29, 34)])


def test_steps_come_in_the_order_of_the_plan_whichever_thread_is_first(folder: Path) -> None:
    loader = make_loader(folder)
    delays = random.Random(0)
    watch(loader, lambda _: time.sleep(delays.choice([0, 0.002, 0.01])))
    assert_goes_on(first_steps(loader, 9), first_steps(make_loader(folder), 9))


@pytest.mark.parametrize("epochs", [1, 2])
@pytest.mark.parametrize("ranks", [1, 4])
def test_whole_epochs_show_every_sample(folder: Path, epochs: int, ranks: int) -> None:
    loaders = [make_loader(folder, rank, ranks) for rank in range(ranks)]
    runs = [[kept(step) for step in loader.steps(START, epochs)] for loader in loaders]
    seen = [name for steps in runs for step in steps for ids in names(step) for name in ids]
    assert sorted(seen) == sorted([f"s{k}" for k in range(29)] * epochs)
    assert {len(steps) for steps in runs} == {loaders[0].plan.count(epochs)}
    assert runs[0][-1].after == Position(epochs)


def test_an_empty_pack_is_one_untrained_token(tmp_path: Path) -> None:
    """Three samples cannot make four packs, and every rank must take part."""
    loader = make_loader(write_samples(tmp_path, some_samples(3)))
    (step,) = loader.steps(START, epochs=1)
    empty = [pack for pack in step.packs if not len(pack)]
    assert len(step.batches) == PACKS and empty
    assert names(step).count(()) == len(empty)


# --- resuming ---


def test_a_loader_started_behind_any_step_goes_on_with_the_next(folder: Path) -> None:
    whole = first_steps(make_loader(folder), 9)
    for number in range(8):
        rest = first_steps(make_loader(folder), 8 - number, whole[number].after)
        assert_goes_on(rest, whole[number + 1 :])


def test_another_number_of_ranks_goes_on_with_the_same_step(folder: Path) -> None:
    after, following = first_steps(make_loader(folder, 0, 2), 2)[0].after, 1
    expected = names(first_steps(make_loader(folder), 2)[following])
    shared = [first_steps(make_loader(folder, rank, 4), 1, after)[0] for rank in range(4)]
    assert [names(step)[0] for step in shared] == expected


def test_steps_that_are_left_out_are_passed_over(folder: Path) -> None:
    whole = first_steps(make_loader(folder), 6)
    steps = make_loader(folder).steps(START, left_out={whole[1].at, whole[4].at})
    assert [next(steps).at for _ in range(4)] == [whole[k].at for k in (0, 2, 3, 5)]
    steps.close()


def test_one_pack_fills_every_place_of_every_step_and_is_resumed_anywhere(folder: Path) -> None:
    dataset = Dataset(folder, "train")
    plan = make_plan(dataset)
    first = next(plan.steps(START)).packs[0]
    for rank, start in ((0, START), (1, Position(3, 1, 2))):
        for step in first_steps(Loader(dataset, OnePack(plan), rank, 2), 20, start):
            assert [pack.tolist() for pack in step.packs] == [first.tolist()] * PACKS
            assert (step.at, step.after) == (START, START)
            for batch in step.batches:
                assert_equal(batch, collate([dataset[int(sample)] for sample in first]))


# --- memory ---


@pytest.mark.parametrize(("packs", "ahead"), [(1, AHEAD), (2, AHEAD // 2), (2 * AHEAD, 1)])
def test_so_many_packs_are_read_ahead_and_no_more(folder: Path, packs: int, ahead: int) -> None:
    loader = make_loader(folder, packs=packs)
    read: list[int] = []
    watch(loader, read.append)
    expected = [step.packs for step in first_steps(make_loader(folder, packs=packs), 1 + ahead)]
    with closing(loader.steps(START)) as steps:
        next(steps)
        samples = sorted(int(i) for step in expected for pack in step for i in pack)
        give_up = time.monotonic() + 20
        while len(read) < len(samples) and time.monotonic() < give_up:
            time.sleep(0.01)
        time.sleep(0.1)  # in which more would be read
        assert sorted(read) == samples


def test_a_step_stays_as_it_is_until_the_next_is_taken(folder: Path) -> None:
    """All that may be read ahead has been read by the time it is compared a second time."""
    dataset = Dataset(folder, "train")
    with closing(make_loader(folder).steps(START)) as steps:
        for step in islice(steps, 12):
            expected = [collate([dataset[int(i)] for i in pack]) for pack in step.packs]
            for _ in range(2):
                for batch, other in zip(step.batches, expected, strict=True):
                    assert_equal(batch, other)
                time.sleep(0.03)


@pytest.mark.parametrize("packs", [1, PACKS])
def test_memory_is_used_again(folder: Path, packs: int) -> None:
    """One pack for ever, so that no arena has to grow."""
    dataset = Dataset(folder, "train")
    loader = Loader(dataset, OnePack(make_plan(dataset, packs)), 0, 1)
    held = packs * (1 + -(-AHEAD // packs))
    with closing(loader.steps(START)) as steps:
        places = [b.input_ids.data_ptr() for s in islice(steps, 30) for b in s.batches]
    assert len(set(places)) <= held < len(places)


def test_the_last_steps_survive_the_loader(folder: Path) -> None:
    dataset = Dataset(folder, "train")
    with closing(make_loader(folder).steps(START)) as steps:
        step = next(steps)
    for pack, batch in zip(step.packs, step.batches, strict=True):
        assert_equal(batch, collate([dataset[int(i)] for i in pack]))


# --- failures ---


def test_a_step_says_how_long_it_was_waited_for(folder: Path) -> None:
    loader = make_loader(folder, packs=1)
    watch(loader, lambda _: time.sleep(0.05))
    with closing(loader.steps(START)) as steps:
        first = next(steps)
        assert first.wait_seconds > 0.05 * len(first.packs[0])
        time.sleep(1)
        assert next(steps).wait_seconds < 0.05


def test_a_damaged_shard_stops_the_consumer_with_its_name(tmp_path: Path) -> None:
    folder = write_samples(tmp_path, some_samples(20))
    path = folder / "train-00000.arrow"
    path.write_bytes(path.read_bytes()[:300] + bytes(path.stat().st_size - 300))
    with pytest.raises(ShardError, match=r"train-00000\.arrow is damaged at sample"):
        list(make_loader(folder).steps(START, epochs=1))
    assert not loader_threads()


def test_a_shard_that_is_cut_off_while_it_is_read_stops_the_consumer(tmp_path: Path) -> None:
    folder = write_samples(tmp_path, some_samples(20))
    with pytest.raises(ShardError, match=r"train-00000\.arrow cannot be read at sample .*it ends"):
        for _ in make_loader(folder).steps(START):
            os.truncate(folder / "train-00000.arrow", 300)
    assert not loader_threads()


def test_steps_before_a_failure_are_handed_over(folder: Path) -> None:
    expected = first_steps(make_loader(folder), 2)
    lost = int(expected[1].packs[1][0])

    def fail(index: int) -> None:
        if index == lost:
            raise ShardError("gone")

    loader, seen = make_loader(folder), []
    watch(loader, fail)
    with pytest.raises(ShardError, match="gone"):
        for step in loader.steps(START):
            seen.append(kept(step))
    assert_goes_on(seen, expected[:1])
    assert not loader_threads()


class Unfinished:
    """A plan that breaks off behind its first step."""

    packs_per_step = PACKS

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def steps(self, start: Position, epochs: int | None = None) -> Iterator[PlannedStep]:
        yield next(self.plan.steps(start, epochs))
        raise LookupError("no further")


def test_a_plan_that_fails_stops_the_consumer(folder: Path) -> None:
    loader = make_loader(folder)
    loader.plan = Unfinished(loader.plan)  # type: ignore[assignment, arg-type]
    steps = loader.steps(START)
    assert next(steps).batches
    with pytest.raises(LookupError, match="no further"):
        next(steps)
    assert not loader_threads()


@pytest.mark.parametrize("taken", [1, 3])
def test_no_thread_is_left_when_the_consumer_stops(folder: Path, taken: int) -> None:
    loader = make_loader(folder)
    watch(loader, lambda _: time.sleep(0.001))
    steps = loader.steps(START)
    for _ in range(taken):
        next(steps)
    assert loader_threads()
    steps.close()
    assert not loader_threads()


def test_no_thread_is_left_when_the_epochs_end_or_the_consumer_fails(folder: Path) -> None:
    assert list(make_loader(folder).steps(START, epochs=1))
    assert not loader_threads()
    with pytest.raises(ZeroDivisionError):
        for _ in make_loader(folder).steps(START):
            1 / 0  # noqa: B018
    assert not loader_threads()


# --- on the device ---


def test_batches_reach_the_device_in_order_each_when_it_is_asked_for(folder: Path) -> None:
    loader = make_loader(folder)
    step = first_steps(loader, 1)[0]
    asked: list[str] = []

    def source() -> Iterator[Batch]:
        for number, batch in enumerate(step.batches):
            asked.append(f"send {number}")
            yield batch

    for number, batch in enumerate(loader.on_device(source())):
        asked.append(f"use {number}")
        assert_equal(batch, step.batches[number])
    assert asked == "send 0,send 1,use 0,send 2,use 1,send 3,use 2,use 3".split(",")
    assert list(loader.on_device([])) == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_batches_on_cuda_are_those_of_the_packs(folder: Path) -> None:
    device = torch.device("cuda", 0)
    dataset = Dataset(folder, "train")
    loader = Loader(dataset, make_plan(dataset), 0, 1, device)
    with closing(loader.steps(START)) as steps:
        for step in islice(steps, 20):
            assert all(c.is_pinned() for b in step.batches for c in b.canvases)
            for pack, sent in zip(step.packs, loader.on_device(step.batches), strict=True):
                assert all(canvas.is_cuda for canvas in sent.canvases)
                on_host = sent.to(torch.device("cpu"))
                assert_equal(on_host, collate([dataset[int(i)] for i in pack]))

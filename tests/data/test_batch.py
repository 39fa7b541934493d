"""A batch is its samples laid end to end, every position in its place, in memory that is reused."""

from pathlib import Path

import numpy as np
import pytest
import torch

from phi3v.data import Dataset
from phi3v.data.batch import ALIGNMENT, Arena, Batch, collate, model_inputs, row_bytes
from phi3v.data.codecs import NAMES, Codec, CodecName
from phi3v.geometry import Grid
from phi3v.sample import IGNORED
from phi3v.views import ViewSettings, make_views
from tests.tiny import CROP, make_sample, write_samples

SETTINGS = ViewSettings(CROP, (0.5, 0.4, 0.3), (0.25, 0.2, 0.1))
SAMPLES = [
    make_sample("a", 6, [(1, 1), (2, 1)]),
    make_sample("b", 9),
    make_sample("c", 4, [(1, 3)]),
]


def test_samples_lie_end_to_end() -> None:
    batch = collate(SAMPLES)
    assert batch.input_ids.dtype == batch.labels.dtype == torch.int64
    assert batch.segment_lengths == tuple(len(s.input_ids) for s in SAMPLES)
    assert batch.tokens == sum(batch.segment_lengths)
    assert batch.ids == ("a", "b", "c")
    ids = batch.input_ids[0].split(batch.segment_lengths)
    labels = batch.labels[0].split(batch.segment_lengths)
    for k, sample in enumerate(SAMPLES):
        assert ids[k].tolist() == sample.input_ids.tolist()
        assert labels[k].tolist() == sample.labels.tolist()
    assert batch.label_tokens == sum(int((s.labels != IGNORED).sum()) for s in SAMPLES)


def test_canvases_come_in_order_and_in_memory_of_their_own(tmp_path: Path) -> None:
    dataset = Dataset(write_samples(tmp_path, SAMPLES), "train")
    batch = collate(list(dataset))
    expected = [canvas.pixels for sample in dataset for canvas in sample.images]
    assert len(batch.canvases) == 3
    for canvas, pixels in zip(batch.canvases, expected, strict=True):
        assert canvas.dtype == torch.uint8
        assert np.array_equal(canvas.numpy(), pixels)
        assert not np.shares_memory(canvas.numpy(), pixels)  # the map is read-only


def test_the_model_gets_the_views_of_all_canvases_and_their_grids() -> None:
    batch = collate(SAMPLES)
    inputs = model_inputs(batch, SETTINGS, torch.device("cpu"))
    assert inputs["grids"] == [Grid(1, 1), Grid(2, 1), Grid(1, 3)]
    assert inputs["views"].shape == (2 + 3 + 4, 3, CROP, CROP)
    assert torch.equal(inputs["views"][2:5], make_views(batch.canvases[1], SETTINGS))
    assert inputs["segment_lengths"] == batch.segment_lengths
    assert torch.equal(inputs["input_ids"], batch.input_ids)


def test_a_pack_of_texts_has_no_views() -> None:
    inputs = model_inputs(collate(SAMPLES[1:2]), SETTINGS, torch.device("cpu"))
    assert "views" not in inputs and "grids" not in inputs


def test_a_pack_of_no_samples_is_one_untrained_token() -> None:
    batch = collate([])
    assert batch.input_ids.tolist() == [[0]]
    assert batch.labels.tolist() == [[IGNORED]]
    assert (batch.segment_lengths, batch.label_tokens) == ((1,), 0)
    assert (batch.canvases, batch.ids) == ((), ())
    assert batch.input_ids.dtype == batch.labels.dtype == torch.int64


# --- arenas ---


def read(dataset: Dataset, indices: list[int], arena: Arena) -> Batch:
    """Samples read straight into an arena, as the loader does it."""
    tokens = int(dataset.tokens[indices].sum())
    arena.reset(row_bytes(tokens) + int((dataset.memory_bytes[indices] + ALIGNMENT).sum()))
    buffers = [arena.take(int(dataset.message_bytes[index])).numpy() for index in indices]
    samples = [dataset.read_into(i, buffer) for i, buffer in zip(indices, buffers, strict=True)]
    return collate(samples, arena)


def tensors_of(batch: Batch) -> tuple[torch.Tensor, ...]:
    return batch.input_ids, batch.labels, *batch.canvases


def assert_equal(one: Batch, other: Batch) -> None:
    assert (one.ids, one.segment_lengths) == (other.ids, other.segment_lengths)
    assert all(map(torch.equal, tensors_of(one), tensors_of(other)))


def memory_of(arena: Arena) -> range:
    return range(arena._memory.data_ptr(), arena._memory.data_ptr() + len(arena._memory))


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_in_an_arena_is_the_same_and_lies_there_whole(
    tmp_path: Path, name: CodecName
) -> None:
    dataset = Dataset(write_samples(tmp_path, SAMPLES, codec=Codec(name)), "train")
    arena = Arena()
    for indices in ([2], [0, 1, 2], [1, 0]):
        batch = read(dataset, indices, arena)
        assert_equal(batch, collate([dataset[index] for index in indices]))
        for tensor in tensors_of(batch):
            assert tensor.data_ptr() in memory_of(arena)
            assert tensor.data_ptr() + tensor.nbytes - 1 in memory_of(arena)


def test_raw_canvases_stay_where_they_were_read(tmp_path: Path) -> None:
    """Room for the messages and the rows is room enough: nothing is copied."""
    dataset = Dataset(write_samples(tmp_path, SAMPLES), "train")
    arena = Arena()
    batch = read(dataset, [0], arena)
    end = max(canvas.data_ptr() + canvas.nbytes for canvas in batch.canvases)
    assert arena._memory.data_ptr() <= batch.canvases[0].data_ptr() < end
    assert end <= batch.input_ids.data_ptr()  # the rows were laid behind the message


def test_an_arena_grows_to_the_largest_batch_and_is_used_again(tmp_path: Path) -> None:
    dataset = Dataset(write_samples(tmp_path, SAMPLES), "train")
    arena = Arena()
    read(dataset, [0, 2], arena)
    memory = memory_of(arena)
    for indices in ([1], [0], [2, 1], [0, 2]):
        read(dataset, indices, arena)
        assert memory_of(arena) == memory
    read(dataset, [0, 1, 2], arena)
    assert len(memory_of(arena)) > len(memory)


def test_pieces_of_an_arena_are_aligned_and_do_not_overlap() -> None:
    arena = Arena()
    arena.reset(4 * ALIGNMENT)
    pieces = [arena.take(size) for size in (1, ALIGNMENT, ALIGNMENT + 1)]
    first = pieces[0].data_ptr()
    assert [piece.data_ptr() - first for piece in pieces] == [0, 64, 128]
    assert [len(piece) for piece in pieces] == [1, 64, 65]
    with pytest.raises(AssertionError, match="too small"):
        arena.take(1)


class Copies:
    """What CUDA still copies: done once somebody has waited for it."""

    is_done = False

    def synchronize(self) -> None:
        self.is_done = True


def test_an_arena_is_not_filled_before_it_has_been_copied_from() -> None:
    arena, copies = Arena(), Copies()
    arena._copied = copies  # type: ignore[assignment]
    arena.reset(10)
    assert copies.is_done


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_batch_reaches_the_device_from_pinned_memory(tmp_path: Path) -> None:
    device = torch.device("cuda", 0)
    dataset, arena = Dataset(write_samples(tmp_path, SAMPLES), "train"), Arena(device)
    for indices in ([0, 1], [2, 0]):
        batch = read(dataset, indices, arena)
        assert all(tensor.is_pinned() for tensor in tensors_of(batch))
        sent = batch.to(device)
        arena.release()
        arena.reset(0)  # waits until the copies are done
        assert_equal(sent.to(torch.device("cpu")), collate([dataset[i] for i in indices]))

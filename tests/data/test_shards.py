"""What is written is what is read, bit for bit, by us and by `datasets`."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from phi3v.data import Dataset
from phi3v.data.codecs import NAMES, Codec, CodecName
from phi3v.data.format import INDEX_SCHEMA, SCHEMA
from phi3v.sample import IGNORED, Canvas, Sample
from tests.tiny import assert_same, make_sample, num_views, write_samples

KINDS = [
    ("text only", 6, []),
    ("one image", 9, [(1, 1)]),
    ("three images", 7, [(2, 1), (1, 1), (1, 3)]),
    ("long text", 3000, []),
    ("r\u00f6w \U0001f600", 2, [(2, 2)]),
]
SAMPLES = [make_sample(name, text, grids) for name, text, grids in KINDS]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """All kinds of samples in shards of one or two."""
    return write_samples(tmp_path / "shards", SAMPLES, shard_bytes=10_000)


def test_samples_come_back_bit_for_bit_in_any_order(folder: Path) -> None:
    dataset = Dataset(folder, "train")
    assert len(dataset) == len(SAMPLES)
    for index in (4, 0, 3, 1, 2, 0):
        assert_same(dataset[index], SAMPLES[index])
    for read, written in zip(dataset, SAMPLES, strict=True):
        assert_same(read, written)


grids = st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3)), max_size=3)
kinds = st.lists(st.tuples(st.text(max_size=9), st.integers(1, 50), grids), max_size=6)


@settings(max_examples=12, deadline=None)
@given(kinds, st.integers(1, 60_000))
def test_any_samples_in_shards_of_any_size_come_back(
    tmp_path_factory: pytest.TempPathFactory, kinds: list, shard_bytes: int
) -> None:
    samples = [make_sample(*kind) for kind in kinds]
    folder = write_samples(tmp_path_factory.mktemp("any"), samples, shard_bytes=shard_bytes)
    dataset = Dataset(folder, "train")
    for read, written in zip(dataset, samples, strict=True):
        assert_same(read, written)
    assert dataset.image_tokens.tolist() == [int((s.input_ids < 0).sum()) for s in samples]
    dataset.verify()


@pytest.mark.parametrize("name", NAMES)
def test_datasets_opens_every_shard_and_sees_the_same(tmp_path: Path, name: CodecName) -> None:
    codec = Codec(name)
    folder = write_samples(tmp_path, SAMPLES, shard_bytes=10_000, codec=codec)
    rows = []
    for shard in Dataset(folder, "train").entry["shards"]:
        opened = datasets.Dataset.from_file(str(folder / shard["file"]))
        assert opened.column_names == SCHEMA.names
        assert len(opened) == shard["samples"]
        rows += list(opened)
    for row, sample in zip(rows, SAMPLES, strict=True):
        assert (row["id"], row["input_ids"]) == (sample.id, sample.input_ids.tolist())
        assert row["labels"] == sample.labels.tolist()
        for image, canvas in zip(row["images"], sample.images, strict=True):
            assert (image["height"], image["width"]) == canvas.size
            assert image["pixels"] == bytes(codec.encode(canvas.pixels))


def test_shards_are_arrow_streams_of_the_promised_columns(folder: Path) -> None:
    for path in folder.glob("train-*.arrow"):
        with pa.ipc.open_stream(path.read_bytes()) as stream:
            assert stream.schema.equals(SCHEMA)
            assert [batch.num_rows for batch in stream] == [1] * stream.stats.num_record_batches
    with pa.ipc.open_stream((folder / "train.index.arrow").read_bytes()) as stream:
        assert stream.schema.equals(INDEX_SCHEMA)


def test_the_index_knows_every_sample_without_reading_it(folder: Path) -> None:
    dataset = Dataset(folder, "train")
    expected = {
        "tokens": [len(s.input_ids) for s in SAMPLES],
        "label_tokens": [int((s.labels != IGNORED).sum()) for s in SAMPLES],
        "views": [num_views(s) for s in SAMPLES],
        "image_tokens": [int((s.input_ids < 0).sum()) for s in SAMPLES],
    }
    for name, values in expected.items():
        assert getattr(dataset, name).tolist() == values, name
        assert dataset.entry[name] == sum(values), name


def test_the_index_of_real_samples_agrees_with_them(tiny_shards: Path) -> None:
    dataset = Dataset(tiny_shards, "train")
    samples = list(dataset)
    assert dataset.tokens.tolist() == [len(s.input_ids) for s in samples]
    assert dataset.image_tokens.tolist() == [int((s.input_ids < 0).sum()) for s in samples]
    assert len(set(dataset.image_tokens.tolist())) > 1, "all canvases have one size"


@pytest.mark.parametrize("name", NAMES)
def test_both_ways_of_reading_give_what_the_codec_gives(tmp_path: Path, name: CodecName) -> None:
    codec = Codec(name)
    dataset = Dataset(write_samples(tmp_path, SAMPLES, codec=codec), "train")
    buffer = np.zeros(int(dataset.message_bytes.max()), np.uint8)
    for index in (4, 0, 3, 1, 2, 0):
        canvases = [
            Canvas(codec.decode(memoryview(codec.encode(image.pixels)), *image.size))
            for image in SAMPLES[index].images
        ]
        expected = replace(SAMPLES[index], images=tuple(canvases))
        assert_same(dataset[index], expected)
        assert_same(dataset.read_into(index, buffer), expected)


@pytest.mark.parametrize(
    "make", [bytearray, lambda size: torch.zeros(size, dtype=torch.uint8).numpy()]
)
def test_a_sample_read_into_a_buffer_lies_in_it(folder: Path, make: Callable[[int], Any]) -> None:
    """No byte is copied again: arrays are views, and canvases can be written to."""
    dataset = Dataset(folder, "train")
    size = int(dataset.message_bytes.max())
    buffer = make(size + 100)
    memory = np.frombuffer(buffer, np.uint8)
    memory[size:] = 7
    for index in (2, 1):
        sample = dataset.read_into(index, buffer)
        for array in (sample.input_ids, sample.labels, *(c.pixels for c in sample.images)):
            assert np.shares_memory(array, memory)
        assert all(canvas.pixels.flags.writeable for canvas in sample.images)
    assert (memory[size:] == 7).all(), "written behind the sample"


@pytest.mark.parametrize(("buffer", "kind"), [(bytearray(9), "writable"), (bytes(9), "read-only")])
def test_a_buffer_that_cannot_hold_a_sample_is_refused(
    folder: Path, buffer: Any, kind: str
) -> None:
    dataset = Dataset(folder, "train")
    size = dataset.message_bytes[1]
    with pytest.raises(ValueError) as caught:
        dataset.read_into(1, buffer)
    assert str(caught.value) == (
        f"sample 1 needs a writable buffer of {size:,} bytes, got a {kind} one of 9; make it as "
        "large as the largest of Dataset.message_bytes"
    )
    with pytest.raises(ValueError, match="got a read-only one"):
        dataset.read_into(1, bytes(size))


def test_threads_read_at_once_into_buffers_of_their_own(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one file kept open and shards of one or two samples, threads close each other's."""
    monkeypatch.setattr("phi3v.data.reader.OPEN_SHARDS", 1)
    before = open_shards()
    dataset = Dataset(folder, "train")
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(partial(read_many, dataset), range(4)))
    assert open_shards() - before == 1
    del dataset
    assert open_shards() == before


def read_many(dataset: Dataset, start: int) -> None:
    buffer = np.zeros(int(dataset.message_bytes.max()), np.uint8)
    for index in range(start, start + 200):
        assert_same(dataset.read_into(index % 5, buffer), SAMPLES[index % 5])


def open_shards() -> int:
    """Shards that this process holds open."""
    count = 0
    for link in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # closed by another thread
            count += link.readlink().name.startswith("train-0000")
    return count


def test_pixels_are_read_only_views_of_the_memory_map(folder: Path) -> None:
    """No byte of a canvas is copied before the batch needs it: its address lies in the file."""
    sample = Dataset(folder, "train")[2]
    arrays = [sample.input_ids, sample.labels, *(canvas.pixels for canvas in sample.images)]
    for array in arrays:
        assert not array.flags.writeable
        assert "train-0000" in mapped_file(array)


def mapped_file(array: np.ndarray) -> str:
    """The file in which Linux says that this memory lies."""
    address = array.__array_interface__["data"][0]
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, stop = (int(end, 16) for end in line.split()[0].split("-"))
        if start <= address < stop:
            return line
    return ""


def test_a_split_without_samples_is_a_dataset_of_length_0(tmp_path: Path) -> None:
    dataset = Dataset(write_samples(tmp_path, [], split="validation"), "validation")
    assert (len(dataset), list(dataset), dataset.image_tokens.tolist()) == (0, [], [])
    dataset.verify()


def test_a_sample_before_the_first_or_behind_the_last_is_an_index_error(folder: Path) -> None:
    dataset = Dataset(folder, "train")
    for index in (-1, len(SAMPLES)):
        with pytest.raises(IndexError, match=f"sample {index} of 5"):
            dataset[index]
        with pytest.raises(IndexError, match=f"sample {index} of 5"):
            dataset.read_into(index, bytearray(100_000))


def test_a_prompt_is_what_comes_before_the_last_answer(folder: Path) -> None:
    sample: Sample = Dataset(folder, "train")[1]
    assert np.array_equal(sample.prompt_ids, sample.input_ids[sample.labels == IGNORED])


def test_every_other_mixed_sample_has_no_picture(mixed_shards: Path) -> None:
    """What tests of packs with and without images rely on."""
    dataset = Dataset(mixed_shards, "train")
    assert [views > 0 for views in dataset.views.tolist()] == [True, False] * 24
    assert dataset.tokens.max() <= 80

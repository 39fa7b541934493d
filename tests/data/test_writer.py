"""A shard is whole or absent, and its bytes depend on its samples alone."""

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from phi3v.data import Dataset
from phi3v.data.codecs import NAMES, Codec, CodecName
from phi3v.data.format import FORMAT_VERSION, INDEX_SCHEMA
from phi3v.data.writer import ShardWriter, finish_split
from phi3v.errors import ShardError
from phi3v.files import sha256, write_json
from phi3v.sample import Canvas, Sample
from tests.tiny import CROP, RAW, SIDE, assert_same, make_sample

SAMPLES = [
    make_sample("a", 6, [(1, 1), (2, 1)]),
    make_sample("b", 9),
    make_sample("c", 5, [(1, 3)]),
]


def write_shard(
    path: Path, samples: Sequence[Sample], codec: Codec = RAW, times: Sequence[int] = (1, 1, 1)
) -> tuple[dict, pa.Table]:
    writer = ShardWriter(path, codec, CROP, SIDE)
    for sample, count in zip(samples, times, strict=False):
        writer.add(sample, count)
    return writer.finish(), writer.index


def publish(folder: Path, entries: list[dict], tables: list[pa.Table]) -> Dataset:
    entry = finish_split(folder, "train", entries, tables)
    pixels = RAW.to_manifest()
    manifest = {"format_version": FORMAT_VERSION, "pixels": pixels, "splits": {"train": entry}}
    write_json(folder / "manifest.json", manifest)
    return Dataset(folder, "train")


@pytest.mark.parametrize("name", NAMES)
def test_a_shards_entry_is_true(tmp_path: Path, name: CodecName) -> None:
    path = tmp_path / "train-00000.arrow"
    entry, _ = write_shard(path, SAMPLES, Codec(name))
    size = path.stat().st_size
    assert entry == {"file": path.name, "samples": 3, "bytes": size, "sha256": sha256(path)}


def test_a_shard_has_its_name_only_once_it_is_finished(tmp_path: Path) -> None:
    path = tmp_path / "train-00000.arrow"
    writer = ShardWriter(path, RAW, CROP, SIDE)
    writer.add(SAMPLES[0])
    assert not path.exists()
    writer.finish()
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_an_abandoned_shard_leaves_nothing(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "train-00000.arrow", RAW, CROP, SIDE)
    writer.add(SAMPLES[0])
    assert len(list(tmp_path.iterdir())) == 1
    del writer
    assert not list(tmp_path.iterdir())


def test_an_abandoned_shard_leaves_the_one_before_it(tmp_path: Path) -> None:
    path = tmp_path / "train-00000.arrow"
    entry, _ = write_shard(path, SAMPLES)
    writer = ShardWriter(path, RAW, CROP, SIDE)
    writer.add(SAMPLES[0])
    del writer
    assert sha256(path) == entry["sha256"]


def test_there_is_no_shard_of_no_samples(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "train-00000.arrow", RAW, CROP, SIDE)
    with pytest.raises(AssertionError, match="no sample was added"):
        writer.finish()


@pytest.mark.parametrize("name", NAMES)
def test_bytes_depend_on_the_samples_alone(tmp_path: Path, name: CodecName) -> None:
    """Not on where arrays lie, nor on their strides, nor on what else is in memory."""
    first, _ = write_shard(tmp_path / "first.arrow", SAMPLES, Codec(name))
    moved = [replace(s, images=tuple(map(scattered, s.images))) for s in SAMPLES]
    moved = [replace(s, input_ids=np.repeat(s.input_ids, 2)[::2]) for s in moved]
    assert not any(canvas.pixels.flags.c_contiguous for s in moved for canvas in s.images)
    second, _ = write_shard(tmp_path / "second.arrow", moved, Codec(name))
    assert first["sha256"] == second["sha256"]


def scattered(canvas: Canvas) -> Canvas:
    """The same pixels, among others."""
    height, width = canvas.size
    memory = np.random.default_rng(5).integers(0, 256, (height, 2 * width + 1, 3), dtype=np.uint8)
    memory[:, 1::2] = canvas.pixels
    return Canvas(memory[:, 1::2])


def test_gaps_between_a_messages_buffers_are_zeros(tmp_path: Path) -> None:
    """Of a sample of nothing but 0xFF: what is neither that nor metadata is padding."""
    canvas = Canvas(np.full((CROP, CROP, 3), 255, np.uint8))
    ones = np.full(3, -1, np.int32)
    path = tmp_path / "train-00000.arrow"
    _, index = write_shard(path, [Sample("\u00ff", ones, ones, (canvas,), {})])
    message = path.read_bytes()[index["offset"][0].as_py() :]
    head = 8 + int.from_bytes(message[4:8], "little")
    body = message[head : index["bytes"][0].as_py()]
    offsets = [1, 2, 3, CROP, canvas.pixels.size]
    assert set(body) <= {0, 255, 0xC3, 0xBF, *b"{}", *np.array(offsets, "<i8").tobytes()}


def test_the_index_places_every_message(tmp_path: Path) -> None:
    path = tmp_path / "train-00000.arrow"
    entry, index = write_shard(path, SAMPLES)
    assert index.schema.equals(INDEX_SCHEMA)
    data = path.read_bytes()
    for row in index.to_pylist():
        message = data[row["offset"] : row["offset"] + row["bytes"]]
        batch = pa.ipc.read_record_batch(pa.py_buffer(message), pa.ipc.open_stream(path).schema)
        assert len(batch["input_ids"][0]) == row["tokens"]
    assert row["offset"] + row["bytes"] + 8 == entry["bytes"]


def test_a_sample_taken_several_times_is_listed_so_and_stored_once(tmp_path: Path) -> None:
    once, _ = write_shard(tmp_path / "once.arrow", SAMPLES)
    first, table = write_shard(tmp_path / "train-00000.arrow", SAMPLES, times=[2, 1, 3])
    assert first["sha256"] == once["sha256"]
    second, other = write_shard(tmp_path / "train-00001.arrow", SAMPLES[:1], times=[2])
    dataset = publish(tmp_path, [first, second], [table, other])
    assert [entry["samples"] for entry in dataset.entry["shards"]] == [3, 1]
    assert len(dataset) == dataset.entry["samples"] == 8
    for read, written in zip(dataset, [SAMPLES[k] for k in (0, 0, 1, 2, 2, 2, 0, 0)], strict=True):
        assert_same(read, written)
    assert dataset.entry["tokens"] == dataset.tokens.sum()
    assert dataset.tokens.tolist() == [len(sample.input_ids) for sample in dataset]


def test_a_sample_is_taken_once_at_least(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "train-00000.arrow", RAW, CROP, SIDE)
    with pytest.raises(AssertionError):
        writer.add(SAMPLES[0], times=0)


def test_shards_are_numbered_by_their_place_in_the_split(tmp_path: Path) -> None:
    """Whatever their names: a shard all of whose rows were rejected leaves a hole."""
    parts = [write_shard(tmp_path / f"train-0000{k}.arrow", [SAMPLES[k]]) for k in (0, 2)]
    dataset = publish(tmp_path, [entry for entry, _ in parts], [table for _, table in parts])
    assert_same(dataset[1], SAMPLES[2])
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "manifest.json",
        "train-00000.arrow",
        "train-00002.arrow",
        "train.index.arrow",
    ]


def test_no_more_tables_are_held_than_are_at_hand(tmp_path: Path) -> None:
    """A million samples need no more memory than two shards'."""
    parts = [write_shard(tmp_path / f"train-0000{k}.arrow", [SAMPLES[k % 3]]) for k in range(9)]
    held: list[weakref.ref[pa.Table]] = []

    def tables() -> Iterator[pa.Table]:
        for _, table in parts:
            assert sum(of() is not None for of in held) <= 2
            copy = pa.table(table)
            held.append(weakref.ref(copy))
            yield copy
            del copy

    finish_split(tmp_path, "train", [entry for entry, _ in parts], tables())
    assert len(held) == 9
    with pa.ipc.open_stream(tmp_path / "train.index.arrow") as stream:
        assert [batch["shard"].to_pylist() for batch in stream] == [[k] for k in range(9)]


def test_entries_and_tables_that_do_not_pair_leave_no_index(tmp_path: Path) -> None:
    entry, table = write_shard(tmp_path / "train-00000.arrow", SAMPLES)
    with pytest.raises(ValueError):
        finish_split(tmp_path, "train", [entry], [table, table])
    assert [file.name for file in tmp_path.iterdir()] == ["train-00000.arrow"]


def test_a_part_of_an_index_that_another_version_wrote_is_refused(tmp_path: Path) -> None:
    """As of a prepare that was killed before an update of the program, and goes on after it."""
    entry, table = write_shard(tmp_path / "train-00000.arrow", SAMPLES)
    with pytest.raises(ShardError) as caught:
        publish(tmp_path, [entry], [table.drop_columns(["digest", "meta_digest"])])
    assert str(caught.value) == (
        f"{tmp_path} holds a part of the index of split 'train' with the columns shard, offset, "
        "bytes, tokens, label_tokens, image_tokens, views, image_sizes, as another version of this "
        "program writes it; remove that folder and run launch/prepare.py again"
    )
    assert not list(tmp_path.glob("*.index.arrow"))

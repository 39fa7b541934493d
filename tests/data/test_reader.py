"""A damaged or foreign folder is refused, and the file is named; no damage crashes the reader."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from phi3v.config.schema import Verify
from phi3v.data import Dataset
from phi3v.data.codecs import NAMES, Codec, CodecName
from phi3v.data.format import PREPARE_AGAIN
from phi3v.errors import ShardError
from phi3v.files import sha256
from phi3v.sample import Sample
from tests.tiny import assert_same, make_sample, write_samples

SHARDS = ["train-00000.arrow", "train-00001.arrow"]
FILES = [*SHARDS, "train.index.arrow"]


def three_samples(seed: int = 0) -> list[Sample]:
    grids = [[(1, 1)], [], [(1, 2)]]
    return [make_sample(f"s{k}", 5 + k, grids[k], seed) for k in range(3)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three small samples in two shards."""
    return write_samples(tmp_path / "shards", three_samples(), shard_bytes=4_000)


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """Other samples of the same sizes, so that each file has the size of its namesake."""
    return write_samples(tmp_path / "other", three_samples(seed=1), shard_bytes=4_000)


def read_mapped(dataset: Dataset, index: int) -> Sample:
    return dataset[index]


def read_into(dataset: Dataset, index: int) -> Sample:
    return dataset.read_into(index, np.zeros(int(dataset.message_bytes[index]), np.uint8))


both_ways = pytest.mark.parametrize("read", [read_mapped, read_into])


def edit_manifest(folder: Path, change: Callable[[dict], object]) -> None:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def flip(path: Path, position: int, bits: int = 0xFF) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= bits
    path.write_bytes(data)


def refusal(folder: Path, split: str = "train", verify: Verify | None = None) -> str:
    with pytest.raises(ShardError) as caught:
        Dataset(folder, split, verify)
    return str(caught.value)


@pytest.mark.parametrize("name", FILES)
def test_opening_names_a_missing_file(folder: Path, name: str) -> None:
    (folder / name).unlink()
    assert refusal(folder) == (
        f"{folder / name} is missing though the manifest lists it; "
        "remove the dataset folder and run launch/prepare.py again"
    )


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("difference", [-1, 1])
def test_opening_names_a_file_of_another_size(folder: Path, name: str, difference: int) -> None:
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[:-1] if difference < 0 else data + b"x")
    assert refusal(folder).startswith(
        f"{folder / name} has {len(data) + difference:,} bytes, the manifest says {len(data):,}; "
    )


def test_a_folder_without_a_manifest_is_no_dataset(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    assert refusal(folder) == (
        f"{folder} holds no manifest.json, so it is no dataset; make it with launch/prepare.py"
    )


@pytest.mark.parametrize("text", ["", '{"format_version": 1', "\u00e4", "\x00"])
def test_a_manifest_that_is_no_json_is_named(folder: Path, text: str) -> None:
    (folder / "manifest.json").write_bytes(text.encode("latin-1"))
    assert refusal(folder).startswith(f"{folder}/manifest.json is not valid JSON")


@pytest.mark.parametrize("version", [0, 1, "2", None])
def test_another_format_version_is_refused(folder: Path, version: object) -> None:
    edit_manifest(folder, lambda manifest: manifest.update(format_version=version))
    assert f"manifest.json has format_version {version}, this program reads 2; " in refusal(folder)


def test_a_manifest_that_is_a_list_is_refused(folder: Path) -> None:
    (folder / "manifest.json").write_text("[]")
    assert "manifest.json is a list, not an object of JSON" in refusal(folder)


def test_an_unknown_split_is_refused_with_the_known_ones(folder: Path) -> None:
    assert refusal(folder, "test") == (
        f"{folder} has no split 'test', it has: train; name one of these"
    )


def test_an_index_that_does_not_fit_the_manifest_is_refused(folder: Path) -> None:
    edit_manifest(folder, lambda m: m["splits"]["train"]["shards"][0].update(samples=7))
    assert refusal(folder).startswith(f"{folder}/train.index.arrow cannot be read (it does not ")


@pytest.mark.parametrize(
    ("column", "values"),
    [("bytes", [8, 0, 0]), ("bytes", [0, 8, 0]), ("bytes", [0, 0, 8]), ("offset", [0, 0, 8])],
)
def test_an_index_whose_messages_leave_gaps_is_refused(
    folder: Path, column: str, values: list[int]
) -> None:
    path = folder / "train.index.arrow"
    with pa.ipc.open_stream(path.read_bytes()) as stream:
        table = stream.read_all().combine_chunks()
    number = table.column_names.index(column)
    moved = pa.array(table[column].to_numpy() + values)
    table = table.set_column(number, table.field(number), moved)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table)
    entry = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    edit_manifest(folder, lambda m: m["splits"]["train"]["index"].update(entry))
    assert refusal(folder).startswith(f"{path} cannot be read (it does not list the samples ")


def test_an_index_of_more_samples_than_the_manifest_says_is_refused(folder: Path) -> None:
    edit_manifest(folder, lambda manifest: manifest["splits"]["train"].update(samples=2))
    assert refusal(folder).startswith(f"{folder}/train.index.arrow cannot be read (it does not ")


def test_a_sample_that_comes_in_pieces_is_put_together(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel may give less than was asked for, and gives 2 GiB at most."""
    whole = os.preadv

    def some(handle: int, buffers: list[memoryview], offset: int) -> int:
        return whole(handle, [buffers[0][:1000]], offset)

    monkeypatch.setattr(os, "preadv", some)
    dataset = Dataset(folder, "train")
    assert_same(read_into(dataset, 2), dataset[2])


def test_verify_accepts_what_was_written(folder: Path) -> None:
    Dataset(folder, "train").verify()


@pytest.mark.parametrize("name", SHARDS)
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_verify_names_the_file_with_one_flipped_bit(folder: Path, name: str, share: float) -> None:
    dataset = Dataset(folder, "train")
    flip(folder / name, int(share * (folder / name).stat().st_size), bits=1)
    with pytest.raises(ShardError, match=f"{name} has SHA-256 .* the file is damaged or"):
        dataset.verify()
    with pytest.raises(ShardError, match=name):  # opened after the damage
        Dataset(folder, "train").verify()


def test_verify_names_an_index_with_one_flipped_bit(folder: Path) -> None:
    dataset = Dataset(folder, "train")
    flip(folder / "train.index.arrow", -20, bits=1)
    with pytest.raises(ShardError, match="train.index.arrow has SHA-256"):
        dataset.verify()


@pytest.mark.parametrize("name", FILES)
def test_verify_names_a_file_truncated_since_it_was_opened(folder: Path, name: str) -> None:
    dataset = Dataset(folder, "train")
    (folder / name).write_bytes((folder / name).read_bytes()[:-8])
    with pytest.raises(ShardError, match=f"{name} has [0-9,]+ bytes, the manifest says"):
        dataset.verify()


@pytest.mark.parametrize("name", SHARDS)
def test_verify_names_a_shard_of_another_dataset(folder: Path, other: Path, name: str) -> None:
    """Of the same size, so that opening cannot see it."""
    shutil.copy(other / name, folder / name)
    dataset = Dataset(folder, "train")
    with pytest.raises(ShardError, match=f"{name} has SHA-256 .* or another dataset's; bring it"):
        dataset.verify()


def test_an_index_of_another_dataset_is_refused(folder: Path, tmp_path: Path) -> None:
    """Of as many samples in as many shards, with as many images, of other sizes."""
    grids = [[(2, 1)], [], [(1, 1)]]
    samples = [make_sample(f"s{k}", 5 + k, grids[k]) for k in range(3)]
    foreign = write_samples(tmp_path / "foreign", samples, shard_bytes=4_000)
    name = "train.index.arrow"
    assert (foreign / name).stat().st_size == (folder / name).stat().st_size
    shutil.copy(foreign / name, folder / name)
    told = refusal(folder, verify="size")
    assert told.startswith(f"{folder / name} cannot be read (it does not list the ")
    assert refusal(folder).startswith(f"{folder / name} has SHA-256 ")


@both_ways
def test_a_sample_that_cannot_be_read_is_a_shard_error_naming_file_and_sample(
    folder: Path, read: Callable[[Dataset, int], Sample]
) -> None:
    """Damage that opening cannot see: a shard of the right size full of zeros."""
    path = folder / SHARDS[1]
    path.write_bytes(bytes(path.stat().st_size))
    dataset = Dataset(folder, "train", verify="size")
    read(dataset, 0)
    with pytest.raises(ShardError, match=f"{path} cannot be read at sample 2 .*; remove the"):
        read(dataset, 2)


@both_ways
@pytest.mark.parametrize("damage", ["truncated", "gone"])
def test_a_shard_lost_since_it_was_opened_is_a_shard_error_naming_file_and_sample(
    folder: Path, read: Callable[[Dataset, int], Sample], damage: str
) -> None:
    dataset = Dataset(folder, "train")
    path = folder / SHARDS[1]
    data = path.read_bytes()
    path.unlink()
    if damage == "truncated":
        path.write_bytes(data[:-100])
    with pytest.raises(ShardError, match=f"{path} cannot be read at sample 2 .*; remove the"):
        read(dataset, 2)


@pytest.mark.parametrize("codec", ["tiff", None])
def test_an_unknown_codec_is_refused(folder: Path, codec: str | None) -> None:
    edit_manifest(folder, lambda manifest: manifest.update(pixels={"codec": codec}))
    assert refusal(folder).startswith(
        f"the manifest names pixels.codec {codec!r}, this program reads raw, zstd, png, jpeg; "
    )


@both_ways
@pytest.mark.parametrize("name", ["zstd", "png", "jpeg"])
def test_pixels_that_cannot_be_decoded_are_a_shard_error_naming_file_and_sample(
    tmp_path: Path, name: CodecName, read: Callable[[Dataset, int], Sample]
) -> None:
    """The text and its lengths are whole."""
    samples, codec = three_samples(), Codec(name)
    folder = write_samples(tmp_path, samples, codec=codec)
    path = folder / SHARDS[0]
    good = bytes(codec.encode(samples[2].images[0].pixels))
    data = path.read_bytes()
    assert data.count(good) == 1
    path.write_bytes(data.replace(good, bytes(20) + good[20:]))
    dataset = Dataset(folder, "train", verify="size")
    read(dataset, 0)
    with pytest.raises(ShardError) as caught:
        read(dataset, 2)
    assert str(caught.value) == (
        f"{path} cannot be read at sample 2 ({len(good):,} bytes of {name} are not an image of "
        "28 x 56 pixels); remove the dataset folder and run launch/prepare.py again"
    )


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("codec", NAMES)
@pytest.mark.filterwarnings("ignore:Invalid APNG")
def test_no_flipped_byte_crashes_the_reader(tmp_path: Path, name: str, codec: CodecName) -> None:
    """Measured once over every byte and three patterns: ShardError or other values, no crash."""
    folder = write_samples(tmp_path, three_samples(), shard_bytes=2_000, codec=Codec(codec))
    path = folder / name
    good = path.read_bytes()
    refused = 0
    for position in range(0, len(good), 151):
        flip(path, position)
        for read in (read_mapped, read_into):
            try:
                dataset = Dataset(folder, "train", verify="size")
                for index in range(3):
                    read(dataset, index)
            except ShardError as error:
                assert str(folder) in str(error)
                refused += 1
        path.write_bytes(good)
    assert refused > 3


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ESTALE, "the machine failed, not the dataset: look after the disk or the file"),
        (errno.EMFILE, "the machine failed, not the dataset: look after the disk or the file"),
        (errno.EACCES, "give the right to read it"),
        (errno.ENOENT, PREPARE_AGAIN),
    ],
)
def test_the_advice_fits_what_the_system_says_of_a_shard(
    folder: Path, monkeypatch: pytest.MonkeyPatch, number: int, advice: str
) -> None:
    def failing(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    dataset = Dataset(folder, "train")
    monkeypatch.setattr(os, "open", failing)
    buffer = np.empty(dataset.message_bytes.max(), np.uint8)
    with pytest.raises(ShardError) as caught:
        dataset.read_into(0, buffer)
    assert os.strerror(number) in str(caught.value) and advice in str(caught.value)
    assert (PREPARE_AGAIN in str(caught.value)) == (number == errno.ENOENT)


@pytest.mark.parametrize(
    ("place", "value", "fault"),
    [
        (("splits",), [], "has a list as 'splits', not an object"),
        (
            ("splits", "train", "samples"),
            "2",
            "as 'splits.train.samples', not a whole number",
        ),
        (
            ("splits", "train", "index", "bytes"),
            None,
            "as 'splits.train.index.bytes', not a whole",
        ),
        (
            ("splits", "train", "shards", 0, "file"),
            "../a",
            "as 'splits.train.shards.file', not the name",
        ),
        (("splits", "train", "shards"), [3], "has 3 as 'splits.train.shards', not an object"),
        (("crop_size",), 10**30, "as 'crop_size', not a whole number from 1 to"),
        (("image_std",), [0, 1, 1], "has 0 as 'image_std', not a number above 0"),
    ],
)
def test_a_manifest_of_wrong_types_or_of_files_elsewhere_is_refused(
    folder: Path, place: tuple, value: object, fault: str
) -> None:
    def change(manifest: dict) -> None:
        for key in place[:-1]:
            manifest = manifest[key]
        manifest[place[-1]] = value

    edit_manifest(folder, change)
    assert "manifest.json has " in refusal(folder)
    assert fault in refusal(folder)


def test_a_shard_that_is_a_pipe_is_not_opened(folder: Path) -> None:
    (folder / "train-00000.arrow").unlink()
    os.mkfifo(folder / "train-00000.arrow")
    assert "train-00000.arrow is not a plain file" in refusal(folder)

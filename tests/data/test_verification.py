"""A flipped bit is found by whoever asks: in tokens, labels, pixels, meta, index and manifest."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from phi3v.data import Dataset
from phi3v.data.codecs import NAMES, Codec, CodecName
from phi3v.data.format import DIGESTS, INDEX_SCHEMA_OF_BEFORE, sealed
from phi3v.data.mixture import open_datasets
from phi3v.data.verification import check_files, listed_files
from phi3v.errors import ShardError
from phi3v.files import sha256, write_json
from phi3v.prepare import verify
from phi3v.sample import Sample
from tests.tiny import assert_same, make_sample, write_samples

SAMPLES = [
    make_sample("a", 6, [(1, 1), (2, 1)]),
    make_sample("b", 9),
    make_sample("c", 5, [(1, 3)]),
]
INDEX = "train.index.arrow"

Places = dict[str, Callable[[Sample], bytes]]
PLACES: Places = {  # what of a sample lies in its record as it is
    "id": lambda sample: sample.id.encode(),
    "tokens": lambda sample: sample.input_ids.tobytes(),
    "labels": lambda sample: sample.labels.tobytes(),
    "pixels": lambda sample: sample.images[-1].pixels.tobytes(),
    "meta": lambda sample: json.dumps(sample.meta, ensure_ascii=False).encode(),
}


def read_mapped(dataset: Dataset, index: int) -> Sample:
    return dataset[index]


def read_into(dataset: Dataset, index: int) -> Sample:
    return dataset.read_into(index, np.zeros(int(dataset.message_bytes[index]), np.uint8))


both_ways = pytest.mark.parametrize("read", [read_mapped, read_into])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three samples in two shards and a sealed manifest."""
    made = write_samples(tmp_path / "shards", SAMPLES, shard_bytes=8_000)
    assert len(list(made.glob("train-*.arrow"))) == 2
    seal(made)
    return made


def seal(folder: Path, **values: object) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    write_json(folder / "manifest.json", sealed(manifest | values))


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def find(path: Path, wanted: bytes) -> int:
    data = path.read_bytes()
    assert data.count(wanted) >= 1
    return data.rindex(wanted)


def make_older(folder: Path) -> Path:
    """The folder as it was written before there were digests of records."""
    path = folder / INDEX
    with pa.ipc.open_stream(path.read_bytes()) as stream:
        table = stream.read_all().drop_columns(list(DIGESTS))
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table)
    manifest = json.loads((folder / "manifest.json").read_text())
    entry = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    manifest["splits"]["train"]["index"] |= entry
    manifest.pop("manifest_sha256", None)
    write_json(folder / "manifest.json", manifest)
    return folder


@both_ways
@pytest.mark.parametrize("place", PLACES)
def test_a_record_with_a_flipped_bit_is_named_when_it_is_read(
    folder: Path, place: str, read: Callable[[Dataset, int], Sample]
) -> None:
    """Its neighbour in the shard stays readable, and by size alone nothing is seen."""
    path, wanted = folder / "train-00001.arrow", PLACES[place](SAMPLES[2])
    flip(path, find(path, wanted) + len(wanted) // 2)
    for dataset in (Dataset(folder, "train"), Dataset(folder, "train", verify="sampled")):
        assert_same(read(dataset, 0), SAMPLES[0])
        with pytest.raises(ShardError) as caught:
            read(dataset, 2)
        told = str(caught.value)
        assert told.startswith(f"{path} is damaged at sample 2 of split 'train': its record has ")
        assert told.endswith(
            "; bring the file back from a copy, or remove the dataset folder and run "
            "launch/prepare.py again"
        )
    if place not in ("id", "meta"):
        read(Dataset(folder, "train", verify="size"), 2)


@both_ways
@pytest.mark.parametrize("codec", NAMES)
def test_no_flipped_bit_of_any_record_stays_unseen(
    tmp_path: Path, codec: CodecName, read: Callable[[Dataset, int], Sample]
) -> None:
    folder = write_samples(tmp_path, SAMPLES, codec=Codec(codec))
    path = folder / "train-00000.arrow"
    good = path.read_bytes()
    dataset = Dataset(folder, "train")
    first = int(dataset._offset[0])
    for position in range(first, len(good) - 8, 997):
        flip(path, position)
        index = int(np.searchsorted(dataset._offset, position, side="right")) - 1
        with pytest.raises(ShardError, match=f"damaged at sample {index} "):
            read(Dataset(folder, "train"), index)
        path.write_bytes(good)


def test_metas_that_are_read_alone_have_digests_of_their_own(folder: Path) -> None:
    path = folder / "train-00001.arrow"
    flip(path, find(path, b'"reference"') + 14)
    dataset = Dataset(folder, "train")
    assert dataset.read_meta(1) == SAMPLES[1].meta
    with pytest.raises(ShardError, match="damaged at sample 2 .* the meta of its record has dig"):
        dataset.read_meta(2)


@both_ways
def test_a_record_is_compared_once(
    folder: Path, read: Callable[[Dataset, int], Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, compared = Dataset(folder, "train"), []
    monkeypatch.setattr(
        "phi3v.data.reader.xxh3_64_intdigest",
        lambda data: compared.append(1) or int(dataset._digests["digest"][1]),
    )
    for _ in range(3):
        read(dataset, 1)
    assert compared == [1]


@pytest.mark.parametrize("verify_by", [None, "digest", "sampled"])
def test_no_flipped_bit_of_an_index_stays_unseen(folder: Path, verify_by: str | None) -> None:
    good = (folder / INDEX).read_bytes()
    for position in range(0, len(good), 31):
        flip(folder / INDEX, position)
        with pytest.raises(ShardError, match=INDEX):
            Dataset(folder, "train", verify_by)
        (folder / INDEX).write_bytes(good)
    Dataset(folder, "train", verify_by)


@pytest.mark.parametrize("verify_by", ["digest", "sampled"])
def test_a_manifest_that_is_not_what_was_written_is_found(folder: Path, verify_by: str) -> None:
    path = folder / "manifest.json"
    good = path.read_bytes()
    flip(path, find(path, b"0.25"))  # 1.25: another normalisation of the pixels
    assert Dataset(folder, "train", "size").view_settings.std == (0.25, 0.25, 1.25)
    for check in (lambda: Dataset(folder, "train", verify_by), lambda: listed_files(folder)):
        with pytest.raises(ShardError, match=r"manifest\.json has SHA-256 .* not what was written"):
            check()
    path.write_bytes(good)
    Dataset(folder, "train", verify_by)


def test_prepared_datasets_are_sealed_and_whole(tiny_shards: Path) -> None:
    assert "manifest_sha256" in json.loads((tiny_shards / "manifest.json").read_text())
    verify(tiny_shards)
    for split in ("train", "validation"):
        assert all(list(Dataset(tiny_shards, split, "sampled")))


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.8, 0.999])
def test_reading_all_files_finds_a_flipped_bit_in_any_of_any_split(
    folder: Path, share: float
) -> None:
    """The stream's schema and end, which no reader of records looks at, included."""
    files = listed_files(folder)
    assert [file.path.name for file in files] == [INDEX, "train-00000.arrow", "train-00001.arrow"]
    for file in files:
        good = file.path.read_bytes()
        flip(file.path, int(share * len(good)))
        for check in (lambda: check_files(files), lambda: verify(folder)):
            with pytest.raises(ShardError, match=f"{file.path.name} has SHA-256 .* from a copy"):
                check()
        file.path.write_bytes(good)
    verify(folder)


def test_the_bytes_of_all_files_are_told_as_they_are_read(folder: Path) -> None:
    told: list[int] = []
    files = listed_files(folder)
    check_files(files, told.append)
    assert sum(told) == sum(file.path.stat().st_size for file in files)


def test_a_file_that_cannot_be_read_is_named(folder: Path) -> None:
    (folder / INDEX).unlink()
    with pytest.raises(ShardError, match=f"{INDEX} is missing though the manifest lists it"):
        check_files(listed_files(folder))


def test_datasets_of_before_are_read_by_size_and_by_file(folder: Path) -> None:
    older = make_older(folder)
    with pa.ipc.open_stream((older / INDEX).read_bytes()) as stream:
        assert stream.schema.equals(INDEX_SCHEMA_OF_BEFORE)
    verify(older)
    for verify_by in (None, "size", "digest"):
        dataset = Dataset(older, "train", verify_by)
        for index, sample in enumerate(SAMPLES):
            assert_same(dataset[index], sample)
            assert dataset.read_meta(index) == sample.meta


def test_records_of_a_dataset_of_before_cannot_be_sampled(folder: Path, tmp_path: Path) -> None:
    """In a mixture with a newer one, too; by default each is checked as far as it can be."""
    newer = tmp_path / "newer"
    shutil.copytree(folder, newer)
    older = make_older(folder)
    with pytest.raises(ShardError) as caught:
        open_datasets([newer, older], "train", verify="sampled")
    assert str(caught.value) == (
        f"{older / INDEX} holds no digests of the records, for its dataset was made before there "
        "were any, so data.verify=sampled cannot be done; take data.verify=digest, or remove the "
        "dataset folder and run launch/prepare.py again"
    )
    assert len(open_datasets([newer, older], "train")) == 6

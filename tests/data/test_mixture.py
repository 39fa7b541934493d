"""Several datasets are one: each sample has its place, and none is of another model's."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from phi3v.data import Dataset
from phi3v.data.codecs import Codec
from phi3v.data.mixture import Mixture, names, open_datasets, qualified_id
from phi3v.errors import ConfigError, ShardError
from tests.tiny import RAW, assert_same, make_sample, write_samples

COUNTS = (3, 1, 4)
COLUMNS = ("tokens", "label_tokens", "image_tokens", "views", "message_bytes")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three datasets, the last stored as zstd; ids of different datasets are the same."""
    folder = tmp_path_factory.mktemp("mixture")
    return [
        write_samples(
            folder / str(seed),
            [make_sample(f"s{k}", 3 + k, [(1, 1 + k)] * (k % 2), seed) for k in range(count)],
            codec=Codec("zstd") if seed == 2 else RAW,
        )
        for seed, count in enumerate(COUNTS)
    ]


def mixture(folders: Sequence[Path], weights: Sequence[float] | None = None) -> Mixture:
    made = open_datasets(folders, "train", weights)
    assert isinstance(made, Mixture)
    return made


def edit_manifest(folder: Path, **values: object) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | values), "utf-8")


def test_samples_are_numbered_through_in_the_order_of_the_folders(folders: list[Path]) -> None:
    data = mixture(folders)
    expected = [sample for folder in folders for sample in Dataset(folder, "train")]
    assert len(data) == len(expected) == sum(COUNTS)
    for index, (sample, walked) in enumerate(zip(expected, data, strict=True)):
        assert_same(data[index], sample)
        assert_same(walked, sample)
        buffer = np.zeros(data.message_bytes[index], np.uint8)
        assert_same(data.read_into(index, buffer), sample)


@pytest.mark.parametrize("index", [-1, sum(COUNTS)])
def test_there_is_no_sample_behind_the_last_nor_before_the_first(
    folders: list[Path], index: int
) -> None:
    data = mixture(folders)
    with pytest.raises(IndexError, match=f"sample {index} of 8"):
        data[index]
    with pytest.raises(IndexError, match=f"sample {index} of 8"):
        data.read_into(index, bytearray(1 << 20))


def test_an_empty_dataset_takes_no_number(tmp_path: Path, folders: list[Path]) -> None:
    empty = write_samples(tmp_path / "empty", [])
    data = mixture([empty, folders[0], empty, folders[1], empty])
    assert [sample.id for sample in data] == [data[k].id for k in range(4)] == "s0 s1 s2 s0".split()


def test_lengths_are_those_of_the_parts(folders: list[Path]) -> None:
    data = mixture(folders)
    for name in (*COLUMNS, "memory_bytes"):
        parts = [getattr(Dataset(folder, "train"), name) for folder in folders]
        assert getattr(data, name).tolist() == [value for part in parts for value in part.tolist()]
    assert data.entry["samples"] == sum(COUNTS)
    for name in ("tokens", "label_tokens", "image_tokens", "views"):
        assert data.entry[name] == getattr(data, name).sum()
    assert data.view_settings == Dataset(folders[0], "train").view_settings


def test_memory_covers_canvases_that_are_decoded(folders: list[Path]) -> None:
    for folder in (folders[0], folders[2]):
        data = Dataset(folder, "train")
        for index, sample in enumerate(data):
            canvases = sum(image.pixels.nbytes for image in sample.images)
            decoded = 0 if data.codec.name == "raw" else canvases
            assert data.memory_bytes[index] >= data.message_bytes[index] + decoded
        is_larger = data.memory_bytes > data.message_bytes
        assert np.array_equal(is_larger, (data.views > 0) & (data.codec.name != "raw"))


def test_parts_are_the_ranges_of_the_datasets_with_their_weights(folders: list[Path]) -> None:
    data = mixture(folders, [2, 0.25, 1])
    assert data.parts == ((0, 3, 2.0), (3, 4, 0.25), (4, 8, 1.0))
    assert [dataset.folder for dataset in data.datasets] == folders
    assert mixture(folders).weights == (1.0, 1.0, 1.0)


def test_a_single_folder_is_a_plain_dataset_unless_it_is_weighted(folders: list[Path]) -> None:
    alone = open_datasets(folders[:1], "train")
    assert isinstance(alone, Dataset)
    assert alone.fingerprint == Dataset(folders[0], "train").fingerprint
    assert (alone.parts, alone.datasets) == (((0, 3, 1.0),), (alone,))
    assert mixture(folders[:1], [0.5]).parts == ((0, 3, 0.5),)


def test_the_fingerprint_tells_datasets_their_order_and_weights(folders: list[Path]) -> None:
    same = [mixture(folders).fingerprint, mixture(folders, [1, 1.0, 1]).fingerprint]
    assert len(set(same)) == 1 and len(same[0]) == 64
    others = [
        mixture(folders, [1, 1, 2]),
        mixture(folders[::-1]),
        mixture(folders[:2]),
        mixture([*folders[:2], folders[0]]),
    ]
    assert len({same[0], *(other.fingerprint for other in others)}) == 5


@pytest.mark.parametrize(
    "values",
    [
        {"crop_size": 56},
        {"image_side": 2},
        {"image_mean": [0.5, 0.5, 0.4]},
        {"image_std": [0.5, 0.5, 0.4]},
        {"tokenizer": "ab12"},
    ],
    ids=lambda values: next(iter(values)),
)
def test_datasets_of_different_models_are_refused(
    tmp_path: Path, folders: list[Path], values: dict[str, object]
) -> None:
    other = write_samples(tmp_path, [make_sample("a")])
    edit_manifest(other, **values)
    ((name, value),) = values.items()
    with pytest.raises(ConfigError) as caught:
        open_datasets([folders[0], other], "train")
    message = str(caught.value)
    assert message.startswith(f"data.shards mixes {folders[0]}, whose {name} is ")
    assert f"{other}, whose {name} is {value}; prepare both" in message


def test_held_out_rows_come_from_the_folders_that_have_them(
    tmp_path: Path, folders: list[Path]
) -> None:
    held = write_samples(tmp_path / "held", [make_sample("h")], split="validation")
    found = open_datasets([*folders, held], "validation", is_optional=True)
    assert isinstance(found, Dataset) and found.folder == held
    with pytest.raises(ShardError, match="has no split 'validation', it has: train"):
        open_datasets([held, *folders], "validation")
    with pytest.raises(ShardError, match=r"none of .*0, .*2 has a split 'validation'"):
        open_datasets(folders, "validation", is_optional=True)
    with pytest.raises(ShardError, match="has no split 'validation', it has: train"):
        open_datasets(folders[:1], "validation", is_optional=True)


def test_no_two_samples_of_several_datasets_are_called_the_same(folders: list[Path]) -> None:
    data = mixture(folders)
    found = [qualified_id(data, index) for index in range(len(data))]
    assert found == ["0:s0", "0:s1", "0:s2", "1:s0", "2:s0", "2:s1", "2:s2", "2:s3"]
    alone = open_datasets(folders[:1], "train")
    assert [qualified_id(alone, index) for index in range(3)] == ["s0", "s1", "s2"]
    assert qualified_id(mixture(folders[:1], [0.5]), 2) == "s2"
    with pytest.raises(IndexError, match="sample 8 of 8"):
        qualified_id(data, 8)


def test_datasets_are_told_apart_by_as_little_of_their_paths_as_that_takes(
    folders: list[Path], tmp_path: Path
) -> None:
    for place in ("a/x/train", "b/x/train", "c/test"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).symlink_to(folders[0])
    one, two, three = (Dataset(tmp_path / p, "train") for p in ("a/x/train", "b/x/train", "c/test"))
    assert names([one]) == [""]
    assert names([one, three]) == ["train", "test"]
    assert names([one, two, three]) == ["a/x/train", "b/x/train", f"{tmp_path.name}/c/test"]
    assert names([one, one]) == ["train", "train"], "the same samples are called the same"


def test_an_id_is_read_without_its_canvases(folders: list[Path]) -> None:
    data = mixture(folders)
    assert [data.read_id(index) for index in range(len(data))] == [sample.id for sample in data]

"""Reading samples of 4.4 MB at random from a warm page cache, against what else could hold them.

    python benchmarks/reading.py
    python benchmarks/reading.py --samples 16 --repeats 3

Each side puts every sample into a reused buffer, as pinned memory would be, once per repeat. A
sample is 13 crops as uint8: a canvas of ours, an array of the others.

memcpy      from memory: the limit
read_into   ours, straight into the buffer
mmap        ours through the memory map, copied
np.load     one .npy file per sample, copied
WebDataset  one tar of .npy files, copied; in its order, it has no other
Array4D     a column of `datasets` in its numpy format (which widens to int64), copied
as torch    the same column in its torch format
as uint8    the same column in its numpy format, told that dtype=np.uint8
"""

import argparse
import importlib.util
import os
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import datasets
import numpy as np
from timing import Times, describe_machine, measure, ratios

from phi3v.data import Dataset
from phi3v.data.codecs import Codec
from phi3v.data.format import FORMAT_VERSION, MANIFEST
from phi3v.data.writer import ShardWriter, finish_split
from phi3v.files import write_json
from phi3v.sample import IGNORED, Canvas, Sample

SIDE = 336
SHAPE = (13, SIDE, SIDE, 3)  # of an array: crops and the global view
TOKENS = 2000

Read = Callable[[int], np.ndarray]
Act = Callable[[int], object]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    print(f"{describe_machine()}; load {os.getloadavg()[0]:.1f}")
    print(f"time a sample: median (quartiles) of {arguments.repeats}; {arguments.samples} samples")
    with tempfile.TemporaryDirectory() as folder:
        times = compare(Path(folder), arguments.samples, arguments.repeats)
    for name, taken in times.items():
        print(f"{name:10} {taken}; of read_into {ratios(taken, times['read_into'])}")


def compare(folder: Path, samples: int, repeats: int) -> dict[str, Times]:
    """Time every side; returns the times of one sample."""
    random = np.random.default_rng(0)
    arrays = [random.integers(0, 256, SHAPE, np.uint8) for _ in range(samples)]
    buffer = np.zeros(SHAPE, np.uint8)
    column = array_column(folder / "datasets", arrays)
    wide, narrow = column.with_format("numpy"), column.with_format("numpy", dtype=np.uint8)
    tensors = column.with_format("torch")
    reads = {
        "memcpy": copied(buffer, lambda index: arrays[index]),
        **ours(folder / "shards", arrays, buffer),
        "np.load": copied(buffer, numpy_files(folder / "npy", arrays)),
        "Array4D": copied(buffer, lambda index: wide[index]["pixels"]),
        "as torch": copied(buffer, lambda index: tensors[index]["pixels"].numpy()),
        "as uint8": copied(buffer, lambda index: narrow[index]["pixels"]),
    }
    sides: dict[str, Callable[[], object]] = {
        name: partial(read_all, read, samples, random) for name, read in reads.items()
    }
    if importlib.util.find_spec("webdataset"):
        sides["WebDataset"] = tar(folder / "samples.tar", arrays, buffer)
    else:
        print("WebDataset is not installed: pip install webdataset")
    times = measure(sides, repeats)
    return {name: taken / samples for name, taken in times.items()}


def read_all(read: Act, samples: int, random: np.random.Generator) -> None:
    for index in random.permutation(samples).tolist():
        read(index)


def copied(buffer: np.ndarray, read: Read) -> Act:
    return lambda index: np.copyto(buffer, read(index), casting="unsafe")


def ours(folder: Path, arrays: list[np.ndarray], buffer: np.ndarray) -> dict[str, Act]:
    """Our two ways of reading, which give the right pixels."""
    dataset = write_dataset(folder, arrays)
    memory = np.zeros(int(dataset.message_bytes.max()), np.uint8)
    for index, array in enumerate(arrays):
        assert np.array_equal(dataset.read_into(index, memory).images[0].pixels.ravel(), array.flat)
    return {
        "read_into": lambda index: dataset.read_into(index, memory),
        "mmap": copied(buffer, lambda index: dataset[index].images[0].pixels.reshape(SHAPE)),
    }


def write_dataset(folder: Path, arrays: list[np.ndarray]) -> Dataset:
    """A dataset folder of the arrays, one canvas of 13 x 1 crops each."""
    folder.mkdir()
    ids = np.arange(TOKENS, dtype=np.int32)
    labels = np.full_like(ids, IGNORED)
    writer = ShardWriter(folder / "train-00000.arrow", Codec(), SIDE, side=12)
    for number, array in enumerate(arrays):
        canvas = Canvas(array.reshape(-1, SIDE, 3))
        writer.add(Sample(str(number), ids, labels, (canvas,), {}))
    entries, tables = [writer.finish()], [writer.index]
    manifest = {
        "format_version": FORMAT_VERSION,
        "pixels": Codec().to_manifest(),
        "splits": {"train": finish_split(folder, "train", entries, tables)},
    }
    write_json(folder / MANIFEST, manifest)
    return Dataset(folder, "train")


def numpy_files(folder: Path, arrays: list[np.ndarray]) -> Read:
    folder.mkdir()
    for number, array in enumerate(arrays):
        np.save(folder / f"{number}.npy", array)
    return lambda index: np.load(folder / f"{index}.npy")


def array_column(folder: Path, arrays: list[np.ndarray]) -> datasets.Dataset:
    features = datasets.Features({"pixels": datasets.Array4D(SHAPE, "uint8")})

    def rows() -> Iterator[dict[str, np.ndarray]]:
        return ({"pixels": array} for array in arrays)

    datasets.disable_progress_bars()
    return datasets.Dataset.from_generator(
        rows, features=features, cache_dir=str(folder), fingerprint="arrays"
    )


def tar(path: Path, arrays: list[np.ndarray], buffer: np.ndarray) -> Callable[[], object]:
    """A pass over a WebDataset."""
    import webdataset  # not one of the project's packages

    with webdataset.TarWriter(str(path)) as file:
        for number, array in enumerate(arrays):
            file.write({"__key__": str(number), "npy": array})

    def read() -> None:
        made = webdataset.WebDataset(str(path), shardshuffle=False).decode()
        for sample in made:
            np.copyto(buffer, sample["npy"])

    return read


if __name__ == "__main__":
    main()

"""Opening a dataset of a million samples, with the lengths of all of them in memory.

    python benchmarks/index.py

The index is real; shards are sparse files of the right size, 256 samples of 4 MB in each.
"""

import argparse
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
from timing import describe_machine, measure

from phi3v.data import Dataset
from phi3v.data.codecs import Codec
from phi3v.data.format import DIGESTS, END_BYTES, FORMAT_VERSION, INDEX_SCHEMA, MANIFEST, SCHEMA
from phi3v.data.writer import finish_split
from phi3v.files import write_json

PER_SHARD = 256
SIZE = (1344, 1008)  # of each sample's one canvas
MESSAGE_BYTES = 3 * SIZE[0] * SIZE[1] + 17_000


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=11)
    arguments = parser.parse_args()
    print(f"{describe_machine()}; load {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_dataset(folder, arguments.samples)
        times = measure(
            {"open": lambda: open_dataset(folder, arguments.samples)}, arguments.repeats
        )
    print(f"{arguments.samples:,} samples, {-(-arguments.samples // PER_SHARD):,} shards")
    print(f"open: median (quartiles) of {arguments.repeats}: {times['open']}")


def open_dataset(folder: Path, samples: int) -> None:
    dataset = Dataset(folder, "train")
    lengths = (dataset.tokens, dataset.label_tokens, dataset.image_tokens, dataset.views)
    assert all(len(of) == samples and of.sum() > 0 for of in lengths)


def write_dataset(folder: Path, samples: int) -> None:
    """A dataset folder whose shards hold nothing but their size."""
    counts = [min(PER_SHARD, samples - start) for start in range(0, samples, PER_SHARD)]
    head = SCHEMA.serialize().size
    entries = []
    for number, count in enumerate(counts):
        entry = {
            "file": f"train-{number:05d}.arrow",
            "samples": count,
            "bytes": head + count * MESSAGE_BYTES + END_BYTES,
            "sha256": "0" * 64,
        }
        (folder / entry["file"]).touch()
        os.truncate(folder / entry["file"], entry["bytes"])
        entries.append(entry)
    manifest = {
        "format_version": FORMAT_VERSION,
        "pixels": Codec().to_manifest(),
        "splits": {"train": finish_split(folder, "train", entries, tables(counts, head))},
    }
    write_json(folder / MANIFEST, manifest)


def tables(counts: list[int], head: int) -> Iterator[pa.Table]:
    """The shards' parts of the index; lengths vary from sample to sample."""
    random = np.random.default_rng(0)
    for count in counts:
        tokens = random.integers(1950, 3000, count)
        columns = {
            "shard": np.zeros(count, np.int32),
            "offset": head + MESSAGE_BYTES * np.arange(count),
            "bytes": np.full(count, MESSAGE_BYTES),
            "tokens": tokens,
            "label_tokens": tokens - 1940,
            "image_tokens": np.full(count, 1921),
            "views": np.full(count, 13),
            "image_sizes": [SIZE] * count,
        }
        # Of records that nobody reads here.
        columns |= {name: random.integers(0, 1 << 64, count, np.uint64) for name in DIGESTS}
        yield pa.table({k: pa.array(v, INDEX_SCHEMA.field(k).type) for k, v in columns.items()})


if __name__ == "__main__":
    main()

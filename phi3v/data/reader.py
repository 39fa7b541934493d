"""Random access to the samples of a dataset folder by memory map."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from phi3v.data.format import SCHEMA, read_manifest
from phi3v.errors import ShardError
from phi3v.files import sha256
from phi3v.sample import Canvas, Sample
from phi3v.views import ViewSettings

PREPARE_AGAIN = "run launch/prepare.py --verify, then prepare again"


class Dataset:
    """The samples of one split: `len(d)`, `d[i]`; lengths of all of them without reading any.

    tokens, label_tokens, views, image_tokens  (samples,)

    Opening checks the size of every file; `verify()` checks every digest.
    Raises: ShardError if the folder is no dataset, or a file is missing or has another size.
    """

    def __init__(self, folder: str | Path, split: str) -> None:
        self.folder, self.split = Path(folder), split
        self.manifest = read_manifest(self.folder)
        if split not in self.manifest["splits"]:
            known = ", ".join(sorted(self.manifest["splits"]))
            raise ShardError(f"{folder} has no split '{split}', it has: {known}; name one of these")
        self.entry: dict[str, Any] = self.manifest["splits"][split]
        for file in (*self.entry["shards"], self.entry["index"]):
            self._check_size(file)
        self._read_index()
        self._maps: dict[int, pa.MemoryMappedFile] = {}

    def _read_index(self) -> None:
        path = self.folder / self.entry["index"]["file"]
        with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as stream:
            index = stream.read_all()
        self._shard, self._offset, self.tokens, self.label_tokens, self.views = (
            index[name].to_numpy()
            for name in ("shard", "offset", "tokens", "label_tokens", "views")
        )
        self.image_tokens = self._count_image_tokens(index["image_sizes"].combine_chunks())
        if len(self.tokens) != self.entry["samples"]:
            raise ShardError(
                f"{path} lists {len(self.tokens)} samples, the manifest says "
                f"{self.entry['samples']}; {PREPARE_AGAIN}"
            )

    def __len__(self) -> int:
        return int(self.entry["samples"])

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        batch = self._record_batch(index)
        return Sample(
            id=batch["id"][0].as_py(),
            input_ids=_flat(batch["input_ids"]),
            labels=_flat(batch["labels"]),
            images=_canvases(batch["images"]),
            meta=json.loads(batch["meta"][0].as_py()),
        )

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))

    @property
    def view_settings(self) -> ViewSettings:
        """How this dataset's canvases become views."""
        mean, std = (tuple(self.manifest[name]) for name in ("image_mean", "image_std"))
        return ViewSettings(self.manifest["crop_size"], mean, std)

    @property
    def fingerprint(self) -> str:
        return str(self.manifest["fingerprint"])

    def verify(self) -> None:
        """Check every digest of the split and its index.

        Raises: ShardError naming the first file that is not what the manifest says.
        """
        for file in (*self.entry["shards"], self.entry["index"]):
            self._check_size(file)
            found = sha256(self.folder / file["file"])
            if found != file["sha256"]:
                raise ShardError(
                    f"{self.folder / file['file']} has SHA-256 {found[:12]}..., the manifest says "
                    f"{file['sha256'][:12]}...; the file is damaged: prepare the dataset again"
                )

    def _count_image_tokens(self, sizes: pa.ListArray) -> np.ndarray:
        """Positions that each sample's images fill, from their canvases' sizes alone."""
        crop, side = self.manifest["crop_size"], self.manifest["image_side"]
        grids = sizes.flatten().to_numpy().reshape(-1, 2) // crop  # (images, rows and cols)
        tokens = (grids.prod(axis=1) + 1) * side**2 + 1 + (grids[:, 0] + 1) * side
        total = np.concatenate([[0], np.cumsum(tokens)])
        ends = sizes.offsets.to_numpy() // 2
        return total[ends[1:]] - total[ends[:-1]]

    def _record_batch(self, index: int) -> pa.RecordBatch:
        shard = int(self._shard[index])
        if shard not in self._maps:
            path = self.folder / self.entry["shards"][shard]["file"]
            self._maps[shard] = pa.memory_map(str(path))
        file = self._maps[shard]
        start = int(self._offset[index])
        last = index + 1 == len(self) or self._shard[index + 1] != shard
        stop = file.size() if last else int(self._offset[index + 1])
        return pa.ipc.read_record_batch(file.read_at(stop - start, start), SCHEMA)

    def _check_size(self, file: dict[str, Any]) -> None:
        path = self.folder / file["file"]
        size = path.stat().st_size if path.is_file() else None
        if size is None:
            raise ShardError(f"{path} is missing though the manifest lists it; {PREPARE_AGAIN}")
        if size != file["bytes"]:
            raise ShardError(
                f"{path} has {size:,} bytes, the manifest says {file['bytes']:,}; {PREPARE_AGAIN}"
            )


def _flat(column: pa.Array) -> np.ndarray:
    return column.flatten().to_numpy()


def _canvases(column: pa.Array) -> tuple[Canvas, ...]:
    images = column.flatten()
    heights, widths = (images.field(name).to_pylist() for name in ("height", "width"))
    pixels = images.field("pixels")
    return tuple(
        Canvas(np.frombuffer(pixels[k].as_buffer(), dtype=np.uint8).reshape(height, width, 3))
        for k, (height, width) in enumerate(zip(heights, widths, strict=True))
    )

"""Random access to the samples of a dataset folder by memory map."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from phi3v.data.format import INDEX_SCHEMA, PREPARE_AGAIN, SCHEMA, read_manifest
from phi3v.errors import ShardError
from phi3v.files import sha256
from phi3v.sample import Canvas, Sample
from phi3v.views import ViewSettings

UNREADABLE = (pa.ArrowException, ValueError, LookupError, EOFError, OSError)  # of damaged bytes


class Dataset:
    """The samples of one split: `len(d)`, `d[i]`; lengths of all of them without reading any.

    tokens, label_tokens, views, image_tokens  (samples,)

    A sample's arrays are read-only views of the memory map. Opening checks the size of every file;
    `verify()` checks every digest.
    Raises: ShardError if the folder is no dataset, or a file is missing, has another size or, once
    it is needed, cannot be read.
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
        path = self.folder / self.entry["index"]["file"]
        try:
            self._read_index(path)
        except UNREADABLE as error:
            raise ShardError(f"{path} cannot be read ({error}); {PREPARE_AGAIN}") from error
        self._maps: dict[int, pa.Buffer] = {}

    def _read_index(self, path: Path) -> None:
        with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as stream:
            index = stream.read_all()
        if not index.schema.equals(INDEX_SCHEMA):
            raise ValueError(f"its columns are {index.schema.names}")
        index.validate(full=True)
        self._shard, self._offset, self.tokens, self.label_tokens, self.views = (
            index[name].to_numpy()
            for name in ("shard", "offset", "tokens", "label_tokens", "views")
        )
        self.image_tokens = self._count_image_tokens(index["image_sizes"].combine_chunks())
        counts = [shard["samples"] for shard in self.entry["shards"]]
        if not np.array_equal(self._shard, np.repeat(np.arange(len(counts)), counts)):
            raise ValueError(f"it does not list {counts} samples by shard, as the manifest does")

    def __len__(self) -> int:
        return int(self.entry["samples"])

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        try:
            return _sample(self._record_batch(index))
        except UNREADABLE as error:
            raise ShardError(
                f"{self._shard_path(index)} cannot be read at sample {index} ({error}); "
                f"{PREPARE_AGAIN}"
            ) from error

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
                    f"{file['sha256'][:12]}..., so the file is damaged; {PREPARE_AGAIN}"
                )

    def _count_image_tokens(self, sizes: pa.ListArray) -> np.ndarray:
        """Positions that each sample's images fill, from their canvases' sizes alone."""
        crop, side = self.manifest["crop_size"], self.manifest["image_side"]
        grids = sizes.flatten().to_numpy().reshape(-1, 2) // crop  # (images, rows and cols)
        tokens = (grids.prod(axis=1) + 1) * side**2 + 1 + (grids[:, 0] + 1) * side
        total = np.concatenate([[0], np.cumsum(tokens)])
        ends = sizes.offsets.to_numpy() // 2
        return total[ends[1:]] - total[ends[:-1]]

    def _shard_path(self, index: int) -> Path:
        return self.folder / self.entry["shards"][int(self._shard[index])]["file"]

    def _record_batch(self, index: int) -> pa.RecordBatch:
        shard = int(self._shard[index])
        if shard not in self._maps:
            self._maps[shard] = pa.memory_map(str(self._shard_path(index))).read_buffer()
        start = int(self._offset[index])
        batch = pa.ipc.read_record_batch(self._maps[shard].slice(start), SCHEMA)
        batch.validate(full=True)  # offsets and texts, not pixels: 1 us
        return batch

    def _check_size(self, file: dict[str, Any]) -> None:
        path = self.folder / file["file"]
        size = path.stat().st_size if path.is_file() else None
        if size is None:
            raise ShardError(f"{path} is missing though the manifest lists it; {PREPARE_AGAIN}")
        if size != file["bytes"]:
            raise ShardError(
                f"{path} has {size:,} bytes, the manifest says {file['bytes']:,}; {PREPARE_AGAIN}"
            )


def _sample(batch: pa.RecordBatch) -> Sample:
    return Sample(
        id=batch["id"][0].as_py(),
        input_ids=_flat(batch["input_ids"]),
        labels=_flat(batch["labels"]),
        images=_canvases(batch["images"]),
        meta=json.loads(batch["meta"][0].as_py()),
    )


def _flat(column: pa.Array) -> np.ndarray:
    return column.flatten().to_numpy()


def _canvases(column: pa.ListArray) -> tuple[Canvas, ...]:
    """Cut the pixels, which lie end to end, by the sizes; a scalar of Arrow is a copy."""
    images = column.flatten()
    if not len(images):
        return ()
    heights, widths = (images.field(name).to_numpy() for name in ("height", "width"))
    data = np.frombuffer(images.field("pixels").buffers()[2], dtype=np.uint8)
    parts = np.split(data, np.cumsum(3 * heights * widths)[:-1])
    return tuple(
        Canvas(part.reshape(height, width, 3))
        for part, height, width in zip(parts, heights, widths, strict=True)
    )

"""Samples to shards: one split of a dataset folder."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from phi3v.data.format import INDEX_SCHEMA, SCHEMA
from phi3v.files import sha256
from phi3v.geometry import grid_of, image_tokens
from phi3v.sample import IGNORED, Sample, count_views


class SplitWriter:
    """Writes one split's samples to shards of about `shard_bytes`, and its index at the end."""

    def __init__(
        self, folder: Path, split: str, crop_size: int, side: int, shard_bytes: int
    ) -> None:
        self.folder, self.split, self.shard_bytes = folder, split, shard_bytes
        self.crop_size, self.side = crop_size, side
        self.shards: list[dict[str, Any]] = []
        self.index: dict[str, list[Any]] = {name: [] for name in INDEX_SCHEMA.names}
        self._file: pa.NativeFile | None = None
        self._stream: pa.RecordBatchStreamWriter | None = None

    def add(self, sample: Sample) -> None:
        """Append a sample."""
        if self._file is not None and self._file.tell() >= self.shard_bytes:
            self._close_shard()
        if self._file is None:
            self._open_shard()
        assert self._file is not None and self._stream is not None
        # The stream writes its schema with its first batch, not when it is opened.
        self._index(sample, offset=self._file.tell() or SCHEMA.serialize().size)
        self._stream.write_batch(_batch(sample))
        self.shards[-1]["samples"] += 1

    def finish(self) -> dict[str, Any]:
        """Close the last shard, write the index; return the split's entry for the manifest."""
        self._close_shard()
        path = self.folder / f"{self.split}.index.arrow"
        table = pa.table(self.index, schema=INDEX_SCHEMA)
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, INDEX_SCHEMA) as stream:
            stream.write_table(table)
        return {
            "samples": table.num_rows,
            "tokens": sum(self.index["tokens"]),
            "label_tokens": sum(self.index["label_tokens"]),
            "image_tokens": sum(self._image_tokens(sizes) for sizes in self.index["image_sizes"]),
            "views": sum(self.index["views"]),
            "shards": self.shards,
            "index": _file_entry(path),
        }

    def _image_tokens(self, sizes: list[int]) -> int:
        pairs = zip(sizes[::2], sizes[1::2], strict=True)
        return sum(image_tokens(grid_of(h, w, self.crop_size), self.side) for h, w in pairs)

    def _index(self, sample: Sample, offset: int) -> None:
        row = {
            "shard": len(self.shards) - 1,
            "offset": offset,
            "tokens": len(sample.input_ids),
            "label_tokens": int(np.count_nonzero(sample.labels != IGNORED)),
            "views": count_views(sample.images, self.crop_size),
            "image_sizes": [side for image in sample.images for side in image.size],
        }
        for name, value in row.items():
            self.index[name].append(value)

    def _open_shard(self) -> None:
        name = f"{self.split}-{len(self.shards):05d}.arrow"
        self.shards.append({"file": name, "samples": 0})
        self._file = pa.OSFile(str(self.folder / name), "wb")
        self._stream = pa.ipc.new_stream(self._file, SCHEMA)

    def _close_shard(self) -> None:
        if self._file is None or self._stream is None:
            return
        self._stream.close()
        self._file.close()
        self.shards[-1] |= _file_entry(self.folder / self.shards[-1]["file"])
        self._file = self._stream = None


def _batch(sample: Sample) -> pa.RecordBatch:
    images = [
        {"height": image.size[0], "width": image.size[1], "pixels": image.pixels.tobytes()}
        for image in sample.images
    ]
    row = {
        "id": sample.id,
        "input_ids": sample.input_ids.tolist(),
        "labels": sample.labels.tolist(),
        "images": images,
        "meta": json.dumps(sample.meta, ensure_ascii=False),
    }
    return pa.RecordBatch.from_pylist([row], schema=SCHEMA)


def _file_entry(path: Path) -> dict[str, Any]:
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": sha256(path)}

"""Samples to shards, and the shards' parts of the index to the index of a split.

    writer = ShardWriter(folder / "train-00000.arrow", Codec(), crop_size=336, side=12)
    writer.add(sample)
    entry, table = writer.finish(), writer.index
    manifest["splits"]["train"] = finish_split(folder, "train", [entry], [table])

A shard's bytes depend on its samples and the codec, on nothing else.
"""

import hashlib
import io
import json
import os
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from xxhash import xxh3_64, xxh3_64_intdigest

from phi3v.data.codecs import Codec
from phi3v.data.format import INDEX_SCHEMA, SCHEMA
from phi3v.errors import ShardError, naming
from phi3v.files import replacing, sha256
from phi3v.geometry import grid_of, image_tokens
from phi3v.sample import IGNORED, Canvas, Sample, count_views

TOTALS = ("tokens", "label_tokens", "image_tokens", "views")
FORGET_BYTES = 1 << 24
PIXELS = SCHEMA.field("images").type.value_type


class ShardWriter:
    """Writes one shard; the file has its name once `finish` has been called, and is absent before.

    A writer that is dropped unfinished removes what it has written.
    crop_size  pixels of a crop
    side       merged patches along a view's side, as in `image_tokens`
    """

    def __init__(self, path: Path, codec: Codec, crop_size: int, side: int) -> None:
        self.path, self.codec, self.crop_size, self.side = path, codec, crop_size, side
        self._samples = 0
        self._rows: list[dict[str, Any]] = []
        self._open = ExitStack()
        self._file = _HashedFile(self._open.enter_context(replacing(path)))
        self._open.callback(self._file.close)
        self._stream = pa.ipc.new_stream(self._file, SCHEMA)

    def add(self, sample: Sample, times: int = 1) -> None:
        """Store a sample; the index lists it `times` times."""
        assert times >= 1, times
        # The stream writes its schema with its first batch, not when it is opened.
        offset = self._file.size or SCHEMA.serialize().size
        meta = json.dumps(sample.meta, ensure_ascii=False)
        self._file.begin(offset)
        self._stream.write_batch(_batch(sample, meta, self.codec))
        counts = [image_tokens(grid_of(*c.size, self.crop_size), self.side) for c in sample.images]
        row = {
            "shard": 0,
            "offset": offset,
            "bytes": self._file.size - offset,
            "tokens": len(sample.input_ids),
            "label_tokens": int(np.count_nonzero(sample.labels != IGNORED)),
            "image_tokens": sum(counts),
            "views": count_views(sample.images, self.crop_size),
            "image_sizes": [side for canvas in sample.images for side in canvas.size],
            "digest": self._file.message.intdigest(),
            "meta_digest": xxh3_64_intdigest(meta.encode()),
        }
        self._samples += 1
        self._rows += [row] * times

    @property
    def bytes(self) -> int:
        """Written so far."""
        return self._file.size

    @property
    def index(self) -> pa.Table:
        """This shard's part of the index; `finish_split` numbers the shards."""
        return pa.Table.from_pylist(self._rows, schema=INDEX_SCHEMA)

    def finish(self) -> dict[str, Any]:
        """Publish the shard; return its entry for the manifest. There is no shard of no samples."""
        assert self._samples, f"{self.path}: no sample was added"
        self._stream.close()
        self._open.close()
        return {
            "file": self.path.name,
            "samples": self._samples,
            "bytes": self._file.size,
            "sha256": self._file.digest.hexdigest(),
        }


def finish_split(
    folder: Path, split: str, entries: Sequence[dict[str, Any]], tables: Iterable[pa.Table]
) -> dict[str, Any]:
    """Write a split's index, one shard's table after the other; return its manifest entry.

    entries, tables  of each shard, as `finish` and `index` gave them
    Raises: ShardError if a table was written by another version of this program.
    """
    path = folder / f"{split}.index.arrow"
    totals = dict.fromkeys(("samples", *TOTALS), 0)
    with replacing(path) as temporary, pa.OSFile(str(temporary), "wb") as file:
        with pa.ipc.new_stream(file, INDEX_SCHEMA) as stream:
            for number, (_, table) in enumerate(zip(entries, tables, strict=True)):
                if not table.schema.equals(INDEX_SCHEMA):
                    raise ShardError(
                        f"{folder} holds a part of the index of split '{split}' with the columns "
                        f"{', '.join(table.schema.names)}, as another version of this program "
                        "writes it; remove that folder and run launch/prepare.py again"
                    )
                stream.write_table(_numbered(table, number))
                totals["samples"] += table.num_rows
                for name in TOTALS:
                    totals[name] += pc.sum(table[name]).as_py()
    index = {"file": path.name, "bytes": path.stat().st_size, "sha256": sha256(path)}
    return {**totals, "shards": list(entries), "index": index}


def _numbered(table: pa.Table, shard: int) -> pa.Table:
    numbers = pa.array(np.full(table.num_rows, shard, np.int32))
    return table.set_column(0, INDEX_SCHEMA.field("shard"), numbers)


class _HashedFile(io.RawIOBase):
    """A file whose size and SHA-256 are known when it is written, and its last message's digest.

    Its pages go to the disk as they come and are forgotten: terabytes that are written once shall
    not fill the memory of the machine, nor a job's share of it; and 4 MB take 1 ms in pages that
    were just freed, up to 10 ms in pages that have to be found.
    """

    def __init__(self, path: Path) -> None:
        self.size, self.digest = 0, hashlib.sha256()
        self.message, self._begins = xxh3_64(), 0
        self.path, self._file = path, path.open("wb")
        self._forgotten = 0

    def writable(self) -> bool:
        return True

    def begin(self, offset: int) -> None:
        """Say where the next message begins: before it the first write may bring a schema."""
        self.message, self._begins = xxh3_64(), offset

    def write(self, data: Any) -> int:
        with naming(self.path):
            self._file.write(data)
        self.digest.update(data)
        self.message.update(memoryview(data)[max(0, self._begins - self.size) :])
        self.size += len(data)
        if self.size > self._forgotten + FORGET_BYTES:
            self._forget()
        return len(data)

    def _forget(self) -> None:
        """Start writing what is not on the disk yet, and drop what is."""
        with naming(self.path):
            self._file.flush()
        os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        self._forgotten = self.size

    def close(self) -> None:
        with naming(self.path):
            self._file.close()
        super().close()


def _batch(sample: Sample, meta: str, codec: Codec) -> pa.RecordBatch:
    """A record batch over the sample's own memory; only several images are copied together."""
    columns = [
        pa.array([sample.id], pa.string()),
        _list(pa.array(sample.input_ids, pa.int32())),
        _list(pa.array(sample.labels, pa.int32())),
        _list(_images(sample.images, codec)),
        pa.array([meta], pa.string()),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=SCHEMA)


def _list(values: pa.Array) -> pa.ListArray:
    """One row that holds all the values."""
    return pa.ListArray.from_arrays(pa.array([0, len(values)], pa.int32()), values)


def _images(images: Sequence[Canvas], codec: Codec) -> pa.StructArray:
    encoded = [codec.encode(image.pixels) for image in images]
    ends = np.cumsum([0, *(data.size for data in encoded)], dtype=np.int64)
    data = encoded[0] if len(encoded) == 1 else pa.py_buffer(b"".join(encoded))
    buffers = [None, pa.py_buffer(ends), data]
    pixels = pa.Array.from_buffers(pa.large_binary(), len(images), buffers)
    heights, widths = (pa.array([c.size[k] for c in images], pa.int32()) for k in (0, 1))
    return pa.StructArray.from_arrays([heights, widths, pixels], fields=list(PIXELS))

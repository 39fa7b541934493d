"""Random access to the samples of a dataset folder, by memory map or into memory of one's own."""

import json
import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from xxhash import xxh3_64_intdigest

from phi3v.config.schema import Verify
from phi3v.data.codecs import Codec
from phi3v.data.format import (
    DIGESTS,
    END_BYTES,
    INDEX_SCHEMA,
    INDEX_SCHEMA_OF_BEFORE,
    PREPARE_AGAIN,
    SCHEMA,
    advice,
    check_seal,
    read_manifest,
)
from phi3v.data.verification import ListedFile, check_files
from phi3v.errors import ShardError
from phi3v.sample import Canvas, Sample
from phi3v.views import ViewSettings

UNREADABLE = (pa.ArrowException, ValueError, LookupError, EOFError, OSError)  # of damaged bytes
OPEN_SHARDS = 128  # files that `read_into` keeps open


def advice_for(split: str) -> str:
    """What to do where a dataset has no such split."""
    if split != "validation":
        return "name one of these"
    return (
        "prepare it with rows held out, in its recipe `split: {validation: 0.1}` for a share of "
        "its rows or `split: {validation: {path: FILE}}` for rows of your own; or set eval.rows=0"
    )


class Dataset:
    """The samples of one split: `len(d)`, `d[i]`; lengths of all of them without reading any.

    tokens, label_tokens, views, image_tokens  (samples,)
    message_bytes                              (samples,) what `read_into` needs for each
    memory_bytes                               (samples,) the same, and its decoded canvases

    `d[i]` reads through a memory map: its arrays are read-only views of it, and the disk is read
    where they are first touched. `d.read_into(i, buffer)` reads in one call into memory that is
    used again and again (pinned memory, say), and may be called from several threads with a buffer
    each. Canvases of a codec other than raw are decoded by both, to memory of their own.

    verify   size     opening checks the size of every file
             digest   and the digests of manifest and index; those of the shards are compared by
                      `verify()`, or by `verification.check_files` where ranks share it
             sampled  as digest, and each record is compared with its own when it is first read
             None     sampled where the index holds the records' digests, else size
    Raises: ShardError if the folder is no dataset, or a file is missing, has another size or, once
    it is needed, cannot be read or is not what was written.
    """

    def __init__(self, folder: str | Path, split: str, verify: Verify | None = None) -> None:
        self.folder, self.split = Path(folder), split
        self.manifest = read_manifest(self.folder)
        self.codec = Codec.from_manifest(self.manifest)
        if split not in self.manifest["splits"]:
            known = ", ".join(sorted(self.manifest["splits"]))
            raise ShardError(
                f"{folder} has no split '{split}', it has: {known}; {advice_for(split)}"
            )
        self.entry: dict[str, Any] = self.manifest["splits"][split]
        for file in self.files:
            file.check_size()
        if verify in ("digest", "sampled"):
            check_seal(self.folder, self.manifest)
        self._digests: dict[str, np.ndarray] = {}
        self._is_right: dict[str, np.ndarray] = {}
        path = self.files[-1].path
        try:
            self._read_index(path, verify)
        except UNREADABLE as error:
            raise ShardError(f"{path} cannot be read ({error}); {advice(error)}") from error
        self._map = lru_cache(maxsize=None)(_map)
        self._open = lru_cache(maxsize=OPEN_SHARDS)(_File)

    @property
    def files(self) -> tuple[ListedFile, ...]:
        """The split's shards and, last, its index."""
        entries = (*self.entry["shards"], self.entry["index"])
        return tuple(ListedFile.of(self.folder, entry) for entry in entries)

    def _read_index(self, path: Path, verify: Verify | None) -> None:
        with pa.OSFile(str(path)) as file, pa.ipc.open_stream(file) as stream:
            has_digests = stream.schema.equals(INDEX_SCHEMA)
            if not has_digests and not stream.schema.equals(INDEX_SCHEMA_OF_BEFORE):
                raise ValueError(f"its columns are {stream.schema.names}")
            if verify is None:
                verify = "sampled" if has_digests else "size"
            if verify != "size":
                self.files[-1].check_digest()
            index = stream.read_all()
        index.validate(full=True)
        if verify == "sampled":
            self._take_digests(path, index)
        self._shard, self._offset, self.message_bytes = (
            _column(index, name) for name in ("shard", "offset", "bytes")
        )
        self.tokens, self.label_tokens, self.image_tokens, self.views = (
            _column(index, name) for name in ("tokens", "label_tokens", "image_tokens", "views")
        )
        if not self._fits():
            raise ValueError("it does not list the samples of the manifest's shards")

    def _take_digests(self, path: Path, index: pa.Table) -> None:
        if not index.schema.equals(INDEX_SCHEMA):
            raise ShardError(
                f"{path} holds no digests of the records, for its dataset was made before there "
                "were any, so data.verify=sampled cannot be done; take data.verify=digest, or "
                f"{PREPARE_AGAIN}"
            )
        self._digests = {name: _column(index, name) for name in DIGESTS}
        self._is_right = {name: np.zeros(index.num_rows, dtype=bool) for name in DIGESTS}

    def _fits(self) -> bool:
        """Whether the messages, each counted once, fill the shards of the manifest end to end."""
        shards = self.entry["shards"]
        stops = self._offset + self.message_bytes
        is_stored = np.ones(len(stops), dtype=bool)  # not listed in the row before
        is_stored[1:] = (np.diff(self._shard) != 0) | (np.diff(self._offset) != 0)
        shard, offset, stop = self._shard[is_stored], self._offset[is_stored], stops[is_stored]
        counts = np.array([entry["samples"] for entry in shards], dtype=np.int64)
        if len(self) != len(stops) or not np.array_equal(
            shard, np.repeat(np.arange(len(counts)), counts)
        ):
            return False
        is_last = np.append(shard[1:] != shard[:-1], True)[: len(shard)]
        sizes = [entry["bytes"] - END_BYTES for entry in shards]
        follows = stop[:-1] == offset[1:]
        return bool((follows | is_last[:-1]).all()) and np.array_equal(stop[is_last], sizes)

    def __len__(self) -> int:
        return int(self.entry["samples"])

    def __getitem__(self, index: int) -> Sample:
        self._check_index(index)
        return self._read(index, None)

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))

    def read_meta(self, index: int) -> dict[str, Any]:
        """Read a sample's meta alone: no canvas is read from the disk or decoded."""
        self._check_index(index)
        with self._named(index):
            batch = _batch(self._mapped(index))
            self._check_record("meta_digest", index, batch["meta"][0].as_buffer())
            return _meta(batch)

    def read_id(self, index: int) -> str:
        """Read a sample's id alone, as `read_meta`."""
        self._check_index(index)
        with self._named(index):
            return str(_batch(self._mapped(index))["id"][0].as_py())

    def place(self, index: int) -> tuple["Dataset", int]:
        """Itself and the index, as of a `Mixture` the dataset and the sample's number in it."""
        self._check_index(index)
        return self, index

    def read_into(self, index: int, buffer: Any) -> Sample:
        """Read a sample into the first `message_bytes[index]` bytes of a writable buffer.

        The sample's arrays are views of the buffer, so they hold until the next sample is read into
        it. The buffer is contiguous memory: a numpy array, or `tensor.numpy()` of pinned memory.
        Raises: ValueError if the buffer is too small or read-only.
        """
        self._check_index(index)
        size = int(self.message_bytes[index])
        memory = memoryview(buffer).cast("B")
        if memory.readonly or len(memory) < size:
            kind = "read-only" if memory.readonly else "writable"
            raise ValueError(
                f"sample {index} needs a writable buffer of {size:,} bytes, got a {kind} one of "
                f"{len(memory):,}; make it as large as the largest of Dataset.message_bytes"
            )
        return self._read(index, memory[:size])

    @cached_property
    def memory_bytes(self) -> np.ndarray:
        """At most: what canvases of a codec other than raw take is reckoned by views."""
        if self.codec.name == "raw":
            return self.message_bytes
        return self.message_bytes + self.views * (3 * self.manifest["crop_size"] ** 2)

    @property
    def datasets(self) -> tuple["Dataset"]:
        """Itself, as of a `Mixture` the datasets it is made of."""
        return (self,)

    @property
    def parts(self) -> tuple[tuple[int, int, float]]:
        """All samples, at weight 1; of a `Mixture` each dataset's."""
        return ((0, len(self), 1.0),)

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
        check_files(self.files)

    def _check_index(self, index: int) -> None:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")

    def _shard_path(self, index: int) -> Path:
        return self.folder / self.entry["shards"][int(self._shard[index])]["file"]

    def _read(self, index: int, memory: memoryview | None) -> Sample:
        with self._named(index):
            message = self._mapped(index) if memory is None else self._fetched(index, memory)
            self._check_record("digest", index, message)
            return _sample(message, self.codec)

    def _check_record(self, name: str, index: int, data: pa.Buffer) -> None:
        """Compare what was read with its digest in the index, once for each record."""
        if not self._digests or self._is_right[name][index]:
            return
        found, known = xxh3_64_intdigest(data), int(self._digests[name][index])
        if found != known:
            what = "its record" if name == "digest" else "the meta of its record"
            raise ShardError(
                f"{self._shard_path(index)} is damaged at sample {index} of split '{self.split}': "
                f"{what} has digest {found:016x}, the index says {known:016x}; bring the file back "
                f"from a copy, or {PREPARE_AGAIN}"
            )
        self._is_right[name][index] = True

    @contextmanager
    def _named(self, index: int) -> Iterator[None]:
        """Say which shard and sample it was that could not be read."""
        try:
            yield
        except UNREADABLE as error:
            raise ShardError(
                f"{self._shard_path(index)} cannot be read at sample {index} ({error}); "
                f"{advice(error)}"
            ) from error

    def _mapped(self, index: int) -> pa.Buffer:
        start, size = int(self._offset[index]), int(self.message_bytes[index])
        return self._map(self._shard_path(index)).slice(start, size)

    def _fetched(self, index: int, memory: memoryview) -> pa.Buffer:
        # Held here, for another thread may drop it from the cache.
        file = self._open(self._shard_path(index))
        start, done = int(self._offset[index]), 0
        while done < len(memory):
            count = os.preadv(file.handle, [memory[done:]], start + done)
            if not count:
                raise EOFError(f"it ends {len(memory) - done:,} bytes before the sample does")
            done += count
        return pa.py_buffer(memory)


class _File:
    """A file that is open as long as anyone holds this."""

    def __init__(self, path: Path) -> None:
        self.handle = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.handle)


def _map(path: Path) -> pa.Buffer:
    return pa.memory_map(str(path)).read_buffer()


def _sample(message: pa.Buffer, codec: Codec) -> Sample:
    batch = _batch(message)
    return Sample(
        id=batch["id"][0].as_py(),
        input_ids=_flat(batch["input_ids"]),
        labels=_flat(batch["labels"]),
        images=_canvases(batch["images"], message, codec),
        meta=_meta(batch),
    )


def _batch(message: pa.Buffer) -> pa.RecordBatch:
    batch = pa.ipc.read_record_batch(message, SCHEMA)
    batch.validate(full=True)  # offsets and texts, not pixels: 1 us
    return batch


def _meta(batch: pa.RecordBatch) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(batch["meta"][0].as_py())
    return found


def _column(table: pa.Table, name: str) -> np.ndarray:
    """A column of numbers. Not Arrow's to_numpy(), which imports pandas: a third of a second."""
    return np.from_dlpack(table[name].combine_chunks())


def _flat(column: pa.Array) -> np.ndarray:
    return np.from_dlpack(column.flatten())


def _canvases(column: pa.ListArray, message: pa.Buffer, codec: Codec) -> tuple[Canvas, ...]:
    """Decode each image's part of the message; a scalar of Arrow would be a copy."""
    images = column.flatten()
    if not len(images):
        return ()
    heights, widths = (images.field(name).to_pylist() for name in ("height", "width"))
    pixels = images.field("pixels")
    _, ends, data = pixels.buffers()
    first = data.address - message.address  # Arrow's own buffers are read-only, the message is not
    stops = np.frombuffer(ends, np.int64, len(pixels) + 1, 8 * pixels.offset) + first
    memory = memoryview(message)
    return tuple(
        Canvas(codec.decode(memory[start:stop], height, width))
        for start, stop, height, width in zip(stops, stops[1:], heights, widths, strict=False)
    )

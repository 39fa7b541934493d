"""The dataset folder: Arrow streams of samples, an index per split, and the manifest.

A shard is an Arrow IPC *stream* with one record batch per sample, so that a sample is found by its
byte offset (a stream has no footer; the index holds the offsets) and `datasets.Dataset.from_file`
opens the file. A folder without a complete manifest is not a dataset.

    schema | message of sample 0 | message of sample 1 | ... | end of stream

The index lists every sample with the place of its message, so that one read fetches it. A sample
that is trained on several times is stored once and listed as often, in consecutive rows.

What a flipped bit changes is found by whoever asks: the manifest holds the SHA-256 of every file
and of itself, the index a digest of every message and of the meta within it, which may be read
alone. Folders that were made before there were the index's digests and the manifest's own lack
them.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow as pa

from phi3v.data.shape import SHAPE
from phi3v.errors import ShardError
from phi3v.reading import is_of_machine
from phi3v.shapes import fault_of
from phi3v.stored import parse_file

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
REJECTED = "rejected.jsonl"
# Keys of the manifest that are there where they say something, of the sources of training rows.
LICENSES = "licenses"  # [{source, license}]
HUB = "hub"  # [names of those that are datasets of the hub]
PREPARE_AGAIN = "remove the dataset folder and run launch/prepare.py again"

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("input_ids", pa.list_(pa.int32())),
        ("labels", pa.list_(pa.int32())),
        (
            "images",
            pa.list_(
                pa.struct(
                    [("height", pa.int32()), ("width", pa.int32()), ("pixels", pa.large_binary())]
                )  # pixels as the manifest's codec encodes them
            ),
        ),
        ("meta", pa.string()),
    ]
)
INDEX_SCHEMA = pa.schema(
    [
        ("shard", pa.int32()),
        ("offset", pa.int64()),  # bytes from the start of the shard to the sample's message
        ("bytes", pa.int64()),  # of the message
        ("tokens", pa.int32()),
        ("label_tokens", pa.int32()),
        ("image_tokens", pa.int32()),
        ("views", pa.int32()),
        ("image_sizes", pa.list_(pa.int32())),  # height, width, height, width, ... in pixels
        ("digest", pa.uint64()),  # XXH3 of the message, 64 bits
        ("meta_digest", pa.uint64()),  # the same of the bytes of its meta's text
    ]
)
DIGESTS = ("digest", "meta_digest")
INDEX_SCHEMA_OF_BEFORE = pa.schema(
    [column for column in INDEX_SCHEMA if column.name not in DIGESTS]
)
SEAL = "manifest_sha256"  # key of the manifest's digest over all its other keys
END_BYTES = 8  # of the mark at the end of a stream


def advice(error: Exception) -> str:
    """What to do where a file of a dataset cannot be read: nothing to it, if the machine failed."""
    if is_of_machine(error):
        return (
            "the machine failed, not the dataset: look after the disk or the file server, then "
            "start the same command again"
        )
    if isinstance(error, PermissionError):
        return "give the right to read it"
    return PREPARE_AGAIN


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read a dataset folder's manifest.

    Raises: ShardError if there is none, or it is of another format.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise ShardError(
            f"{folder} holds no {MANIFEST}, so it is no dataset; make it with launch/prepare.py"
        )
    try:
        manifest = parse_file(path)
    except ValueError as error:
        raise ShardError(f"{path} {error}; {PREPARE_AGAIN}") from error
    version = manifest.get("format_version")
    if version != FORMAT_VERSION:
        raise ShardError(
            f"{path} has format_version {version}, this program reads {FORMAT_VERSION}; "
            f"{PREPARE_AGAIN}"
        )
    if fault := fault_of(manifest, SHAPE):
        raise ShardError(f"{path} {fault}; {PREPARE_AGAIN}")
    return manifest


def sealed(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest with a digest of its own."""
    return manifest | {SEAL: _digest(manifest)}


def check_seal(folder: Path, manifest: dict[str, Any]) -> None:
    """Compare a manifest with its own digest; one that was made before it had one passes.

    Raises: ShardError if it is not what was written.
    """
    if SEAL in manifest and manifest[SEAL] != (found := _digest(manifest)):
        raise ShardError(
            f"{folder / MANIFEST} has SHA-256 {found[:12]}... over its keys, it says "
            f"{str(manifest[SEAL])[:12]}..., so it is not what was written; bring it back from a "
            f"copy, or {PREPARE_AGAIN}"
        )


def _digest(manifest: dict[str, Any]) -> str:
    content = {key: value for key, value in manifest.items() if key != SEAL}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

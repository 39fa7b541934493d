"""Reading what W&B wrote to a run folder without a network."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK_BYTES, HEADER_BYTES, FILE_HEADER_BYTES = 32768, 7, 7
FULL, LAST = 1, 4


def records(path: Path) -> Iterator[Any]:
    """The records of a .wandb file: a log of LevelDB's form holding protobuf messages."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, message = path.read_bytes(), FILE_HEADER_BYTES, b""
    while position + HEADER_BYTES <= len(data):
        left = BLOCK_BYTES - position % BLOCK_BYTES
        if left < HEADER_BYTES:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        position += HEADER_BYTES
        message += data[position : position + length]
        position += length
        if kind in (FULL, LAST):
            yield Record.FromString(message)
            message = b""


def of_kind(path: Path, kind: str) -> list[Any]:
    """The records of a kind."""
    found = [record for record in records(path) if record.WhichOneof("record_type") == kind]
    return [getattr(record, kind) for record in found]


def history(path: Path) -> list[dict[str, Any]]:
    """What was logged, step by step; wandb's own keys left out."""
    rows = []
    for record in of_kind(path, "history"):
        items = {"/".join(item.nested_key) or item.key: item for item in record.item}
        values = {key: json.loads(item.value_json) for key, item in items.items()}
        own = ("_timestamp", "_runtime", "eval/examples/")
        rows.append({key: value for key, value in values.items() if not key.startswith(own)})
    return rows

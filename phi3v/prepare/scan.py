"""Pass 1: what every row would become, found without decoding its pictures.

A chunk of rows ends as a small table: why a row is rejected or how many tokens it takes, which side
of the split its key chooses, what its images look like. The tables of all chunks together give the
split and the shards; nothing else of the first pass is kept (fetched images are, in their cache).
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from phi3v.config.dataset import SourceSection
from phi3v.errors import SampleError
from phi3v.geometry import hd_layout, image_tokens
from phi3v.prepare.conversations import LONGEST_ID, Conversation, row_name
from phi3v.prepare.duplicates import THUMBNAIL, WORDS, perceptual_hash
from phi3v.prepare.inputs import Input, Inputs
from phi3v.prepare.plan import Chunk, write_table
from phi3v.prepare.rows import ClassName, Row
from phi3v.prepare.samples import canvas_bytes
from phi3v.prepare.split import hash64, split_key
from phi3v.prepare.workers import Done
from phi3v.printing import printable, without_passwords
from phi3v.processing import Phi3VProcessor
from phi3v.processing.decoding import Picture
from phi3v.processing.keys import is_empty

LONGEST = 500  # characters of a reason
TOKEN_BYTES, SAMPLE_BYTES = 8, 1000  # in a shard, about

SCAN_SCHEMA = pa.schema(
    [
        ("row", pa.int64()),  # of the source
        ("line", pa.int64()),  # of a text file, from 1
        ("id", pa.string()),  # JSON
        ("reason", pa.string()),  # null: the row can be used
        ("take", pa.int16()),  # how often; 0: its source's weight leaves it out
        ("tokens", pa.int32()),
        ("saved_tokens", pa.int32()),  # by never_upscale
        ("bytes", pa.int64()),  # in a shard, before any codec
        ("key", pa.uint64()),
        ("stratum", pa.string()),
        ("digests", pa.list_(pa.binary(16))),
        ("hashes", pa.list_(pa.binary(8 * WORDS))),
    ]
)


def scan_chunk(inputs: Inputs, chunk: Chunk) -> Done:
    """Write the table of a chunk of rows."""
    part = inputs.parts[chunk.source]
    records, images, read = [], 0, 0
    wanted = np.ones(chunk.stop - chunk.start, dtype=bool)
    for row, conversation in inputs.conversations(chunk, wanted):
        record = {"row": row.number, "line": row.line, "id": row_id(row, part.section)}
        try:
            taken, pictures = _scan(inputs, part, row, conversation)
            record |= taken
            images += len(pictures)
            read += sum(len(picture.data) for picture in pictures)
        except SampleError as error:
            record["reason"] = reason_of(error)
        records.append(record)
    assert [r["row"] for r in records] == list(range(chunk.start, chunk.stop)), chunk
    write_table(inputs.work.scan(chunk), pa.Table.from_pylist(records, schema=SCAN_SCHEMA))
    rejected = sum("reason" in record for record in records)
    return Done(rows=len(records), images=images, bytes=read, rejected=rejected)


def _scan(
    inputs: Inputs, part: Input, row: Row, conversation: Conversation | SampleError
) -> tuple[dict[str, Any], Sequence[Picture]]:
    cfg = inputs.cfg
    if row.is_left_out:
        return {"take": 0}, ()
    if isinstance(conversation, SampleError):
        # Itself it would hold this frame and the frame it, and so its row until a collection.
        raise SampleError(*conversation.args)
    take = _times(part.section.weight, conversation.id, cfg.split.seed)
    if not take:
        return {"take": 0}, ()
    key = stratum = None
    if not part.is_held_out:
        key = _column(row.values, cfg.split.by, "by which rows are split")
        stratum = _column(row.values, cfg.split.stratify, "by which the split is stratified")
    pictures = part.pictures(conversation)
    sizes = [(picture.width, picture.height) for picture in pictures]
    tokens = part.builder.tokens(conversation, sizes)
    processor = part.builder.processor
    record: dict[str, Any] = {
        "take": take,
        "tokens": len(tokens.input_ids),
        "saved_tokens": _saved(processor, sizes, tokens.of_images) if cfg.never_upscale else 0,
        "bytes": SAMPLE_BYTES
        + TOKEN_BYTES * len(tokens.input_ids)
        + sum(canvas_bytes(processor, *size) for size in sizes),
        "key": split_key(cfg.split.seed, conversation.id if key is None else key),
        "stratum": stratum,
    }
    if cfg.split.compares_pictures:
        record["digests"] = [picture.digest for picture in pictures]
        record["hashes"] = [_likeness(picture) for picture in pictures]
    return record, pictures


def _likeness(picture: Picture) -> bytes:
    return perceptual_hash(picture.thumbnail(THUMBNAIL)).astype("<u8").tobytes()


def _times(weight: float, name: str, seed: int) -> int:
    """How often a row is taken: 2.25 is twice, and a third time for a quarter of the rows.

    A hash of the row's id decides, so that it does not depend on the other rows.
    """
    return int(weight) + (hash64(f"weight:{seed}:{name}") / 2**64 < weight % 1)


def _column(values: Mapping[str, Any], name: str | None, purpose: str) -> str | None:
    if name is None:
        return None
    value = values.get(name)
    if is_empty(value):
        raise SampleError(f"column '{name}', {purpose}, is empty")
    return str(value.id if isinstance(value, ClassName) else value)  # sides stay what they were


def _saved(
    processor: Phi3VProcessor, sizes: Sequence[tuple[int, int]], counts: Sequence[int]
) -> int:
    """Tokens that the published transform would take beyond `counts`."""
    grids = [hd_layout(*size, processor.num_crops, processor.crop_size).grid for size in sizes]
    return sum(image_tokens(grid, processor.side) for grid in grids) - sum(counts)


def row_id(row: Row, section: SourceSection) -> str | None:
    """A row's own id as JSON, which alone can hold half of a surrogate pair; of one that is too
    long the beginning.
    """
    name = row_name(row.values, section)
    return None if name is None else json.dumps(str(name)[:LONGEST_ID])


def reason_of(error: SampleError) -> str:
    """A reason on one line that UTF-8 can hold, whatever a row has given for a name or a role."""
    line = printable(without_passwords(str(error))[: LONGEST + 1])
    return line if len(line) <= LONGEST else f"{line[:LONGEST]}..."

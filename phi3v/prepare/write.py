"""Pass 2: a shard's rows become samples, pictures decoded.

What the scan could not see (a picture whose header is whole and whose rest is not) is rejected
here; the shard then holds a sample less.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from phi3v.data.audit import Audit
from phi3v.data.codecs import Codec
from phi3v.data.writer import ShardWriter
from phi3v.errors import SampleError
from phi3v.files import write_json
from phi3v.prepare.conversations import Conversation
from phi3v.prepare.inputs import Input, Inputs
from phi3v.prepare.plan import Shard, times_in, write_table
from phi3v.prepare.rows import Row
from phi3v.prepare.scan import reason_of, row_id
from phi3v.prepare.workers import Done
from phi3v.sample import Sample

Made = tuple[Sample, Counter[str]]
"""What a row becomes, and how many of its pictures have which traits."""


def write_shard(inputs: Inputs, shard: Shard) -> Done:
    """Write a shard, its part of the index, its audit and the rows that it had to reject.

    Raises: ShardError naming a sample whose labels are not those that its row asks for.
    """
    builder = inputs.parts[0].builder
    path = inputs.work.path / f"{shard.name}.arrow"
    codec = Codec(inputs.cfg.pixels.codec, inputs.cfg.pixels.quality)
    writer = ShardWriter(path, codec, builder.processor.crop_size, builder.processor.side)
    audit = Audit(builder.assistant_id, builder.end_id)
    rejected: list[dict[str, Any]] = []
    samples = images = 0
    for place, made, times in _samples(inputs, shard):
        if isinstance(made, SampleError):
            rejected.append(place | {"reason": reason_of(made)})
            continue
        sample, traits = made
        writer.add(sample, times)
        asked = sample.meta["trained_answers"]
        audit.add(sample.id, sample.input_ids, sample.labels, asked, times)
        audit.add_pictures(len(sample.images), traits, times)
        samples, images = samples + 1, images + len(sample.images)
    entry = writer.finish() if samples else None
    if entry:
        write_table(inputs.work.index(shard), writer.index)
    # Last, for it says that the shard is there.
    entries = {"shard": entry, "rejected": rejected, "audit": audit.to_dict()}
    write_json(inputs.work.entry(shard), entries)
    size = entry["bytes"] if entry else 0
    return Done(samples + len(rejected), images, size, len(rejected))


def _samples(
    inputs: Inputs, shard: Shard
) -> Iterator[tuple[dict[str, Any], Made | SampleError, int]]:
    """Of each row: its place (number among all, line, id), what it becomes, how often it counts."""
    known = np.load(inputs.work.rows, mmap_mode="r")
    shared = np.load(inputs.work.shared, mmap_mode="r")
    for chunk in inputs.plan.parts(shard.start, shard.stop):
        first = inputs.plan.first_rows[chunk.source]
        rows = known[first + chunk.start : first + chunk.stop]
        ends = np.searchsorted(shared, [first + chunk.start, first + chunk.stop])
        of_shared = set(shared[slice(*ends)].tolist())
        times = times_in(shard.split, rows["take"])
        part = inputs.parts[chunk.source]
        for row, conversation in inputs.conversations(chunk, times > 0):
            index = row.number - chunk.start
            number = first + row.number
            made = _build(part, row, conversation, int(rows["tokens"][index]))
            if number in of_shared:
                made = _numbered(made, number)
            place: dict[str, Any] = {"number": number, "line": row.line}
            place["id"] = row_id(row, part.section)
            yield place, made, int(times[index])


def _numbered(made: Made | SampleError, number: int) -> Made | SampleError:
    """A sample called by its row's number, too, for its id is not its alone."""
    if isinstance(made, SampleError):
        return made
    sample, traits = made
    return replace(sample, id=f"{sample.id}#{number}"), traits


def _build(
    part: Input, row: Row, conversation: Conversation | SampleError, tokens: int
) -> Made | SampleError:
    """Make a row's sample, of as many tokens as the scan has counted."""
    if isinstance(conversation, SampleError):
        return conversation
    try:
        pictures = part.pictures(conversation)
        provenance = {"source": part.source.path, "row": row.number}
        sample, traits = part.builder.build(conversation, pictures, provenance)
    except SampleError as error:
        return error
    if len(sample.input_ids) != tokens:
        return SampleError(
            f"an image changed while rows were prepared: {len(sample.input_ids)} tokens, "
            f"{tokens} when it was scanned"
        )
    return sample, traits

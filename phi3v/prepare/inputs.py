"""What a worker needs to turn rows into samples: sources, images, tokenizer, opened once."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from phi3v.config import DatasetConfig
from phi3v.config.dataset import SourceSection, SplitSection
from phi3v.errors import SampleError
from phi3v.prepare.conversations import Conversation, read_conversation
from phi3v.prepare.fetch import ImageCache
from phi3v.prepare.images import ImageLoader
from phi3v.prepare.plan import Chunk, Plan, WorkFolder
from phi3v.prepare.reach import image_root, reach
from phi3v.prepare.rows import Row
from phi3v.prepare.samples import SampleBuilder, canvas_bytes
from phi3v.prepare.sources import Source, open_source
from phi3v.processing import Phi3VProcessor
from phi3v.processing.decoding import Picture
from phi3v.processing.keys import ROW_KEYS

BATCH_BYTES = 64 << 20  # texts and inline images of the rows held at once

Item = tuple[Row, Conversation | SampleError]
"""A row, and its conversation or why it has none."""


@dataclass(frozen=True)
class Input:
    """One source, opened; `is_held_out`: all of its rows are; `max_row_bytes` as in the recipe."""

    section: SourceSection
    source: Source
    loader: ImageLoader
    builder: SampleBuilder
    is_held_out: bool
    max_row_bytes: int

    def pictures(self, conversation: Conversation) -> list[Picture]:
        """Open the images of a conversation, none of them decoded.

        Raises: SampleError if one cannot be used, or they take more than `max_row_bytes`.
        """
        pictures: list[Picture] = []
        taken = 0
        for number, image in enumerate(conversation.images, 1):
            picture = self.loader.picture(image)
            canvas = canvas_bytes(self.builder.processor, picture.width, picture.height)
            taken += len(picture.data) + canvas
            if taken > self.max_row_bytes:
                raise SampleError(
                    f"images take too many bytes: {taken:,} for {number} of "
                    f"{len(conversation.images)} images, files and canvases; max_row_bytes is "
                    f"{self.max_row_bytes:,}"
                )
            pictures.append(picture)
        return pictures


@dataclass(frozen=True)
class Inputs:
    """All that a unit of work needs."""

    cfg: DatasetConfig
    plan: Plan
    work: WorkFolder
    parts: tuple[Input, ...]

    def conversations(self, chunk: Chunk, wanted: np.ndarray) -> Iterator[Item]:
        """The rows of a chunk for which `wanted`, bool (rows,), is true.

        What stands at http(s) addresses is fetched for many rows at once.
        """
        part = self.parts[chunk.source]
        batch: list[Item] = []
        held = 0
        for row in part.source.read(chunk.start, chunk.stop):
            if not wanted[row.number - chunk.start]:
                continue
            batch.append((row, _conversation(row, part.section, self.cfg)))
            held += _held_bytes(*batch[-1])
            if held > BATCH_BYTES:
                yield from _fetched(part.loader, batch)
                batch, held = [], 0
        yield from _fetched(part.loader, batch)


def open_inputs(cfg: DatasetConfig, plan: Plan, work: WorkFolder) -> Inputs:
    """Open every source of a recipe for reading any of its rows."""
    cache = ImageCache(fetch_folder(cfg), cfg.fetch)
    parts = []
    for number, (section, state) in enumerate(zip(cfg.sources, plan.states, strict=True)):
        also = cfg.split.by, cfg.split.stratify
        source = open_source(section, work.spool(number), state, also)
        section = _with_named(section, cfg.split)
        limits = (cfg.max_pixels, cache, cfg.images, reach(section), cfg.max_row_bytes)
        loader = ImageLoader(image_root(section), *limits)
        builder = SampleBuilder(open_processor(cfg, section), cfg.max_tokens)
        is_held_out = number >= cfg.first_held_out
        parts.append(Input(section, source, loader, builder, is_held_out, cfg.max_row_bytes))
    return Inputs(cfg, plan, work, tuple(parts))


def _with_named(section: SourceSection, split: SplitSection) -> SourceSection:
    """Have the columns understood that the recipe names elsewhere, to split by or to name rows."""
    named = (section.id, split.by, split.stratify)
    others = (name for name in named if name and name not in ROW_KEYS)
    return replace(section, ignore=tuple(dict.fromkeys([*(section.ignore or ()), *others])))


def open_processor(cfg: DatasetConfig, section: SourceSection) -> Phi3VProcessor:
    """The model's processor with the recipe's settings of pictures, and the source's."""
    num_crops = section.num_crops or cfg.num_crops
    return Phi3VProcessor.from_pretrained(cfg.model, num_crops, cfg.never_upscale, cfg.images)


def fetch_folder(cfg: DatasetConfig) -> Path:
    """Where fetched images are kept: beside the dataset, for all that are made there."""
    return Path(cfg.fetch.cache) if cfg.fetch.cache else Path(cfg.out).absolute().parent / "fetched"


def _conversation(
    row: Row, section: SourceSection, cfg: DatasetConfig
) -> Conversation | SampleError:
    if row.is_left_out:
        return SampleError("left out")  # so that none of its pictures is fetched
    try:
        conversation = read_conversation(row, section)
    except SampleError as error:
        return error
    if (images := len(conversation.images)) > cfg.max_images:
        return SampleError(f"too many images: {images:,}, max_images is {cfg.max_images:,}")
    characters = sum(len(message["content"]) for message in conversation.messages)
    characters += sum(map(len, conversation.references))
    if characters > cfg.max_characters:
        return SampleError(
            f"too much text: {characters:,} characters, max_characters is {cfg.max_characters:,}"
        )
    return conversation


def _held_bytes(row: Row, item: Conversation | SampleError) -> int:
    """Bytes of the texts and images that a row carries itself, those that stand by themselves."""
    images = () if isinstance(item, SampleError) else item.images
    held = [*row.values.values(), *images]
    inner = [value.get("bytes") if isinstance(value, dict) else value for value in held]
    return sum(len(value) for value in inner if isinstance(value, bytes | str))


def _fetched(loader: ImageLoader, batch: list[Item]) -> Iterator[Item]:
    loader.prefetch([image for _, c in batch if isinstance(c, Conversation) for image in c.images])
    yield from batch

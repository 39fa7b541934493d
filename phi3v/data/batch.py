"""A pack as tensors: what one rank hands to the model in one micro-step."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from phi3v.geometry import grid_of
from phi3v.sample import IGNORED, Sample
from phi3v.views import ViewSettings, make_views


@dataclass(frozen=True)
class Batch:
    """Whole samples laid end to end.

    input_ids, labels  (1, T) int64
    segment_lengths    tokens of each sample
    canvases           of all images in order, uint8 (height, width, 3) each
    ids                of the samples
    """

    input_ids: Tensor
    labels: Tensor
    segment_lengths: tuple[int, ...]
    canvases: tuple[Tensor, ...]
    ids: tuple[str, ...]

    @property
    def tokens(self) -> int:
        """Sequence positions, all of them real."""
        return self.input_ids.shape[1]

    @property
    def label_tokens(self) -> int:
        """Trained positions."""
        return int((self.labels != IGNORED).sum())


def model_inputs(batch: Batch, settings: ViewSettings, device: torch.device) -> dict[str, Any]:
    """The arguments of the packed call: ids, labels, segments, and the views made on `device`."""
    inputs: dict[str, Any] = {
        "input_ids": batch.input_ids.to(device, non_blocking=True),
        "labels": batch.labels.to(device, non_blocking=True),
        "segment_lengths": batch.segment_lengths,
    }
    if batch.canvases:
        canvases = [canvas.to(device, non_blocking=True) for canvas in batch.canvases]
        inputs["views"] = torch.cat([make_views(canvas, settings) for canvas in canvases])
        inputs["grids"] = [grid_of(c.shape[0], c.shape[1], settings.crop_size) for c in canvases]
    return inputs


def collate(samples: Sequence[Sample]) -> Batch:
    """Lay samples end to end; no samples make a pack of one untrained token.

    The last step of a run of whole epochs may have fewer packs than ranks: the rest get such a
    pack, so that every rank takes part in every collective and no sample is seen twice.
    """
    if not samples:
        blank = torch.zeros(1, 1, dtype=torch.int64)
        return Batch(blank, torch.full_like(blank, IGNORED), (1,), (), ())
    return Batch(
        input_ids=_row([s.input_ids for s in samples]),
        labels=_row([s.labels for s in samples]),
        segment_lengths=tuple(len(s.input_ids) for s in samples),
        canvases=tuple(_tensor(image.pixels) for s in samples for image in s.images),
        ids=tuple(s.id for s in samples),
    )


def _row(arrays: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(arrays).astype(np.int64))[None]


def _tensor(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(pixels))  # a copy: the memory map is read-only

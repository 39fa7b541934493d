"""A pack as tensors: what one rank hands to the model in one micro-step.

    batch = collate(samples)
    loss = model(**model_inputs(batch, dataset.view_settings, device))

The uint8 canvases travel to the device, where they are cut, normalised and given their global
views. Ids and labels stay on the host, which looks for places in them; the model sends them. A
loader's batches lie in arenas, memory that is used again for later ones and that CUDA copies from
while the processor goes on.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from phi3v.geometry import grid_of
from phi3v.sample import IGNORED, Sample
from phi3v.views import ViewSettings, make_views

ALIGNMENT = 64  # bytes, as Arrow asks of its buffers
CPU = torch.device("cpu")


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

    def to(self, device: torch.device) -> "Batch":
        """The same with its canvases on a device; copies from pinned memory are only asked for."""
        canvases = (canvas.to(device, non_blocking=True) for canvas in self.canvases)
        return replace(self, canvases=tuple(canvases))


class Arena:
    """Memory for one batch at a time, used again and again; pinned if it is to feed CUDA.

    It grows to the largest batch it has held. Pieces that were taken before `reset` are overwritten
    after it.
    """

    def __init__(self, device: torch.device = CPU) -> None:
        self._is_pinned = device.type == "cuda"
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._used = 0
        self._copied: torch.cuda.Event | None = None

    def reset(self, size: int) -> None:
        """Start anew with room for `size` bytes, once CUDA has read what it held."""
        if self._copied:
            self._copied.synchronize()
        if size > len(self._memory):
            self._memory = torch.empty(size, dtype=torch.uint8, pin_memory=self._is_pinned)
        self._used = 0

    def take(self, size: int) -> Tensor:
        """The next `size` bytes."""
        start, self._used = self._used, self._used + _aligned(size)
        assert start + size <= len(self._memory), "reset() was told too small a size"
        return self._memory[start : start + size]

    def hold(self, array: np.ndarray) -> Tensor:
        """A uint8 array as a tensor of this memory; copied if it does not lie there."""
        start = array.ctypes.data - self._memory.data_ptr()
        if 0 <= start < len(self._memory):
            return self._memory[start : start + array.size].view(array.shape)
        piece = self.take(array.size).view(array.shape)
        np.copyto(piece.numpy(), array)
        return piece

    def release(self) -> None:
        """Let it be used again behind everything that CUDA has been asked to do so far."""
        if self._is_pinned:
            self._copied = torch.cuda.Event()
            self._copied.record()


def collate(samples: Sequence[Sample], arena: Arena | None = None) -> Batch:
    """Lay samples end to end; no samples make a pack of one untrained token.

    A step of a run of whole epochs may have fewer packs than ranks: the rest get such a pack, so
    that every rank takes part in every collective and no sample is seen twice.
    `arena` has room for the ids and labels (8 bytes each) and all canvases that do not lie in it;
    without one the batch has memory of its own.
    """
    if not samples:
        blank = torch.zeros(1, 1, dtype=torch.int64)
        return Batch(blank, torch.full_like(blank, IGNORED), (1,), (), ())
    lengths = tuple(len(s.input_ids) for s in samples)
    pixels = [image.pixels for s in samples for image in s.images]
    if arena is None:
        arena = Arena()
        arena.reset(row_bytes(sum(lengths)) + sum(_aligned(p.size) for p in pixels))
    return Batch(
        input_ids=_row([s.input_ids for s in samples], arena),
        labels=_row([s.labels for s in samples], arena),
        segment_lengths=lengths,
        canvases=tuple(arena.hold(p) for p in pixels),
        ids=tuple(s.id for s in samples),
    )


def row_bytes(tokens: int) -> int:
    """Memory of the ids and labels of a pack."""
    return 2 * _aligned(8 * tokens)


def model_inputs(batch: Batch, settings: ViewSettings, device: torch.device) -> dict[str, Any]:
    """The arguments of the packed call: ids, labels, segments, and the views made on `device`.

    Ids and labels lie on the host, so that the device is waited for nowhere.

    Canvases become views one by one: on a CPU several of a size at once take longer.
    """
    batch = batch.to(device)
    inputs: dict[str, Any] = {
        "input_ids": batch.input_ids,
        "labels": batch.labels,
        "segment_lengths": batch.segment_lengths,
    }
    if batch.canvases:
        canvases, side = batch.canvases, settings.crop_size
        inputs["views"] = torch.cat([make_views(canvas, settings) for canvas in canvases])
        inputs["grids"] = [grid_of(c.shape[0], c.shape[1], side) for c in canvases]
    return inputs


def _row(arrays: Sequence[np.ndarray], arena: Arena) -> Tensor:
    row = arena.take(8 * sum(map(len, arrays))).view(torch.int64)
    np.concatenate(arrays, out=row.numpy())
    return row[None]


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT

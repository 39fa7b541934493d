"""The loss of held-out rows, in packs of bounded size that do not depend on the number of ranks."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from phi3v.data.batch import collate, model_inputs
from phi3v.evaluation.held_out import HeldOut, spread
from phi3v.evaluation.outcomes import Job, within
from phi3v.progress import progress

PACK_TOKENS = 8192
PACK_VIEWS = 64


@dataclass(frozen=True)
class PackLoss:
    """Sum of the losses of a pack's trained tokens, how many they are, and the pack's rows."""

    total: float
    label_tokens: int
    rows: int


def sum_losses(job: Job, seconds: float | None) -> list[PackLoss]:
    """The losses of this rank's packs; what is not begun in time is left out."""
    generator, dataset = job.generator, job.dataset
    packs = cut_packs(dataset, job.settings.loss_rows)[job.rank :: job.world_size]
    losses = []
    bar = progress(packs, "evaluation loss", "pack", disable=job.rank > 0)
    with bar, torch.inference_mode():
        for pack in within(seconds, bar):
            generator.tick()
            batch = collate([dataset[row] for row in pack])
            total = generator.model(**model_inputs(batch, generator.views, generator.model.device))
            losses.append(PackLoss(float(total), batch.label_tokens, len(pack)))
    return losses


def cut_packs(dataset: HeldOut, count: int | None) -> list[list[int]]:
    """`count` rows of a dataset, evenly spaced, as packs of at most PACK_TOKENS and PACK_VIEWS.

    In a fixed random order: the first packs are a fair sample of all rows. A row that is larger
    than a pack may be is a pack of its own.
    """
    packs: list[list[int]] = []
    tokens = views = 0
    for row in np.random.default_rng(0).permutation(spread(len(dataset), count)).tolist():
        tokens, views = tokens + int(dataset.tokens[row]), views + int(dataset.views[row])
        if not packs or tokens > PACK_TOKENS or views > PACK_VIEWS:
            packs.append([])
            tokens, views = int(dataset.tokens[row]), int(dataset.views[row])
        packs[-1].append(row)
    return packs


def mean_loss(losses: Sequence[PackLoss]) -> float | None:
    """The mean over all trained tokens, the same in whatever order the packs come.

    None where it is not finite, for which JSON has no number.
    """
    totals = [loss.total for loss in losses]
    if not all(map(math.isfinite, totals)):
        return None
    return math.fsum(totals) / max(1, sum(loss.label_tokens for loss in losses))

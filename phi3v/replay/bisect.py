"""Which of a step's samples carry its loss: each one alone, with the weights before the step.

    carriers = measure(again)             # all ranks, each its share of the samples
    for line in describe(step, carriers): ...

Forward and backward once for each sample, which is together the work of the step itself, without
its packing; and the weights and one gradient, in the model's precision, of a whole model on every
rank (16.6 GB for the published sizes in bf16). Halving the step would need more passes, and would
name one sample where there may be several.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass

import numpy as np
import torch
from torch import nn

from phi3v.data.batch import collate, model_inputs
from phi3v.data.mixture import qualified_id
from phi3v.progress import progress
from phi3v.replay.again import Again
from phi3v.replay.check import Pair, finite
from phi3v.replay.listing import number_text, place_text
from phi3v.replay.steps import TakenStep
from phi3v.training import zero
from phi3v.training.optimizer import freeze
from phi3v.training.session import gathered
from phi3v.view.samples import provenance


@dataclass(frozen=True)
class Carrier:
    """A sample of the step alone.

    loss   summed over its `trained` tokens
    norm   of the gradient of that sum; of what is not frozen
    """

    index: int
    loss: float
    trained: int
    norm: float

    @property
    def mean(self) -> float:
        return self.loss / max(1, self.trained)

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.norm)


def measure(again: Again) -> list[Carrier]:
    """Every sample of the step, as it is with the engine's weights; all ranks call."""
    run, data = again.run, again.run.dataset
    model = gathered(run, again.engine)
    model.set_execution(run.execution)
    freeze(model, run.cfg.model.freeze)
    model.train()
    mine = np.concatenate(again.taken.planned.packs)[run.ranks.rank :: run.ranks.world_size]
    carriers = []
    with progress(mine.tolist(), "bisect", "sample", disable=not run.ranks.is_first) as indices:
        for index in indices:
            inputs = model_inputs(collate([data[index]]), data.view_settings, run.device)
            loss = model(**inputs)
            loss.backward()
            trained = int(data.label_tokens[index])
            carriers.append(Carrier(index, float(loss.detach()), trained, _take_norm(model)))
    shares = zero.gather_objects([astuple(carrier) for carrier in carriers])
    return [Carrier(*values) for share in shares for values in share]


def _take_norm(model: nn.Module) -> float:
    """The norm of a model's gradient, which is gone afterwards."""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    squares = [torch.linalg.vector_norm(grad, dtype=torch.float32).double() ** 2 for grad in grads]
    model.zero_grad(set_to_none=True)
    return math.sqrt(float(torch.stack(squares).sum()))


def usual_loss(carriers: Sequence[Carrier]) -> float:
    """The median of the samples' mean losses, of those that are finite."""
    means = [carrier.mean for carrier in carriers if math.isfinite(carrier.loss)]
    return float(np.median(means)) if means else math.nan


def by_excess(carriers: Sequence[Carrier]) -> list[tuple[Carrier, float]]:
    """Each with what it adds to the step's loss above the usual one; what is not finite first.

    The step's loss is the mean over its trained tokens: a sample of n of them adds its own mean
    less the usual, times n / all. Together that is the step's loss less the usual.
    """
    usual, total = usual_loss(carriers), max(1, sum(carrier.trained for carrier in carriers))
    found = [(c, (c.mean - usual) * c.trained / total) for c in carriers]
    return sorted(found, key=lambda pair: (pair[0].is_finite, -pair[1], -pair[0].norm))


def step_loss(step: TakenStep, carriers: Sequence[Carrier]) -> Pair:
    """The step's loss as written down, and as its samples give it one by one."""
    total = max(1, sum(carrier.trained for carrier in carriers))
    loss = sum(carrier.loss for carrier in carriers) / total
    return Pair("loss of its samples one by one", step.line["loss"], finite(loss))


def describe(step: TakenStep, carriers: Sequence[Carrier]) -> Iterator[str]:
    """A table of the samples, those that carry the spike first."""
    total = max(1, sum(carrier.trained for carrier in carriers))
    yield (
        f"adds: to the step's loss, above the usual {number_text(finite(usual_loss(carriers)))} "
        "(the median of its samples); loss, sum: over its trained tokens; gradient: norm of its "
        "part of the step's gradient"
    )
    yield ROW.format("adds", "loss", "sum", "trained", "gradient", "sample")
    for carrier, excess in by_excess(carriers):
        name, sample = qualified_id(step.dataset, carrier.index), step.dataset[carrier.index]
        place = f"{name} ({place_text(step, carrier.index)}; {provenance(sample)['source']})"
        numbers = excess, carrier.mean, carrier.loss, carrier.norm / total
        adds, mean, loss, norm = map(_cell, numbers)
        yield ROW.format(adds, mean, loss, f"{carrier.trained:,}", norm, place)
    largest = max(carriers, key=lambda carrier: (not carrier.is_finite, carrier.norm))
    yield f"the largest gradient is that of {qualified_id(step.dataset, largest.index)}"


ROW = "{:>10}  {:>10}  {:>10}  {:>8}  {:>10}  {}"


def _cell(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else "not finite"

"""The samples of a step as lines of text: where each comes from, and what it says."""

import json
from collections.abc import Iterator

import numpy as np

from phi3v.data.mixture import qualified_id
from phi3v.evaluation.controls import digest
from phi3v.replay.steps import TakenStep
from phi3v.view.samples import provenance, texts
from phi3v.view.tokens import TokenText


def list_step(step: TakenStep, text: TokenText) -> Iterator[str]:
    """A line about the step, and of each pack its samples.

    A picture's digest is that of its canvas, as `evaluation.controls.digest` takes it: the same
    for the same pixels only.
    """
    yield describe_step(step)
    packs = step.planned.packs
    for number, pack in enumerate(packs, 1):
        yield f"pack {number} of {len(packs)}: {_sizes(step, pack)}"
        for index in pack.tolist():
            yield from _sample(step, index, text)


def describe_step(step: TakenStep) -> str:
    """What and where the step is, and what the run says of it, in one line."""
    line, at = step.line, step.planned.at
    skipped = f", skipped: {line['skipped']}" if line.get("skipped") else ""
    return (
        f"step {step.number} of {step.folder.path}: epoch {at.epoch}, window {at.window}, step "
        f"{at.step} (each from 0); loss {number_text(line['loss'])}, gradient norm "
        f"{number_text(line.get('grad_norm'))}{skipped}; {len(step.planned.packs)} packs, "
        f"{_sizes(step, np.concatenate(step.planned.packs))}"
    )


def number_text(value: float | None) -> str:
    """A number of metrics.jsonl, which has null for what is no number."""
    return "not finite" if value is None else f"{value:.9g}"


def place_text(step: TakenStep, index: int) -> str:
    """Where a sample lies: "shards/docvqa, train[17]"."""
    dataset, own = step.dataset.place(index)
    return f"{dataset.folder}, {dataset.split}[{own}]"


def _sizes(step: TakenStep, samples: np.ndarray) -> str:
    data = step.dataset
    tokens, trained, views = (
        int(values[samples].sum()) for values in (data.tokens, data.label_tokens, data.views)
    )
    return f"{len(samples):,} samples, {tokens:,} tokens, {trained:,} trained, {views:,} views"


def _sample(step: TakenStep, index: int, text: TokenText) -> Iterator[str]:
    data, sample = step.dataset, step.dataset[index]
    yield (
        f"  {qualified_id(data, index)}: {data.tokens[index]:,} tokens, "
        f"{data.label_tokens[index]:,} trained, {data.views[index]:,} views"
    )
    facts = {"dataset": place_text(step, index), **provenance(sample)}
    for number, canvas in enumerate(sample.images, 1):
        height, width = canvas.size
        facts[f"picture {number}"] = f"{width} x {height} pixels, sha256 {digest(canvas).hex()}"
    for name, value in texts(sample, text).items():
        facts[name] = json.dumps(value, ensure_ascii=False)
    yield from (f"    {name:<9} {value}" for name, value in facts.items())

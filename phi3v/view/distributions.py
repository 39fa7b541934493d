"""How the dataset is spread: lengths, views, crop grids, aspect ratios, and packs of them."""

from collections import Counter
from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np

from phi3v.data import Dataset
from phi3v.data.audit import bin_start, canvas_sizes
from phi3v.data.mixture import Mixture
from phi3v.data.packing import Budget, Plan, Position, check_fits
from phi3v.evaluation.bars import Bar, bar_chart, histogram
from phi3v.geometry import Grid, grid_of
from phi3v.view.drawings import Part, grid_chart, pack_chart

PACKS = 8  # drawn, of the first epoch
MAX_TOKENS, MAX_VIEWS, WINDOW = 8192, 64, 1024  # of a pack, as data.* of a run recipe have them
SEED = 0  # of the packs that are shown


def distributions_section(datasets: Mapping[str, Dataset]) -> str:
    """Charts over all splits."""
    grids = _grids(datasets)
    shapes: Counter[Fraction] = Counter()
    for grid, count in grids.items():
        shapes[Fraction(grid.cols, grid.rows)] += count
    charts = (
        bar_chart("Tokens per sample", _bins(datasets, "tokens"), "tokens"),
        bar_chart("Trained tokens per sample", _bins(datasets, "label_tokens"), "trained tokens"),
        bar_chart("Views per sample", _bins(datasets, "views"), "crops and global views"),
        bar_chart(
            "Aspect ratios of canvases",
            [Bar(_ratio(r), shapes[r], f"{_ratio(r)}: {shapes[r]:,}") for r in sorted(shapes)],
            "width : height",
        ),
        grid_chart("Crops of canvases", grids),
    )
    return (
        '<section id="distributions"><h2>Distributions</h2><p class="note">Of all splits. Bins '
        "widen with the value, eight to a doubling; the label is the least value of a bin.</p>"
        f'<div class="charts">{"".join(charts)}</div></section>\n'
    )


def packs_section(dataset: Dataset, max_tokens: int | None, max_views: int | None) -> str:
    """Packs as a run on this split makes them, one to a step, and how full an epoch's are.

    Raises: ConfigError if a sample is larger than a pack of the given size.
    """
    if not len(dataset):
        return ""
    budget = Budget(
        max_tokens or max(MAX_TOKENS, int(dataset.tokens.max())),
        max_views or max(MAX_VIEWS, int(dataset.views.max())),
        WINDOW,
    )
    costs = dataset.tokens.astype(float)
    plan = Plan(dataset.fingerprint, SEED, dataset.tokens, dataset.views, costs, budget, 1)
    check_fits(plan, lambda index: dataset[index].id)
    packs = [step.packs[0] for step in plan.steps(Position(), epochs=1)]
    fill = float(dataset.tokens.sum()) / (len(packs) * budget.max_tokens)
    shown = packs[:PACKS]
    count = f"the first {len(shown)} of {len(packs):,} packs" if len(packs) > PACKS else "all packs"
    return (
        f'<section id="packs"><h2>Packs</h2><p class="note">{count[0].upper()}{count[1:]} of an '
        f"epoch over {dataset.split}, each of {budget.max_tokens:,} tokens and {budget.max_views:,}"
        f" views at most: on average {100 * fill:.1f}% of the tokens are filled, by "
        f"{len(dataset) / len(packs):,.1f} samples. "
        f"{_legend()}</p>{_pack_chart(dataset, shown, budget.max_tokens)}</section>\n"
    )


def drawn_packs(dataset: Dataset | Mixture, packs: Sequence[np.ndarray], max_tokens: int) -> str:
    """Packs of so many tokens at most, drawn, and what the colours mean."""
    return f'<p class="note">{_legend()}</p>{_pack_chart(dataset, packs, max_tokens)}'


def _pack_chart(dataset: Dataset | Mixture, packs: Sequence[np.ndarray], max_tokens: int) -> str:
    parts = [[_part(dataset, index) for index in pack.tolist()] for pack in packs]
    return pack_chart("Samples end to end", parts, max_tokens)


def _legend() -> str:
    kinds = (("image", "image"), ("text", "masked text"), ("trained", "trained"))
    return "".join(f' <span class="swatch in-{kind}"></span>&nbsp;{text}' for kind, text in kinds)


def _part(dataset: Dataset | Mixture, index: int) -> Part:
    names = (dataset.image_tokens, dataset.label_tokens, dataset.tokens)
    image, trained, tokens = (int(values[index]) for values in names)
    return Part(image, tokens - image - trained, trained)


def _bins(datasets: Mapping[str, Dataset], name: str) -> list[Bar]:
    counts: Counter[int] = Counter()
    for dataset in datasets.values():
        values, numbers = np.unique(getattr(dataset, name), return_counts=True)
        for value, number in zip(values.tolist(), numbers.tolist(), strict=True):
            counts[bin_start(value)] += number
    return histogram(counts)


def _grids(datasets: Mapping[str, Dataset]) -> dict[Grid, int]:
    """How many canvases have which grid; an image of a sample listed twice counts twice."""
    counts: Counter[Grid] = Counter()
    for dataset in datasets.values():
        sizes, numbers = np.unique(canvas_sizes(dataset), axis=0, return_counts=True)
        crop = dataset.view_settings.crop_size
        for (height, width), number in zip(sizes.tolist(), numbers.tolist(), strict=True):
            counts[grid_of(height, width, crop)] += number
    return dict(counts)


def _ratio(shape: Fraction) -> str:
    return f"{shape.numerator}:{shape.denominator}"

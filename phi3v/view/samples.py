"""The samples that are shown: which, and what of them."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from phi3v.data import Dataset
from phi3v.errors import ConfigError
from phi3v.geometry import grid_of
from phi3v.progress import progress
from phi3v.sample import IGNORED, Sample
from phi3v.view.canvases import canvas_figure
from phi3v.view.tokens import TokenText

FEW, LARGE, SMALL = 48, 448, 224  # up to FEW samples have large pictures; pixels
PLACE = ("source", "row")  # of meta
SHOWN_ELSEWHERE = (*PLACE, "prompt_length", "reference")


@dataclass(frozen=True)
class Shown:
    """Sample `index` of a split."""

    split: str
    index: int


def spread(counts: Mapping[str, int], rows: int) -> list[Shown]:
    """Choose `rows` samples: of every split by its size but at least one, from first to last.

    {"train": 90, "validation": 10}, 4 rows -> train 0, 44, 89 and validation 0
    """
    chosen: list[Shown] = []
    left, total = rows, sum(counts.values())
    filled = {split: count for split, count in counts.items() if count}
    for number, (split, count) in enumerate(filled.items()):
        reserved = len(filled) - number - 1
        share = min(round(left * count / total), left - reserved)
        num = min(max(share, 1), count, left)
        chosen += [Shown(split, i * (count - 1) // max(num - 1, 1)) for i in range(num)]
        left, total = left - num, total - count
    return chosen


def find(datasets: Mapping[str, Dataset], ids: Sequence[str]) -> list[Shown]:
    """The samples of these ids, in the order of `ids`; reads the dataset from its start.

    Raises: ConfigError naming an id that no sample has.
    """
    places: dict[str, Shown] = {}
    for split, dataset in datasets.items():
        with progress(dataset, f"find ids in {split}", "sample", len(dataset)) as samples:
            for index, sample in enumerate(samples):
                if sample.id in ids:
                    places.setdefault(sample.id, Shown(split, index))
    for name in ids:
        if name not in places:
            raise ConfigError(
                f"--ids names '{name}', which is no sample of the dataset; rows that were rejected "
                "are listed in its rejected.jsonl"
            )
    return [places[name] for name in ids]


def samples_section(
    datasets: Mapping[str, Dataset], shown: Sequence[Shown], text: TokenText
) -> Iterator[str]:
    """The section, piece by piece."""
    side = LARGE if len(shown) <= FEW else SMALL
    total = sum(len(dataset) for dataset in datasets.values())
    yield (
        f'<section id="samples"><h2>Samples</h2><p class="note">{len(shown):,} of {total:,}; '
        "--rows and --ids choose them. A canvas is the picture as it is stored: resized, padded "
        "with white to whole crops, cut along the lines; beside it is the global view of all of "
        'it. Tokens: <span class="tokens"><span class="trained"><i>trained</i></span> '
        '<span class="masked"><i>masked</i> <b>control</b></span> '
        '<span class="image">image</span></span>; a token shows its id under the pointer.</p>\n'
    )
    with progress(shown, "draw", "sample", len(shown)) as places:
        for place in places:
            dataset = datasets[place.split]
            yield _sample(dataset[place.index], place, dataset, text, side)
    yield "</section>\n"


def _sample(sample: Sample, place: Shown, dataset: Dataset, text: TokenText, side: int) -> str:
    settings = dataset.view_settings
    grids = [grid_of(*canvas.size, settings.crop_size) for canvas in sample.images]
    figures = "".join(
        canvas_figure(canvas, k, grid, int((sample.input_ids == -k).sum()), settings, side)
        for k, (canvas, grid) in enumerate(zip(sample.images, grids, strict=True), start=1)
    )
    answer = sample.input_ids[len(sample.prompt_ids) :]
    trained = int(np.count_nonzero(sample.labels != IGNORED))
    facts = {"prompt": text.plain(sample.prompt_ids), "answer": text.plain(answer)}
    terms = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>"
        for name, value in (facts | _provenance(sample)).items()
    )
    return (
        f'<article class="sample"><h3>{escape(sample.id)}</h3>'
        f'<p class="muted">{escape(place.split)} {place.index:,}: {len(sample.input_ids):,} tokens,'
        f" {trained:,} of them trained</p>"
        f'<div class="{"sides" if figures else "alone"}"><div>{figures}</div><div>'
        f'<div class="tokens">{text.sequence(sample, grids)}</div><dl>{terms}</dl></div></div>'
        "</article>\n"
    )


def _provenance(sample: Sample) -> dict[str, str]:
    """Where the sample comes from, and whatever else its meta holds."""
    places = [str(sample.meta[key]) for key in PLACE[:1] if key in sample.meta]
    places += [f"row {sample.meta[key] + 1}" for key in PLACE[1:] if key in sample.meta]  # from 1
    others = {key: value for key, value in sample.meta.items() if key not in SHOWN_ELSEWHERE}
    if all(others.get("trained_answers", ())):
        others.pop("trained_answers", None)  # as nearly everywhere
    return {
        "source": ", ".join(places),
        **{name: json.dumps(value, ensure_ascii=False) for name, value in others.items()},
    }

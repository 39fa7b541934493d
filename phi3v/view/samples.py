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
from phi3v.views import ViewSettings

FEW, LARGE, SMALL = 48, 448, 224  # up to FEW samples have large pictures; pixels
PLACE = ("source", "row")  # of meta
NOT_RECORDED = "not recorded"
SHOWN_ELSEWHERE = (*PLACE, "prompt_length", "reference")
LEGEND = (
    "A canvas is the picture as it is stored: resized, padded "
    "with white to whole crops, cut along the lines; beside it is the global view of all of "
    'it. Tokens: <span class="tokens"><span class="trained"><i>trained</i></span> '
    '<span class="masked"><i>masked</i> <b>control</b></span> '
    '<span class="image">image</span></span>; a token shows its id under the pointer.'
)


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

    In datasets of before several samples may have an id: all of them.

    Raises: ConfigError naming an id that no sample has.
    """
    places: dict[str, dict[str, Shown]] = {name: {} for name in ids}
    for split, dataset in datasets.items():
        with progress(range(len(dataset)), f"find ids in {split}", "sample") as indices:
            for index in indices:
                if (name := dataset.read_id(index)) in places:
                    meta = json.dumps(dataset.read_meta(index), sort_keys=True)
                    places[name].setdefault(meta, Shown(split, index))  # a sample listed twice
    for name in ids:
        if not places[name]:
            raise ConfigError(
                f"--ids names '{name}', which is no sample of the dataset; rows that were rejected "
                "are listed in its rejected.jsonl"
            )
    return [place for name in ids for place in places[name].values()]


def samples_section(
    datasets: Mapping[str, Dataset], shown: Sequence[Shown], text: TokenText
) -> Iterator[str]:
    """The section, piece by piece."""
    side = picture_side(len(shown))
    total = sum(len(dataset) for dataset in datasets.values())
    yield (
        f'<section id="samples"><h2>Samples</h2><p class="note">{len(shown):,} of {total:,}; '
        f"--rows and --ids choose them. {LEGEND}</p>\n"
    )
    with progress(shown, "draw", "sample", len(shown)) as places:
        for place in places:
            dataset = datasets[place.split]
            sample = dataset[place.index]
            yield sample_article(sample, sample.id, place, dataset.view_settings, text, side)
    yield "</section>\n"


def picture_side(num_samples: int) -> int:
    """Pixels of the longer side of a picture in a page of so many samples, at most."""
    return LARGE if num_samples <= FEW else SMALL


def sample_article(
    sample: Sample, title: str, place: Shown, settings: ViewSettings, text: TokenText, side: int
) -> str:
    """Draw a sample: its canvases, its tokens by what is trained, where it comes from.

    side  as of `picture_side`
    """
    grids = [grid_of(*canvas.size, settings.crop_size) for canvas in sample.images]
    figures = "".join(
        canvas_figure(canvas, k, grid, int((sample.input_ids == -k).sum()), settings, side)
        for k, (canvas, grid) in enumerate(zip(sample.images, grids, strict=True), start=1)
    )
    trained = int(np.count_nonzero(sample.labels != IGNORED))
    terms = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>"
        for name, value in (texts(sample, text) | provenance(sample)).items()
    )
    return (
        f'<article class="sample"><h3>{escape(title)}</h3>'
        f'<p class="muted">{escape(place.split)} {place.index:,}: {len(sample.input_ids):,} tokens,'
        f" {trained:,} of them trained</p>"
        f'<div class="{"sides" if figures else "alone"}"><div>{figures}</div><div>'
        f'<div class="tokens">{text.sequence(sample, grids)}</div><dl>{terms}</dl></div></div>'
        "</article>\n"
    )


def texts(sample: Sample, text: TokenText) -> dict[str, str]:
    """The prompt and the answer as the tokens decode, control tokens and image tags included."""
    answer = sample.input_ids[len(sample.prompt_ids) :]
    return {"prompt": text.plain(sample.prompt_ids), "answer": text.plain(answer)}


def provenance(sample: Sample) -> dict[str, str]:
    """Where the sample comes from, and whatever else its meta holds."""
    places = [str(sample.meta[key]) for key in PLACE[:1] if key in sample.meta]
    places += [f"row {sample.meta[key] + 1}" for key in PLACE[1:] if key in sample.meta]  # from 1
    others = {key: value for key, value in sample.meta.items() if key not in SHOWN_ELSEWHERE}
    if all(others.get("trained_answers", ())):
        others.pop("trained_answers", None)  # as nearly everywhere
    return {
        "source": ", ".join(places) or NOT_RECORDED,
        **{name: json.dumps(value, ensure_ascii=False) for name, value in others.items()},
    }

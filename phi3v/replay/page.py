"""The samples of a step as one HTML page, drawn as the page about a dataset draws them."""

from collections.abc import Iterator
from html import escape
from pathlib import Path

from phi3v.data.mixture import qualified_id
from phi3v.evaluation.charts import short_number
from phi3v.page import heading
from phi3v.progress import progress
from phi3v.replay.listing import describe_step, number_text
from phi3v.replay.steps import TakenStep, counts
from phi3v.view.distributions import drawn_packs
from phi3v.view.page import write_page
from phi3v.view.samples import LEGEND, Shown, picture_side, sample_article
from phi3v.view.tokens import TokenText


def write_step_page(step: TakenStep, text: TokenText, out: Path) -> None:
    """Write the page about a step, whole or not at all.

    Raises: ConfigError if the file cannot be written.
    """
    title = f"Step {step.number:,} of {step.folder.path}"
    write_page(out, title, "".join(_body(step, text, title)), option="--page")


def _body(step: TakenStep, text: TokenText, title: str) -> Iterator[str]:
    line, packs = step.line, step.planned.packs
    found = counts(step.dataset, packs)
    yield heading(
        title,
        [
            ("loss", number_text(line["loss"])),
            ("gradient norm", number_text(line.get("grad_norm"))),
            (f"samples in {len(packs):,} packs", f"{found['samples']:,}"),
            ("tokens", short_number(found["tokens"])),
            ("of them trained", short_number(found["label_tokens"])),
        ],
    )
    chart = drawn_packs(step.dataset, packs, step.cfg.data.max_tokens)
    yield f'<section><p class="note">{escape(describe_step(step))}. {LEGEND}</p>{chart}</section>\n'
    side = picture_side(found["samples"])
    with progress(None, "draw", "sample", found["samples"]) as bar:
        for number, pack in enumerate(packs, 1):
            yield f'<section id="pack-{number}"><h2>Pack {number} of {len(packs)}</h2>\n'
            for index in pack.tolist():
                yield _article(step, index, text, side)
                bar.update()
            yield "</section>\n"


def _article(step: TakenStep, index: int, text: TokenText, side: int) -> str:
    dataset, own = step.dataset.place(index)
    place = Shown(f"{dataset.folder}, {dataset.split}", own)
    title = qualified_id(step.dataset, index)
    return sample_article(dataset[own], title, place, dataset.view_settings, text, side)

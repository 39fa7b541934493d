"""Which samples are shown, and how their tokens and canvases become HTML."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from phi3v.geometry import Grid
from phi3v.processing import Phi3VProcessor
from phi3v.sample import IGNORED, Canvas, Sample
from phi3v.view.canvases import canvas_figure, global_view
from phi3v.view.samples import Shown, spread
from phi3v.view.tokens import TokenText, runs_of
from phi3v.views import ViewSettings, make_views
from tests.page import Page

SETTINGS = ViewSettings(336, (0.48, 0.46, 0.41), (0.27, 0.26, 0.28))


def sample(ids: list[int], trained: slice) -> Sample:
    tokens = np.array(ids, np.int32)
    labels = np.full(len(ids), IGNORED, np.int32)
    labels[trained] = tokens[trained]
    return Sample("s", tokens, labels, (), {"prompt_length": 0, "reference": ""})


@given(
    counts=st.dictionaries(st.sampled_from("abc"), st.integers(0, 40), min_size=1),
    rows=st.integers(1, 60),
)
def test_so_many_different_samples_are_chosen_and_of_every_split_one(counts, rows) -> None:
    chosen = spread(counts, rows)
    assert len(set(chosen)) == len(chosen) == min(rows, sum(counts.values()))
    assert all(0 <= place.index < counts[place.split] for place in chosen)
    filled = {split for split, count in counts.items() if count}
    if rows >= len(filled):
        assert {place.split for place in chosen} == filled


def test_chosen_samples_go_evenly_from_the_first_to_the_last() -> None:
    chosen = spread({"train": 90, "validation": 10}, 4)
    assert chosen == [Shown("train", n) for n in (0, 44, 89)] + [Shown("validation", 0)]


def test_runs_end_where_the_kind_of_token_changes() -> None:
    runs = runs_of(sample([5, -1, -1, -2, 6, 7, 8, 9], slice(5, 7)))
    assert [(run.kind, run.start, run.stop) for run in runs] == [
        (0, 0, 1),
        (-1, 1, 3),
        (-2, 3, 4),
        (0, 4, 5),
        (1, 5, 7),
        (0, 7, 8),
    ]


@pytest.fixture
def text(tiny_model) -> TokenText:
    return TokenText(Phi3VProcessor.from_pretrained(tiny_model).tokenizer)


def test_a_sequence_shows_every_token_with_its_id_and_images_as_one_chip(text) -> None:
    words = text.tokenizer("<|user|>\nA <b>.\u00e9", add_special_tokens=False)["input_ids"]
    end = text.tokenizer.convert_tokens_to_ids("<|end|>")
    shown = sample([*words, *[-1] * 757, *words, end], slice(-len(words) - 1, None))
    page = Page(text.sequence(shown, [Grid(2, 2)]))
    assert ">&lt;</i>" in page.source and "><<" not in page.source
    ids = [int(a["title"]) for _, a in page.tags if "title" in a]
    assert ids == [*words, *words, end]
    masked, image, trained = re.split(r"(image 1: 757 tokens, 2 . 2 crops)", page.text)
    assert trained == f"{masked}<|end|>"
    assert masked.startswith("<|user|>") and "A <b>." in masked and "<0xC3><0xA9>" in masked
    controls = [a["title"] for tag, a in page.tags if tag == "b"]
    assert {int(c) for c in controls} <= text.tokenizer.added_tokens_decoder.keys()
    assert str(end) in controls


def test_ids_that_mean_nothing_and_trained_images_are_shown_not_hidden(text) -> None:
    page = Page(text.sequence(sample([99999999, -3, -3, -1], slice(3, 4)), []))
    assert page.text == "unknown tokenimage 3: 2 tokens, but no such imageimage 1"


def test_of_a_long_run_the_ends_are_shown_and_the_rest_is_counted(text) -> None:
    word = text.tokenizer("Price", add_special_tokens=False)["input_ids"][0]
    html = text.sequence(sample([word] * 5000, slice(0, 0)), [])
    assert html.count(f'title="{word}"') == 600 and ">4,400 tokens more<" in html
    assert "more" not in text.sequence(sample([word] * 600, slice(0, 0)), [])


def test_plain_text_has_tags_where_images_are(text) -> None:
    words = text.tokenizer("Full Price", add_special_tokens=False)["input_ids"]
    ids = np.array([*words, -1, -1, -2, *words, -1])
    plain = text.tokenizer.decode(words)
    assert text.plain(ids) == f"{plain}<|image_1|><|image_2|>{plain}<|image_1|>"
    assert text.plain(ids[:0]) == ""


@pytest.mark.parametrize("crops", [1, 3])
def test_pictures_of_the_worst_canvas_stay_below_200_kb(crops: int) -> None:
    settings = ViewSettings(448, SETTINGS.mean, SETTINGS.std)  # shown pixel by pixel
    shape = (448 * crops, 448 * crops, 3)
    noise = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    page = Page(canvas_figure(Canvas(noise), 1, Grid(crops, crops), 9, settings, 448))
    (canvas,), (overview,) = page.all("image"), page.all("img")
    assert max(len(canvas["href"]), len(overview["src"])) <= 200_000


def test_the_global_view_is_what_the_model_gets_but_for_its_normalisation() -> None:
    rows, columns = np.mgrid[0:672, 0:336]
    pixels = np.stack([rows % 256, columns % 256, (rows + columns) % 256], -1).astype(np.uint8)
    shown = torch.tensor(global_view(Canvas(pixels), SETTINGS)).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(v)[:, None, None] for v in (SETTINGS.mean, SETTINGS.std))
    real = make_views(torch.tensor(pixels), SETTINGS)[0] * std + mean
    # Rounded to 1/255; bicubic overshoots of [0, 1] are cut off.
    assert (shown - real.clamp(0, 1)).abs().max() <= 0.5 / 255 + 1e-6

"""A batch is its samples laid end to end, every position in its place."""

from pathlib import Path

import numpy as np
import torch

from phi3v.data import Dataset
from phi3v.data.batch import collate, model_inputs
from phi3v.geometry import Grid
from phi3v.sample import IGNORED
from phi3v.views import ViewSettings, make_views
from tests.tiny import CROP, make_sample, write_samples

SETTINGS = ViewSettings(CROP, (0.5, 0.4, 0.3), (0.25, 0.2, 0.1))
SAMPLES = [
    make_sample("a", 6, [(1, 1), (2, 1)]),
    make_sample("b", 9),
    make_sample("c", 4, [(1, 3)]),
]


def test_samples_lie_end_to_end() -> None:
    batch = collate(SAMPLES)
    assert batch.input_ids.dtype == batch.labels.dtype == torch.int64
    assert batch.segment_lengths == tuple(len(s.input_ids) for s in SAMPLES)
    assert batch.tokens == sum(batch.segment_lengths)
    assert batch.ids == ("a", "b", "c")
    ids = batch.input_ids[0].split(batch.segment_lengths)
    labels = batch.labels[0].split(batch.segment_lengths)
    for k, sample in enumerate(SAMPLES):
        assert ids[k].tolist() == sample.input_ids.tolist()
        assert labels[k].tolist() == sample.labels.tolist()
    assert batch.label_tokens == sum(int((s.labels != IGNORED).sum()) for s in SAMPLES)


def test_canvases_come_in_order_and_in_memory_of_their_own(tmp_path: Path) -> None:
    dataset = Dataset(write_samples(tmp_path, SAMPLES), "train")
    batch = collate(list(dataset))
    expected = [canvas.pixels for sample in dataset for canvas in sample.images]
    assert len(batch.canvases) == 3
    for canvas, pixels in zip(batch.canvases, expected, strict=True):
        assert canvas.dtype == torch.uint8
        assert np.array_equal(canvas.numpy(), pixels)
        assert not np.shares_memory(canvas.numpy(), pixels)  # the map is read-only


def test_the_model_gets_the_views_of_all_canvases_and_their_grids() -> None:
    batch = collate(SAMPLES)
    inputs = model_inputs(batch, SETTINGS, torch.device("cpu"))
    assert inputs["grids"] == [Grid(1, 1), Grid(2, 1), Grid(1, 3)]
    assert inputs["views"].shape == (2 + 3 + 4, 3, CROP, CROP)
    assert torch.equal(inputs["views"][2:5], make_views(batch.canvases[1], SETTINGS))
    assert inputs["segment_lengths"] == batch.segment_lengths
    assert torch.equal(inputs["input_ids"], batch.input_ids)


def test_a_pack_of_texts_has_no_views() -> None:
    inputs = model_inputs(collate(SAMPLES[1:2]), SETTINGS, torch.device("cpu"))
    assert "views" not in inputs and "grids" not in inputs


def test_a_pack_of_no_samples_is_one_untrained_token() -> None:
    batch = collate([])
    assert batch.input_ids.tolist() == [[0]]
    assert batch.labels.tolist() == [[IGNORED]]
    assert (batch.segment_lengths, batch.label_tokens) == ((1,), 0)
    assert (batch.canvases, batch.ids) == ((), ())
    assert batch.input_ids.dtype == batch.labels.dtype == torch.int64

"""Held-out rows: what each asks, what it asks with other pictures, what cannot be asked at all."""

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phi3v.config.running import EvalSection
from phi3v.data import Dataset
from phi3v.errors import ConfigError, ShardError
from phi3v.evaluation.evaluate import evaluate
from phi3v.evaluation.held_out import blind_prompt, open_held_out, prompt_of, spread
from phi3v.geometry import grid_of, image_tokens
from phi3v.prepare import prepare
from phi3v.sample import Sample, with_images
from tests.tiny import product_recipe, write_samples

CROP, SIDE = 56, 2  # pixels and merged patches of the tiny model's views


@pytest.fixture(scope="module")
def held_out(tiny_shards: Path) -> Dataset:
    return Dataset(tiny_shards, "validation")


@pytest.fixture(scope="module")
def shapes(tiny_shards: Path) -> list[Sample]:
    """A sample of each size of canvas that the catalogue has."""
    found = {sample.images[0].size: sample for sample in Dataset(tiny_shards, "train")}
    assert len(found) > 1
    return list(found.values())


def test_rows_are_evenly_spaced() -> None:
    assert spread(10, 4) == [0, 3, 6, 9]
    assert spread(3, 4) == spread(3, None) == [0, 1, 2]
    assert spread(9, 1) == [0]


def test_a_blind_prompt_is_the_question_about_another_canvas(shapes: list[Sample]) -> None:
    """Pictures of other shapes fill other numbers of positions; the words stay as they are."""
    for sample, donor in product(shapes, shapes):
        prompt = blind_prompt(sample, donor, CROP, SIDE)
        words = sample.prompt_ids[sample.prompt_ids >= 0]
        assert np.array_equal(prompt.ids[prompt.ids >= 0], words)
        assert (prompt.ids == -1).sum() == image_tokens(grid_of(*donor.images[0].size, CROP), SIDE)
        assert prompt.images == donor.images
        assert prompt.ids.dtype == sample.prompt_ids.dtype


def test_each_of_several_pictures_gets_its_own_number_of_positions(shapes: list[Sample]) -> None:
    ids = np.array([1, 7, -1, -1, 1, 8, -2, 1, 9], dtype=np.int32)
    images = (*shapes[0].images, *shapes[1].images)
    first, second = (image_tokens(grid_of(*image.size, CROP), SIDE) for image in images)
    assert first != second
    found = with_images(ids, images, CROP, SIDE)
    assert found.tolist() == [1, 7, *[-1] * first, 1, 8, *[-2] * second, 1, 9]


def test_a_prompt_has_the_pictures_of_its_own_turns(held_out: Dataset) -> None:
    sample = held_out[0]
    asked = prompt_of(sample)
    assert np.array_equal(asked.ids, sample.input_ids[: sample.meta["prompt_length"]])
    assert len(asked.images) == 1
    late = Sample(
        sample.id,
        np.concatenate([asked.ids, [5], -2 * np.ones(9, np.int32)]).astype(np.int32),
        sample.labels,
        sample.images * 2,
        sample.meta,
    )
    assert len(prompt_of(late).images) == 1, "a picture behind the prompt is not shown"


# --- what cannot be evaluated ---


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rows": 0}, "eval.rows is 0, so there is nothing to evaluate; set it above 0"),
        ({"metrics": ("blue",)}, "eval.metrics has 'blue', which is no metric; "),
        ({"metrics": ("a_mape",), "pattern": "{a}"}, "eval.metrics has 'a_mape', which needs a "),
        ({"pattern": "no field"}, "eval.pattern 'no field' has no field; "),
        ({"pattern": "Price: {price:float}"}, "{shards}, split 'validation', row '"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_is_asked(
    tiny_shards: Path, values: dict[str, Any], message: str
) -> None:
    for attempt in (open_held_out, lambda *a: evaluate(None, *a)):  # no model is needed to refuse
        with pytest.raises(ConfigError) as caught:
            attempt([str(tiny_shards)], EvalSection(**values))
        assert str(caught.value).startswith(message.replace("{shards}", str(tiny_shards)))


def test_a_reference_that_the_pattern_cannot_read_is_named_with_its_own_folder(
    tiny_shards: Path, tmp_path: Path
) -> None:
    sample = Dataset(tiny_shards, "validation")[0]
    odd = replace(sample, id="r9", meta=sample.meta | {"reference": "A bag."})
    good, bad = str(tmp_path / "good"), str(tmp_path / "bad")
    write_samples(Path(good), [sample], "validation")
    write_samples(Path(bad), [sample, odd], "validation")
    pattern = "Product: {title}, Category: {category}, Full Price: {price:float}"
    for folders in ([good, bad], [bad, good]):
        with pytest.raises(ConfigError) as caught:
            open_held_out(folders, EvalSection(pattern=pattern))
        assert str(caught.value) == (
            f"{bad}, split 'validation', row 'r9': the reference 'A bag.' does not fit the "
            f"pattern '{pattern}'; correct eval.pattern, or the assistant text of the dataset"
        )


def test_an_empty_split_is_refused(catalogue: Path, tiny_model: Path, tmp_path: Path) -> None:
    recipe = product_recipe(catalogue, tiny_model, tmp_path / "shards", split={"validation": 1e-12})
    prepare(recipe)
    with pytest.raises(ConfigError) as caught:
        open_held_out([str(tmp_path / "shards")], EvalSection())
    assert str(caught.value) == (
        f"{tmp_path / 'shards'} has no rows in split 'validation'; prepare it with a larger "
        "split.validation, or set eval.rows=0"
    )


def test_an_unknown_split_is_refused(tiny_shards: Path) -> None:
    with pytest.raises(ShardError, match="has no split 'test', it has: train, validation; "):
        open_held_out([str(tiny_shards)], EvalSection(split="test"))


def test_what_is_unseen_needs_a_split_to_be_seen_in(mixed_shards: Path, tmp_path: Path) -> None:
    text = [sample for sample in Dataset(mixed_shards, "train") if not sample.images]
    write_samples(tmp_path, text[:1], "validation")
    with pytest.raises(ShardError, match="has no split 'train'"):
        open_held_out([str(tmp_path)], EvalSection(metrics=("exact_match_unseen",)))

"""What a sample can say about itself, and a prompt rewritten for other images."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phi3v.geometry import Grid, grid_of, image_tokens
from phi3v.processing.prompt import encode
from phi3v.sample import Canvas, Sample, count_views, with_images
from tests.processing.tokens import tokenizer

CROP, SIDE = 28, 1
GRIDS = st.builds(Grid, st.integers(1, 4), st.integers(1, 4))


def canvas(grid: Grid) -> Canvas:
    return Canvas(np.zeros((grid.rows * CROP, grid.cols * CROP, 3), dtype=np.uint8))


def test_a_canvas_has_height_before_width() -> None:
    assert canvas(Grid(2, 3)).size == (56, 84)


def test_views_are_crops_and_one_global_view_an_image() -> None:
    assert count_views((canvas(Grid(2, 2)), canvas(Grid(1, 1)), canvas(Grid(1, 4))), CROP) == 12
    assert count_views((), CROP) == 0


def test_a_prompt_ends_where_the_last_answer_begins() -> None:
    ids = np.arange(6, dtype=np.int32)
    sample = Sample("a", ids, ids, (), {"prompt_length": 4, "reference": "x"})
    assert sample.prompt_ids.tolist() == [0, 1, 2, 3]


def test_a_prompt_is_rewritten_for_another_image() -> None:
    ids = np.array([1, 5] + [-1] * 5 + [1, 9], dtype=np.int32)
    rewritten = with_images(ids, (canvas(Grid(1, 3)),), CROP, SIDE)
    assert rewritten.tolist() == [1, 5] + [-1] * 7 + [1, 9]
    assert rewritten.dtype == np.int32


def test_a_prompt_without_images_is_itself() -> None:
    ids = np.array([1, 7, 7, 7, 2], dtype=np.int32)
    assert with_images(ids, (), CROP, SIDE).tolist() == ids.tolist()


@settings(deadline=None)
@given(st.data(), st.integers(1, 3))
def test_a_rewritten_prompt_is_the_prompt_of_the_other_images(
    data: st.DataObject, images: int
) -> None:
    order = data.draw(st.permutations(range(1, images + 1)))
    text = "a" + "".join(f"<|image_{number}|>bb" for number in order)
    before, after = (data.draw(st.lists(GRIDS, min_size=images, max_size=images)) for _ in range(2))
    ids = encode(tokenizer(), text, [image_tokens(grid, SIDE) for grid in before])
    expected = encode(tokenizer(), text, [image_tokens(grid, SIDE) for grid in after])
    canvases = tuple(canvas(grid) for grid in after)
    assert [grid_of(*c.size, CROP) for c in canvases] == after
    rewritten = with_images(np.array(ids, dtype=np.int32), canvases, CROP, SIDE)
    assert rewritten.tolist() == expected


def test_a_prompt_that_asks_for_more_images_than_given_is_a_defect() -> None:
    with pytest.raises(IndexError):
        with_images(np.array([-2, -2], dtype=np.int32), (canvas(Grid(1, 1)),), CROP, SIDE)

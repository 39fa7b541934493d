"""The image embedding: as many vectors as the closed form says, each in its place."""

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from phi3v.geometry import Grid, image_tokens
from phi3v.model import Phi3VConfig
from phi3v.model.attention import VIEWS
from phi3v.model.vision import ImageEmbedding, merge_crops
from phi3v.samples.tiny import TinySizes, tiny_config
from tests.model.tiny import SIZES, TOKENIZER, make_model

GRIDS = st.builds(Grid, st.integers(1, 4), st.integers(1, 4))


@cache
def embedding(side: int) -> ImageEmbedding:
    """With `side` x `side` merged patches a view, of 2 pixels each way."""
    sizes = TinySizes(
        image_size=4 * side, patch_size=2, vision_width=8, vision_layers=2, vision_heads=2, width=8
    )
    config = Phi3VConfig.from_dict(tiny_config(sizes, TOKENIZER).to_dict())
    config.vision_config._attn_implementation = VIEWS  # as the whole model sets it
    torch.manual_seed(side)
    made = ImageEmbedding(config)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made


def views_of(side: int, count: int) -> torch.Tensor:
    return torch.randn(count, 3, 4 * side, 4 * side, generator=torch.Generator().manual_seed(count))


@settings(deadline=None)
@given(st.integers(1, 3), st.lists(GRIDS, min_size=1, max_size=3))
def test_an_image_takes_as_many_tokens_as_the_closed_form_says(
    side: int, grids: list[Grid]
) -> None:
    views = views_of(side, sum(grid.views for grid in grids))
    with torch.no_grad():
        embedded = embedding(side)(views, grids)
    assert len(embedded) == sum(image_tokens(grid, side) for grid in grids)


def test_the_images_of_a_batch_do_not_mix() -> None:
    grids = [Grid(2, 2), Grid(1, 1), Grid(1, 3)]
    views = views_of(2, sum(grid.views for grid in grids))
    model = embedding(2)
    with torch.no_grad():
        together = model(views, grids).split([image_tokens(grid, 2) for grid in grids])
        parts = views.split([grid.views for grid in grids])
        for ours, own, grid in zip(together, parts, grids, strict=True):
            assert torch.allclose(ours, model(own, [grid]), atol=1e-5)


@settings(deadline=None)
@given(GRIDS, st.integers(1, 3))
def test_crops_are_merged_where_they_lie_in_the_image(grid: Grid, side: int) -> None:
    """Patches that know their place: those of a block end side by side, in the order (dy, dx)."""
    edge = 2 * side
    high, wide = grid.rows * edge, grid.cols * edge
    places = torch.cartesian_prod(torch.arange(high), torch.arange(wide)).view(high, wide, 2)
    tiles = [
        places[row * edge : (row + 1) * edge, col * edge : (col + 1) * edge].reshape(-1, 2)
        for row in range(grid.rows)
        for col in range(grid.cols)
    ]
    merged = merge_crops(torch.stack(tiles), grid, side)
    for y in range(grid.rows * side):
        for x in range(grid.cols * side):
            block = [(2 * y + dy, 2 * x + dx) for dy in (0, 1) for dx in (0, 1)]
            assert merged[y, x].view(4, 2).tolist() == [list(place) for place in block]


def test_separators_end_each_line_and_part_the_views() -> None:
    """A 1 x 2 grid of side 2: two lines of four and a separator, one between, then 2 x (2 + 1)."""
    model, grid = embedding(2), Grid(1, 2)
    with torch.no_grad():
        sequence = model.arrange(model.img_processor(views_of(2, 3)), grid)
    is_end = (sequence == model.sub_GN[0, 0, 0]).all(dim=1)
    is_between = (sequence == model.glb_GN[0, 0]).all(dim=1)
    assert is_end.nonzero().flatten().tolist() == [4, 9, 13, 16]
    assert is_between.nonzero().flatten().tolist() == [10]


def test_the_layer_behind_the_feature_is_not_computed() -> None:
    model = make_model()
    tower = model.model.vision_embed_tokens.img_processor.vision_model
    with torch.no_grad():
        for unused in (*tower.encoder.layers[-1].parameters(), *tower.post_layernorm.parameters()):
            unused.fill_(torch.nan)
        features = tower(torch.randn(1, 3, SIZES.image_size, SIZES.image_size))
    assert features.shape == (1, 16, SIZES.vision_width)
    assert features.isfinite().all()


def test_what_the_tower_gives_of_a_view_are_its_patches_without_the_class_token() -> None:
    tower = embedding(2).img_processor.vision_model
    view = views_of(2, 1)
    with torch.no_grad():
        states = tower.encoder(tower.pre_layrnorm(tower.embeddings(view)))  # (1, 1 + 16, C)
        patches = tower.embeddings.patch_embedding(view).flatten(2).transpose(1, 2)
        places = tower.embeddings.position_embedding.weight
        assert torch.equal(tower.embeddings(view)[0, 1:], patches[0] + places[1:])
        assert torch.equal(tower(view), states[:, 1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_image_gives_zeros_in_which_every_trained_parameter_has_its_part(
    dtype: torch.dtype,
) -> None:
    model = make_model().to(dtype).model.vision_embed_tokens
    nothing = model(None, ())
    assert nothing.dtype == dtype
    assert not nothing.any()
    nothing.sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (not parameter.requires_grad), name
        assert parameter.grad is None or not parameter.grad.any(), name

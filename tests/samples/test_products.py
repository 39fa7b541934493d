"""The sample catalogue: what its table says is what its pictures show."""

import csv
import runpy
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from phi3v.config import DatasetConfig, load_recipe
from phi3v.errors import ConfigError
from phi3v.prepare.split import choose_sides, split_key
from phi3v.samples import products
from phi3v.samples.products import (
    HEADER,
    draw_product,
    full_price,
    limited_editions,
    list_products,
    make_products,
)

ROWS = 120


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("products") / "made" / "here"
    make_products(out, rows=ROWS, seed=0)
    return out


def read_rows(catalogue: Path) -> list[dict[str, str]]:
    with (catalogue / "products.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def read_files(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def read_pixels(catalogue: Path, row: dict[str, str]) -> np.ndarray:
    with Image.open(catalogue / row["local_image_path"]) as picture:
        return np.asarray(picture, dtype=np.float32)


def count_near(pixels: np.ndarray, colour: tuple[int, int, int]) -> int:
    """Count pixels within 15 of the colour at some brightness from 90 to 110 %, in each channel."""
    shades = (np.minimum(255, np.array(colour) * factor) for factor in (0.9, 0.95, 1, 1.05, 1.1))
    near = [(np.abs(pixels - shade) < 15).all(axis=-1) for shade in shades]
    return int(np.any(near, axis=0).sum())


def hide_tag(pixels: np.ndarray) -> np.ndarray:
    """Whiten the corner with the tag; keep every third pixel, which is enough to tell colours."""
    side = round(32 / 112 * max(pixels.shape))
    shown = pixels.copy()
    shown[-side:, -side:] = 255
    return shown[::3, ::3]


def test_the_table_has_the_promised_columns_and_one_picture_per_row(catalogue: Path) -> None:
    header = (catalogue / "products.csv").read_text("utf-8").splitlines()[0]
    assert header == HEADER
    rows = read_rows(catalogue)
    assert [row["product_code"] for row in rows] == [f"P{i:05d}" for i in range(1, ROWS + 1)]
    assert {row["currency"] for row in rows} == {"USD"}
    pictures = {f"images/{path.name}" for path in (catalogue / "images").iterdir()}
    assert {row["local_image_path"] for row in rows} == pictures


def test_texts_follow_the_rule_from_style_and_size(catalogue: Path) -> None:
    for row, product in zip(read_rows(catalogue), list_products(ROWS, 0), strict=True):
        colour, pattern, category = row["title"].split(" ")
        assert (colour, pattern, category) == (
            product.style.colour,
            product.style.pattern,
            product.style.category,
        )
        assert row["category3_code"] == category.upper()
        assert int(row["full_price"]) == full_price(category, product.size)


def test_prices_of_all_categories_and_sizes_are_whole_and_differ() -> None:
    prices = [full_price(c, s) for c in products.BASE_PRICES for s in products.SIZE_TENTHS]
    tenths = [b * t for b in products.BASE_PRICES.values() for t in products.SIZE_TENTHS.values()]
    assert len(set(prices)) == 32
    assert all(value % 10 == 0 for value in tenths)


def test_the_commonest_colour_in_a_picture_is_the_one_in_its_title(catalogue: Path) -> None:
    for row in read_rows(catalogue):
        pixels = hide_tag(read_pixels(catalogue, row))
        counts = {name: count_near(pixels, rgb) for name, rgb in products.COLOURS.items()}
        assert max(counts, key=lambda name: counts[name]) == row["title"].split(" ")[0], row


def test_only_striped_and_checked_pictures_show_the_stripe_colour(catalogue: Path) -> None:
    for row in read_rows(catalogue):
        colour, pattern, _ = row["title"].split(" ")
        pixels = hide_tag(read_pixels(catalogue, row))
        grey = (np.abs(pixels - np.array(products.STRIPE_COLOUR)) < 12).all(axis=-1).sum()
        share = grey / (grey + count_near(pixels, products.COLOURS[colour]))
        assert share < 0.05 if pattern == "plain" else 0.2 < share < 0.8, (row, share)


def test_the_tag_in_the_corner_tells_the_size_and_so_the_price(catalogue: Path) -> None:
    for row in read_rows(catalogue):
        pixels = read_pixels(catalogue, row)
        crops = 2 if max(pixels.shape) < 3 * min(pixels.shape[:2]) else 3
        unit = max(pixels.shape) / (56 * crops)
        seen = pixels[-round(28 * unit), -round(16 * unit)]  # near the tag's upper edge, no dots
        size = min(
            products.TAG_COLOURS,
            key=lambda name: np.abs(seen - np.array(products.TAG_COLOURS[name])).sum(),
        )
        category = row["title"].split(" ")[2]
        assert int(row["full_price"]) == full_price(category, size), row


def test_a_size_has_as_many_dots_as_its_rank() -> None:
    assert [len(products.TAG_DOTS[size]) for size in products.SIZE_TENTHS] == [1, 2, 3, 4]


def test_two_runs_write_the_same_bytes(catalogue: Path, tmp_path: Path) -> None:
    make_products(tmp_path / "again", rows=ROWS, seed=0)
    assert read_files(tmp_path / "again") == read_files(catalogue)


def test_a_short_catalogue_is_the_start_of_a_long_one(catalogue: Path, tmp_path: Path) -> None:
    make_products(tmp_path, rows=20, seed=0)
    short, long = read_files(tmp_path), read_files(catalogue)
    assert long["products.csv"].startswith(short.pop("products.csv"))
    assert short.items() <= long.items()


def test_another_seed_gives_another_catalogue() -> None:
    assert list_products(50, 0) != list_products(50, 1)
    product = list_products(1, 0)[0]
    assert draw_product(product, 0).tobytes() != draw_product(product, 1).tobytes()


@pytest.mark.parametrize("seed", [0, 1])
def test_limited_editions_are_a_third_of_the_styles_and_a_sixth_of_the_products(seed: int) -> None:
    listed = list_products(3000, seed)
    limited = limited_editions(seed)
    assert len(set(limited)) == 64
    assert {product.style for product in listed if product.is_limited} == set(limited)
    assert not {product.style for product in listed if not product.is_limited} & set(limited)
    assert 0.16 < sum(product.is_limited for product in listed) / 3000 < 0.2
    others = Counter(product.style for product in listed if not product.is_limited)
    assert len(others) == 128
    assert min(others.values()) >= 8


def test_the_edition_of_a_row_is_its_title_or_its_own_code(catalogue: Path) -> None:
    for row, product in zip(read_rows(catalogue), list_products(ROWS, 0), strict=True):
        assert row["edition"] == row["title" if product.is_limited else "product_code"]


@pytest.mark.parametrize(("seed", "held_out", "unseen"), [(0, 276, 63), (1, 282, 61)])
def test_the_recipe_holds_out_whole_limited_editions(seed: int, held_out: int, unseen: int) -> None:
    """About 60 of the demo's validation rows have a title that no row of training has."""
    recipe = load_recipe(
        DatasetConfig, Path(__file__).parents[2] / "launch/recipes/products.yaml", []
    )
    assert recipe.split.by == "edition"
    products = list_products(3000, seed)
    keys = [split_key(recipe.split.seed, product.edition) for product in products]
    sides = choose_sides(np.array(keys, dtype=np.uint64), recipe.split.share)
    is_held = dict(zip(products, sides.held_out.tolist(), strict=True))
    seen = {product.title for product in products if not is_held[product]}
    asked = [product for product in products if is_held[product]]
    assert len(asked) == held_out
    assert sum(product.title not in seen for product in asked) == unseen
    assert not {product.title for product in asked if product.is_limited} & seen


def test_one_picture_in_eleven_is_wide_or_tall() -> None:
    sizes = [draw_product(product, 0).size for product in list_products(800, 0)]
    ratios = [width / height for width, height in sizes]
    wide, tall = sum(r > 2 for r in ratios), sum(r < 0.5 for r in ratios)
    assert wide >= 10
    assert tall >= 10
    assert 0.07 < (wide + tall) / len(ratios) < 0.12
    assert all(1 / 1.45 < r < 1.45 or not 1 / 2.05 < r < 2.05 for r in ratios)
    assert {max(size) for size in sizes} <= set(range(128, 221))
    assert any(r > 3 or r < 1 / 3 for r in ratios)


def test_a_catalogue_replaces_a_longer_or_unfinished_one(tmp_path: Path) -> None:
    make_products(tmp_path / "short", rows=3)
    make_products(tmp_path / "long", rows=6, seed=1)
    make_products(tmp_path / "long", rows=3)
    assert read_files(tmp_path / "long") == read_files(tmp_path / "short")
    (tmp_path / "short/products.csv").rename(tmp_path / "short/.products.csv.1.tmp")
    make_products(tmp_path / "short", rows=3)
    assert read_files(tmp_path / "short") == read_files(tmp_path / "long")


@pytest.mark.parametrize("name", ["notes.txt", "images/holiday.jpg", "products.csv"])
def test_a_folder_with_other_files_is_refused_and_left_alone(tmp_path: Path, name: str) -> None:
    foreign = tmp_path / name
    foreign.parent.mkdir(exist_ok=True)
    foreign.write_text("mine")
    with pytest.raises(ConfigError, match=f"because {foreign} is not from one; name an empty"):
        make_products(tmp_path, rows=1)
    assert read_files(tmp_path) == {name: b"mine"}


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(ConfigError, match="taken is not from one"):
        make_products(tmp_path / "taken", rows=1)


def test_less_than_one_row_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--rows is 0 for .*, but a catalogue has 1 or more"):
        make_products(tmp_path, rows=0)


def test_the_command_writes_a_catalogue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = Path(__file__).parents[2] / "launch/products.py"
    monkeypatch.setattr(sys, "argv", [str(command), str(tmp_path), "--rows", "2", "--seed", "7"])
    try:
        runpy.run_path(str(command), run_name="__main__")
    except SystemExit as end:
        assert not end.code
    assert len(read_rows(tmp_path)) == 2

"""What the perceptual hash keeps together and apart; the search for near pairs is exact."""

import io
from collections.abc import Iterator
from random import Random

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageEnhance, ImageFont
from sklearn.datasets import load_digits

from phi3v.prepare.duplicates import (
    BANDS,
    DISTANCE,
    THUMBNAIL,
    WORDS,
    connected,
    first_equal,
    near_duplicate_pairs,
    perceptual_hash,
)
from phi3v.samples.products import draw_product, list_products


def hash_of(picture: Image.Image) -> np.ndarray:
    size = (THUMBNAIL, THUMBNAIL)
    return perceptual_hash(np.asarray(picture.convert("L").resize(size, Image.Resampling.BILINEAR)))


def distances(one: np.ndarray, others: np.ndarray) -> np.ndarray:
    return np.bitwise_count(one ^ others).sum(axis=-1)


def make_photo(seed: int) -> Image.Image:
    """Clouds of noise that is strong where it is coarse, with a few shapes before them."""
    random = np.random.default_rng(seed)
    width, height = (int(side) for side in random.integers(200, 500, 2))
    clouds = np.zeros((height, width))
    for side in (3, 6, 12, 24, 48):
        noise = Image.fromarray(random.normal(size=(side, side)).astype(np.float32))
        clouds += np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC)) * 60 / side
    picture = Image.fromarray(np.clip(128 + 3 * clouds, 0, 255).astype(np.uint8)).convert("RGB")
    pen = ImageDraw.Draw(picture)
    for _ in range(4):
        x, y, grey = (int(value) for value in random.integers(0, 200, 3))
        pen.ellipse((x, y, x + 60, y + 90), fill=(grey, 255 - grey, 128))
    return picture


def make_page(seed: int, lines: int = 40) -> Image.Image:
    random = Random(seed)
    page = Image.new("RGB", (425, 550), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(9)
    for line in range(lines):
        words = ("".join(random.choices("aeinrstlomd", k=random.randint(1, 9))) for _ in range(12))
        pen.text((40, 30 + 12 * line), " ".join(words), fill="black", font=font)
    return page


def recoded(picture: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality)
    return Image.open(file)


def copies_of(picture: Image.Image) -> Iterator[Image.Image]:
    for quality in (95, 75, 60):
        yield recoded(picture, quality)
    for scale in (0.5, 0.75, 1.5):
        yield picture.resize((round(picture.width * scale), round(picture.height * scale)))
    yield ImageEnhance.Brightness(picture).enhance(0.9)


def make_hashes(count: int, seed: int, likely: float = 0.5) -> np.ndarray:
    """Hashes (count, 4) of which each bit is set with a probability of `likely`."""
    bits = np.random.default_rng(seed).random((count, 64 * WORDS)) < likely
    return np.packbits(bits, axis=1).view(np.uint64)


def flip(hashes: np.ndarray, bits: list[int]) -> np.ndarray:
    """The hashes with these of their 256 bits changed."""
    flipped = hashes.copy()
    for bit in bits:
        flipped[..., bit // 64] ^= np.uint64(1 << bit % 64)
    return flipped


def crowd(count: int, flips: int, seed: int) -> np.ndarray:
    """Hashes around one, each with up to `flips` other bits."""
    random = np.random.default_rng(seed)
    bits = [random.permutation(64 * WORDS)[:flips].tolist() for _ in range(count)]
    return np.stack([flip(make_hashes(1, seed)[0], flipped) for flipped in bits])


@pytest.mark.parametrize("make", [make_photo, make_page])
def test_a_picture_encoded_again_rescaled_or_darkened_is_near(make) -> None:
    for seed in range(20):
        picture = make(seed)
        copies = np.stack([hash_of(copy) for copy in copies_of(picture)])
        assert distances(hash_of(picture), copies).max() <= DISTANCE


def test_other_photos_pages_and_products_are_not_near() -> None:
    pictures = [make(seed) for make in (make_photo, make_page) for seed in range(60)]
    pictures += [draw_product(product, seed=1) for product in list_products(300, seed=1)]
    hashes = np.stack([hash_of(picture) for picture in pictures])
    assert hashes.any(axis=1).all()
    assert not len(near_duplicate_pairs(hashes))


def test_handwritten_digits_are_near_only_to_their_like() -> None:
    digits = load_digits()
    inks = (255 - digits.images * 255 / 16).astype(np.uint8)
    hashes = np.stack([hash_of(Image.fromarray(ink)) for ink in inks])
    pairs = near_duplicate_pairs(hashes)
    assert len(pairs) <= 10
    assert (digits.target[pairs[:, 0]] == digits.target[pairs[:, 1]]).all()


def test_pictures_with_too_little_in_them_are_near_to_none_not_even_their_like() -> None:
    greys = [Image.new("L", (300, 200), grey) for grey in (0, 77, 130, 255, 255)]
    ramp = Image.linear_gradient("L")
    lines = [make_page(seed, lines=1) for seed in (0, 1, 1)]
    hashes = np.stack([hash_of(picture) for picture in (*greys, ramp, ramp, *lines)])
    assert not hashes.any()
    assert not len(near_duplicate_pairs(hashes))


def test_the_hash_of_a_thumbnail_stays_what_it_was() -> None:
    row, column = np.mgrid[:THUMBNAIL, :THUMBNAIL]
    thumbnail = (row * row * 7 + column * column * 3 + row * column * 5) // 16 % 256
    words = perceptual_hash(thumbnail.astype(np.uint8))
    assert words.dtype == np.uint64
    assert [f"{word:016x}" for word in words] == [
        "7069c204271c7a0c",
        "ac61e2af8e0c7e30",
        "8074b008974e897c",
        "def3e3a249cbb454",
    ]


def test_a_mirrored_picture_and_a_negative_are_other_pictures() -> None:
    photo = make_photo(0)
    others = [photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT), photo.point(lambda p: 255 - p)]
    assert distances(hash_of(photo), np.stack([hash_of(p) for p in others])).min() > 80


@pytest.mark.parametrize("whole", range(len(BANDS) * WORDS))
def test_hashes_are_near_up_to_the_distance_wherever_the_bits_differ(whole: int) -> None:
    """One bit in every band but one: only that band still finds the pair."""
    firsts = [64 * word + start for word in range(WORDS) for start, _ in BANDS]
    sizes = [bits for _ in range(WORDS) for _, bits in BANDS]
    assert sum(sizes) == 64 * WORDS
    one = make_hashes(1, seed=3)[0]
    differing = [first for band, first in enumerate(firsts) if band != whole]
    assert len(differing) == DISTANCE
    assert near_duplicate_pairs(np.stack([one, flip(one, differing)])).tolist() == [[0, 1]]
    last = firsts[whole] + sizes[whole] - 1
    assert not len(near_duplicate_pairs(np.stack([one, flip(one, [*differing, last])])))
    beside = [firsts[whole - 1] + bit for bit in range(DISTANCE + 1)]
    assert not len(near_duplicate_pairs(np.stack([one, flip(one, beside)])))


@pytest.mark.parametrize("seed", range(6))
def test_the_groups_are_those_of_comparing_all_with_all(seed: int) -> None:
    likely = [0.5, 0.5, 0.1, 0.1, 0.03, 0.03][seed]  # the rarer, the fuller a bucket
    hashes = np.concatenate([make_hashes(300, seed, likely), crowd(250, 4 + seed, seed)])
    hashes = np.concatenate([hashes, hashes[::7], np.zeros((5, WORDS), dtype=np.uint64)])
    hashes = np.random.default_rng(seed).permutation(hashes)
    near = distances(hashes[:, None], hashes[None]) <= DISTANCE
    near &= hashes.any(axis=1)[:, None] & hashes.any(axis=1)[None]
    every = np.argwhere(near)
    pairs = near_duplicate_pairs(hashes)
    assert near[pairs[:, 0], pairs[:, 1]].all()
    expected = connected(len(hashes), every)
    assert np.array_equal(connected(len(hashes), pairs), expected)
    assert 5 < len(np.unique(expected)) < len(hashes)


def test_many_alike_are_linked_without_listing_each_with_each() -> None:
    equal = np.repeat(make_hashes(1, 2), 50_000, axis=0)
    hashes = np.concatenate([crowd(4000, 6, seed=1), equal])
    pairs = near_duplicate_pairs(hashes)
    assert len(np.unique(connected(len(hashes), pairs))) == 2
    assert len(pairs) < len(equal) + 8 * 4000  # of 8,000,000 pairs in the crowd


def test_no_hash_has_no_pairs() -> None:
    assert near_duplicate_pairs(make_hashes(0, 0)).shape == (0, 2)
    assert near_duplicate_pairs(make_hashes(1, 0)).shape == (0, 2)


def test_connected_names_a_group_by_its_smallest_number() -> None:
    pairs = np.array([[7, 3], [3, 5], [8, 9], [9, 8], [4, 4]])
    assert connected(10, pairs).tolist() == [0, 1, 2, 3, 4, 3, 6, 3, 8, 8]
    assert connected(3, np.empty((0, 2), dtype=np.int64)).tolist() == [0, 1, 2]


@pytest.mark.parametrize("kind", ["up", "down", "mixed"])
def test_connected_follows_long_chains_in_any_order(kind: str) -> None:
    up = np.arange(20_000)
    mixed = np.random.default_rng(0).permutation(up)
    order = {"up": up, "down": up[::-1], "mixed": mixed}[kind]
    chain = np.stack([order[:-1], order[1:]], axis=1)
    assert not connected(20_000, chain).any()
    cut = connected(20_000, np.delete(chain, 9_999, axis=0))
    assert np.unique(cut).tolist() == sorted([order[:10_000].min(), order[10_000:].min()])


def test_first_equal_is_the_first_row_with_the_same_values() -> None:
    rows = np.random.default_rng(0).integers(0, 4, (500, 3)).astype(np.uint64)
    firsts: dict[tuple[int, ...], int] = {}
    expected = [firsts.setdefault(tuple(row), k) for k, row in enumerate(rows.tolist())]
    assert first_equal(rows).tolist() == expected
    assert first_equal(rows[:0]).tolist() == []

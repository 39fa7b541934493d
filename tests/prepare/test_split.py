"""Who is held out: the same rows for ever, groups undivided, the share kept."""

from collections.abc import Sequence

import numpy as np
import pytest

from phi3v.prepare.split import RowImages, choose_sides, split_key


def make_keys(names: Sequence[object], seed: int = 0) -> np.ndarray:
    return np.array([split_key(seed, str(name)) for name in names], dtype=np.uint64)


def make_images(
    rows: Sequence[int], contents: Sequence[int] | None = None, looks: Sequence[int] | None = None
) -> RowImages:
    """Images of these rows; equal contents have equal bytes, equal looks are near duplicates."""
    count = len(rows)
    contents = range(count) if contents is None else contents
    looks = contents if looks is None else looks
    bits = np.random.default_rng(0).random((max(looks, default=0) + 1, 256)) < 0.5
    hashes = np.packbits(bits, axis=1).view(np.uint64)[np.array(looks, dtype=int)]
    hashes[:, 0] ^= np.array(contents, dtype=np.uint64) % np.uint64(8)  # near, not equal
    digests = np.repeat(np.array(contents, dtype=np.uint64)[:, None], 2, axis=1)
    return RowImages(np.array(rows, dtype=int), digests, hashes)


def divided(groups: np.ndarray, held_out: np.ndarray) -> bool:
    """Whether any group has rows on both sides."""
    held = np.bincount(groups, weights=held_out)
    return bool(((held > 0) & (held < np.bincount(groups))).any())


def test_a_key_has_the_hash_it_always_had() -> None:
    assert split_key(0, "P00001") == 14247871892540338922
    assert split_key(1, "P00001") == 4853207842974747944
    assert split_key(0, "half a pair \ud800") < 2**64


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.999])
def test_a_row_for_itself_is_held_out_by_its_own_key(share: float) -> None:
    keys = make_keys(range(2000))
    expected = [int(key) / 2**64 < share for key in keys]
    images = make_images(range(2000))
    assert choose_sides(keys, share).held_out.tolist() == expected
    assert choose_sides(keys, share, images=images).held_out.tolist() == expected
    assert choose_sides(keys[::3], share).held_out.tolist() == expected[::3]


def test_rows_of_one_key_have_the_side_of_that_key() -> None:
    names = [k % 50 for k in range(500)]
    sides = choose_sides(make_keys(names), 0.3)
    assert sides.held_out.tolist() == choose_sides(make_keys(range(50)), 0.3).held_out.tolist() * 10
    assert sides.held_out.any() and not sides.held_out.all()
    assert sides.largest_group == 10


@pytest.mark.parametrize("is_stratified", [False, True])
def test_no_group_is_divided_however_its_rows_hang_together(is_stratified: bool) -> None:
    """Of each three rows the first two share a key, the last two an image; the third of k + 100
    looks like that of k."""
    rows = np.arange(600)
    keys = make_keys([k - 1 if k % 3 == 1 else k for k in rows])
    contents = np.where(rows % 3 == 2, rows - 1, rows)
    looks = np.where((rows % 3 > 0) & (rows >= 300), contents - 300, contents)
    strata = rows % 5 if is_stratified else None
    sides = choose_sides(keys, 0.3, strata, make_images(rows, contents, looks))
    assert not divided(rows // 3 % 100, sides.held_out)
    assert divided(rows // 3 % 50, sides.held_out)  # there are both sides
    assert sides.largest_group == 6


def test_every_image_of_a_row_counts() -> None:
    keys = make_keys(range(40))
    images = make_images([*range(40), *range(20)], [*range(40), *range(39, 19, -1)])
    sides = choose_sides(keys, 0.5, images=images)
    assert np.array_equal(sides.held_out[:20], sides.held_out[:19:-1])
    assert sides.held_out.any() and not sides.held_out.all()


def test_copies_are_found_where_there_is_too_little_to_look_at() -> None:
    images = make_images(range(100), np.arange(100) // 2)
    blank = RowImages(images.rows, images.digests, np.zeros_like(images.hashes))
    sides = choose_sides(make_keys(range(100)), 0.5, images=blank)
    assert not divided(np.arange(100) // 2, sides.held_out)
    assert (sides.copies, sides.look_alikes, sides.largest_group) == (50, 0, 2)


def test_groups_of_several_keys_are_held_out_no_more_often() -> None:
    rows = np.arange(40_000)
    images = make_images(rows, rows // 4)
    sides = choose_sides(make_keys(rows), 0.1, images=images)
    assert abs(sides.held_out.mean() - 0.1) < 0.01  # 3.3 standard errors; the smallest key: 0.34


def test_sides_do_not_depend_on_the_order_of_rows() -> None:
    keys = make_keys(range(1000))
    contents = np.arange(1000) // 2
    order = np.random.default_rng(0).permutation(1000)
    for strata in (None, contents % 3):
        sides = choose_sides(keys, 0.2, strata, make_images(range(1000), contents))
        mixed = None if strata is None else strata[order]
        other = choose_sides(keys[order], 0.2, mixed, make_images(range(1000), contents[order]))
        assert np.array_equal(other.held_out, sides.held_out[order])


def test_each_stratum_has_its_share_to_half_a_group() -> None:
    strata = np.repeat(["rare", "common", "usual"], [35, 3000, 400])
    sides = choose_sides(make_keys(range(len(strata))), 0.1, strata)
    counts = {name: int(sides.held_out[strata == name].sum()) for name in set(strata.tolist())}
    assert counts["common"] == 300 and counts["usual"] == 40 and counts["rare"] in (3, 4)


@pytest.mark.parametrize(("rows", "held_out"), [(4, 0), (6, 1), (14, 1), (16, 2)])
def test_a_stratum_of_few_rows_holds_out_as_many_as_come_nearest(rows: int, held_out: int) -> None:
    strata = np.repeat(np.arange(20), rows)
    sides = choose_sides(make_keys(range(20 * rows)), 0.1, strata)
    assert np.bincount(strata, weights=sides.held_out).tolist() == [held_out] * 20


@pytest.mark.parametrize("seed", range(5))
def test_a_group_too_large_for_its_stratum_leaves_the_share_to_others(seed: int) -> None:
    names = [min(k, 700) for k in range(1000)]  # 300 rows of one key
    sides = choose_sides(make_keys(names, seed), 0.1, np.zeros(1000, dtype=int))
    assert sides.held_out.sum() == 100 and not sides.held_out[700:].any()


def test_a_seed_holds_out_other_rows() -> None:
    one, other = (choose_sides(make_keys(range(1000), seed), 0.5).held_out for seed in (0, 1))
    assert 400 < (one != other).sum() < 600


def test_the_split_says_what_images_did_to_it() -> None:
    keys = make_keys(range(1000))
    images = make_images(range(7), [0, 0, 0, 3, 4, 5, 6], [0, 0, 0, 3, 3, 0, 6])
    sides = choose_sides(keys, 0.6, images=images)
    alone = choose_sides(keys, 0.6)
    assert (sides.copies, sides.look_alikes) == (2, 2)
    assert (sides.rows_joined, sides.largest_group) == (6, 4)
    assert sides.rows_moved == (sides.held_out != alone.held_out).sum() > 0
    assert (alone.copies, alone.look_alikes, alone.rows_joined, alone.rows_moved) == (0, 0, 0, 0)


def test_a_dataset_without_images_is_split_as_one_that_has_none_to_compare() -> None:
    keys = make_keys(range(100))
    sides = choose_sides(keys, 0.5, images=make_images([]))
    assert np.array_equal(sides.held_out, choose_sides(keys, 0.5).held_out)
    assert choose_sides(keys[:0], 0.5).held_out.shape == (0,)

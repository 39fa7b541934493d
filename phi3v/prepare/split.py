"""Which rows are held out: by a hash of each row's key, with what belongs together on one side.

A row that has nothing in common with another is held out or not by its own key and the seed alone,
so that its side stays what it was when rows are added. Rows with equal keys, with the same image,
or with images that look alike make a group, and a group is never divided.
"""

import hashlib
from dataclasses import dataclass

import numpy as np

from phi3v.prepare.duplicates import connected, first_equal, near_duplicate_pairs


@dataclass(frozen=True)
class RowImages:
    """The images of all rows, in any order.

    rows     int (images,), the row that an image belongs to
    digests  uint64 (images, 2), SHA-256 of what the image was read from, its first 16 bytes
    hashes   uint64 (images, 4) of `perceptual_hash`
    """

    rows: np.ndarray
    digests: np.ndarray
    hashes: np.ndarray


@dataclass(frozen=True)
class Sides:
    """The split, and what images had to do with it.

    held_out        bool (rows,)
    copies          images of which an earlier image has the same bytes
    look_alikes     images that are near to an earlier one without having its bytes
    rows_joined     rows that are in one group with others for their images, not for their key
    rows_moved      rows that are on another side than without their images
    largest_group   rows of the largest group; much of the dataset if a picture is in every row
    rows_across     of a split that is the user's own: training rows with an image that a held-out
                    row has too, or one that is near to it
    """

    held_out: np.ndarray
    copies: int
    look_alikes: int
    rows_joined: int
    rows_moved: int
    largest_group: int
    rows_across: int = 0


def split_key(seed: int, key: str) -> int:
    """Hash a key to 0 ... 2**64 - 1; the same for ever, for it decides who is held out."""
    return hash64(f"{seed}:{key}")


def hash64(text: str) -> int:
    """The first 8 bytes of a text's SHA-256 as a number."""
    digest = hashlib.sha256(text.encode(errors="surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big")


def choose_sides(
    keys: np.ndarray,
    share: float,
    strata: np.ndarray | None = None,
    images: RowImages | None = None,
) -> Sides:
    """Hold out a share of the rows, groups undivided.

    keys     uint64 (rows,) of `split_key`, equal for rows that belong together
    share    of the rows, from 0 to below 1
    strata   (rows,) numbers or texts; of every value the share is held out; None: of all rows
    images   None: rows are joined by their keys alone

    The hash of a group is its key; of a group of several keys a hash of the smallest. Without
    strata a group is held out if its hash is below share * 2**64. With strata a group counts for
    that of its first row, and the groups of a stratum are gone through by hash: one is held out if
    that brings the rows held out nearer to the share. So a stratum's share is met to half a group:
    of 4 rows for themselves and a share of 0.1 none is held out, of 6 rows one.
    """
    by_key = first_equal(keys[:, None])
    alone = _hold_out(by_key, keys, share, strata)
    if images is None:
        return Sides(alone, 0, 0, 0, 0, _largest(by_key))
    like = _alike(images)
    with_key = np.stack([by_key, np.arange(len(keys))], axis=1)
    groups = connected(len(keys), np.concatenate([with_key, images.rows[like.pairs]]))
    held_out = _hold_out(groups, keys, share, strata)
    return Sides(
        held_out=held_out,
        copies=like.copies,
        look_alikes=like.look_alikes,
        rows_joined=int(_of_several_keys(groups, keys)[groups].sum()),
        rows_moved=int((held_out != alone).sum()),
        largest_group=_largest(groups),
    )


def own_sides(held_out: np.ndarray, images: RowImages | None) -> Sides:
    """Keep to a split that was made elsewhere, and find the training rows that leak across it.

    held_out  bool (rows,)
    images    None: nothing is looked for
    """
    if images is None:
        return Sides(held_out, 0, 0, 0, 0, 0)
    like = _alike(images)
    groups = connected(len(held_out), images.rows[like.pairs])
    is_shown = np.zeros(len(held_out), dtype=bool)
    is_shown[groups[held_out]] = True
    across = int((is_shown[groups] & ~held_out).sum())
    return Sides(held_out, like.copies, like.look_alikes, 0, 0, _largest(groups), across)


@dataclass(frozen=True)
class _Alike:
    """Pairs of images, (pairs, 2), that are the same or near; and how many, as in `Sides`."""

    pairs: np.ndarray
    copies: int
    look_alikes: int


def _alike(images: RowImages) -> _Alike:
    position = np.arange(len(images.rows))
    copies = first_equal(images.digests)
    near = near_duplicate_pairs(images.hashes)
    is_later = connected(len(position), near) != position
    return _Alike(
        pairs=np.concatenate([np.stack([copies, position], axis=1), near]),
        copies=int((copies != position).sum()),
        look_alikes=int((is_later & (copies == position)).sum()),
    )


def _hold_out(
    groups: np.ndarray, keys: np.ndarray, share: float, strata: np.ndarray | None
) -> np.ndarray:
    """Whether each row is held out; `groups` names a group by its first row."""
    hashes = _group_hashes(groups, keys)
    if strata is None:
        return (hashes / 2.0**64 < share)[groups]
    firsts, sizes = np.unique(groups, return_counts=True)
    stratum = np.unique(strata, return_inverse=True)[1][firsts]
    order = np.lexsort((firsts, hashes[firsts], stratum))
    targets = share * np.bincount(stratum, weights=sizes)
    held_out = np.zeros(len(keys), dtype=bool)
    held_out[firsts[order]] = _fill(stratum[order].tolist(), sizes[order].tolist(), targets)
    return held_out[groups]


def _fill(strata: list[int], sizes: list[int], targets: np.ndarray) -> list[bool]:
    """Take each group in turn if it brings its stratum's rows nearer to the target."""
    missing = targets.tolist()
    taken = []
    for stratum, size in zip(strata, sizes, strict=True):
        taken.append(size < 2 * missing[stratum])
        missing[stratum] -= size * taken[-1]
    return taken


def _group_hashes(groups: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """At each group's first row its hash; the smallest key as it is would be too often held out."""
    smallest = _smallest_keys(groups, keys)
    return np.where(_of_several_keys(groups, keys), _mix(smallest), smallest)


def _smallest_keys(groups: np.ndarray, keys: np.ndarray) -> np.ndarray:
    smallest = keys.copy()
    np.minimum.at(smallest, groups, keys)
    return smallest


def _of_several_keys(groups: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """At each group's first row whether its rows have different keys."""
    several = np.zeros(len(keys), dtype=bool)
    several[groups[keys != keys[groups]]] = True
    return several


def _mix(keys: np.ndarray) -> np.ndarray:
    """Scatter 64-bit numbers; one to one. Source: Vigna, splitmix64.c."""
    mixed = keys + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ mixed >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ mixed >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return mixed ^ mixed >> np.uint64(31)


def _largest(groups: np.ndarray) -> int:
    return int(np.bincount(groups, minlength=1).max())

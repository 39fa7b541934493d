"""Pictures that look alike: a hash of 256 bits from a small gray thumbnail, and who is near whom.

A bit says whether one low frequency of the thumbnail is clearly positive (discrete cosine
transform). Encoding a picture again, another size or a little brightness leave the frequencies
nearly as they are; other content does not. Colours do not count: one article photographed in the
same pose in black and in navy is one picture here, which is what a split wants.

How far apart two hashes may be was chosen by measuring (Pillow 13, thumbnails by a bilinear
resize). Found, of the changed copies of 300 photo-like pictures / 150 pages of text / 150 charts
and tables / 300 sample products:

    JPEG quality 95                 100 / 100 / 100 / 100 %
    JPEG quality 75                 100 / 100 / 97 / 100 %
    JPEG quality 60                 100 / 100 / 95 / 100 %
    half, 3/4 and 3/2 size          100 / 100 / 100 / 100 %
    half size, then JPEG 75         100 / 100 / 95 / 100 %
    10 % darker                     100 / 100 / 100 / 100 %
    10 % brighter                   99 / 100 / 100 / 99 %
    1 % cut off width and height    48 / 51 / 53 / 28 %
    2 % cut off                     1 / 1 / 0 / 1 %

Linked, of pictures that differ: none of 3,000 sample products, 2,000 pages of text, 2,000 charts
and tables, 700 fillings of one form and 1,500 printed words; 4 pairs of 1,797 handwritten digits
of 8 x 8 pixels, each pair the same digit.
"""

import numpy as np

THUMBNAIL = 64  # pixels; half of it doubles the bits that a page of text loses to JPEG
WORDS = 4  # of 64 bits, in one hash
DISTANCE = 11  # bits that may differ between the hashes of near duplicates

FREQUENCIES = 16  # each way
CLEAR = 4.0  # gray levels; a coefficient below is noise of rounding and of JPEG
LEAST_BITS = 64  # one line of text on a white page has about 50, a full page or a digit 75 and more
BANDS = ((0, 21), (21, 21), (42, 22))  # first bit and bits of the three in each word
ROUNDS = (8, 8, 64, 512)  # neighbours in a bucket that are compared before all of them are
COSINE_UNIT = 1 << 12


def _cosines() -> np.ndarray:
    """Rows of the transform as whole numbers: sums of products are exact, whatever their order."""
    position = np.pi * (2 * np.arange(THUMBNAIL) + 1) / (2 * THUMBNAIL)
    return np.rint(COSINE_UNIT * np.cos(np.arange(FREQUENCIES)[:, None] * position))


def _bit_order() -> np.ndarray:
    """Frequencies dealt out to the bands, low to high, so that every band tells about as much."""
    row, column = np.divmod(np.arange(FREQUENCIES**2), FREQUENCIES)
    ranked = np.lexsort((row, row**2 + column**2))
    bands = len(BANDS) * WORDS
    dealt = [ranked[band::bands] for band in range(bands)]  # 22 frequencies each in the first four
    return np.concatenate([dealt[w + k] for w in range(WORDS) for k in (WORDS, 2 * WORDS, 0)])


COSINES = _cosines()
BIT_ORDER = _bit_order()


def perceptual_hash(thumbnail: np.ndarray) -> np.ndarray:
    """Hash a picture by what it looks like; 0.07 ms.

    thumbnail  uint8 (64, 64), gray, by an antialiasing filter such as bilinear (Pillow's BOX
               rounds borders to pixels: small pictures and their halves come out 10 bits apart)
    returns    uint64 (4,); all 0, near to no other, for a picture with too little in it to be told
               from others: a blank page, a single colour, one line of text, most plain shapes
    """
    assert thumbnail.shape == (THUMBNAIL, THUMBNAIL) and thumbnail.dtype == np.uint8
    spectrum = COSINES @ thumbnail.astype(np.float64) @ COSINES.T  # (16, 16)
    spectrum[0, 0] = 0  # brightness
    bits = spectrum.ravel()[BIT_ORDER] > CLEAR * THUMBNAIL / 2 * COSINE_UNIT**2
    if bits.sum() < LEAST_BITS:
        return np.zeros(WORDS, dtype=np.uint64)
    return np.packbits(bits, bitorder="little").view("<u8").astype(np.uint64)


def near_duplicate_pairs(hashes: np.ndarray) -> np.ndarray:
    """Link all pictures whose hashes differ in at most `DISTANCE` bits.

    hashes   uint64 (pictures, 4)
    returns  int64 (pairs, 2), positions of near pictures. Not every near pair is listed, but any
             two are linked directly or through others: `connected` gives the exact groups.

    Of the 12 bands of a hash one at least is left as it is when 11 bits differ, so only pictures
    that share a band are compared, and only if nothing links them yet. One core needs 4 s for
    1,000,000 hashes of random bits, 25 s if 30 % of the bits are set, as of pages, and 0.3 s for
    100,000 that are all near to one, as of a still camera.
    """
    present = np.flatnonzero(hashes.any(axis=1))
    firsts = present[first_equal(hashes[present])]
    pairs = [np.stack([firsts, present], axis=1)[firsts != present]]
    distinct = present[firsts == present]
    kept = hashes[distinct]
    groups = np.arange(len(kept))
    for word in range(WORDS):
        for start, bits in BANDS:
            band = kept[:, word] >> np.uint64(start) & np.uint64((1 << bits) - 1)
            groups, near = _link_band(kept, band, groups)
            pairs.append(distinct[near])
    return np.concatenate(pairs)


def connected(count: int, pairs: np.ndarray) -> np.ndarray:
    """Give every one of `count` things the smallest number of its group.

    pairs    int (pairs, 2), numbers from 0 to count - 1
    returns  int64 (count,)

    Every group is hooked to a lower one that it has a pair with, until no pair joins two groups.
    """
    groups = np.arange(count)
    left, right = pairs.T
    while len(left):
        left, right = groups[left], groups[right]
        joins = left != right
        left, right = left[joins], right[joins]
        groups[np.maximum(left, right)] = np.minimum(left, right)
        while not np.array_equal(groups, above := groups[groups]):
            groups = above
    return groups


def first_equal(rows: np.ndarray) -> np.ndarray:
    """For every row of a table (rows, columns) the number of the first row that equals it."""
    order = np.lexsort(rows.T)  # stable: of equal rows the first comes first
    ordered = rows[order]
    is_first = np.ones(len(rows), dtype=bool)
    is_first[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    starts = np.flatnonzero(is_first)
    firsts = np.empty(len(rows), dtype=np.int64)
    firsts[order] = np.repeat(order[starts], np.diff(starts, append=len(rows)))
    return firsts


def _link_band(
    hashes: np.ndarray, band: np.ndarray, groups: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Compare what shares a band's value, a bucket; give the groups after it and the near pairs.

    Each round compares more neighbours in the buckets that are still of several groups. The largest
    group of a bucket lies last in it and its members start no comparison: where nearly all look
    alike, few are left to be compared with all.
    """
    pairs = []
    order = np.arange(len(band))
    for most in (*ROUNDS, len(band)):
        sizes = np.bincount(groups)[groups[order]]
        order = order[np.lexsort((groups[order], sizes, band[order]))]
        values = band[order]
        ends = np.searchsorted(values, values, side="right")
        outside = np.flatnonzero(groups[order] != groups[order[ends - 1]])
        pairs.append(_compare(hashes, groups, order, ends, outside, most))
        groups = connected(len(band), groups[pairs[-1]])[groups]
        unfinished = values[outside[ends[outside] - outside > most + 1]]
        order = order[np.isin(values, unfinished)]
    return groups, np.concatenate(pairs)


def _compare(
    hashes: np.ndarray,
    groups: np.ndarray,
    order: np.ndarray,
    ends: np.ndarray,
    starts: np.ndarray,
    most: int,
) -> np.ndarray:
    """Near pairs of each position in `starts` with up to `most` that follow, before its end."""
    pairs = [np.empty((0, 2), dtype=np.int64)]
    for offset in range(1, most + 1):
        starts = starts[starts + offset < ends[starts]]
        if not len(starts):
            break
        left, right = order[starts], order[starts + offset]
        joins = groups[left] != groups[right]
        left, right = left[joins], right[joins]
        differing = np.bitwise_count(hashes[left] ^ hashes[right]).sum(axis=1)
        near = differing <= DISTANCE
        pairs.append(np.stack([left[near], right[near]], axis=1))
    return np.concatenate(pairs)

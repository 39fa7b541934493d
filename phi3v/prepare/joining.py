"""Between the passes: the tables of all chunks give the split and the shards.

This is the one place that holds something of every row at once: about 40 bytes and its id, and 60
bytes more for each of its images while near duplicates are sought (100 MB for a million rows of one
image).
"""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from phi3v.config import DatasetConfig
from phi3v.files import replacing, write_json
from phi3v.prepare.plan import ROW, Plan, Shard, WorkFolder, plan_shards, read_table
from phi3v.prepare.split import RowImages, Sides, choose_sides, own_sides


def join_scans(cfg: DatasetConfig, plan: Plan, work: WorkFolder) -> list[Shard]:
    """Decide every row's side and every shard's rows, and write them down.

    Shards that were written after an earlier scan stay if nothing about them has changed.
    """
    tables = [read_table(work.scan(chunk)) for chunk in plan.chunks]
    table = pa.concat_tables(tables, promote_options="default")
    take = _numbers(table, "take")
    usable = np.flatnonzero(take)
    parts = table.select(["key", "stratum", "digests", "hashes"]).take(usable)
    sides = _sides(cfg, parts, usable >= sum(plan.num_rows[: cfg.first_held_out]))
    rows = np.zeros(plan.rows, ROW)
    rows["tokens"] = _numbers(table, "tokens")
    rows["take"][usable] = np.where(sides.held_out, -1, take[usable])
    shards = plan_shards(rows["take"], _numbers(table, "bytes"), cfg.shard_bytes)
    shared = usable[_shares_id(table.select(["id", "row"]).take(usable))]
    if work.read_shards() != shards or not (
        _holds(work.rows, rows) and _holds(work.shared, shared)
    ):
        shutil.rmtree(work.written)
        work.written.mkdir()
    for path, numbers in ((work.rows, rows), (work.shared, shared)):
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.save(file, numbers)
    report = _report(table, sides, np.abs(rows["take"])) | {"shared_ids": len(shared)}
    write_json(work.report, report)
    work.write_shards(shards)
    return shards


def _holds(path: Path, numbers: np.ndarray) -> bool:
    return np.array_equal(np.load(path), numbers)


def _shares_id(table: pa.Table) -> np.ndarray:
    """Whether each row is called as another is: bool (rows,). Without an id, it is by its number.

    Where some are, those count that would be mistaken for one with a number behind its id.
    """
    numbers = pc.binary_join_element_wise('"', table["row"].cast(pa.string()), '"', "")
    names = pc.coalesce(table["id"], numbers).combine_chunks()  # JSON, as in the scan
    codes = names.dictionary_encode().indices.to_numpy()
    is_shared = np.bincount(codes, minlength=1)[codes] > 1
    if is_shared.any():
        is_shared |= pc.match_substring_regex(names, '#[0-9]+"$').to_numpy(zero_copy_only=False)
    return is_shared


def _numbers(table: pa.Table, column: str) -> np.ndarray:
    """A column of numbers, 0 where there is none, for the row is rejected or left out."""
    return pc.fill_null(table[column], 0).to_numpy()


def _sides(cfg: DatasetConfig, table: pa.Table, own: np.ndarray) -> Sides:
    """The sides of the rows; `own`, bool (rows,): which are held out by the user's own choice."""
    images = _images(table) if cfg.split.compares_pictures else None
    if cfg.split.own:
        return own_sides(own, images)
    strata = None
    if cfg.split.stratify:
        strata = table["stratum"].combine_chunks().dictionary_encode().indices.to_numpy()
    return choose_sides(_numbers(table, "key"), cfg.split.share, strata, images)


def _images(table: pa.Table) -> RowImages:
    digests, hashes = (table[name].combine_chunks() for name in ("digests", "hashes"))
    return RowImages(
        rows=np.repeat(np.arange(len(table)), pc.list_value_length(digests).to_numpy()),
        digests=_words(digests.flatten()),
        hashes=_words(hashes.flatten()),
    )


def _words(values: pa.FixedSizeBinaryArray) -> np.ndarray:
    """Binaries of equal length as numbers of 64 bits: (values, length / 8)."""
    width = values.type.byte_width
    data = np.frombuffer(values.buffers()[1], np.uint8)
    data = data[values.offset * width : (values.offset + len(values)) * width]
    return data.view("<u8").reshape(len(values), width // 8)


def _report(table: pa.Table, sides: Sides, times: np.ndarray) -> dict[str, Any]:
    """What the manifest says of all rows, each counted as often as the dataset lists it."""
    is_left_out = pc.and_(pc.is_null(table["reason"]), pc.equal(table["take"], 0))
    return {
        "left_out": pc.sum(is_left_out).as_py() or 0,
        "saved_tokens": int((times * _numbers(table, "saved_tokens")).sum()),
        "near_duplicates": {
            name: value for name, value in vars(sides).items() if not isinstance(value, np.ndarray)
        },
    }

"""From all parts of the work to the manifest, which makes a folder a dataset."""

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from phi3v.config import DatasetConfig
from phi3v.data.audit import merge
from phi3v.data.codecs import Codec
from phi3v.data.format import FORMAT_VERSION, HUB, LICENSES, MANIFEST, check_seal, sealed
from phi3v.data.writer import finish_split
from phi3v.errors import ConfigError
from phi3v.files import write_json
from phi3v.prepare import rejections
from phi3v.prepare.inputs import open_processor
from phi3v.prepare.plan import START_ANEW, Plan, Shard, WorkFolder, read_table
from phi3v.prepare.sources import check_source
from phi3v.stored import read_object


def write_manifest(
    cfg: DatasetConfig, plan: Plan, work: WorkFolder, shards: Sequence[Shard]
) -> dict[str, Any]:
    """Write the indices, rejected.jsonl and the manifest of shards that are all written.

    Raises: ConfigError if too many rows were rejected, or none is left to train on.
    """
    found = [
        *rejections.in_scan(plan, work, plan.chunks),
        *rejections.in_write(work, shards),
    ]
    rejections.check_share(cfg, plan, work, found)
    rejections.write_rejected(cfg, plan, work, found)
    splits = {split: _finish_split(work, split, shards) for split in _splits(cfg)}
    if not splits["train"]["samples"]:
        _refuse_empty(cfg, plan, splits, len(found))
    report = read_object(work.report, ConfigError, advice=START_ANEW)
    processor = open_processor(cfg, cfg.sources[0])
    pictures = [
        {"source": section.paths[0], **open_processor(cfg, section).pictures.to_dict()}
        for section in cfg.sources
    ]
    content = {
        "format_version": FORMAT_VERSION,
        "fingerprint": _fingerprint(plan.recipe, splits),
        "recipe": plan.recipe,
        **_told_licenses(cfg),
        **hub_sources(cfg),
        "crop_size": processor.crop_size,
        "image_side": processor.side,
        "image_mean": list(processor.image_mean),
        "image_std": list(processor.image_std),
        "num_crops": max(entry["num_crops"] for entry in pictures),
        "pictures": pictures,
        "tokenizer": processor.tokenizer_digest,
        "pixels": Codec(cfg.pixels.codec, cfg.pixels.quality).to_manifest(),
        "splits": splits,
        "rows": plan.rows,
        **report,
        "rejected": {"count": len(found), "by_reason": rejections.by_reason(found)},
    }
    manifest = sealed(json.loads(json.dumps(content)))  # as who reads it will
    write_json(work.path / MANIFEST, manifest)
    return manifest


def note_licenses(cfg: DatasetConfig, out: Path, manifest: dict[str, Any]) -> bool:
    """Have the manifest of a finished dataset name the licenses of the recipe; whether it changed.

    They are in no fingerprint, so the dataset stays what it is.

    Raises: ShardError if the manifest is not what was written, which a new digest would hide.
    """
    told = _told_licenses(cfg)
    if manifest.get(LICENSES) == told.get(LICENSES):
        return False
    check_seal(out, manifest)
    manifest.pop(LICENSES, None)
    manifest.update(told)
    manifest.update(sealed(manifest))
    write_json(out / MANIFEST, manifest)
    return True


def _told_licenses(cfg: DatasetConfig) -> dict[str, Any]:
    """The license of each source of training rows that the recipe names one of."""
    named = [
        {"source": section.paths[0], "license": section.license}
        for section in cfg.sources[: cfg.first_held_out]
        if section.license is not None
    ]
    return {LICENSES: named} if named else {}


def hub_sources(cfg: DatasetConfig) -> dict[str, Any]:
    """The sources of training rows that are datasets of the hub: later nobody can tell."""
    paths = dict.fromkeys(section.paths[0] for section in cfg.sources[: cfg.first_held_out])
    names = [path for path in paths if check_source(path) is None]
    return {HUB: names} if names else {}


def clear(work: WorkFolder, manifest: dict[str, Any]) -> None:
    """Remove all but the dataset, shards of an earlier plan included.

    The recipe goes first: a folder with a manifest and without one has only this and its name to
    come.
    """
    work.recipe.unlink(missing_ok=True)
    for folder in (work.scans, work.written, work.spools):
        shutil.rmtree(folder, ignore_errors=True)
    splits = manifest["splits"].values()
    listed = {file["file"] for split in splits for file in (*split["shards"], split["index"])}
    strays = [path for path in work.path.glob("*.arrow") if path.name not in listed]
    for path in (*strays, *work.path.glob(".*.tmp")):  # the latter are a killed process's
        path.unlink()
    made = (work.rows, work.shared, work.shards, work.report)
    for path in (*made, work.plan, work.digests, work.plan_lock):
        path.unlink(missing_ok=True)


def _splits(cfg: DatasetConfig) -> list[str]:
    return ["train", "validation"] if cfg.split.holds_out else ["train"]


def _finish_split(work: WorkFolder, split: str, shards: Sequence[Shard]) -> dict[str, Any]:
    """Join what the shards of a split say of themselves."""
    mine = [shard for shard in shards if shard.split == split]
    entries = [work.read_entry(shard) for shard in mine]
    there = [shard for shard, entry in zip(mine, entries, strict=True) if entry["shard"]]
    tables = (read_table(work.index(shard)) for shard in there)
    result = finish_split(work.path, split, [e["shard"] for e in entries if e["shard"]], tables)
    return result | {"audit": merge([entry["audit"] for entry in entries])}


def _refuse_empty(
    cfg: DatasetConfig, plan: Plan, splits: dict[str, Any], num_rejected: int
) -> None:
    held_out = splits["validation"]["samples"] if "validation" in splits else 0
    paths = ", ".join(section.paths[0] for section in cfg.sources)
    raise ConfigError(
        f"source.path {paths} gave no training sample: of {plan.rows} rows {held_out} are "
        f"held out and {num_rejected} rejected; give more rows, or lower "
        f"split.validation {cfg.split.share}"
    )


def _fingerprint(recipe: dict[str, Any], splits: dict[str, Any]) -> str:
    text = json.dumps([recipe, splits], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()

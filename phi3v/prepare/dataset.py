"""The whole of prepare: rows to a published dataset folder.

Every row ends as a sample or as a line of rejected.jsonl with its reason; their numbers are in the
manifest. The folder gets its name only when everything in it is on the disk.
"""

import hashlib
import json
import shutil
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers.utils.hub import cached_file

from phi3v.config import DatasetConfig, differing_keys, to_dict
from phi3v.data import Dataset
from phi3v.data.format import FORMAT_VERSION, MANIFEST, REJECTED, read_manifest
from phi3v.data.writer import SplitWriter
from phi3v.errors import ConfigError, SampleError
from phi3v.files import publish, sha256, write_json, write_text
from phi3v.prepare.conversations import check_columns, read_conversation
from phi3v.prepare.samples import SampleBuilder
from phi3v.prepare.sources import Row, read_rows
from phi3v.processing import Phi3VProcessor
from phi3v.progress import progress

MODEL_FILES = ("tokenizer.json", "preprocessor_config.json")


@dataclass
class Rejections:
    """Rows that became no sample, and why."""

    lines: list[str] = field(default_factory=list)
    by_reason: Counter[str] = field(default_factory=Counter)

    def add(self, source: str, row: Row, reason: str) -> None:
        entry = {"source": source, "row": row.number, "id": row.values.get("id"), "reason": reason}
        self.lines.append(json.dumps(entry, ensure_ascii=False, default=str))
        self.by_reason[_kind(reason)] += 1


def prepare(cfg: DatasetConfig) -> dict[str, Any]:
    """Make the dataset folder `cfg.out` and return its manifest; do nothing if it is up to date.

    Raises: ConfigError if the folder holds a dataset of another recipe, if the recipe does not fit
    its source, or if more than `max_rejected` of the rows had to be rejected.
    """
    out = Path(cfg.out)
    recipe = {key: value for key, value in to_dict(cfg).items() if key != "out"}
    recipe["inputs"] = _input_digests(cfg)
    if (out / MANIFEST).is_file():
        return _existing(out, recipe)
    if out.exists() and any(out.iterdir()):
        raise ConfigError(
            f"out {out} exists and is no dataset; name another folder, or remove this one"
        )
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    manifest = _write(cfg, recipe, partial)
    publish(partial, out)
    return manifest


def verify(folder: Path) -> None:
    """Check every digest of every split of a dataset folder.

    Raises: ShardError naming the first damaged file.
    """
    for split in read_manifest(folder)["splits"]:
        Dataset(folder, split).verify()


def _existing(out: Path, recipe: dict[str, Any]) -> dict[str, Any]:
    manifest = read_manifest(out)
    if different := differing_keys(manifest["recipe"], recipe):
        raise ConfigError(
            f"{out} was made by another recipe: {', '.join(different)} differ; "
            "name another folder in 'out', or remove this one"
        )
    return manifest


def _write(cfg: DatasetConfig, recipe: dict[str, Any], folder: Path) -> dict[str, Any]:
    processor = Phi3VProcessor.from_pretrained(cfg.model, num_crops=cfg.num_crops)
    rejections = Rejections()
    writers = {
        split: SplitWriter(folder, split, processor.crop_size, processor.side, cfg.shard_bytes)
        for split in (["train", "validation"] if cfg.split.validation else ["train"])
    }
    rows = _write_rows(cfg, processor, writers, rejections)
    _check_share(cfg, rows, rejections)
    splits = {split: writer.finish() for split, writer in writers.items()}
    if not splits["train"]["samples"]:
        raise ConfigError(f"{cfg.source.path} gave no training sample of {rows} rows; check it")
    write_text(folder / REJECTED, "".join(line + "\n" for line in rejections.lines))
    manifest = {
        "format_version": FORMAT_VERSION,
        "fingerprint": _fingerprint(recipe, splits),
        "recipe": recipe,
        "crop_size": processor.crop_size,
        "image_side": processor.side,
        "image_mean": processor.image_mean,
        "image_std": processor.image_std,
        "num_crops": processor.num_crops,
        "tokenizer": processor.tokenizer_digest,
        "splits": splits,
        "rows": rows,
        "rejected": {
            "count": len(rejections.lines),
            "by_reason": dict(rejections.by_reason.most_common()),
        },
    }
    write_json(folder / MANIFEST, manifest)
    return manifest


def _write_rows(
    cfg: DatasetConfig,
    processor: Phi3VProcessor,
    writers: dict[str, SplitWriter],
    rejections: Rejections,
) -> int:
    """Turn every row into a sample or a rejection; return how many there were."""
    source = cfg.source
    root = Path(source.image_root) if source.image_root else Path(source.path).parent
    builder = SampleBuilder(processor, root, cfg.max_tokens)
    count, is_checked = 0, False
    for row in progress(read_rows(Path(source.path)), f"prepare {cfg.out}", "row"):
        count += 1
        if not is_checked and not row.fault:
            check_columns(source, cfg.split.by, row.values)
            is_checked = True
        try:
            conversation = read_conversation(row, source)
            sample = builder.build(conversation, {"source": source.path, "row": row.number})
            split = _split_of(cfg, row, sample.id)
        except SampleError as error:
            rejections.add(source.path, row, str(error))
            continue
        writers[split].add(sample)
    return count


def _split_of(cfg: DatasetConfig, row: Row, name: str) -> str:
    """Hold out by a hash of the key, so that a row's side does not depend on the others."""
    if cfg.split.by and row.values.get(cfg.split.by) in (None, ""):
        raise SampleError(f"column '{cfg.split.by}', by which rows are split, is empty")
    key = row.values[cfg.split.by] if cfg.split.by else f"{row.number}:{name}"
    digest = hashlib.sha256(f"{cfg.split.seed}:{key}".encode()).digest()
    share = int.from_bytes(digest[:8], "big") / 2**64
    return "validation" if share < cfg.split.validation else "train"


def _check_share(cfg: DatasetConfig, rows: int, rejections: Rejections) -> None:
    count = len(rejections.lines)
    if not rows:
        raise ConfigError(f"source.path {cfg.source.path} holds no rows; check the file")
    if count > cfg.max_rejected * rows:
        first = json.loads(rejections.lines[0])
        reasons = "; ".join(f"{n} x {reason}" for reason, n in rejections.by_reason.most_common(3))
        raise ConfigError(
            f"{count} of {rows} rows of {cfg.source.path} cannot be used, max_rejected allows "
            f"{cfg.max_rejected:.0%}: {reasons}; first: row {first['row']}, {first['reason']}; "
            "mend the rows or raise max_rejected"
        )


def _kind(reason: str) -> str:
    """A reason without what is particular to its row, for counting: digits and names left out."""
    words = [word for word in reason.split(":")[0].split() if not any(c in word for c in "/\\")]
    return " ".join("N" if any(c.isdigit() for c in word) else word for word in words)


def _input_digests(cfg: DatasetConfig) -> dict[str, str]:
    """SHA-256 of what the samples are made of, where it is a file: source, tokenizer, settings."""
    digests = {}
    source = Path(cfg.source.path)
    if source.is_file():
        digests["source"] = sha256(source)
    for name in MODEL_FILES:
        try:
            digests[name] = sha256(Path(cached_file(cfg.model, name)))
        except OSError as error:
            raise ConfigError(
                f"model {cfg.model} has no {name}; name a model folder or a hub model"
            ) from error
    return digests


def _fingerprint(recipe: dict[str, Any], splits: dict[str, Any]) -> str:
    text = json.dumps([recipe, splits], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()

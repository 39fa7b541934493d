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

from phi3v.config import DatasetConfig, differing_keys, to_dict
from phi3v.data import Dataset
from phi3v.data.format import FORMAT_VERSION, MANIFEST, REJECTED, read_manifest
from phi3v.data.writer import SplitWriter
from phi3v.errors import ConfigError, SampleError
from phi3v.files import publish, sha256, write_json, write_text
from phi3v.prepare.conversations import check_columns, is_empty, read_conversation
from phi3v.prepare.samples import SampleBuilder
from phi3v.prepare.sources import Row, check_source, read_rows
from phi3v.processing import Phi3VProcessor
from phi3v.processing.processor import model_file
from phi3v.progress import progress

MODEL_FILES = ("tokenizer.json", "preprocessor_config.json")


@dataclass
class Rejections:
    """Rows that became no sample, and why."""

    lines: list[str] = field(default_factory=list)
    by_reason: Counter[str] = field(default_factory=Counter)

    def add(self, source: str, row: Row, reason: str) -> None:
        name = row.values.get("id")
        name = None if is_empty(name) else str(name)
        entry = {"source": source, "row": row.number, "id": name, "reason": reason}
        line = json.dumps(entry, ensure_ascii=False)
        self.lines.append(line.encode(errors="backslashreplace").decode())  # half surrogate pairs
        self.by_reason[reason.partition(":")[0]] += 1


def prepare(cfg: DatasetConfig) -> dict[str, Any]:
    """Make the dataset folder `cfg.out` and return its manifest; do nothing if it is up to date.

    Raises: ConfigError if the folder holds a dataset of another recipe, if the recipe does not fit
    its source, or if more than `max_rejected` of the rows had to be rejected. ShardError if the
    folder's files are not those of its manifest.
    """
    out = Path(cfg.out).absolute()
    check_source(Path(cfg.source.path))
    processor = Phi3VProcessor.from_pretrained(cfg.model, num_crops=cfg.num_crops)
    recipe = {key: value for key, value in to_dict(cfg).items() if key != "out"}
    recipe["inputs"] = _inputs(cfg, processor)
    if (out / MANIFEST).is_file():
        return _existing(cfg, recipe)
    if out.is_file() or (out.exists() and any(out.iterdir())):
        raise ConfigError(f"out {cfg.out} exists and is no dataset; name another, or remove this")
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    manifest = _write(cfg, processor, recipe, partial)
    publish(partial, out)
    return manifest


def verify(folder: Path) -> None:
    """Check every digest of every split of a dataset folder.

    Raises: ShardError naming the first damaged file.
    """
    for split in read_manifest(folder)["splits"]:
        Dataset(folder, split).verify()


def _existing(cfg: DatasetConfig, recipe: dict[str, Any]) -> dict[str, Any]:
    manifest = read_manifest(Path(cfg.out))
    if different := differing_keys(manifest["recipe"], recipe):
        raise ConfigError(
            f"{cfg.out} was made by another recipe: {', '.join(different)} differ; "
            "name another folder in 'out', or remove this one"
        )
    for split in manifest["splits"]:
        Dataset(cfg.out, split)
    return manifest


def _write(
    cfg: DatasetConfig, processor: Phi3VProcessor, recipe: dict[str, Any], folder: Path
) -> dict[str, Any]:
    rejections = Rejections()
    writers = {
        split: SplitWriter(folder, split, processor.crop_size, processor.side, cfg.shard_bytes)
        for split in (["train", "validation"] if cfg.split.validation else ["train"])
    }
    rows = _write_rows(cfg, processor, writers, rejections)
    write_text(folder / REJECTED, "".join(line + "\n" for line in rejections.lines))
    _check_share(cfg, rows, rejections, folder / REJECTED)
    splits = {split: writer.finish() for split, writer in writers.items()}
    if not splits["train"]["samples"]:
        held_out = splits["validation"]["samples"] if "validation" in splits else 0
        raise ConfigError(
            f"source.path {cfg.source.path} gave no training sample: of {rows} rows {held_out} are "
            f"held out and {len(rejections.lines)} rejected; give more rows, or lower "
            f"split.validation {cfg.split.validation}"
        )
    manifest = {
        "format_version": FORMAT_VERSION,
        "fingerprint": _fingerprint(recipe, splits),
        "recipe": recipe,
        "crop_size": processor.crop_size,
        "image_side": processor.side,
        "image_mean": list(processor.image_mean),
        "image_std": list(processor.image_std),
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
    with progress(read_rows(Path(source.path)), f"prepare {cfg.out}", "row") as rows:
        for row in rows:
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
    """Hold out by a hash of the key, so that a row's side does not depend on the others.

    The key is the column `split.by`, else the row's id, else (rows without one) its number.
    """
    if cfg.split.by and is_empty(row.values.get(cfg.split.by)):
        raise SampleError(f"column '{cfg.split.by}', by which rows are split, is empty")
    key = row.values[cfg.split.by] if cfg.split.by else name
    digest = hashlib.sha256(f"{cfg.split.seed}:{key}".encode(errors="surrogatepass")).digest()
    share = int.from_bytes(digest[:8], "big") / 2**64
    return "validation" if share < cfg.split.validation else "train"


def _check_share(cfg: DatasetConfig, rows: int, rejections: Rejections, listed: Path) -> None:
    count = len(rejections.lines)
    if not rows:
        raise ConfigError(f"source.path {cfg.source.path} holds no rows; check the file")
    if count / rows > cfg.max_rejected:
        first = json.loads(rejections.lines[0])
        reasons = "; ".join(f"{n} x {reason}" for reason, n in rejections.by_reason.most_common(3))
        raise ConfigError(
            f"{count} of {rows} rows of {cfg.source.path} cannot be used, max_rejected allows a "
            f"share of {cfg.max_rejected}: {reasons}; first: row {first['row']}, "
            f"{first['reason']}; mend the rows that {listed} lists, or raise max_rejected"
        )


def _inputs(cfg: DatasetConfig, processor: Phi3VProcessor) -> dict[str, Any]:
    """What the samples are made of and the recipe only names: digests of files, and sizes."""
    return {
        "source": _source_digest(Path(cfg.source.path)),
        **{name: sha256(model_file(cfg.model, name)) for name in MODEL_FILES},
        "crop_size": processor.crop_size,
        "image_side": processor.side,
    }


def _source_digest(path: Path) -> str:
    """SHA-256 of a file, or of the names and digests of a folder's files."""
    if path.is_file():
        return sha256(path)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    lines = [f"{file.relative_to(path).as_posix()} {sha256(file)}" for file in files]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _fingerprint(recipe: dict[str, Any], splits: dict[str, Any]) -> str:
    text = json.dumps([recipe, splits], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()

"""What prepare says at its end, in a few lines."""

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from phi3v.data.audit import SUSPICIONS, answers_of, describe_answers
from phi3v.data.format import REJECTED
from phi3v.prepare.templates import FIELD


def summary(folder: Path, manifest: Mapping[str, Any]) -> Iterator[str]:
    """Lines on a dataset: samples, tokens, disk, what looks wrong, what was rejected."""
    for name, split in manifest["splits"].items():
        size = sum(shard["bytes"] for shard in split["shards"])
        yield (
            f"{folder} {name}: {split['samples']:,} samples, {split['tokens']:,} tokens, "
            f"{split['audit']['label_share']:.1%} of them trained, {_disk(size)}"
        )
        answers = answers_of(split["audit"])
        if answers["excluded"] or answers["unrecorded_samples"]:
            yield f"  {describe_answers(answers)}"
        for kind, found in split["audit"]["suspicious"].items():
            examples = ", ".join(found["examples"])
            yield f"  look at {found['count']:,} samples: {SUSPICIONS[kind]}, such as {examples}"
    if shared := manifest.get("shared_ids"):
        yield (
            f"{shared:,} rows have an id that another row has, too: their samples are called ID#N "
            "after their row's number, counted through all sources from 0"
        )
    yield from _pictures(manifest)
    yield from _likeness(manifest)
    yield from _policy(manifest)
    rejected = manifest["rejected"]
    if rejected["count"]:
        yield (
            f"{rejected['count']:,} of {manifest['rows']:,} rows rejected, see {folder / REJECTED}:"
        )
        yield from (f"  {count:,} x {reason}" for reason, count in rejected["by_reason"].items())


def _disk(size: int) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.2f} MB"


def _likeness(manifest: Mapping[str, Any]) -> Iterator[str]:
    """What near duplicates have done to the split, and whether they leave too little of one."""
    found, split = manifest["near_duplicates"], manifest["recipe"]["split"]
    if found["rows_joined"]:
        yield (
            f"{found['rows_joined']:,} rows share an image or one that looks alike with another "
            f"row, {found['rows_moved']:,} of them changed sides to stay together"
        )
    if across := found.get("rows_across"):
        yield (
            f"{across:,} training rows show a picture that a held-out row shows too, or one that "
            "looks alike: scores on the held-out rows are better than they should be; take these "
            "rows out of one of the two"
        )
    samples = sum(entry["samples"] for entry in manifest["splits"].values())
    held_out = manifest["splits"].get("validation", {"samples": 0})["samples"]
    is_share = isinstance(split["validation"], float)
    if is_share and held_out < split["validation"] * samples / 2:
        yield (
            f"only {held_out:,} of {samples:,} samples are held out, split.validation asks for a "
            f"share of {split['validation']}; the largest group of rows that stay together has "
            f"{found['largest_group']:,}"
        )


def _pictures(manifest: Mapping[str, Any]) -> Iterator[str]:
    """What pictures needed to be seen as they are meant, and what the recipe did about it."""
    rules = manifest["recipe"].get("images")
    if rules is None:  # made before there was a choice, and before they were counted
        return
    found: Counter[str] = Counter()
    for split in manifest["splits"].values():
        found.update(split["audit"]["pictures"])
    is_turned = "are" if rules["exif"] == "apply" else "would be"
    told = {
        "transparent": "have transparency",
        "turned": f"{is_turned} turned by EXIF",
        "deep": "have more than 8 bits",
    }
    if counted := [f"{found[trait]:,} {what}" for trait, what in told.items() if found[trait]]:
        counted[0] = counted[0].replace(" ", " pictures ", 1)
        yield f"{', '.join(counted)}; images.alpha is {rules['alpha']}, images.exif {rules['exif']}"


def _policy(manifest: Mapping[str, Any]) -> Iterator[str]:
    source = manifest["recipe"]["source"]
    for section in source if isinstance(source, list) else [source]:
        if section["assistant"] and not FIELD.search(section["assistant"]):
            yield f"every answer is {section['assistant']!r}: source.assistant names no column"
    if manifest["left_out"]:
        yield f"{manifest['left_out']:,} of {manifest['rows']:,} rows left out by weights"
    if manifest["recipe"]["never_upscale"]:
        tokens = sum(split["tokens"] for split in manifest["splits"].values())
        saved = manifest["saved_tokens"]
        yield (
            f"never_upscale saves {saved:,} tokens, {saved / (saved + tokens):.1%} of what the "
            "published transform takes"
        )
    if manifest["pixels"]["is_lossy"]:
        yield f"pixels are stored lossily: {manifest['pixels']['codec']}"

"""The whole page about a dataset: opens it, asks each section for its part, writes the file."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from phi3v.data import Dataset
from phi3v.data.audit import audit_split, merge
from phi3v.data.format import read_manifest
from phi3v.errors import ConfigError
from phi3v.evaluation.charts import CHART_STYLE, short_number
from phi3v.files import write_text
from phi3v.page import facts_section, heading, html_page
from phi3v.processing.processor import open_tokenizer, tokenizer_digest
from phi3v.view.distributions import distributions_section, packs_section
from phi3v.view.findings import audit_section, rejected_section
from phi3v.view.samples import find, samples_section, spread
from phi3v.view.style import VIEW_STYLE
from phi3v.view.tokens import TokenText

SECTIONS = ("samples", "distributions", "audit", "rejected", "packs", "recipe")


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """What the reader asks to see."""

    rows: int = 12
    """Samples shown, spread over the splits."""

    ids: tuple[str, ...] = ()
    """Samples shown instead, by id."""

    model: str | None = None
    """Folder or hub name of the tokenizer's model; default: the recipe's."""

    max_tokens: int | None = None
    """Tokens of a pack; default: 8,192, or the longest sample's."""

    max_views: int | None = None
    """Views of a pack; default: 64, or the most of a sample."""

    def __post_init__(self) -> None:
        for name in ("rows", "max_tokens", "max_views"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name} must be at least 1, got {value}")


def write_view(folder: Path, out: Path, wishes: Wishes) -> None:
    """Write the page about a dataset folder, whole or not at all.

    Raises: ShardError if the folder is no dataset or damaged; ConfigError if the tokenizer is not
    the dataset's, a wish cannot be met, or the file cannot be written.
    """
    manifest = read_manifest(folder)
    datasets = {split: Dataset(folder, split) for split in manifest["splits"]}
    tokenizer = _open_tokenizer(manifest, wishes.model)
    check_out(out)
    write_page(out, f"Dataset {folder}", "".join(_body(folder, datasets, tokenizer, wishes)))


def check_out(out: Path, option: str = "--out") -> None:
    """Refuse a folder where the name of a page is due, before anything slow starts.

    Raises: ConfigError
    """
    if out.is_dir():
        raise ConfigError(
            f"{option} {out} is a folder; name a file in it, such as {out / 'view.html'}"
        )


def write_page(out: Path, title: str, body: str, option: str = "--out") -> None:
    """Write a page with the look of this one, whole or not at all; `option` named the file.

    Raises: ConfigError if it cannot be written.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out, html_page(title, body, CHART_STYLE + VIEW_STYLE))
    except OSError as error:
        raise ConfigError(
            f"{option} {out} cannot be written ({error}); name another file"
        ) from error


def _open_tokenizer(manifest: Mapping[str, Any], model: str | None) -> PreTrainedTokenizerFast:
    path = model or manifest["recipe"]["model"]
    try:
        tokenizer = open_tokenizer(path)
    except ConfigError as error:
        raise ConfigError(f"{error}; --model says where the dataset's tokenizer is") from error
    if (digest := tokenizer_digest(tokenizer)) != manifest["tokenizer"]:
        raise ConfigError(
            f"model {path} has tokenizer {digest[:12]}..., the dataset was made"
            f" with {manifest['tokenizer'][:12]}...; name the model it was made for with --model"
        )
    return tokenizer


def _body(
    folder: Path,
    datasets: Mapping[str, Dataset],
    tokenizer: PreTrainedTokenizerFast,
    wishes: Wishes,
) -> Iterator[str]:
    manifest = next(iter(datasets.values())).manifest
    counts = {split: len(dataset) for split, dataset in datasets.items()}
    shown = find(datasets, wishes.ids) if wishes.ids else spread(counts, wishes.rows)
    # The packs first: they alone may refuse what was asked for.
    packs = packs_section(next(iter(datasets.values())), wishes.max_tokens, wishes.max_views)
    assistant, end = tokenizer.convert_tokens_to_ids(["<|assistant|>", "<|end|>"])
    audit = merge(audit_split(dataset, assistant, end) for dataset in datasets.values())
    links = "".join(f'<a href="#{name}">{name}</a>' for name in SECTIONS)
    yield heading(f"Dataset {folder}", _key_facts(manifest), f"<nav>{links}</nav>")
    yield _splits_section(manifest)
    yield from samples_section(datasets, shown, TokenText(tokenizer))
    yield distributions_section(datasets)
    yield audit_section(audit)
    yield rejected_section(folder, manifest)
    yield packs
    yield facts_section("Recipe", _flat(manifest["recipe"]))


def _key_facts(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    splits = manifest["splits"].values()
    samples, tokens, trained = (
        sum(split[name] for split in splits) for name in ("samples", "tokens", "label_tokens")
    )
    rejected = manifest["rejected"]["count"]
    pixels = manifest["pixels"]
    lossy = ", lossy" if pixels["is_lossy"] else ""
    return [
        ("rows read", f"{manifest['rows']:,}"),
        (f"samples; {rejected:,} rows rejected", f"{samples:,}"),
        ("tokens", short_number(tokens)),
        ("of them trained", f"{100 * trained / max(tokens, 1):.1f}%"),
        (f"on disk; pixels {pixels['codec']}{lossy}", _size(sum(map(_split_bytes, splits)))),
    ]


def _splits_section(manifest: Mapping[str, Any]) -> str:
    names = ("samples", "tokens", "image_tokens", "label_tokens", "views")
    head = "".join(f'<th class="number">{name}</th>' for name in (*_titles(names), "disk"))
    rows = "".join(
        f"<tr><th>{escape(name)}</th>"
        + "".join(f'<td class="number">{split[key]:,}</td>' for key in names)
        + f'<td class="number">{_size(_split_bytes(split))}</td></tr>\n'
        for name, split in manifest["splits"].items()
    )
    return (
        '<section><div class="wide"><table class="list"><thead><tr><th>split</th>'
        f"{head}</tr></thead><tbody>{rows}</tbody></table></div>"
        f'<p class="note">{_account(manifest)} '
        f'<span class="text">Fingerprint {escape(manifest["fingerprint"])}</span></p></section>\n'
    )


def _account(manifest: Mapping[str, Any]) -> str:
    """What became of the rows; a source's weight leaves rows out or lists them several times."""
    shards = [shard for split in manifest["splits"].values() for shard in split["shards"]]
    stored = sum(shard["samples"] for shard in shards)
    listed = sum(split["samples"] for split in manifest["splits"].values())
    left_out = f" + {manifest['left_out']:,} left out by weights" if manifest["left_out"] else ""
    repeats = f" Weights list them as {listed:,} samples." if listed != stored else ""
    return (
        f"{manifest['rows']:,} rows read = {stored:,} prepared + "
        f"{manifest['rejected']['count']:,} rejected{left_out}.{repeats}"
    )


def _titles(names: tuple[str, ...]) -> list[str]:
    return [name.replace("label_tokens", "trained").replace("_", " ") for name in names]


def _split_bytes(split: Mapping[str, Any]) -> int:
    return int(split["index"]["bytes"]) + sum(shard["bytes"] for shard in split["shards"])


def _size(count: int) -> str:
    """Bytes in a few characters: 73.6 MB."""
    number = short_number(count)
    return f"{number[:-1]} {number[-1]}B" if number[-1].isalpha() else f"{number} B"


def _flat(value: Any, name: str = "") -> dict[str, str]:
    """Nested values by dotted names: {"split": {"by": "id"}} -> {"split.by": "id"}."""
    if isinstance(value, dict | list) and value:
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        parts = (_flat(part, f"{name}.{key}".lstrip(".")) for key, part in pairs)
        return {key: text for part in parts for key, text in part.items()}
    return {} if value is None or value == [] or value == {} else {name: str(value)}

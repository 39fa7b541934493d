"""Every key of a dataset's recipe, with its type, default, unit and own checks.

`DatasetConfig` is what `launch/prepare.py` reads; schema.py says how such classes are made.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from phi3v.config.values import above_zero, at_least, distinct, filled, real_breaks
from phi3v.errors import ConfigError

Alpha = Literal["white", "published"]
Exif = Literal["apply", "published"]
MAX_PIXELS, MAX_ROW_BYTES = 100_000_000, 268435456
"""Of a picture, and of a row's pictures, where nothing else is said."""
MAX_IMAGES, MAX_CHARACTERS = 128, 1_000_000
"""Of a row, where nothing else is said."""


@dataclass(frozen=True, kw_only=True)
class SourceSection:
    path: str | tuple[str, ...]
    """Raw rows: a file, a folder saved by `datasets`, or a hub dataset's name; or a list of them,
    of which each is read as this section says."""

    format: Literal["columns", "messages", "llava", "texts", "auto"] = "auto"
    """columns: `user` and `assistant` below turn a row into one question and answer; messages:
    rows hold messages and images; llava: rows hold conversations of human and gpt, and image;
    texts: rows hold images, and texts of user and assistant, as FineVision's; auto: columns if
    `user` is given, else what the first row's names tell."""

    image_root: str | None = None
    """Folder where relative image paths start, and in which images must lie once links are
    followed; default: the folder that holds `path`."""

    image_folders: tuple[str, ...] | None = None
    """Further folders that images, and links of a folder of data, may lead to; `/` allows all."""

    user: str | None = None
    """The question; {name} stands for a column, <|image_1|> for the first image. Columns only."""

    assistant: str | None = None
    """The answer to learn; {name} stands for a column. Columns only."""

    images: tuple[str, ...] = ()
    """Columns that hold a path, URL, base64, bytes, a datasets Image or a list of these, in order.
    Columns only."""

    references: str | None = None
    """Column that holds every accepted answer, a text or a list of texts, for the metrics; default:
    the answer to learn is the only one. Columns only: rows of messages hold their `references`."""

    id: str | None = None
    """Column that names a row, in the dataset and in rejected.jsonl; default: `id`, if there is
    one, else the row's number."""

    ignore: tuple[str, ...] | None = None
    """Keys of a row or turn that say nothing about the sample, and tags such as <img> that are
    text; what is neither known nor named here rejects its row."""

    convert: str | None = None
    """module:function, a function of yours that makes a row (a dict) of each row, or None to leave
    it out; the module lies in the current folder or is installed."""

    delimiter: str | None = None
    """What separates the columns of a CSV, one character; default: a comma, in a .tsv a tab, or
    what the first line tells."""

    num_crops: int | None = None
    """Crops of one canvas at most, for this source; default: the recipe's."""

    weight: float = 1.0
    """How often a training row counts: 0.25 takes a quarter of the rows, 2 each row twice (stored
    once)."""

    max_rows: int | None = None
    """Rows read at most, from the first on; default: all."""

    config: str | None = None
    """The configuration of a hub dataset that has several."""

    split: str = "train"
    """The split of a hub dataset, or of a folder that `datasets` saved with several."""

    revision: str | None = None
    """Branch, tag or commit of a hub dataset; default: its main branch."""

    streaming: bool = False
    """Read a hub dataset row by row, up to `max_rows`, instead of downloading all of it first."""

    license: str | None = None
    """The license of the rows and pictures, such as cc-by-4.0, for the model card. It may be named
    later: prepare writes it into the manifest, and the dataset stays as it is."""

    def __post_init__(self) -> None:
        filled(source__user=self.user, source__assistant=self.assistant, source__split=self.split)
        real_breaks(
            "",
            'put the text in double quotes, "a\\nb" (in a shell \'source.user="a\\nb"\'), or take '
            "the two characters from a column",
            source__user=self.user,
            source__assistant=self.assistant,
        )
        filled(source__references=self.references, source__id=self.id)
        filled(source__license=self.license)
        for folder in self.image_folders or ():
            filled(source__image_folders=folder)
        if not self.paths:
            raise ConfigError("source.path must name at least one file, folder or hub dataset")
        for path in self.paths:
            filled(source__path=path)
        distinct(source__path=self.paths, source__images=self.images)
        at_least(1, source__num_crops=self.num_crops, source__max_rows=self.max_rows)
        above_zero("to leave a source out, remove it", source__weight=self.weight)
        if self.delimiter is not None and (len(self.delimiter) != 1 or self.delimiter in '"\r\n'):
            raise ConfigError(
                f"source.delimiter must be one character, got {self.delimiter!r}; write ';' or a "
                'tab as "\\t"'
            )
        if self.convert is not None and not all(self.convert.rpartition(":")[::2]):
            raise ConfigError(
                f"source.convert must be module:function, got {self.convert!r}; for example "
                "rows:convert"
            )
        if self.format in ("messages", "llava", "texts"):
            self._refuse_columns()
        elif self.format == "columns" or self._has_columns():
            self._require_template()

    @property
    def paths(self) -> tuple[str, ...]:
        """The path, or all of the list."""
        return (self.path,) if isinstance(self.path, str) else self.path

    def _has_columns(self) -> bool:
        return bool(self.user or self.assistant or self.images or self.references)

    def _refuse_columns(self) -> None:
        for name in ("user", "assistant", "images", "references"):
            if getattr(self, name):
                raise ConfigError(
                    f"source.{name} has no meaning with source.format '{self.format}', got "
                    f"{getattr(self, name)!r}; remove it, or use format 'columns'"
                )

    def _require_template(self) -> None:
        for name in ("user", "assistant"):
            if getattr(self, name) is None:
                raise ConfigError(
                    f"source.{name} is needed to turn columns into messages, got nothing; write "
                    f"its text with {{column}} names (source.format is {self.format!r})"
                )


@dataclass(frozen=True, kw_only=True)
class OwnValidation:
    path: str | tuple[str, ...] | None = None
    """Rows of your own to hold out, read as the source's: a file, a folder or a hub dataset's name,
    or a list; default: the source's path, of which `split` is another."""

    split: str | None = None
    """Their split of a hub dataset or saved folder; default: the source's."""

    image_root: str | None = None
    """Folder where their relative image paths start; default: the source's, if it is set."""

    def __post_init__(self) -> None:
        filled(split__validation__split=self.split)
        for path in (self.path,) if isinstance(self.path, str) else self.path or ():
            filled(split__validation__path=path)
        if not self.path and not self.split:
            raise ConfigError(
                "split.validation names neither a path nor a split; write {path: val.jsonl}, "
                "{split: validation}, or a share such as 0.1"
            )


@dataclass(frozen=True, kw_only=True)
class SplitSection:
    validation: float | OwnValidation = 0.0
    """Share of the rows held out, from 0 to below 1; or {path} or {split} of rows of your own."""

    by: str | None = None
    """Column whose equal values stay on one side of the split; default: each row for itself."""

    stratify: str | None = None
    """Column of whose every value the same share is held out; default: a share of all rows."""

    near_duplicates: Literal["together", "ignore"] = "together"
    """together: rows whose images look alike stay on one side of the split; where the held-out
    rows are your own choice, those on both sides are counted and named."""

    seed: int = 0
    """Decides which rows are held out."""

    def __post_init__(self) -> None:
        if not 0 <= self.share < 1:
            raise ConfigError(
                f"split.validation must be a share from 0 to below 1, got {self.validation!r}"
            )
        filled(split__by=self.by, split__stratify=self.stratify)
        at_least(0, split__seed=self.seed)
        if self.own and self.stratify:
            raise ConfigError(
                f"split.stratify {self.stratify!r} has no meaning where split.validation names "
                "rows of your own; remove it"
            )

    @property
    def share(self) -> float:
        """The share of the source's rows that is held out."""
        return 0.0 if isinstance(self.validation, OwnValidation) else self.validation

    @property
    def own(self) -> OwnValidation | None:
        """The rows that are held out, where they are the user's own choice."""
        return self.validation if isinstance(self.validation, OwnValidation) else None

    @property
    def holds_out(self) -> bool:
        """Whether anything is held out."""
        return bool(self.share) or self.own is not None

    @property
    def compares_pictures(self) -> bool:
        """Whether rows are compared by what their pictures look like."""
        return self.holds_out and self.near_duplicates == "together"


@dataclass(frozen=True, kw_only=True)
class ImagesSection:
    alpha: Alpha = "white"
    """white: what is transparent lies on white, as other programs show it; published: alpha is
    dropped, as the published processor does, and what lies under it is seen."""

    exif: Exif = "apply"
    """apply: a photo is turned as its camera says; published: it stays as it is stored."""


@dataclass(frozen=True, kw_only=True)
class PixelsSection:
    codec: Literal["raw", "zstd", "png", "jpeg"] = "raw"
    """How canvases are stored. raw: as they are, the fastest to read; zstd, png: smaller, exact;
    jpeg: the smallest, and lossy."""

    quality: int = 95
    """Quality of jpeg, 1 to 100; chroma is kept at full resolution."""

    def __post_init__(self) -> None:
        if not 1 <= self.quality <= 100:
            raise ConfigError(f"pixels.quality must be 1 to 100, got {self.quality!r}")


@dataclass(frozen=True, kw_only=True)
class FetchSection:
    cache: str | None = None
    """Folder where fetched images are kept, by content; default: `fetched` beside `out`."""

    concurrency: int = 16
    """Requests at once, to all hosts, in each worker process."""

    per_host: int = 8
    """Requests at once to one host, of all processes that share the cache."""

    timeout: float = 20.0
    """Seconds that one try of an image may take, from the connection to the last byte."""

    retries: int = 3
    """Further tries of an image whose host is slow, broken or overloaded."""

    wait: float = 120.0
    """Seconds that one image may wait at most, over all its tries, for a host that is overloaded or
    asks to be left alone for a while."""

    contact: str | None = None
    """Where the owner of a host can reach you, an e-mail address or a page; part of the User-Agent
    of every request."""

    robots: Literal["obey", "ignore"] = "ignore"
    """obey: an image that its host's robots.txt closes to programs is rejected; ignore: robots.txt
    is not asked for, since a list of addresses is no crawl."""

    max_bytes: int = 67108864
    """Bytes of one image file at most; default 64 MiB."""

    allow_private: bool = False
    """Whether addresses of the machine itself and of private networks may be fetched from."""

    def __post_init__(self) -> None:
        filled(fetch__cache=self.cache, fetch__contact=self.contact)
        at_least(
            1,
            fetch__concurrency=self.concurrency,
            fetch__per_host=self.per_host,
            fetch__max_bytes=self.max_bytes,
        )
        at_least(0, fetch__retries=self.retries, fetch__wait=self.wait)
        if self.contact and not (self.contact.isascii() and self.contact.isprintable()):
            raise ConfigError(
                f"fetch.contact is sent in a header and must be printable ASCII on one line, got "
                f"{self.contact!r}; write an e-mail address or a page's address"
            )
        above_zero("write seconds", fetch__timeout=self.timeout)


@dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """One dataset: raw rows, and the shards that are made of them."""

    source: SourceSection | tuple[SourceSection, ...]
    """Where the rows are and what they look like; or a list of such sections."""

    model: str
    """Folder or hub name of the model to be trained; its weights are not needed."""

    out: str
    """Dataset folder to write."""

    num_crops: int | None = None
    """Crops of one canvas at most; default: the model's own."""

    never_upscale: bool = False
    """Whether a picture gets no more crops along its long side than its own pixels need, rounded
    up; the published transform enlarges every picture to the crop limit."""

    images: ImagesSection = ImagesSection()
    """How the pixels of a picture are read."""

    max_pixels: int = MAX_PIXELS
    """Pixels (width x height) of a picture at most; larger ones are rejected undecoded."""

    max_images: int = MAX_IMAGES
    """Images of one row at most; rows with more are rejected before any is opened."""

    max_row_bytes: int = MAX_ROW_BYTES
    """Bytes that the images of one row may take, their files and their canvases together; default
    256 MiB."""

    max_characters: int = MAX_CHARACTERS
    """Characters of one row's messages and references at most; rows with more are rejected before
    they are tokenised."""

    split: SplitSection = SplitSection()
    """What is held out."""

    max_tokens: int | None = None
    """Tokens of one sample at most, longer ones are rejected; default: no limit."""

    max_rejected: float = 0.05
    """Share of rejected rows, from 0 to 1, above which nothing is published."""

    pixels: PixelsSection = PixelsSection()
    """How canvases are stored."""

    shard_bytes: int = 268435456
    """Size in bytes at which a shard is closed and the next one begun; default 256 MiB."""

    fetch: FetchSection = FetchSection()
    """How images at http(s) addresses are fetched."""

    workers: int | None = None
    """Worker processes; the result does not depend on it. Default: the CPUs of this process."""

    def __post_init__(self) -> None:
        filled(model=self.model, out=self.out)
        at_least(
            1,
            num_crops=self.num_crops,
            max_tokens=self.max_tokens,
            max_pixels=self.max_pixels,
            max_images=self.max_images,
            max_row_bytes=self.max_row_bytes,
            max_characters=self.max_characters,
            shard_bytes=self.shard_bytes,
            workers=self.workers,
        )
        if not self.sources:
            raise ConfigError("source must hold at least one section, got an empty list")
        if self.split.own and not isinstance(self.source, SourceSection):
            raise ConfigError(
                "split.validation names rows that are read as the source's, and there are "
                f"{len(self.source)} sources; make a dataset of each, and list the folders in "
                "data.shards of the run"
            )
        if not 0 <= self.max_rejected <= 1:
            raise ConfigError(
                f"max_rejected must be a share from 0 to 1, got {self.max_rejected!r}"
            )

    @property
    def sources(self) -> tuple[SourceSection, ...]:
        """The section, or all of the list, one for each path; then those of rows held out."""
        return self._divided + self._held_out

    @property
    def first_held_out(self) -> int:
        """The first of `sources` whose rows are all held out; their number if there is none."""
        return len(self._divided)

    @property
    def _divided(self) -> tuple[SourceSection, ...]:
        sections = (self.source,) if isinstance(self.source, SourceSection) else self.source
        return tuple(replace(section, path=path) for section in sections for path in section.paths)

    @property
    def _held_out(self) -> tuple[SourceSection, ...]:
        own = self.split.own
        if own is None or not isinstance(self.source, SourceSection):
            return ()
        section = replace(
            self.source,
            path=own.path or self.source.path,
            split=own.split or self.source.split,
            image_root=own.image_root or self.source.image_root,
            weight=1.0,
        )
        return tuple(replace(section, path=path) for path in section.paths)

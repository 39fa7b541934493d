"""Every key of the two kinds of recipe, with its type, default, unit and own checks.

`RunConfig` is what `launch/train.py` reads, `DatasetConfig` what `launch/prepare.py` reads. Each is
a tree of frozen dataclasses, one per YAML section; `load_recipe` builds it and nobody changes it
afterwards. A class checks its own values; what needs two sections is checked in `check.py`.

A section's key is written with dots everywhere a user meets it: `optim.lr`, `train.max_steps`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

from phi3v.config.values import above_zero, at_least, distinct, filled
from phi3v.errors import ConfigError

Module = Literal["vision", "projector", "language", "embeddings", "head"]
"""The parts of the model that have their own learning rate and can be frozen."""

MODULES: tuple[Module, ...] = get_args(Module)

LR_FIELDS: dict[Module, str] = {
    "vision": "vision_lr",
    "projector": "projector_lr",
    "language": "lr",
    "embeddings": "embedding_lr",
    "head": "head_lr",
}
"""The field of `OptimSection` that holds each module's learning rate."""


@dataclass(frozen=True, kw_only=True)
class RunSection:
    out: str
    """Run folder: resolved config, metrics, checkpoints, report."""

    seed: int = 0
    """Decides the order of samples and everything random in training."""

    def __post_init__(self) -> None:
        filled(run__out=self.out)
        at_least(0, run__seed=self.seed)


@dataclass(frozen=True, kw_only=True)
class ModelSection:
    path: str
    """Hugging Face folder or hub name to start from."""

    attention: Literal["auto", "sdpa"] = "auto"
    """auto: the fastest kernel present; sdpa: torch's own, one call per segment."""

    checkpointing: Literal["none", "full"] = "none"
    """full: recompute each layer in the backward pass; less memory, about a third more compute."""

    freeze: tuple[Module, ...] = ()
    """Modules whose parameters stay as they are."""

    def __post_init__(self) -> None:
        filled(model__path=self.path)
        distinct(model__freeze=self.freeze)


@dataclass(frozen=True, kw_only=True)
class DataSection:
    shards: str
    """Dataset folder that `launch/prepare.py` wrote."""

    max_tokens: int = 8192
    """Tokens in one pack at most; longer samples cannot be trained on."""

    max_views: int = 64
    """Views (crops and global thumbnails) in one pack at most."""

    window: int = 1024
    """Samples the packer looks ahead; more fill packs better and mix the order less."""

    def __post_init__(self) -> None:
        filled(data__shards=self.shards)
        at_least(
            1,
            data__max_tokens=self.max_tokens,
            data__max_views=self.max_views,
            data__window=self.window,
        )


@dataclass(frozen=True, kw_only=True)
class OptimSection:
    lr: float
    """Peak learning rate of the language layers, and of every module without its own."""

    vision_lr: float | None = None
    """Peak learning rate of the vision tower; default `lr`."""

    projector_lr: float | None = None
    """Peak learning rate of the projector; default `lr`."""

    embedding_lr: float | None = None
    """Peak learning rate of the token embeddings; default `lr`."""

    head_lr: float | None = None
    """Peak learning rate of the output head; default `lr`."""

    weight_decay: float = 0.0
    """Decoupled weight decay, as in AdamW: a step shrinks a weight by lr * weight_decay of it."""

    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the learning rates from the end of the warmup to the last step."""

    warmup_steps: int = 0
    """Steps over which the learning rates rise from 0 to their peaks."""

    min_lr_ratio: float = 0.0
    """Learning rate at the last step, as a share of the peak; 0 to 1."""

    def __post_init__(self) -> None:
        above_zero(
            "to keep a module as it is, name it in model.freeze",
            **{f"optim__{name}": getattr(self, name) for name in LR_FIELDS.values()},
        )
        at_least(
            0,
            optim__weight_decay=self.weight_decay,
            optim__warmup_steps=self.warmup_steps,
        )
        if not 0 <= self.min_lr_ratio <= 1:
            raise ConfigError(
                f"optim.min_lr_ratio must be a share from 0 to 1, got {self.min_lr_ratio!r}"
            )

    def peak_lr(self, module: Module) -> float:
        """Give the peak learning rate of one module: its own, or `lr`."""
        own: float | None = getattr(self, LR_FIELDS[module])
        return self.lr if own is None else own


@dataclass(frozen=True, kw_only=True)
class TrainSection:
    max_steps: int | None = None
    """Length of the run in optimizer steps; either this or `epochs`."""

    epochs: int | None = None
    """Length of the run in passes over the training samples; either this or `max_steps`."""

    def __post_init__(self) -> None:
        if (self.max_steps is None) == (self.epochs is None):
            both = f"both, {self.max_steps} and {self.epochs}"
            raise ConfigError(
                "exactly one of train.max_steps and train.epochs must be set, got "
                f"{'neither' if self.epochs is None else both}"
            )
        at_least(1, train__max_steps=self.max_steps, train__epochs=self.epochs)


@dataclass(frozen=True, kw_only=True)
class EvalSection:
    every: int = 0
    """Steps between evaluations; 0: only at the end."""

    rows: int = 256
    """Held-out rows that are answered; 0: no evaluation."""

    split: str = "validation"
    """Split of the dataset that is answered."""

    metrics: tuple[str, ...] = ("exact_match",)
    """exact_match, parse_rate, or FIELD_accuracy, FIELD_exact_match, FIELD_exact_match_unseen and
    FIELD_mape, where FIELD is named in `pattern`."""

    pattern: str | None = None
    """What an answer looks like: "Product: {title}, Full Price: {price:float}"."""

    blind: bool = True
    """Answer the rows a second time with their images exchanged: what the images are worth."""

    max_new_tokens: int = 64
    """Tokens of one answer at most."""

    batch_rows: int = 32
    """Rows answered at once by one rank."""

    def __post_init__(self) -> None:
        filled(eval__split=self.split, eval__pattern=self.pattern)
        distinct(eval__metrics=self.metrics)
        at_least(0, eval__every=self.every, eval__rows=self.rows)
        at_least(1, eval__max_new_tokens=self.max_new_tokens, eval__batch_rows=self.batch_rows)


@dataclass(frozen=True, kw_only=True)
class CheckpointSection:
    every: int = 200
    """Steps between checkpoints; the last step is always saved."""

    keep: int = 3
    """Newest checkpoints that are kept; older ones are deleted."""

    def __post_init__(self) -> None:
        at_least(1, checkpoint__every=self.every, checkpoint__keep=self.keep)


@dataclass(frozen=True, kw_only=True)
class WandbSection:
    mode: Literal["offline", "online", "disabled"] = "offline"
    """offline writes to the run folder only; `wandb sync` uploads it later."""

    project: str = "phi3v"
    """Project under which the run appears."""

    def __post_init__(self) -> None:
        filled(wandb__project=self.project)


@dataclass(frozen=True, kw_only=True)
class DebugSection:
    deterministic: bool = False
    """Use only kernels that give the same bits each time; slower."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One training run; batch sizes, precision and optimizer type are the DeepSpeed JSON's."""

    run: RunSection
    """Where the run is written, and its seed."""

    model: ModelSection
    """What is trained."""

    data: DataSection
    """What it is trained on, and how large a pack is."""

    optim: OptimSection
    """Learning rates, their schedule, weight decay."""

    train: TrainSection
    """How long."""

    eval: EvalSection = EvalSection()
    """How answers on held-out rows are generated and measured."""

    checkpoint: CheckpointSection = CheckpointSection()
    """How often the run is saved, and what is kept."""

    wandb: WandbSection = WandbSection()
    """Whether Weights & Biases is told."""

    deepspeed: str | None = None
    """Path of the DeepSpeed JSON; default: zero3.json on CUDA, zero3_cpu.json elsewhere."""

    debug: DebugSection = DebugSection()
    """Switches for finding out what went wrong."""

    def __post_init__(self) -> None:
        filled(deepspeed=self.deepspeed)


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What `launch/evaluate.py` asks of a model."""

    eval: EvalSection = EvalSection()
    """How answers on held-out rows are generated and measured."""


@dataclass(frozen=True, kw_only=True)
class SourceSection:
    path: str | tuple[str, ...]
    """Raw rows: a file, a folder saved by `datasets`, or a hub dataset's name; or a list of them,
    of which each is read as this section says."""

    format: Literal["columns", "messages", "llava", "auto"] = "auto"
    """columns: `user` and `assistant` below turn a row into one question and answer; messages:
    rows hold messages and images; llava: rows hold conversations of human and gpt, and image;
    auto: columns if those are given, else what the first row's names tell."""

    image_root: str | None = None
    """Folder where relative image paths start; default: the folder that holds `path`."""

    user: str | None = None
    """The question; {name} stands for a column, <|image_1|> for the first image. Columns only."""

    assistant: str | None = None
    """The answer to learn; {name} stands for a column. Columns only."""

    images: tuple[str, ...] = ()
    """Columns that hold a path, URL, base64, bytes, a datasets Image or a list of these, in order.
    Columns only."""

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

    def __post_init__(self) -> None:
        filled(source__user=self.user, source__assistant=self.assistant, source__split=self.split)
        if not self.paths:
            raise ConfigError("source.path must name at least one file, folder or hub dataset")
        for path in self.paths:
            filled(source__path=path)
        distinct(source__path=self.paths, source__images=self.images)
        at_least(1, source__num_crops=self.num_crops, source__max_rows=self.max_rows)
        above_zero("to leave a source out, remove it", source__weight=self.weight)
        if self.format in ("messages", "llava"):
            self._refuse_columns()
        elif self.format == "columns" or self._has_columns():
            self._require_template()

    @property
    def paths(self) -> tuple[str, ...]:
        """The path, or all of the list."""
        return (self.path,) if isinstance(self.path, str) else self.path

    def _has_columns(self) -> bool:
        return bool(self.user or self.assistant or self.images)

    def _refuse_columns(self) -> None:
        for name in ("user", "assistant", "images"):
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
class SplitSection:
    validation: float = 0.0
    """Share of the rows held out, from 0 to below 1."""

    by: str | None = None
    """Column whose equal values stay on one side of the split; default: each row for itself."""

    stratify: str | None = None
    """Column of whose every value the same share is held out; default: a share of all rows."""

    near_duplicates: Literal["together", "ignore"] = "together"
    """together: rows whose images look alike stay on one side of the split."""

    seed: int = 0
    """Decides which rows are held out."""

    def __post_init__(self) -> None:
        if not 0 <= self.validation < 1:
            raise ConfigError(
                f"split.validation must be a share from 0 to below 1, got {self.validation!r}"
            )
        filled(split__by=self.by, split__stratify=self.stratify)
        at_least(0, split__seed=self.seed)


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
    """Requests at once, in each worker process."""

    timeout: float = 20.0
    """Seconds that one try of an image may take, from the connection to the last byte."""

    retries: int = 3
    """Further tries of an image whose host is slow, broken or overloaded."""

    max_bytes: int = 67108864
    """Bytes of one image file at most; default 64 MiB."""

    allow_private: bool = False
    """Whether addresses of the machine itself and of private networks may be fetched from."""

    def __post_init__(self) -> None:
        filled(fetch__cache=self.cache)
        at_least(1, fetch__concurrency=self.concurrency, fetch__max_bytes=self.max_bytes)
        at_least(0, fetch__retries=self.retries)
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

    max_pixels: int = 100_000_000
    """Pixels (width x height) of a picture at most; larger ones are rejected undecoded."""

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
            shard_bytes=self.shard_bytes,
            workers=self.workers,
        )
        if not self.sources:
            raise ConfigError("source must hold at least one section, got an empty list")
        if not 0 <= self.max_rejected <= 1:
            raise ConfigError(
                f"max_rejected must be a share from 0 to 1, got {self.max_rejected!r}"
            )

    @property
    def sources(self) -> tuple[SourceSection, ...]:
        """The section, or all of the list, one for each path."""
        sections = (self.source,) if isinstance(self.source, SourceSection) else self.source
        return tuple(replace(section, path=path) for section in sections for path in section.paths)

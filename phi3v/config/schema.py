"""Every key of a run's recipe, with its type, default, unit and own checks.

`RunConfig` is what `launch/train.py` reads; `DatasetConfig`, what `launch/prepare.py` reads, is in
dataset.py. Each is a tree of frozen dataclasses, one per YAML section; `load_recipe` builds it and
nobody changes it afterwards. A class checks its own values; what needs two sections is checked in
`check.py`.

A section's key is written with dots everywhere a user meets it: `optim.lr`, `train.max_steps`.
"""

from __future__ import annotations

from dataclasses import dataclass
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

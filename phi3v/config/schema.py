"""Every key of a run's recipe, with its type, default, unit and own checks.

`RunConfig` is what `launch/train.py` reads; `DatasetConfig`, what `launch/prepare.py` reads, is in
dataset.py; the sections on how a run runs are in running.py. Each is a tree of frozen dataclasses,
one per YAML section; `load_recipe` builds it and nobody changes it afterwards. A class checks its
own values; what needs two sections is checked in `check.py`.

A section's key is written with dots everywhere a user meets it: `optim.lr`, `train.max_steps`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from phi3v.config.running import (
    CheckpointSection,
    DebugSection,
    EvalSection,
    FaultsSection,
    TrackingSection,
    TrainSection,
    WandbSection,
)
from phi3v.config.values import above_zero, at_least, distinct, filled
from phi3v.errors import ConfigError

Module = Literal["vision", "projector", "language", "embeddings", "head"]
"""The parts of the model that have their own learning rate and can be frozen."""

MODULES: tuple[Module, ...] = get_args(Module)

Checkpointing = Literal["none", "selective", "full"]
"""How much of a layer is computed a second time to save memory."""

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

    attention: Literal["auto", "flash", "varlen", "sdpa"] = "auto"
    """flash: the flash-attn package; varlen: torch's variable-length flash attention; sdpa: torch's
    scaled_dot_product_attention, one call per segment; auto: the first of these that runs here."""

    kernels: Literal["auto", "compiled", "eager"] = "auto"
    """compiled: the element-wise parts of a layer run as kernels fused by torch.compile; eager: one
    operation after another; auto: compiled on CUDA."""

    loss: Literal["auto", "liger", "chunked"] = "auto"
    """How logits are avoided. liger: Liger's fused kernel (CUDA); chunked: a thousand tokens at a
    time; auto: chunked."""

    checkpointing: Checkpointing = "none"
    """What of each layer is computed again in the backward pass. none: nothing; selective: all but
    matrix products and attention, for a sixth less memory; full: the layer, for the least memory
    and about a quarter more compute."""

    vision_checkpointing: Checkpointing | None = None
    """The same for the vision tower's layers; default: as `checkpointing`."""

    offload_activations: bool = False
    """Whether what full checkpointing keeps, each layer's input, waits in the host's memory."""

    freeze: tuple[Module, ...] = ()
    """Modules whose parameters stay as they are."""

    def __post_init__(self) -> None:
        filled(model__path=self.path)
        distinct(model__freeze=self.freeze)

    @property
    def trained(self) -> list[Module]:
        """Modules that are not frozen, in the order of MODULES."""
        return [module for module in MODULES if module not in self.freeze]

    @property
    def tower_checkpointing(self) -> Checkpointing:
        """What of the vision tower's layers is computed again."""
        return self.vision_checkpointing or self.checkpointing


Verify = Literal["size", "digest", "sampled"]
"""How datasets are compared with what was written of them."""


@dataclass(frozen=True, kw_only=True)
class ShardsSection:
    path: str
    """Dataset folder that `launch/prepare.py` wrote."""

    weight: float = 1.0
    """How often an epoch holds each of its samples: 2 each twice, 0.25 a quarter of them, another
    quarter in the next epoch."""

    def __post_init__(self) -> None:
        filled(data__shards__path=self.path)
        above_zero("to leave a dataset out, remove it", data__shards__weight=self.weight)


@dataclass(frozen=True, kw_only=True)
class CostSection:
    token: float = 0.0
    """Cost of one token, in any unit that the four keys share."""

    token_pair: float = 0.0
    """Cost of attention by the square of a sample's tokens."""

    view: float = 0.0
    """Cost of one view in the vision tower, its image tokens' projection included."""

    label_token: float = 0.0
    """Cost of one trained token in the head."""

    def __post_init__(self) -> None:
        at_least(
            0,
            data__cost__token=self.token,
            data__cost__token_pair=self.token_pair,
            data__cost__view=self.view,
            data__cost__label_token=self.label_token,
        )

    @property
    def is_given(self) -> bool:
        """Whether any coefficient is set; none: model FLOPs are the cost."""
        return any((self.token, self.token_pair, self.view, self.label_token))


@dataclass(frozen=True, kw_only=True)
class DataSection:
    shards: str | tuple[ShardsSection, ...]
    """Dataset folder that `launch/prepare.py` wrote; or a list of {path, weight}."""

    max_tokens: int = 8192
    """Tokens in one pack at most; longer samples cannot be trained on."""

    max_views: int = 64
    """Views (crops and global thumbnails) in one pack at most."""

    window: int = 1024
    """Samples that are packed together, at least; more fill packs better, mix the order less."""

    window_steps: int = 16
    """Steps whose packs are dealt together, at least: packs of like cost share a step."""

    verify: Verify | None = None
    """How the shards are compared with what was written. size: the size of every file; digest:
    every byte of every file, before the first step; sampled: each record by a digest of its own,
    when it is first read. Default: sampled where the datasets hold such digests, else size (those
    that were made before there were any)."""

    cost: CostSection = CostSection()
    """What a pack is expected to take, as `benchmarks/cost.py` measures it; default: its FLOPs."""

    def __post_init__(self) -> None:
        if isinstance(self.shards, str):
            filled(data__shards=self.shards)
        if not self.parts:
            raise ConfigError("data.shards must name at least one dataset folder, got []")
        distinct(data__shards=self.folders)
        at_least(
            1,
            data__max_tokens=self.max_tokens,
            data__max_views=self.max_views,
            data__window=self.window,
            data__window_steps=self.window_steps,
        )

    @property
    def parts(self) -> tuple[ShardsSection, ...]:
        """The dataset, or all of the list."""
        return (ShardsSection(path=self.shards),) if isinstance(self.shards, str) else self.shards

    @property
    def folders(self) -> tuple[str, ...]:
        """The folder of each dataset."""
        return tuple(part.path for part in self.parts)


@dataclass(frozen=True, kw_only=True)
class OptimSection:
    lr: float
    """Peak learning rate of the language layers, and of every module without its own."""

    vision_lr: float | None = None
    """Peak learning rate of the vision tower; default `lr`."""

    projector_lr: float | None = None
    """Peak learning rate of the projector; default `lr`."""

    vision_layer_decay: float = 1.0
    """Factor by which each layer of the tower learns slower than the one above it; above 0 to 1."""

    embedding_lr: float | None = None
    """Peak learning rate of the token embeddings; default `lr`."""

    head_lr: float | None = None
    """Peak learning rate of the output head; default `lr`."""

    weight_decay: float = 0.0
    """Decoupled weight decay, as in AdamW: a step shrinks a weight by lr * weight_decay of it."""

    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the learning rates from the end of the warmup to the last step."""

    warmup_steps: int | None = None
    """Steps over which the learning rates rise from 0 to their peaks; default 0. Either this or
    `warmup_ratio`."""

    warmup_ratio: float | None = None
    """The same as a share of the run's steps, from 0 to below 1: it fits runs of any length."""

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
            optim__warmup_ratio=self.warmup_ratio,
        )
        if self.warmup_steps is not None and self.warmup_ratio is not None:
            raise ConfigError(
                "only one of optim.warmup_steps and optim.warmup_ratio may be set, got both, "
                f"{self.warmup_steps} and {self.warmup_ratio}; set the other to null"
            )
        if self.warmup_ratio is not None and self.warmup_ratio >= 1:
            raise ConfigError(
                f"optim.warmup_ratio must be a share from 0 to below 1, got {self.warmup_ratio!r}"
            )
        if not 0 < self.vision_layer_decay <= 1:
            raise ConfigError(
                "optim.vision_layer_decay must be a factor above 0 and at most 1, got "
                f"{self.vision_layer_decay!r}"
            )
        if not 0 <= self.min_lr_ratio <= 1:
            raise ConfigError(
                f"optim.min_lr_ratio must be a share from 0 to 1, got {self.min_lr_ratio!r}"
            )

    def warmup(self, total_steps: int) -> int:
        """Steps of the warm-up of a run; by a ratio it is rounded up and shorter than the run.

        Source: transformers TrainingArguments.get_warmup_steps rounds up as well.
        """
        if self.warmup_ratio is None:
            return self.warmup_steps or 0
        return min(math.ceil(self.warmup_ratio * total_steps), total_steps - 1)

    def peak_lr(self, module: Module) -> float:
        """Give the peak learning rate of one module: its own, or `lr`."""
        own: float | None = getattr(self, LR_FIELDS[module])
        return self.lr if own is None else own


@dataclass(frozen=True, kw_only=True)
class DeepSpeedFiles:
    """The DeepSpeed JSON of each kind of device, where a run is meant for both."""

    cpu: str
    """Path of the JSON for a run on the CPU."""

    cuda: str
    """Path of the JSON for a run on GPUs."""

    def __post_init__(self) -> None:
        filled(deepspeed__cpu=self.cpu, deepspeed__cuda=self.cuda)


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

    faults: FaultsSection = FaultsSection()
    """What happens to steps that would spoil the weights."""

    wandb: WandbSection = WandbSection()
    """Whether Weights & Biases is told."""

    tracking: TrackingSection = TrackingSection()
    """Who else is told."""

    deepspeed: str | DeepSpeedFiles | None = None
    """Path of the DeepSpeed JSON, or {cpu: PATH, cuda: PATH}; default: zero3.json on CUDA,
    zero3_cpu.json elsewhere. `ds_configs/NAME` is the shipped one where the current folder has no
    such file. On the command line `deepspeed.KEY=VALUE` sets a key of the JSON."""

    debug: DebugSection = DebugSection()
    """Switches for finding out what went wrong."""

    def __post_init__(self) -> None:
        if isinstance(self.deepspeed, str):
            filled(deepspeed=self.deepspeed)


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What `launch/evaluate.py` asks of a model."""

    eval: EvalSection = EvalSection()
    """How answers on held-out rows are generated and measured."""


@dataclass(frozen=True, kw_only=True)
class SuiteDataset:
    shards: str
    """Dataset folder that `launch/prepare.py` wrote."""

    name: str | None = None
    """What tables and files call it; default: the folder's name."""

    eval: EvalSection = EvalSection()
    """What is asked of it, as in a run's recipe, but for `every` and `at_start`."""

    def __post_init__(self) -> None:
        filled(datasets__shards=self.shards, datasets__name=self.name)
        for key, value in (("every", self.eval.every), ("at_start", self.eval.at_start)):
            if value:
                raise ConfigError(
                    f"datasets.eval.{key} is {value} for {self.shards}, but a suite is evaluated "
                    "once; leave it out"
                )

    @property
    def title(self) -> str:
        """Its name, or its folder's."""
        return self.name or Path(self.shards).name


@dataclass(frozen=True, kw_only=True)
class SuiteConfig:
    """What `launch/evaluate.py --suite` asks of each model."""

    datasets: tuple[SuiteDataset, ...]
    """Each dataset with its own metrics."""

    def __post_init__(self) -> None:
        if not self.datasets:
            raise ConfigError("datasets must name at least one dataset, got []")
        titles = [one.title for one in self.datasets]
        for one in self.datasets:
            if titles.count(one.title) > 1:
                raise ConfigError(
                    f"datasets has {one.title!r} twice; give each a name of its own, as name: NAME"
                )

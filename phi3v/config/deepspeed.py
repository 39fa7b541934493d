"""Read the DeepSpeed JSON, and refuse what DeepSpeed would silently ignore or we own elsewhere.

    ds = load_deepspeed(Path("ds_configs/zero3.json"), world_size=8)
    deepspeed.initialize(config=ds.for_engine(), ...)

The file states the global batch and the micro batch (one pack); accumulation is derived, so the
optimisation does not change with the number of ranks. `keys.py` lists the keys it may hold.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from phi3v.config.keys import (
    DECOUPLED_OPTIMIZERS,
    OPTIMIZERS,
    SECTIONS,
    idle_zero_keys,
    optimizer_keys,
)
from phi3v.config.names import nearest
from phi3v.errors import ConfigError
from phi3v.stored import parse_file

SHIPPED = Path(__file__).resolve().parents[2] / "ds_configs"
Json = dict[str, Any]
Scalar = TypeVar("Scalar", bool, int, float, str)

REQUIRED_KEYS = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "optimizer.type",
    "zero_optimization.stage",
)

BF16_KEYS = ("data_types.grad_accum_dtype", "communication_data_type")
"""Keys that must be stated beside bf16: DeepSpeed would add gradients up in bf16 as well."""

CHOICES: dict[str, tuple[str | float, ...]] = {
    "train_micro_batch_size_per_gpu": (1,),
    "zero_optimization.stage": (1, 2, 3),
    "zero_optimization.offload_optimizer.device": ("none", "cpu", "nvme"),
    "zero_optimization.offload_optimizer.ratio": (1.0,),
    "zero_optimization.offload_optimizer.super_offload": (False,),
    "zero_optimization.offload_param.device": ("none", "cpu", "nvme"),
    "data_types.grad_accum_dtype": ("fp32", "bf16"),
    "communication_data_type": ("fp32", "bf16"),
    "fp16.enabled": (False,),
    "bf16.check_grad_overflow": (True,),
    "zero_optimization.zero_quantized_gradients": (False,),
}
"""Values that some keys are confined to."""

REASONS = {
    "train_micro_batch_size_per_gpu": "one pack is one micro-batch, and data.max_tokens sets its "
    "size",
    "fp16.enabled": "float16 needs loss scaling, which skips steps; use bf16.enabled, or neither "
    "for float32",
    "bf16.check_grad_overflow": "the stages 1 and 2 would put a gradient that is not a number into "
    "the weights; stage 3 checks always",
    "zero_optimization.offload_optimizer.ratio": "DeepSpeed 0.19.8 steps the rest by an optimizer "
    "that is in no checkpoint and has no learning rate of ours",
    "zero_optimization.offload_optimizer.super_offload": "DeepSpeed 0.19.8 keeps the moments in a "
    "process of their own, and no checkpoint has them",
    "zero_optimization.zero_quantized_gradients": "DeepSpeed 0.19.8 reads every gradient as "
    "float16, whatever it is",
}
"""Why, where the choice alone does not say it."""

OWNED_ELSEWHERE = {
    "gradient_accumulation_steps": "it is derived from train_batch_size and the number of ranks",
    "scheduler": "the recipe's optim.schedule owns it",
    "optimizer.params.lr": "the recipe's optim.lr owns it, per module",
    "optimizer.params.weight_decay": "the recipe's optim.weight_decay owns it",
    "optimizer.params.max_grad_norm": "gradient_clipping owns it",
    "activation_checkpointing": "the recipe's model.checkpointing owns it",
    "compile": "the recipe's model.kernels owns it",
    "zero_optimization.leaf_module": "phi3v.model.LAYERS owns it",
    "wandb": "the recipe's wandb section owns it",
}
"""Keys that DeepSpeed would obey and that have another owner here, with that owner."""


@dataclass(frozen=True, kw_only=True)
class DeepSpeedConfig:
    """A checked DeepSpeed JSON, for a given number of ranks."""

    path: Path
    """Where it was read."""

    world_size: int
    """Ranks of the run; each works on one pack at a time."""

    overrides: Mapping[str, Any] = field(default_factory=dict)
    """Values of the command line that won over the file's, by dotted key."""

    json: Json
    """The file's content; hand `for_engine()` to DeepSpeed, which edits what it gets."""

    @property
    def place(self) -> str:
        """Where values came from: "zero3.json with deepspeed.train_batch_size=8"."""
        texts = [f"deepspeed.{key}={json.dumps(value)}" for key, value in self.overrides.items()]
        return f"{self.path} with {', '.join(texts)}" if texts else str(self.path)

    def for_engine(self) -> Json:
        """Copy the content for `deepspeed.initialize(config=...)`."""
        return copy.deepcopy(self.json)

    @property
    def train_batch_size(self) -> int:
        """Packs per optimizer step, over all ranks and accumulation rounds."""
        return self._value("train_batch_size", 0)

    @property
    def micro_batch(self) -> int:
        """Packs that a rank works on at a time: 1."""
        return self._value("train_micro_batch_size_per_gpu", 0)

    @property
    def accumulation(self) -> int:
        """Rounds per optimizer step: train_batch_size / (1 pack x ranks)."""
        return self.train_batch_size // (self.micro_batch * self.world_size)

    @property
    def zero_stage(self) -> int:
        """What ZeRO divides among the ranks: 1 optimizer state, 2 + gradients, 3 + weights."""
        return self._value("zero_optimization.stage", 0)

    @property
    def offloads_optimizer(self) -> bool:
        """Whether the optimizer's state lies, and its steps are computed, in the host's memory."""
        return self._value("zero_optimization.offload_optimizer.device", "none") == "cpu"

    @property
    def bf16(self) -> bool:
        """Whether the model computes in bfloat16 (with float32 master weights), not float32."""
        return self._value("bf16.enabled", False)

    @property
    def gradient_clipping(self) -> float:
        """Largest gradient norm of a step; 0: not clipped."""
        return float(self._value("gradient_clipping", 0.0))

    @property
    def optimizer_type(self) -> str:
        """DeepSpeed's name of the optimizer, such as AdamW."""
        return self._value("optimizer.type", "")

    @property
    def takes_torch_adam(self) -> bool:
        """Whether Adam is torch's own, which nothing need be compiled for."""
        return self._value("optimizer.params.torch_adam", False)

    @property
    def steps_on_host(self) -> bool:
        """Whether the optimizer's steps are the CPU's, its state in memory or on NVMe."""
        return self._value("zero_optimization.offload_optimizer.device", "none") != "none"

    @property
    def offloads_to_nvme(self) -> bool:
        """Whether the optimizer's state or the weights are on NVMe."""
        sections = ("offload_optimizer", "offload_param")
        keys = [f"zero_optimization.{section}.device" for section in sections]
        return "nvme" in [self._value(key, "none") for key in keys]

    @property
    def quantizes_weights(self) -> bool:
        """Whether weights travel as 8-bit integers (ZeRO++)."""
        kinds = ("weights", "nontrainable_weights")
        keys = [f"zero_optimization.zero_quantized_{kind}" for kind in kinds]
        return any(self._value(key, False) for key in keys)

    @property
    def decouples_decay(self) -> bool:
        """Whether weight decay acts on the weights, as in AdamW, not on the gradient.

        Source: DeepSpeed runtime/engine.py `_configure_basic_optimizer`: "Adam" is AdamW too,
        unless `adam_w_mode` is false.
        """
        name = self.optimizer_type.lower()
        is_adamw = name == "adam" and self._value("optimizer.params.adam_w_mode", True)
        return is_adamw or name in DECOUPLED_OPTIMIZERS

    def _value(self, key: str, default: Scalar) -> Scalar:
        """Read the value at a dotted key; its type was checked when the file was loaded."""
        value: Scalar | None = _lookup(self.json, key)
        return default if value is None else value


def load_deepspeed(
    path: Path, world_size: int, overrides: Mapping[str, Any] | None = None
) -> DeepSpeedConfig:
    """Read and check the DeepSpeed JSON at `path` for a run on `world_size` ranks.

    overrides  values by dotted key, which win over the file's

    Raises: ConfigError naming the file, the dotted key and the value.
    """
    assert world_size >= 1
    path = _find(path)
    content, overrides = _read(path), overrides or {}
    for key, value in overrides.items():
        _set(content, key, value)
    ds = DeepSpeedConfig(path=path, world_size=world_size, overrides=overrides, json=content)
    _check_owners(ds)
    _check_auto(ds)
    _check_keys(ds)
    _check_required(ds)
    _check_values(ds)
    _check_idle(ds)
    _check_batch(ds)
    _check_nodes(ds)
    return ds


def default_deepspeed(has_cuda: bool) -> Path:
    """Name the JSON of a run that names none: bf16 on CUDA, float32 elsewhere."""
    return SHIPPED / ("zero3.json" if has_cuda else "zero3_cpu.json")


def _find(path: Path) -> Path:
    """The shipped file for `ds_configs/NAME` where the current folder has no such file."""
    shipped = SHIPPED / path.name
    is_shipped = path.parent == Path(SHIPPED.name) and shipped.is_file()
    return shipped if is_shipped and not path.exists() else path


def _set(content: Json, key: str, value: Any) -> None:
    """Set the value at a dotted key, opening the sections on the way; null removes the key.

    YAML reads 1e-6 as a text: where the JSON has a float, it is one.
    """
    section, _, name = key.rpartition(".")
    if isinstance(value, str) and SECTIONS.get(section, {}).get(name) is float:
        with suppress(ValueError):
            value = float(value)
    *sections, name = key.split(".")
    for section in sections:
        inner = content.setdefault(section, {})
        if not isinstance(inner, dict):
            raise ConfigError(
                f"deepspeed.{key} sets a key of {section!r}, which is {inner!r}; see "
                "docs/deepspeed.md"
            )
        content = inner
    if value is None:
        content.pop(name, None)
    else:
        content[name] = value


def _read(path: Path) -> Json:
    if not path.is_file():
        raise ConfigError(f"DeepSpeed config {path} does not exist; name a file, see ds_configs/")
    try:
        return parse_file(path, partial(json.loads, object_pairs_hook=_unique))
    except _DuplicateKey as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from None
    except ValueError as error:
        raise ConfigError(f"{path} {error}") from None


class _DuplicateKey(Exception):
    """An object of the JSON holds a key twice; Python's parser would keep the second."""


def _unique(pairs: list[tuple[str, Any]]) -> Json:
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise _DuplicateKey(f"key {name!r} is there twice")
    return dict(pairs)


def _check_owners(ds: DeepSpeedConfig) -> None:
    for key, owner in OWNED_ELSEWHERE.items():
        value = _lookup(ds.json, key)
        if value is not None:
            raise ConfigError(f"{ds.place}: {key} must not be written, got {value!r}; {owner}")


def _check_auto(ds: DeepSpeedConfig) -> None:
    for key, value in _leaves(ds.json):
        if value == "auto":
            raise ConfigError(
                f"{ds.place}: {key} is 'auto', which has no meaning here; write it out"
            )


def _check_keys(ds: DeepSpeedConfig) -> None:
    for section, kinds in SECTIONS.items():
        prefix = f"{section}." if section else ""
        for name, value in (_lookup(ds.json, section) or {}).items():
            if name not in kinds:
                hint = nearest(name, list(kinds), prefix)
                raise ConfigError(f"unknown key {prefix + name!r} in {ds.place}; {hint}")
            kind = kinds[name]
            if type(value) is not kind and not (kind is float and type(value) is int):
                raise ConfigError(
                    f"{ds.place}: {prefix}{name} must be {kind.__name__}, got {value!r}"
                )


def _check_required(ds: DeepSpeedConfig) -> None:
    for key in REQUIRED_KEYS + (BF16_KEYS if ds.bf16 else ()):
        if _lookup(ds.json, key) is None:
            raise ConfigError(f"missing key {key!r} in {ds.place}; state it there")


def _check_values(ds: DeepSpeedConfig) -> None:
    for key, choice in CHOICES.items():
        value = _lookup(ds.json, key)
        if value is not None and value not in choice:
            names = " or ".join(", ".join(map(json.dumps, choice)).rsplit(", ", 1))
            reason = f"; {REASONS[key]}" if key in REASONS else ""
            raise ConfigError(f"{ds.place}: {key} must be {names}, got {json.dumps(value)}{reason}")
    if ds.optimizer_type.lower() not in OPTIMIZERS:
        raise ConfigError(
            f"{ds.place}: optimizer.type must be one of {', '.join(OPTIMIZERS)}, got "
            f"{ds.optimizer_type!r}"
        )
    if ds.gradient_clipping < 0:
        raise ConfigError(
            f"{ds.place}: gradient_clipping must be at least 0, got {ds.gradient_clipping}"
        )


def _check_idle(ds: DeepSpeedConfig) -> None:
    """Refuse keys that nothing reads at this ZeRO stage, or that this optimizer does not take."""
    is_torch = ds.takes_torch_adam
    taken = optimizer_keys(ds.optimizer_type.lower(), is_torch)
    idle = {
        "zero_optimization": (idle_zero_keys(ds.zero_stage), f"ZeRO stage {ds.zero_stage}"),
        "optimizer.params": (
            SECTIONS["optimizer.params"].keys() - taken,
            f"{'torch' if is_torch else 'DeepSpeed'}'s {ds.optimizer_type}",
        ),
    }
    for section, (names, user) in idle.items():
        for name in _lookup(ds.json, section) or {}:
            if name in names:
                raise ConfigError(
                    f"{ds.place}: {section}.{name} means nothing to {user}; remove it"
                )


def _check_batch(ds: DeepSpeedConfig) -> None:
    """Refuse a global batch that the ranks cannot share, and say which ones they can."""
    batch, ranks = ds.train_batch_size, ds.world_size
    if batch < 1:
        raise ConfigError(f"{ds.place}: train_batch_size must be at least 1, got {batch}")
    if batch % ranks:
        above = (batch // ranks + 1) * ranks
        fewer = max(count for count in range(1, ranks) if batch % count == 0)
        raise ConfigError(
            f"{ds.place}: train_batch_size {batch} is not divisible by 1 pack x {ranks} ranks; "
            f"use {above} or {above + ranks}, or {fewer} rank{'s' if fewer > 1 else ''}"
        )


def _check_nodes(ds: DeepSpeedConfig) -> None:
    """Refuse a second partition (ZeRO++ hpZ) of which the ranks are no multiple."""
    size = min(ds._value("zero_optimization.zero_hpz_partition_size", 1) or 1, ds.world_size)
    if ds.world_size % size:
        raise ConfigError(
            f"{ds.place}: {ds.world_size} ranks are no multiple of "
            f"zero_optimization.zero_hpz_partition_size {size}; set it to the GPUs of one node"
        )


def _lookup(tree: Any, key: str) -> Any:
    """Find the value at a dotted key, "" being the whole tree; None where there is none."""
    for name in key.split(".") if key else ():
        tree = tree.get(name) if isinstance(tree, dict) else None
    return tree


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Walk all values that are not objects or lists, with keys like `optimizer.params.betas[0]`."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _leaves(inner, f"{key}.{name}" if key else name)
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from _leaves(inner, f"{key}[{i}]")
    else:
        yield key, value

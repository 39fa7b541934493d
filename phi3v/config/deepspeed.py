"""Read the DeepSpeed JSON, and refuse what DeepSpeed would silently ignore or we own elsewhere.

    ds = load_deepspeed(Path("ds_configs/zero3.json"), world_size=8)
    deepspeed.initialize(config=ds.for_engine(), ...)

The file states the global batch and the micro batch (one pack); accumulation is derived, so the
optimisation does not change with the number of ranks. DeepSpeed 0.19.8 does not look at top-level
keys that it does not know (`runtime/config.py`), so the list of known ones is here. The keys inside
a section are checked by DeepSpeed itself when the engine is built.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from phi3v.config.names import nearest
from phi3v.errors import ConfigError

Json = dict[str, Any]
Scalar = TypeVar("Scalar", bool, int, float, str)

REQUIRED_KEYS = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "optimizer.type",
    "zero_optimization.stage",
)

ALLOWED_KEYS = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_clipping",
    "bf16",
    "fp16",
    "data_types",
    "communication_data_type",
    "optimizer",
    "zero_optimization",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "aio",
    "checkpoint",
    "compile",
    "comms_logger",
    "flops_profiler",
    "timers",
    "wall_clock_breakdown",
    "memory_breakdown",
    "steps_per_print",
    "dump_state",
    "log_level",
    "disable_python_gc",
)
"""Top-level keys that DeepSpeed 0.19.8 reads and that have a meaning in this project."""

VALUE_TYPES = {
    "train_batch_size": int,
    "train_micro_batch_size_per_gpu": int,
    "gradient_clipping": float,
    "bf16.enabled": bool,
    "fp16.enabled": bool,
    "optimizer.type": str,
    "optimizer.params.adam_w_mode": bool,
    "zero_optimization.stage": int,
}
"""What this project reads; an int will do for a float."""

OWNED_ELSEWHERE = {
    "gradient_accumulation_steps": "it is derived from train_batch_size and the number of ranks",
    "scheduler": "the recipe's optim.schedule owns it",
    "optimizer.params.lr": "the recipe's optim.lr owns it, per module",
    "optimizer.params.weight_decay": "the recipe's optim.weight_decay owns it",
    "optimizer.params.max_grad_norm": "gradient_clipping owns it",
    "activation_checkpointing": "the recipe's model.checkpointing owns it",
    "wandb": "the recipe's wandb section owns it",
}
"""Keys that DeepSpeed would obey and that have another owner here, with that owner."""

DECOUPLED_OPTIMIZERS = ("adamw", "lion", "lamb", "muon", "muadamw")
"""Optimizer types that decay the weights themselves, not by way of the gradient."""


@dataclass(frozen=True, kw_only=True)
class DeepSpeedConfig:
    """A checked DeepSpeed JSON, for a given number of ranks."""

    path: Path
    """Where it was read."""

    world_size: int
    """Ranks of the run; each works on one pack at a time."""

    json: Json
    """The file's content; hand `for_engine()` to DeepSpeed, which edits what it gets."""

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


def load_deepspeed(path: Path, world_size: int) -> DeepSpeedConfig:
    """Read and check the DeepSpeed JSON at `path` for a run on `world_size` ranks.

    Raises: ConfigError naming the file, the dotted key and the value.
    """
    assert world_size >= 1
    ds = DeepSpeedConfig(path=path, world_size=world_size, json=_read(path))
    _check_keys(ds)
    _check_owners(ds)
    _check_auto(ds)
    _check_types(ds)
    _check_values(ds)
    _check_batch(ds)
    return ds


def default_deepspeed(has_cuda: bool) -> Path:
    """Name the JSON of a run that names none: bf16 on CUDA, float32 elsewhere."""
    name = "zero3.json" if has_cuda else "zero3_cpu.json"
    return Path(__file__).resolve().parents[2] / "ds_configs" / name


def _read(path: Path) -> Json:
    if not path.is_file():
        raise ConfigError(f"DeepSpeed config {path} does not exist; name a file, see ds_configs/")
    try:
        content = json.loads(path.read_bytes(), object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path} is not valid JSON at line {error.lineno}: {error.msg}") from None
    except (UnicodeDecodeError, _DuplicateKey) as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold a JSON object, got {content!r}")
    return content


class _DuplicateKey(Exception):
    """An object of the JSON holds a key twice; Python's parser would keep the second."""


def _unique(pairs: list[tuple[str, Any]]) -> Json:
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise _DuplicateKey(f"key {name!r} is there twice")
    return dict(pairs)


def _check_keys(ds: DeepSpeedConfig) -> None:
    for key in ds.json:
        if key not in ALLOWED_KEYS and key not in OWNED_ELSEWHERE:
            hint = nearest(key, ALLOWED_KEYS)
            raise ConfigError(f"unknown key {key!r} in {ds.path}; {hint}")
    for key in REQUIRED_KEYS:
        if _lookup(ds.json, key) is None:
            raise ConfigError(f"missing key {key!r} in {ds.path}; state it there")


def _check_owners(ds: DeepSpeedConfig) -> None:
    for key, owner in OWNED_ELSEWHERE.items():
        value = _lookup(ds.json, key)
        if value is not None:
            raise ConfigError(f"{ds.path}: {key} must not be written, got {value!r}; {owner}")


def _check_auto(ds: DeepSpeedConfig) -> None:
    for key, value in _leaves(ds.json):
        if value == "auto":
            raise ConfigError(
                f"{ds.path}: {key} is 'auto', which has no meaning here; write it out"
            )


def _check_types(ds: DeepSpeedConfig) -> None:
    for key, kind in VALUE_TYPES.items():
        value = _lookup(ds.json, key)
        fits = type(value) is kind or (kind is float and type(value) is int)
        if value is not None and not fits:
            raise ConfigError(f"{ds.path}: {key} must be {kind.__name__}, got {value!r}")


def _check_values(ds: DeepSpeedConfig) -> None:
    if ds.micro_batch != 1:
        raise ConfigError(
            f"{ds.path}: train_micro_batch_size_per_gpu must be 1, got {ds.micro_batch}; one pack "
            "is one micro-batch, and data.max_tokens sets its size"
        )
    if ds.zero_stage not in (0, 1, 2, 3):
        raise ConfigError(
            f"{ds.path}: zero_optimization.stage must be 0, 1, 2 or 3, got {ds.zero_stage}"
        )
    if ds.gradient_clipping < 0:
        raise ConfigError(
            f"{ds.path}: gradient_clipping must be at least 0, got {ds.gradient_clipping}"
        )
    if _lookup(ds.json, "fp16.enabled"):
        raise ConfigError(
            f"{ds.path}: fp16.enabled must be false, got true; float16 needs loss scaling, which "
            "skips steps; use bf16.enabled, or neither for float32"
        )


def _check_batch(ds: DeepSpeedConfig) -> None:
    """Refuse a global batch that the ranks cannot share, and say which ones they can."""
    batch, ranks = ds.train_batch_size, ds.world_size
    if batch < 1:
        raise ConfigError(f"{ds.path}: train_batch_size must be at least 1, got {batch}")
    if batch % ranks:
        above = (batch // ranks + 1) * ranks
        fewer = max(count for count in range(1, ranks) if batch % count == 0)
        raise ConfigError(
            f"{ds.path}: train_batch_size {batch} is not divisible by 1 pack x {ranks} ranks; "
            f"use {above} or {above + ranks}, or {fewer} rank{'s' if fewer > 1 else ''}"
        )


def _lookup(tree: Any, key: str) -> Any:
    """Find the value at a dotted key; None where there is none."""
    for name in key.split("."):
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

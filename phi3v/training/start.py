"""From the command line to a checked configuration."""

from collections.abc import Sequence
from pathlib import Path

from phi3v.config import (
    DeepSpeedConfig,
    RunConfig,
    check,
    deepspeed_overrides,
    default_deepspeed,
    load_deepspeed,
    load_recipe,
)
from phi3v.devices import has_cuda
from phi3v.training.ranks import Ranks


def load_run(
    recipe: str | Path, overrides: Sequence[str], ranks: Ranks
) -> tuple[RunConfig, DeepSpeedConfig]:
    """Read a run recipe and its DeepSpeed JSON, and check them against each other.

    Raises: ConfigError.
    """
    own, of_json = deepspeed_overrides(overrides)
    cfg = load_recipe(RunConfig, Path(recipe), own)
    ds = load_deepspeed(deepspeed_file(cfg), ranks.world_size, of_json)
    check(cfg, ds)
    return cfg, ds


def deepspeed_file(cfg: RunConfig) -> Path:
    """The DeepSpeed JSON of a recipe on this kind of device."""
    if cfg.deepspeed is None:
        return default_deepspeed(has_cuda())
    if isinstance(cfg.deepspeed, str):
        return Path(cfg.deepspeed)
    return Path(cfg.deepspeed.cuda if has_cuda() else cfg.deepspeed.cpu)

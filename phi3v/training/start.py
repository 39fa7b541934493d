"""From the command line to a checked configuration."""

from collections.abc import Sequence
from pathlib import Path

from phi3v.config import (
    DeepSpeedConfig,
    RunConfig,
    check,
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
    cfg = load_recipe(RunConfig, Path(recipe), overrides)
    path = Path(cfg.deepspeed) if cfg.deepspeed else default_deepspeed(has_cuda())
    ds = load_deepspeed(path, ranks.world_size)
    check(cfg, ds)
    return cfg, ds

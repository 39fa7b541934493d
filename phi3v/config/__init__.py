"""Recipes (YAML with dotted overrides) and the DeepSpeed JSON, read, checked and frozen.

    cfg = load_recipe(RunConfig, Path("launch/recipes/demo.yaml"), ["train.max_steps=20"])
    ds = load_deepspeed(Path("ds_configs/zero3.json"), world_size=8)
    check(cfg, ds)

Imports neither torch nor DeepSpeed.
"""

from phi3v.config.check import check, check_warmup, is_smoke_run
from phi3v.config.dataset import DatasetConfig
from phi3v.config.deepspeed import DeepSpeedConfig, default_deepspeed, load_deepspeed
from phi3v.config.load import (
    build_recipe,
    deepspeed_overrides,
    differences,
    differing_keys,
    dump_yaml,
    load_recipe,
    read_mapping,
    read_yaml,
    to_dict,
)
from phi3v.config.schema import MODULES, EvaluationConfig, Module, RunConfig, SuiteConfig

__all__ = [
    "MODULES",
    "DatasetConfig",
    "DeepSpeedConfig",
    "EvaluationConfig",
    "Module",
    "RunConfig",
    "SuiteConfig",
    "build_recipe",
    "check",
    "check_warmup",
    "deepspeed_overrides",
    "default_deepspeed",
    "differences",
    "differing_keys",
    "dump_yaml",
    "is_smoke_run",
    "load_deepspeed",
    "load_recipe",
    "read_mapping",
    "read_yaml",
    "to_dict",
]

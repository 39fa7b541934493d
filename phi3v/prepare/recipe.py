"""The recipe as it is followed: every default, and digests of what it only names."""

import shutil
from dataclasses import replace
from typing import Any

from phi3v.config import DatasetConfig, differing_keys, to_dict
from phi3v.errors import ConfigError
from phi3v.files import sha256
from phi3v.prepare.conversations import check_columns
from phi3v.prepare.inputs import open_processor
from phi3v.prepare.lock import locked
from phi3v.prepare.plan import Plan, WorkFolder
from phi3v.prepare.sources import Source, open_source, source_digest
from phi3v.processing.processor import model_file

MODEL_FILES = ("tokenizer.json", "preprocessor_config.json")
HOW = ("out", "workers", "fetch")
"""Keys that say how the work is done, not what comes of it."""


def resolved_recipe(cfg: DatasetConfig) -> dict[str, Any]:
    """What the dataset will be made of, to tell it from any other.

    Raises: ConfigError if a source or a file of the model is missing.
    """
    recipe = {key: value for key, value in to_dict(cfg).items() if key not in HOW}
    processor = open_processor(cfg, cfg.sources[0])
    digests = [source_digest(section) for section in cfg.sources]
    recipe["inputs"] = {
        "source": digests[0] if len(digests) == 1 else digests,
        **{name: sha256(model_file(cfg.model, name)) for name in MODEL_FILES},
        "crop_size": processor.crop_size,
        "image_side": processor.side,
    }
    return recipe


def make_plan(cfg: DatasetConfig, recipe: dict[str, Any], work: WorkFolder) -> Plan:
    """The plan of the work folder, made now if there is none.

    Raises: ConfigError if the folder holds work on another recipe, or the recipe does not fit its
    sources.
    """
    with locked(work.plan_lock, is_shared=False, waits=True):
        if plan := work.read_plan():
            if different := _differing(plan, recipe):
                raise ConfigError(
                    f"{work.path} holds unfinished work on another recipe: {', '.join(different)} "
                    "differ; remove that folder"
                )
            return replace(plan, recipe=recipe)
        sources = [_open(cfg, number, work) for number in range(len(cfg.sources))]
        states = tuple(source.state() for source in sources)
        plan = Plan(recipe, states, tuple(source.num_rows for source in sources))
        work.write_plan(plan)
        return plan


def start_afresh(recipe: dict[str, Any], work: WorkFolder) -> list[str]:
    """Remove work on another recipe; return the keys that differ."""
    plan = work.read_plan()
    different = _differing(plan, recipe) if plan else []
    if different or not plan:
        for path in work.path.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path != work.lock:
                path.unlink()
    return different


def _differing(plan: Plan, recipe: dict[str, Any]) -> list[str]:
    """max_rejected only judges what was found: after a stop it may be raised, and work goes on."""
    keys = differing_keys(plan.recipe, recipe)
    return [key for key in keys if key != "max_rejected"]


def _open(cfg: DatasetConfig, number: int, work: WorkFolder) -> Source:
    section = cfg.sources[number]
    source = open_source(section, work.spool(number))
    if not source.num_rows:
        raise ConfigError(f"source.path {source.path} holds no rows; check the file")
    row = next((r for r in source.read(0, source.num_rows) if not r.fault), None)
    if row is not None:
        for column in (cfg.split.by, cfg.split.stratify):
            check_columns(section, column, row.values)
    return source

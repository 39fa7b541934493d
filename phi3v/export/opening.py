"""Opening a model by name: a run folder, a Hugging Face folder, or a name on the hub."""

from collections.abc import Sequence
from pathlib import Path

import torch
import yaml

from phi3v.config import EvaluationConfig, RunConfig, build_recipe, to_dict
from phi3v.config.running import EvalSection
from phi3v.errors import ConfigError
from phi3v.evaluation.generation import Generator
from phi3v.evaluation.models import as_generator, open_model
from phi3v.export.originals import is_text_half
from phi3v.model import Phi3VConfig, Phi3VForCausalLM
from phi3v.model.weights import load_weights
from phi3v.processing import Phi3VProcessor
from phi3v.training.checkpoints.reading import open_weights
from phi3v.training.checkpoints.store import find_step, named_step
from phi3v.training.run_folder import CONFIG, RunFolder


def read_run(folder: Path) -> RunConfig:
    """The resolved configuration of a run folder.

    Raises: ConfigError if it is no run folder.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise ConfigError(
            f"{folder} holds no {CONFIG}, so it is no run folder; name the folder of a run "
            "(run.out of its recipe)"
        )
    return build_recipe(RunConfig, yaml.safe_load(path.read_text(encoding="utf-8")), path, [])


def evaluation_settings(model: Path, overrides: Sequence[str]) -> EvalSection:
    """The eval settings of a run, or the defaults for a model folder, with overrides.

    Raises: ConfigError naming a key that is wrong.
    """
    values = {"eval": to_dict(read_run(model))["eval"]} if _is_run(model) else {}
    place = model / CONFIG if _is_run(model) else Path("the command line")
    return build_recipe(EvaluationConfig, values, place, overrides).eval


def base_of(model: str) -> str:
    """The folder or hub name that holds a model's tokenizer and image settings: a run's base.

    Raises: ConfigError if it is the text half of an export.
    """
    if is_text_half(Path(model)):
        raise ConfigError(
            f"{model} is the text half of a model, exported with --llama-cpp for llama.cpp alone; "
            "name its run's folder, or an export without --llama-cpp"
        )
    return read_run(Path(model)).model.path if _is_run(Path(model)) else model


def check_step(models: Sequence[str], step: str | None) -> dict[str, int | None]:
    """The step of each model's checkpoint that --step names, None for the newest or no run.

    Raises: ConfigError if --step is given and a model is no run; CheckpointError if a run has no
    whole checkpoint of it.
    """
    steps: dict[str, int | None] = {}
    for model in models:
        if not _is_run(Path(model)):
            if step is not None:
                raise ConfigError(
                    f"--step {step} is for run folders, and {model} is none; leave it out, or name "
                    "the run"
                )
            steps[model] = None
            continue
        checkpoints = RunFolder(Path(model)).checkpoints
        steps[model] = named_step(checkpoints, step)
        find_step(checkpoints, steps[model])
    return steps


def open_any(model: str, settings: EvalSection, step: int | None = None) -> Generator:
    """Open a run's checkpoint, the newest or of a step, or a Hugging Face folder or hub name."""
    if _is_run(Path(model)):
        return open_run(Path(model), settings.max_new_tokens, settings.batch_rows, step)
    return open_model(model, settings.max_new_tokens, settings.batch_rows)


def open_run(run: Path, max_new_tokens: int, batch_rows: int, step: int | None = None) -> Generator:
    """A checkpoint of a run, whole on the device there is, ready to answer; default: the newest.

    Raises: ConfigError if it is no run folder; CheckpointError if it has no checkpoint, or a
    damaged one.
    """
    cfg = read_run(run)
    processor = Phi3VProcessor.from_pretrained(cfg.model.path)
    config = Phi3VConfig.from_pretrained(cfg.model.path)
    with torch.device("meta"):
        model = Phi3VForCausalLM(config)
    weights = open_weights(RunFolder(run).checkpoints, step)
    load_weights(model, weights, config.dtype or torch.float32)
    return as_generator(model, processor, max_new_tokens, batch_rows)


def _is_run(model: Path) -> bool:
    return (model / CONFIG).is_file()

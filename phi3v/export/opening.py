"""Opening a model by name: a run folder, a Hugging Face folder, or a name on the hub."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from phi3v.config import EvaluationConfig, RunConfig, build_recipe, load_recipe, to_dict
from phi3v.config.running import EvalSection
from phi3v.data import Dataset
from phi3v.data.format import MANIFEST, read_manifest
from phi3v.errors import ConfigError
from phi3v.evaluation.generation import Generator
from phi3v.evaluation.metrics.own import is_own
from phi3v.evaluation.models import as_generator, check_model, open_model
from phi3v.export.originals import is_text_half
from phi3v.export.target import ORIGIN
from phi3v.model import Phi3VConfig, Phi3VForCausalLM
from phi3v.model.weights import load_weights
from phi3v.pictures import PREPROCESSOR, PictureSettings, Prepared, choose, prepared
from phi3v.printing import print
from phi3v.processing import Phi3VProcessor
from phi3v.processing.processor import has_preprocessor
from phi3v.stored import read_object
from phi3v.training.checkpoints.reading import open_weights
from phi3v.training.checkpoints.store import find_step, named_step
from phi3v.training.run_folder import CONFIG, DATA, RunFolder


def read_run(folder: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The resolved configuration of a run folder, with overrides.

    Raises: ConfigError if it is no run folder.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise ConfigError(
            f"{folder} holds no {CONFIG}, so it is no run folder; name the folder of a run "
            "(run.out of its recipe)"
        )
    return load_recipe(RunConfig, path, overrides)


def evaluation_settings(model: Path, overrides: Sequence[str]) -> EvalSection:
    """The eval settings of a run, or the defaults for a model folder, with overrides.

    Raises: ConfigError naming a key that is wrong, and for code that the run alone names.
    """
    values = {"eval": to_dict(read_run(model))["eval"]} if _is_run(model) else {}
    place = model / CONFIG if _is_run(model) else Path("the command line")
    settings = build_recipe(EvaluationConfig, values, place, overrides).eval
    if not {"eval", "eval.metrics"} & {text.partition("=")[0] for text in overrides}:
        _refuse_own(settings, place)
    return settings


def _refuse_own(settings: EvalSection, place: Path) -> None:
    """Refuse a metric that is code: the folder may be another person's, and runs nothing here."""
    own = [name for name in settings.metrics if is_own(name)]
    if own:
        raise ConfigError(
            f"{place} has {own[0]} in eval.metrics, a function of a module in the current folder "
            "or installed; nothing that a run folder names is run unless you name it too: add "
            f"'eval.metrics=[{', '.join(settings.metrics)}]', or name other metrics"
        )


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


def picture_settings(run: Path) -> PictureSettings | None:
    """How the pictures of a run's datasets became canvases; None where nobody knows any more.

    Says on stderr what was taken where the datasets differ, and if it is not known.
    Raises: ConfigError if the run says of them what this program does not know.
    """
    parts = _prepared(run)
    if not parts:
        print(
            f"{run / DATA} does not say how pictures were prepared, and the shards are gone: they "
            "are shown as the base model's preprocessor_config.json says",
            file=sys.stderr,
        )
        return None
    settings, differing = choose(parts)
    if differing:
        print(f"{run}: {differing}", file=sys.stderr)
    return settings


def _prepared(run: Path) -> list[Prepared]:
    """The datasets of a run, by its own record, else (a run of before) by their manifests."""
    path = run / DATA
    data = read_object(path) if path.is_file() else {}
    if "pictures" in data:
        return [Prepared.from_dict(entry, str(path)) for entry in data["pictures"]]
    folders = read_run(run).data.folders
    if not all(Path(folder, MANIFEST).is_file() for folder in folders):
        return []
    return [
        part
        for folder in folders
        for part in prepared(folder, "train", read_manifest(Path(folder)))
    ]


def made_preprocessor(run: Path, pictures: PictureSettings | None) -> dict[str, Any]:
    """What stands for the preprocessor_config.json of a base that has none: as the datasets say.

    pictures  of `picture_settings`
    Raises: ConfigError if nobody knows it any more.
    """
    path = run / DATA
    data = read_object(path) if path.is_file() else {}
    views = data.get("view_settings")
    if views is None:  # a run of before
        folder = Path(read_run(run).data.folders[0])
        views = read_manifest(folder) if (folder / MANIFEST).is_file() else None
    if views is None or pictures is None:
        raise ConfigError(
            f"model {read_run(run).model.path} has no {PREPROCESSOR}, {path} does not say what it "
            "said, and the shards are gone; put the base's file back, or name where the shards are"
        )
    return pictures.whole_preprocessor(views)


def open_processor(model: str) -> Phi3VProcessor:
    """The processor of a model; of a run it is the base's, with the settings of the run's datasets.

    Raises: ConfigError as `base_of` and `picture_settings`.
    """
    base = base_of(model)
    settings = picture_settings(Path(model)) if _is_run(Path(model)) else None
    if _is_run(Path(model)) and not has_preprocessor(base):
        made = made_preprocessor(Path(model), settings)
        return Phi3VProcessor.from_pretrained(base, settings=made)
    if settings is None:
        return Phi3VProcessor.from_pretrained(base)
    return Phi3VProcessor.from_pretrained(
        base, settings.num_crops, settings.never_upscale, settings.images
    )


def check_shards(model: str, dataset: Dataset) -> None:
    """Refuse shards that were prepared for another model, and compare how they hold pictures.

    Says on stderr if a run or an export was trained on pictures that were prepared in another way;
    of any other folder nobody knows it.
    Raises: ConfigError as `check_model`.
    """
    check_model(dataset, base_of(model))
    if _is_run(Path(model)):
        trained = picture_settings(Path(model))
    elif (Path(model) / ORIGIN).is_file():
        trained = Phi3VProcessor.from_pretrained(model).pictures
    else:
        return
    held, _ = choose(prepared(str(dataset.folder), dataset.split, dataset.manifest))
    if trained not in (None, held):
        print(
            f"{model} was trained on pictures with {trained}, {dataset.folder} holds them with "
            f"{held}: it is asked about those",
            file=sys.stderr,
        )


def check_step(models: Sequence[str], step: str | None) -> dict[str, int | None]:
    """The step of each model's checkpoint that --step names, None for the newest or no run.

    Raises: ConfigError if --step is given and no model is a run; CheckpointError if a run has no
    whole checkpoint of it.
    """
    runs = [model for model in models if _is_run(Path(model))]
    if step is not None and not runs:
        raise ConfigError(
            f"--step {step} is for run folders, and {models[0]} is none; leave it out, or name the "
            "run"
        )
    steps: dict[str, int | None] = dict.fromkeys(models)
    for run in runs:
        checkpoints = RunFolder(Path(run)).checkpoints
        steps[run] = named_step(checkpoints, step)
        find_step(checkpoints, steps[run])
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
    is_whole = has_preprocessor(cfg.model.path)
    processor = (
        Phi3VProcessor.from_pretrained(cfg.model.path) if is_whole else open_processor(str(run))
    )
    config = Phi3VConfig.from_pretrained(cfg.model.path)
    with torch.device("meta"):
        model = Phi3VForCausalLM(config)
    weights = open_weights(RunFolder(run).checkpoints, step)
    load_weights(model, weights, config.dtype or torch.float32)
    return as_generator(model, processor, max_new_tokens, batch_rows)


def _is_run(model: Path) -> bool:
    return (model / CONFIG).is_file()

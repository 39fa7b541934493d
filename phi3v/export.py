"""A checkpoint to an ordinary Hugging Face folder, verified by reading it back.

The weights come from the checkpoint under the published names; everything else is the base model's
own files: config.json is edited as raw JSON, never saved anew by transformers; tokenizer, processor
settings and the code that they name are copied as they are.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import save_torch_state_dict
from torch import Tensor
from transformers.dynamic_module_utils import get_relative_imports
from transformers.utils.hub import cached_file

from phi3v.config import EvaluationConfig, RunConfig, build_recipe, to_dict
from phi3v.config.running import EvalSection
from phi3v.errors import CheckpointError, ConfigError
from phi3v.evaluation.generation import Generator
from phi3v.evaluation.models import as_generator, open_model
from phi3v.files import publish, write_json
from phi3v.model import Phi3VConfig, Phi3VForCausalLM
from phi3v.model.weights import STOP_TOKENS, check_shapes
from phi3v.processing import Phi3VProcessor
from phi3v.training.checkpoints.store import find_step
from phi3v.training.run_folder import CONFIG, RunFolder
from phi3v.training.zero import read_weights

ORIGIN = "phi3v_export.json"
VERBATIM = (
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
)
NAMING_CODE = (
    "config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer_config.json",
)
DROPPED_KEYS = ("_attn_implementation", "_name_or_path")
SHARD_SIZE = "5GB"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def read_run(folder: Path) -> RunConfig:
    """The resolved configuration of a run folder.

    Raises: ConfigError if it is no run folder.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise ConfigError(f"{folder} holds no {CONFIG}, so it is no run folder; name run.out")
    return build_recipe(RunConfig, yaml.safe_load(path.read_text(encoding="utf-8")), path, [])


def export(run: Path, out: Path, step: int | None = None, dtype: str | None = None) -> None:
    """Write a checkpoint of a run as a Hugging Face folder.

    step   of the checkpoint; None for the newest
    dtype  bf16 or fp32; None for the base model's
    Raises: ConfigError if `out` holds something that was not exported from this run;
    CheckpointError if there is no such checkpoint, or its names are not the model's.
    """
    cfg = read_run(run)
    checkpoints = RunFolder(run).checkpoints
    name = find_step(checkpoints, step)
    origin = {"run": str(run.resolve()), "config": CONFIG, "checkpoint": name}
    _check_target(out, origin)
    config = Phi3VConfig.from_pretrained(cfg.model.path)
    weights = load_weights(checkpoints, name, config, DTYPES[dtype] if dtype else config.dtype)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    _copy_base(cfg.model.path, partial, next(iter(weights.values())).dtype)
    _copy_code(cfg.model.path, partial)
    _write_weights(weights, partial)
    write_json(partial / ORIGIN, origin)
    _verify(partial, weights)
    publish(partial, out)


def evaluation_settings(model: Path, overrides: Sequence[str]) -> EvalSection:
    """The eval settings of a run, or the defaults for a model folder, with overrides.

    Raises: ConfigError naming a key that is wrong.
    """
    is_run = (model / CONFIG).is_file()
    values = {"eval": to_dict(read_run(model))["eval"]} if is_run else {}
    place = model / CONFIG if is_run else Path("the command line")
    return build_recipe(EvaluationConfig, values, place, overrides).eval


def base_of(model: str) -> str:
    """The folder or hub name that holds a model's tokenizer and image settings: a run's base."""
    is_run = (Path(model) / CONFIG).is_file()
    return read_run(Path(model)).model.path if is_run else model


def open_any(model: str, settings: EvalSection) -> Generator:
    """Open a run's newest checkpoint, or a Hugging Face folder or hub name."""
    if (Path(model) / CONFIG).is_file():
        return open_run(Path(model), settings.max_new_tokens, settings.batch_rows)
    return open_model(model, settings.max_new_tokens, settings.batch_rows)


def open_run(run: Path, max_new_tokens: int, batch_rows: int) -> Generator:
    """The newest checkpoint of a run, whole on the device there is, ready to answer.

    Raises: ConfigError if it is no run folder; CheckpointError if it has no checkpoint.
    """
    cfg = read_run(run)
    processor = Phi3VProcessor.from_pretrained(cfg.model.path)
    checkpoints = RunFolder(run).checkpoints
    config = Phi3VConfig.from_pretrained(cfg.model.path)
    weights = load_weights(checkpoints, find_step(checkpoints, None), config, config.dtype)
    with torch.device("meta"):
        model = Phi3VForCausalLM(config)
    model.load_state_dict(weights, assign=True)
    return as_generator(model, processor, max_new_tokens, batch_rows)


def load_weights(
    checkpoints: Path, name: str, config: Phi3VConfig, dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """The weights of a checkpoint under the published names, each checked for name and shape.

    Raises: CheckpointError listing what is missing, unknown or of another shape.
    """
    weights = read_weights(checkpoints, name)
    with torch.device("meta"):
        model = Phi3VForCausalLM(config)
    found = {key: tuple(value.shape) for key, value in weights.items()}
    check_shapes(str(checkpoints / name), found, model)
    return {key: weights[key].to(dtype).contiguous() for key, _ in model.named_parameters()}


def _write_weights(weights: dict[str, Tensor], out: Path) -> None:
    """Write safetensors, as many as needed, that whoever may read config.json may read too.

    safetensors itself makes files that only their owner can read.
    """
    save_torch_state_dict(weights, out, max_shard_size=SHARD_SIZE)
    for file in out.glob("*.safetensors"):
        shutil.copymode(out / "config.json", file)


def _check_target(out: Path, origin: dict[str, str]) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    marker = out / ORIGIN
    written = json.loads(marker.read_text(encoding="utf-8")) if marker.is_file() else {}
    if written.get("run") != origin["run"]:
        source = f"was exported from {written['run']}" if written else "is not an export"
        raise ConfigError(f"--out {out} exists and {source}; name another folder, or remove it")


def _copy_base(model: str, out: Path, dtype: torch.dtype) -> None:
    """Write what surrounds the weights: the base's config edited, its other files as they are."""
    config = _read_base(model, "config.json")
    for key in DROPPED_KEYS:
        config.pop(key, None)
    key = "dtype" if "dtype" in config else "torch_dtype"
    config[key] = str(dtype).removeprefix("torch.")
    write_json(out / "config.json", config)
    for name in VERBATIM:
        if (file := _find_base(model, name)) is not None:
            shutil.copyfile(file, out / name)
    tokenizer = Phi3VProcessor.from_pretrained(model).tokenizer
    end, text_end = (tokenizer.convert_tokens_to_ids(token) for token in STOP_TOKENS)
    generation = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": [end, text_end]}
    write_json(out / "generation_config.json", generation | {"pad_token_id": text_end})


def _copy_code(model: str, out: Path) -> None:
    """Copy the .py files that an `auto_map` names, for those who load with remote code.

    A JSON of which the base lacks a file loses its `auto_map`: one that leads nowhere makes every
    loader with trust_remote_code fail.
    """
    for name in (name for name in NAMING_CODE if (out / name).is_file()):
        content = json.loads((out / name).read_text(encoding="utf-8"))
        if "auto_map" not in content:
            continue
        files = _code_files(model, content["auto_map"])
        if files is None:
            write_json(out / name, {k: v for k, v in content.items() if k != "auto_map"})
        else:
            for file in [*files, *filter(None, [_find_base(model, "LICENSE")])]:
                shutil.copyfile(file, out / file.name)


def _code_files(model: str, auto_map: Mapping[str, str | list[str | None]]) -> list[Path] | None:
    """The modules that an `auto_map` names and those they import; None if one is missing.

    An entry is "module.Class", or a list of these; "repository--module.Class" lies elsewhere.
    """
    entries = [e if isinstance(e, list) else [e] for e in auto_map.values()]
    names = [name for entry in entries for name in entry if name and "--" not in name]
    waiting, found = [name.split(".")[0] for name in names], dict[str, Path]()
    while waiting:
        module = waiting.pop()
        if module not in found:
            file = _find_base(model, f"{module}.py")
            if file is None:
                return None
            found[module] = file
            waiting += get_relative_imports(file)
    return list(found.values())


def _read_base(model: str, name: str) -> dict[str, Any]:
    file = _find_base(model, name)
    if file is None:
        raise ConfigError(f"model.path {model} has no {name}; it must be there to export the run")
    return json.loads(file.read_text(encoding="utf-8"))


def _find_base(model: str, name: str) -> Path | None:
    file = cached_file(model, name, _raise_exceptions_for_missing_entries=False)
    return Path(file) if file else None


def _verify(folder: Path, weights: dict[str, Tensor]) -> None:
    """Read a folder back and compare every weight.

    Raises: CheckpointError naming the first that came back changed.
    """
    model, report = Phi3VForCausalLM.from_pretrained(
        folder, dtype=next(iter(weights.values())).dtype, output_loading_info=True
    )
    lost = sorted({*report["missing_keys"], *report["unexpected_keys"]})
    changed = [k for k, v in model.state_dict().items() if not torch.equal(v, weights[k])]
    if lost or changed:
        raise CheckpointError(
            f"{folder} does not read back as it was written, see {(lost or changed)[0]}; "
            "check the disk and export again"
        )

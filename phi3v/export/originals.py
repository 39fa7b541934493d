"""What surrounds the weights: the base model's own files.

config.json is edited as raw JSON, never saved anew by transformers, which would write keys that the
published code refuses; so is preprocessor_config.json where the run showed pictures in another way
than the base. The tokenizer and the code that they name are copied as they are.
"""

import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.dynamic_module_utils import get_relative_imports
from transformers.utils.hub import cached_file

from phi3v.errors import ConfigError
from phi3v.export.target import ORIGIN
from phi3v.files import write_json
from phi3v.model.weights import STOP_TOKENS
from phi3v.pictures import OWN_KEY, PREPROCESSOR, PictureSettings
from phi3v.printing import print
from phi3v.processing.processor import open_tokenizer
from phi3v.stored import read_object

TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "chat_template.jinja",
)
VERBATIM = (PREPROCESSOR, "processor_config.json", *TOKENIZER, "LICENSE")
NAMING_CODE = (
    "config.json",
    PREPROCESSOR,
    "processor_config.json",
    "tokenizer_config.json",
)
MODULE = re.compile(r"[\w-]+")  # beside the JSON that names it
DROPPED_KEYS = ("_attn_implementation", "_name_or_path")
TEXT_TYPE = "phi3"  # model_type of the language model alone
# What llama.cpp must not read: code of another architecture, and what is not in the text model.
NOT_TEXT = ("auto_map", "img_processor", "embd_layer", "vision_config")


def write_originals(
    model: str,
    out: Path,
    dtype: torch.dtype,
    pictures: PictureSettings | None = None,
    preprocessor: Mapping[str, Any] | None = None,
) -> None:
    """Write everything but the weights and the card.

    pictures      how the run showed them; None: as the base does
    preprocessor  what is written where the base has no preprocessor_config.json
    Raises: ConfigError if the base has no config.json, or a file that is a link to another one.
    """
    write_json(out / "config.json", _edited_config(model, dtype))
    _copy(model, VERBATIM, out)
    if preprocessor is not None and not (out / PREPROCESSOR).is_file():
        write_json(out / PREPROCESSOR, preprocessor)
    elif pictures is not None:
        _edit_preprocessor(out / PREPROCESSOR, pictures)
    _write_generation(model, out)
    missing = {name: _copy_code(model, out, name) for name in NAMING_CODE if (out / name).is_file()}
    if lost := {name: module for name, module in missing.items() if module}:
        print(
            f"auto_map is left out of {', '.join(lost)}, because {model} has no "
            f"{', no '.join(sorted(set(lost.values())))}; vLLM and transformers then open the "
            "folder where phi3v is installed, and nowhere else",
            file=sys.stderr,
        )


def write_text_originals(model: str, out: Path, dtype: torch.dtype) -> None:
    """Write what llama.cpp's converter reads of the language model alone.

    Raises: ConfigError if the base has no config.json.
    """
    config = _edited_config(model, dtype)
    config |= {"architectures": ["Phi3ForCausalLM"], "model_type": TEXT_TYPE}
    write_json(out / "config.json", {k: v for k, v in config.items() if k not in NOT_TEXT})
    _copy(model, (*TOKENIZER, "LICENSE"), out)
    _write_generation(model, out)
    if not (out / "tokenizer.model").is_file():
        print(
            f"{model} has no tokenizer.model, which llama.cpp's converter needs; put that of "
            "Phi-3-mini beside config.json before you convert",
            file=sys.stderr,
        )


def is_text_half(folder: Path) -> bool:
    """Whether an export is what `write_text_originals` made; False for what is no export."""
    if not (folder / ORIGIN).is_file() or not (folder / "config.json").is_file():
        return False
    config = read_object(folder / "config.json", ConfigError)
    return bool(config.get("model_type") == TEXT_TYPE)


def find_base(model: str, name: str) -> Path | None:
    """A file of the base model, in its folder or fetched from the hub; None if it has none."""
    file = cached_file(model, name, _raise_exceptions_for_missing_entries=False)
    return Path(file) if file else None


def _edited_config(model: str, dtype: torch.dtype) -> dict[str, Any]:
    file = find_base(model, "config.json")
    if file is None:
        raise ConfigError(f"model.path {model} has no config.json; it must be there to export")
    config = read_object(file, ConfigError, needs={"num_attention_heads": int})
    for key in DROPPED_KEYS:
        config.pop(key, None)
    config.setdefault("num_key_value_heads", config["num_attention_heads"])
    key = "dtype" if "dtype" in config else "torch_dtype"
    config[key] = str(dtype).removeprefix("torch.")
    return dict(config)


def _edit_preprocessor(path: Path, pictures: PictureSettings) -> None:
    """Have the folder show pictures as these settings do; a file that does is left as it is.

    num_crops is a published key. What other programs have no key for stands in one of its own,
    which the published processor keeps as an attribute and never looks at.
    """
    content = read_object(path, ConfigError)
    if PictureSettings.from_preprocessor(content, str(path)) != pictures:
        kept = {key: value for key, value in content.items() if key != OWN_KEY}
        write_json(path, kept | pictures.to_preprocessor())


def _copy(model: str, names: tuple[str, ...], out: Path) -> None:
    for name in names:
        file = find_base(model, name)
        if file is None:
            continue
        if not _is_within(model, file) and file.resolve().name != name:
            raise ConfigError(
                f"{file} is a link to {file.resolve()}, which would be published as the base "
                "model's; put the file itself there"
            )
        shutil.copyfile(file, out / name)


def _write_generation(model: str, out: Path) -> None:
    """What ends an answer, and not </s>, which the published file names and nobody says."""
    tokenizer = open_tokenizer(model)
    end, text_end = (tokenizer.convert_tokens_to_ids(token) for token in STOP_TOKENS)
    generation = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": [end, text_end]}
    write_json(out / "generation_config.json", generation | {"pad_token_id": text_end})


def _copy_code(model: str, out: Path, name: str) -> str | None:
    """Copy the .py files that the `auto_map` of a JSON names, for those who load with remote code.

    Where the base lacks one, which is returned, the `auto_map` goes: one that leads nowhere makes
    every loader with trust_remote_code fail.
    """
    content = read_object(out / name, ConfigError)
    files = dict(_code_files(model, content.get("auto_map") or {}))
    if missing := next((module for module, file in files.items() if file is None), None):
        write_json(out / name, {k: v for k, v in content.items() if k != "auto_map"})
        return f"{missing}.py"
    for file in filter(None, files.values()):
        shutil.copyfile(file, out / file.name)
    return None


def _code_files(model: str, auto_map: Any) -> Iterator[tuple[str, Path | None]]:
    """The modules that an `auto_map` names and those they import, each with its file or None.

    An entry is "module.Class", or a list of these; "repository--module.Class" lies elsewhere. What
    is not a plain name is not looked for, nor is a link followed out of the folder:
    /home/me/secret.py would come along and be published.
    """
    values = auto_map.values() if isinstance(auto_map, dict) else [auto_map]
    entries = [e if isinstance(e, list) else [e] for e in values]
    names = [str(name) for entry in entries for name in entry if name]
    waiting, seen = [name.rpartition(".")[0] or name for name in names if "--" not in name], set()
    while waiting:
        module = waiting.pop()
        if module not in seen:
            seen.add(module)
            file = find_base(model, f"{module}.py") if MODULE.fullmatch(module) else None
            file = file if file and _is_within(model, file) else None
            yield module, file
            waiting += get_relative_imports(file) if file else []


def _is_within(model: str, file: Path) -> bool:
    """Whether a file lies in the base's folder, links followed; the hub's cache has its own."""
    root = Path(model).resolve()
    if not root.is_dir():
        return True
    if root.parent.name == "snapshots":  # a folder of the hub's cache, of links to ../../blobs
        root = root.parent.parent
    return file.resolve().is_relative_to(root)

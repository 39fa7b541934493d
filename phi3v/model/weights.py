"""A model folder's tensors by name: which there are, whether they fit, and one at a time.

The names in the files are the published ones, and so are the module's parameters': no map stands
between them. transformers' own loading reads everything at once and does not refuse a file with
unknown names.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.utils.hub import cached_file

from phi3v.content import disguise
from phi3v.errors import CheckpointError
from phi3v.stored import read_object

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# Some fine-tunes hold the token embeddings a second time, under the name of the image embedding.
ALIASES = ("model.vision_embed_tokens.wte.weight",)
SHOWN = 5  # names listed of each kind
# What ends an answer. The published config.json says </s>, which the model does not say.
STOP_TOKENS = ("<|end|>", "<|endoftext|>")


class Weights(Protocol):
    """Tensors by their published names, read one at a time; `path` is where they lie."""

    @property
    def path(self) -> str: ...
    def shapes(self) -> dict[str, tuple[int, ...]]: ...
    def read(self, name: str) -> Tensor: ...


class WeightFiles:
    """The safetensors files of a folder or hub name, opened but not read.

    `where` is what transformers' from_pretrained takes to find them: revision, subfolder, token ...
    """

    def __init__(self, path: str | Path, **where: Any) -> None:
        self.path = str(path)
        self._files = _find_files(self.path, where)
        self._stack = ExitStack()
        self._open: dict[Path, Any] = {}

    def __enter__(self) -> "WeightFiles":
        for file in set(self._files.values()):
            self._open[file] = self._stack.enter_context(_open(file))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor, aliases left out."""
        return {
            name: tuple(self._open[file].get_slice(name).get_shape())
            for name, file in self._files.items()
            if name not in ALIASES
        }

    def read(self, name: str) -> Tensor:
        """Read one tensor into memory."""
        return self._open[self._files[name]].get_tensor(name)


def check_shapes(path: str, found: Mapping[str, tuple[int, ...]], model: nn.Module) -> None:
    """Refuse weights of a folder or checkpoint that are not exactly the model's.

    Raises: CheckpointError listing unknown, missing and mis-shaped names.
    """
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
    shared = expected.keys() & found.keys()
    faults = {
        "missing": sorted(expected.keys() - found.keys()),
        "unknown": sorted(found.keys() - expected.keys()),
        "of another shape": [
            f"{name} {found[name]} for {expected[name]}"
            for name in sorted(shared)
            if found[name] != expected[name]
        ],
    }
    listed = "; ".join(f"{len(n)} {kind}: {_first(n)}" for kind, n in faults.items() if n)
    if listed:
        raise CheckpointError(
            f"the weights of {path} do not fit the model's config.json: {listed}; "
            "use weights and a config.json that belong together"
        )


def _first(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _find_files(path: str, where: dict[str, Any]) -> dict[str, Path]:
    """The file of every tensor.

    Raises: CheckpointError if there are no safetensors files, one is damaged, or the index names
    one of another folder.
    """
    index = cached_file(path, INDEX, _raise_exceptions_for_missing_entries=False, **where)
    if index is not None:
        names = read_object(Path(index), needs={"weight_map": dict})["weight_map"]
        for file in names.values():
            if not isinstance(file, str):
                raise CheckpointError(
                    f"{index} has {file!r} where a file's name belongs; download the model again"
                )
            if Path(file).is_absolute() or ".." in Path(file).parts:
                raise CheckpointError(
                    f"{index} names {file!r}, which is not in its folder; name files beside it, or "
                    "download the model again"
                )
        return {name: _file(path, file, where) for name, file in names.items()}
    single = _file(path, SINGLE, where)
    with _open(single) as handle:
        return {name: single for name in handle.keys()}


def _open(file: Path) -> Any:
    try:
        return safe_open(str(file), framework="pt")
    except SafetensorError as error:
        if cause := disguise(file):
            raise CheckpointError(f"{file} is {cause}") from error
        raise CheckpointError(
            f"{file} is damaged ({error}), it has {file.stat().st_size:,} bytes: half a download, "
            "perhaps; download it again"
        ) from error


def _file(path: str, name: str, where: dict[str, Any]) -> Path:
    found = cached_file(path, name, _raise_exceptions_for_missing_entries=False, **where)
    if found is None:
        raise CheckpointError(
            f"{path} has no {name}; name a folder with safetensors weights, or download it again"
        )
    return Path(found)


def find_stop_ids(path: str, **where: Any) -> list[int]:
    """The ids of STOP_TOKENS in the tokenizer beside the weights; none where there is none."""
    found = cached_file(
        path, "tokenizer.json", _raise_exceptions_for_missing_entries=False, **where
    )
    if found is None:
        return []
    added = read_object(Path(found), needs={"added_tokens": list})["added_tokens"]
    if not all(isinstance(t, dict) and {"content", "id"} <= t.keys() for t in added):
        raise CheckpointError(
            f"{found} has an entry without content or id in 'added_tokens'; download it again"
        )
    ids = {token["content"]: token["id"] for token in added}
    return [ids[token] for token in STOP_TOKENS if token in ids]


def parameter_places(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Every parameter as its full name, the module that holds it, and its name there."""
    for prefix, module in model.named_modules():
        for name, _ in module.named_parameters(recurse=False):
            yield f"{prefix}.{name}".lstrip("."), module, name


def load_weights(model: nn.Module, files: Weights, dtype: torch.dtype) -> None:
    """Give a model that was built on the meta device its weights, on the CPU.

    Raises: CheckpointError if names or shapes do not fit.
    """
    check_shapes(files.path, files.shapes(), model)
    for name, module, own in list(parameter_places(model)):
        trains = getattr(module, own).requires_grad
        tensor = files.read(name).to(dtype)
        setattr(module, own, nn.Parameter(tensor, requires_grad=trains))

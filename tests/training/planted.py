"""Files with code planted in them, as another person's run folder may have them."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from phi3v.training.checkpoints.store import MADE_FROM, SavedFile, read_manifest, write_manifest


class Code:
    """An object whose pickle makes a file where it is read in full."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.system, (f"touch {self.mark}",)


def plant(file: Path, mark: Path) -> None:
    """Have a file make `mark` where it is read in full; nothing else in it changes."""
    state = torch.load(file, weights_only=False, map_location="cpu")
    if isinstance(state, dict):
        state["extra"] = Code(mark)
    else:
        state = {"param": state, "extra": Code(mark)}
    torch.save(state, file)


def seal(checkpoint: Path, made_from: str | None = None) -> None:
    """Write a checkpoint's manifest anew, by what its files are now: anybody can."""
    manifest = read_manifest(checkpoint)
    files = {name: SavedFile.of(checkpoint / name) for name in manifest.pop("files")}
    manifest.pop("format")
    if made_from is not None:
        manifest[MADE_FROM] = made_from
    write_manifest(checkpoint, manifest, files)

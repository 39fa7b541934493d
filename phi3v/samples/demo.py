"""The inputs of the demo recipe: made once, by the first rank, while the others wait."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from phi3v.config import DatasetConfig, RunConfig, load_recipe
from phi3v.data.format import MANIFEST
from phi3v.prepare import prepare
from phi3v.prepare.conversations import read_conversation
from phi3v.prepare.sources import read_rows
from phi3v.processing.prompt import render
from phi3v.samples.products import make_products
from phi3v.samples.tiny import make_tiny_model


def make_missing(cfg: RunConfig, recipe: Path, is_first: bool) -> None:
    """Make the sample products, the tiny model and the shards where they are missing.

    cfg     the run that needs them
    recipe  dataset recipe of the sample products; model and shards are those of `cfg`
    """
    overrides = [f"model={cfg.model.path}", f"out={cfg.data.shards}"]
    dataset = load_recipe(DatasetConfig, recipe, overrides)
    catalogue = Path(dataset.source.path)
    is_done = Path(cfg.data.shards, MANIFEST)
    with _lock(Path(f"{cfg.data.shards}.lock")):
        if is_done.is_file():
            return
        if not catalogue.is_file():
            make_products(catalogue.parent)
        if not Path(cfg.model.path, "config.json").is_file():
            make_tiny_model(Path(cfg.model.path), catalogue_texts(dataset))
        prepare(dataset)


def catalogue_texts(dataset: DatasetConfig) -> Iterator[str]:
    """Every conversation of a source as text, for a tokenizer to learn from."""
    for row in read_rows(Path(dataset.source.path)):
        yield render(read_conversation(row, dataset.source).messages)


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Let one process of this host in at a time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield

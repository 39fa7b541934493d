"""Small real objects for tests: a catalogue, a tiny model, dataset recipes, samples.

The session's fixtures of conftest.py are made here, by the project's own functions; a test that
wants something else calls these with its own arguments.
"""

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from phi3v.config import DatasetConfig
from phi3v.config.load import build_recipe
from phi3v.data.codecs import Codec
from phi3v.data.format import FORMAT_VERSION
from phi3v.data.writer import ShardWriter, finish_split
from phi3v.files import write_json
from phi3v.geometry import grid_of, image_tokens
from phi3v.prepare import prepare
from phi3v.sample import IGNORED, Canvas, Sample, count_views
from phi3v.samples.products import make_products, sample_texts
from phi3v.samples.tiny import TinySizes, make_tiny_model

ROWS = 120  # of the catalogue
RAW = Codec()
CROP, SIDE = 28, 1  # pixels and merged patches of a view of `make_sample`
QUESTION = "<|image_1|>\nWhat is shown in this image?"
ANSWER = "Product: {title}, Category: {category3_code}, Full Price: {full_price}"


def make_catalogue(out: Path, rows: int = ROWS) -> Path:
    """The sample products: out/products.csv and out/images."""
    make_products(out, rows=rows, seed=0)
    return out


def make_model(out: Path, **sizes: int) -> Path:
    """A tiny model that can spell the sample products; its sizes are the default ones."""
    make_tiny_model(out, sample_texts(), TinySizes(**sizes))
    return out


def recipe(model: Path, out: Path, source: Mapping[str, Any], **values: Any) -> DatasetConfig:
    """A dataset recipe, built and checked as one that was read from YAML."""
    tree = {"model": str(model), "out": str(out), "source": dict(source), **values}
    return build_recipe(DatasetConfig, tree, Path("recipe.yaml"), ())


def product_recipe(catalogue: Path, model: Path, out: Path, **values: Any) -> DatasetConfig:
    """launch/recipes/products.yaml for folders of one's own."""
    source = {
        "path": str(catalogue / "products.csv"),
        "user": QUESTION,
        "assistant": ANSWER,
        "images": ["local_image_path"],
    }
    return recipe(model, out, source, **values)


def make_shards(catalogue: Path, model: Path, out: Path) -> Path:
    """The catalogue's dataset, a tenth of it held out."""
    split = {"validation": 0.1, "by": "product_code"}
    prepare(product_recipe(catalogue, model, out, split=split))
    return out


def make_mixed_shards(catalogue: Path, model: Path, folder: Path, pairs: int = 24) -> Path:
    """Products with their pictures and, after each, a question of the same length without one."""
    with (catalogue / "products.csv").open(encoding="utf-8", newline="") as file:
        products = list(csv.DictReader(file))[:pairs]
    rows: list[dict[str, Any]] = []
    for product in products:
        answer = ANSWER.format(**product)
        rows.append(turn(QUESTION, answer, images=[product["local_image_path"]]))
        rows.append(turn(f"What is {product['title']}?", answer))
    source = {"path": str(write_jsonl(folder / "rows.jsonl", rows)), "image_root": str(catalogue)}
    prepare(recipe(model, folder / "shards", source))
    return folder / "shards"


def turn(question: str, answer: str, **values: Any) -> dict[str, Any]:
    """A row of one question and its answer."""
    messages = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer},
    ]
    return {"messages": messages, **values}


def write_jsonl(path: Path, rows: Sequence[Any]) -> Path:
    """One JSON value per line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_picture(path: Path, width: int = 60, height: int = 40, seed: int = 0) -> Path:
    """A picture of noise, lossless."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def make_sample(
    name: str, text: int = 6, grids: Sequence[tuple[int, int]] = (), seed: int = 0
) -> Sample:
    """A sample of noise: `text` tokens, the latter half labelled, behind canvases of these grids.

    A view is CROP pixels and SIDE merged patches wide: a 1 x 1 canvas takes 5 tokens.
    """
    random = np.random.default_rng([seed, *name.encode()])
    canvases = tuple(
        Canvas(random.integers(0, 256, (CROP * rows, CROP * cols, 3), dtype=np.uint8))
        for rows, cols in grids
    )
    counts = [image_tokens(grid_of(*canvas.size, CROP), SIDE) for canvas in canvases]
    fills = [np.full(count, -number - 1) for number, count in enumerate(counts)]
    words = random.integers(3, 1000, text)
    ids = np.concatenate([*fills, words]).astype(np.int32)
    labels = ids.copy()
    labels[: len(ids) - text // 2] = IGNORED
    meta = {"prompt_length": len(ids) - text // 2, "reference": "ja \u00fc", "row": seed}
    return Sample(name, ids, labels, canvases, meta)


def write_samples(
    folder: Path,
    samples: Sequence[Sample],
    split: str = "train",
    shard_bytes: int = 1 << 30,
    codec: Codec = RAW,
) -> Path:
    """A dataset folder of these samples, one split."""
    folder.mkdir(parents=True, exist_ok=True)
    entries, tables = [], []
    waiting = list(samples)
    while waiting:
        path = folder / f"{split}-{len(entries):05d}.arrow"
        writer = ShardWriter(path, codec, CROP, SIDE)
        while waiting and writer.bytes < shard_bytes:
            writer.add(waiting.pop(0))
        entries.append(writer.finish())
        tables.append(writer.index)
    manifest = {
        "format_version": FORMAT_VERSION,
        "fingerprint": f"{len(samples)} samples",
        "crop_size": CROP,
        "image_side": SIDE,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.25, 0.25, 0.25],
        "pixels": codec.to_manifest(),
        "splits": {split: finish_split(folder, split, entries, tables)},
    }
    write_json(folder / "manifest.json", manifest)
    return folder


def assert_same(one: Sample, other: Sample) -> None:
    """The samples are equal, bit for bit."""
    assert (one.id, one.meta, len(one.images)) == (other.id, other.meta, len(other.images))
    for name in ("input_ids", "labels"):
        left, right = getattr(one, name), getattr(other, name)
        assert left.dtype == right.dtype == np.int32
        assert np.array_equal(left, right)
    for left, right in zip(one.images, other.images, strict=True):
        assert left.pixels.dtype == right.pixels.dtype == np.uint8
        assert np.array_equal(left.pixels, right.pixels)


def num_views(sample: Sample) -> int:
    """Views of a sample of `make_sample`."""
    return count_views(sample.images, CROP)

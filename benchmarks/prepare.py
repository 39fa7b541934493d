"""Preparing an image for training once, against the published processor's work on it.

    python benchmarks/prepare.py

published  decode, HD transform, float32 views in num_crops + 1 slots, ids: what a data loader built
           on the published processor does for an image in every epoch
ours       `prepare` from a recipe to the published folder, with one worker: both passes (the
           picture's header; decode, HD transform, ids, labels), the shard, its SHA-256 and fsync;
           and what starting costs, shared out among the images
split      the same with a tenth held out: every picture is also looked at for near duplicates

Both on one thread, from the same JPEG files.
"""

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from itertools import count
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timing import Times, describe_machine, measure, ratios
from torch import Tensor
from torch.nn.functional import interpolate
from transformers import PreTrainedTokenizerFast

from phi3v.config import DatasetConfig
from phi3v.config.dataset import SourceSection, SplitSection
from phi3v.geometry import hd_layout, image_tokens
from phi3v.prepare import prepare
from phi3v.processing import Phi3VProcessor
from phi3v.processing.prompt import Message, encode, render
from phi3v.samples.products import sample_texts
from phi3v.samples.tiny import CLIP_MEAN, CLIP_STD, train_tokenizer

SIZES = ((640, 480), (1344, 1008), (2016, 1512))  # width, height
CROPS = (4, 16)
ROWS_PER_FILE = 8
CHAT = (
    Message(role="user", content="<|image_1|>\nWhat is shown in this image?"),
    Message(role="assistant", content="Product: Check shirt, Category: Shirts, Full Price: 420.00"),
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--images", type=int, default=24, help="of each size")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--width", type=int, help="of one size only")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    print(describe_machine())
    print(f"time an image: median (quartiles) of {arguments.repeats}; {arguments.images} images")
    with tempfile.TemporaryDirectory() as folder:
        for size in (s for s in SIZES if arguments.width in (None, s[0])):
            files = make_photos(Path(folder), *size, arguments.images)
            for num_crops in CROPS:
                times = compare(files, num_crops, arguments.repeats)
                print(f"{size[0]}x{size[1]}, {num_crops} crops")
                for name, side in times.items():
                    print(f"  {name:9} {side}")
                for name in ("ours", "split"):
                    print(f"  {name:9} {ratios(times['published'], times[name])}", flush=True)


def compare(files: Sequence[Path], num_crops: int, repeats: int) -> dict[str, Times]:
    """Time both sides on all files; returns the times of one image."""
    with tempfile.TemporaryDirectory(dir=files[0].parent) as name:
        folder = Path(name)
        model = make_model(folder / "model")
        processor = Phi3VProcessor.from_pretrained(model, num_crops=num_crops)
        check_published(files[0], processor)
        rows = write_rows(folder / "rows.jsonl", [*files] * ROWS_PER_FILE)
        # A folder of its own for each: to write over a file is to wait for the old one's removal.
        outs = (folder / f"out{number}" for number in count())
        sides = {
            "published": lambda: publish_all(files, processor),
            "ours": lambda: prepare(recipe(rows, model, next(outs), num_crops)),
            "split": lambda: prepare(recipe(rows, model, next(outs), num_crops, is_split=True)),
        }
        times = measure(sides, repeats)
    rows_of = {"published": 1, "ours": ROWS_PER_FILE, "split": ROWS_PER_FILE}
    return {name: side / (len(files) * rows_of[name]) for name, side in times.items()}


def make_photos(folder: Path, width: int, height: int, number: int) -> list[Path]:
    """JPEG files that compress as photos do (2 to 3 bits a pixel): soft shapes and grain."""
    files = [folder / f"{width}x{height}-{index}.jpg" for index in range(number)]
    for seed, file in enumerate(files):
        random = np.random.default_rng(seed)
        shapes = Image.fromarray(random.integers(0, 256, (height // 16, width // 16, 3), np.uint8))
        soft = np.asarray(shapes.resize((width, height), Image.Resampling.BICUBIC), np.float32)
        grain = random.normal(0, 6, soft.shape)
        Image.fromarray((soft + grain).clip(0, 255).astype(np.uint8)).save(file, quality=90)
    return files


# --- ours ---


def make_model(folder: Path) -> Path:
    """What preparation reads of a model, with the published tower's sizes."""
    folder.mkdir()
    tokenizer = train_tokenizer(sample_texts(), 400)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    settings = {"num_crops": 16, "image_mean": CLIP_MEAN, "image_std": CLIP_STD}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text("{}")
    return folder


def write_rows(path: Path, files: Sequence[Path]) -> Path:
    """A row for each file."""
    rows = [{"messages": CHAT, "images": [str(file)]} for file in files]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def recipe(
    rows: Path, model: Path, out: Path, num_crops: int, is_split: bool = False, workers: int = 1
) -> DatasetConfig:
    """The recipe of the rows; split, a tenth is held out and likeness of the pictures looked at."""
    return DatasetConfig(
        source=SourceSection(path=str(rows), image_root="/"),
        model=str(model),
        out=str(out),
        num_crops=num_crops,
        split=SplitSection(validation=0.1) if is_split else SplitSection(),
        workers=workers,
    )


# --- published ---


def publish_all(files: Sequence[Path], processor: Phi3VProcessor) -> None:
    """One after the other; none is kept, as in a loader that hands them on."""
    for file in files:
        published(file, processor)


def published(file: Path, processor: Phi3VProcessor) -> tuple[Tensor, list[int]]:
    """The published processor's work, step by step as its transforms do it.

    returns  (1, num_crops + 1, 3, 336, 336) float32, and the ids
    """
    with Image.open(file) as image:
        picture = image.convert("RGB")
    layout = hd_layout(picture.width, picture.height, processor.num_crops, processor.crop_size)
    values = normalise(enlarge(picture, processor), processor)
    views = cut(values, processor.crop_size)
    slots = torch.zeros(processor.num_crops + 1 - len(views), *views.shape[1:])
    counts = [image_tokens(layout.grid, processor.side)]
    padded = torch.stack([torch.cat([views, slots])])
    return padded, encode(processor.tokenizer, render(CHAT), counts)


def enlarge(picture: Image.Image, processor: Phi3VProcessor) -> Image.Image:
    """The HD transform; all pictures here lie on their long side."""
    layout = hd_layout(picture.width, picture.height, processor.num_crops, processor.crop_size)
    size = (layout.resized_long, layout.resized_short)
    if picture.size != size:
        picture = picture.resize(size, Image.Resampling.BILINEAR)
    padded = Image.new("RGB", (layout.resized_long, layout.padded_short), (255, 255, 255))
    padded.paste(picture, (0, layout.pad_before))
    return padded


def normalise(picture: Image.Image, processor: Phi3VProcessor) -> Tensor:
    """ToTensor and Normalize: (3, height, width) float32."""
    values = torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()
    mean, std = (
        torch.tensor(of)[:, None, None] for of in (processor.image_mean, processor.image_std)
    )
    values = values.to(torch.float32).div(255)  # ToTensor
    return values.clone().sub_(mean).div_(std)  # Normalize keeps what it is given


def cut(values: Tensor, side: int) -> Tensor:
    """The global view, then the crops row by row: (N, 3, side, side) float32."""
    overview = interpolate(values[None], size=(side, side), mode="bicubic")
    rows, cols = values.shape[1] // side, values.shape[2] // side
    crops = values.reshape(3, rows, side, cols, side).permute(1, 3, 0, 2, 4)
    return torch.cat([overview, crops.reshape(-1, 3, side, side)])


def check_published(file: Path, processor: Phi3VProcessor) -> None:
    """The written-out steps give what the processor gives, which tests hold to the goldens."""
    values, ids = published(file, processor)
    with Image.open(file) as image:
        expected = processor(render(CHAT), image)
    assert torch.equal(values, expected["pixel_values"])
    assert ids == expected["input_ids"][0].tolist()


if __name__ == "__main__":
    main()

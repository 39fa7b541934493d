"""Synthetic conversations: 15 % text, 75 % with one image, 10 % with two to four.

Lengths of question and answer are lognormal, images have random sizes and go through the project's
own HD transform layout. What is drawn depends on the seed alone.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from phi3v.data.codecs import Codec
from phi3v.data.format import FORMAT_VERSION, MANIFEST
from phi3v.data.writer import ShardWriter, finish_split
from phi3v.files import write_json
from phi3v.geometry import Grid, hd_layout, image_tokens
from phi3v.sample import IGNORED, Canvas, Sample

WITHOUT, ONE = 0.15, 0.75  # shares of samples by number of images; the rest have 2, 3 or 4
ASPECT = 0.35  # deviation of the logarithm of width over height


@dataclass(frozen=True)
class Mixture:
    """Sizes of samples; question and answer in tokens, the template's and BOS tokens included.

    questions, answers  (samples,)
    grids               of each sample's images
    side                merged patches along a view, 12 in the published model
    """

    questions: np.ndarray
    answers: np.ndarray
    grids: list[tuple[Grid, ...]]
    side: int

    @property
    def views(self) -> np.ndarray:
        return np.array([sum(grid.views for grid in grids) for grids in self.grids])

    @property
    def image_tokens(self) -> np.ndarray:
        return np.array([sum(image_tokens(g, self.side) for g in grids) for grids in self.grids])

    @property
    def tokens(self) -> np.ndarray:
        return self.questions + self.answers + self.image_tokens

    def samples(self, crop: int, vocabulary: int, seed: int = 0) -> Iterator[Sample]:
        """Conversations of these sizes, of random tokens and pixels; crops of `crop` pixels."""
        random = np.random.default_rng(seed)
        sizes = zip(self.questions, self.answers, self.grids, strict=True)
        for number, (question, answer, grids) in enumerate(sizes):
            images = [np.full(image_tokens(g, self.side), -k) for k, g in enumerate(grids, 1)]
            text = random.integers(3, vocabulary, question + answer)
            ids = np.concatenate([*images, text]).astype(np.int32)
            labels = np.full_like(ids, IGNORED)
            labels[-answer:] = ids[-answer:]
            shapes = [(grid.rows * crop, grid.cols * crop, 3) for grid in grids]
            canvases = [Canvas(random.integers(0, 256, shape, np.uint8)) for shape in shapes]
            yield Sample(f"sample-{number}", ids, labels, tuple(canvases), {})

    def write(self, folder: Path, crop: int, vocabulary: int) -> Path:
        """A dataset folder of these samples, in one shard."""
        folder.mkdir(parents=True)
        writer = ShardWriter(folder / "train-00000.arrow", Codec(), crop, self.side)
        for sample in self.samples(crop, vocabulary):
            writer.add(sample)
        manifest = {
            "format_version": FORMAT_VERSION,
            "fingerprint": folder.name,
            "crop_size": crop,
            "image_side": self.side,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.25, 0.25, 0.25],
            "tokenizer": "",
            "pixels": Codec().to_manifest(),
            "splits": {"train": finish_split(folder, "train", [writer.finish()], [writer.index])},
        }
        write_json(folder / MANIFEST, manifest)
        return folder


def alike(count: int, question: int, answer: int, grids: tuple[Grid, ...], side: int) -> Mixture:
    """So many samples of one size."""
    return Mixture(np.full(count, question), np.full(count, answer), [grids] * count, side)


def draw_mixture(
    count: int, num_crops: int, seed: int = 0, side: int = 12, median: tuple[int, int] = (60, 60)
) -> Mixture:
    """Draw the sizes of `count` samples; `median` tokens of a question and of an answer.

    Samples without an image have four times as long answers, as text data have.
    """
    random = np.random.default_rng(seed)
    kind = random.random(count)
    several = random.integers(2, 5, count)
    images = np.where(kind < WITHOUT, 0, np.where(kind < WITHOUT + ONE, 1, several))
    questions, answers = (random.lognormal(np.log(m), 0.8, count) for m in median)
    answers = np.where(images == 0, 4 * answers, answers)
    longest = 40 * sum(median)
    questions, answers = (np.clip(n, 4, longest).astype(np.int64) for n in (questions, answers))
    ratios = np.exp(random.normal(0.2, ASPECT, int(images.sum())))
    layouts = iter([hd_layout(int(1000 * r), 1000, num_crops, 336).grid for r in ratios])
    grids = [tuple(next(layouts) for _ in range(n)) for n in images]
    return Mixture(questions, answers, grids, side)

"""How long training waits for data, and how fast batches come, beside reading them when needed.

    python benchmarks/loader.py
    python benchmarks/loader.py --samples 16 --repeats 3

loader   ours, which reads ahead in threads, of the files by data.verify=size
sampled  the same with data.verify=sampled, every record new to it: a digest of each is computed
digest   data.verify=digest: what a pass over the files of one epoch takes, before the first step
in turn  the same packs collated through the memory map, in the consumer's thread

wait     share of a step for which the consumer waits, at the demo's scale: samples of 5 views of 56
         pixels, packs of 264 tokens, 8 packs a step on 2 ranks. The consumer multiplies matrices on
         one thread for as long as a step of the demo takes on 2 cores. Nothing can be read before
         the first step, which is not counted.
rate     to a consumer that does nothing else, so that no step hides anything: samples of 1344 x
         1008 pixels, raw and zstd, in packs of 8,192 tokens; the page cache is warm and the loader
         has been running
"""

import argparse
import os
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import closing
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from timing import describe_machine, measure, ratios

from phi3v.data import Dataset
from phi3v.data.batch import Batch, collate
from phi3v.data.codecs import Codec, CodecName
from phi3v.data.format import FORMAT_VERSION, MANIFEST
from phi3v.data.loader import Loader, Step
from phi3v.data.packing import Budget, Plan, Position
from phi3v.data.writer import ShardWriter, finish_split
from phi3v.files import write_json
from phi3v.sample import IGNORED, Canvas, Sample

CODECS: tuple[CodecName, ...] = ("raw", "zstd")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=48, help="of 4 MB each")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--steps", type=int, default=60, help="of the demo's scale")
    parser.add_argument("--seconds", type=float, default=0.4, help="of one of these")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{describe_machine()}; load {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() as folder:
        compare_waits(Path(folder, "demo"), arguments.steps, arguments.seconds)
        print(f"an epoch of {arguments.samples} samples: median (quartiles) of {arguments.repeats}")
        for name in CODECS:
            compare_rates(Path(folder, name), name, arguments.samples, arguments.repeats)


def compare_waits(folder: Path, steps: int, seconds: float) -> None:
    """Print the share of their steps that both sides wait."""
    dataset = write_dataset(folder, 2700, side=56, grid=(2, 2), tokens=66, codec=Codec())
    plan = make_plan(dataset, Budget(264, 32, 1024), packs=8)
    loader = Loader(dataset, plan, rank=0, world_size=2)
    with closing(loader.steps(Position())) as source:
        report_wait("loader", source, steps, seconds)
    in_turn = (collate_all(dataset, step.packs[::2]) for step in plan.steps(Position()))
    report_wait("in turn", in_turn, steps, seconds)


def report_wait(side: str, source: Iterator[object], steps: int, seconds: float) -> None:
    next(source)
    waited, taken = [], []
    for _ in range(steps):
        began = time.perf_counter()
        next(source)
        waited.append(time.perf_counter() - began)
        compute(seconds)
        taken.append(time.perf_counter() - began)
    print(
        f"wait {side:7} {sum(waited) / sum(taken):.3%} of {steps} steps; of them the median "
        f"{np.median(waited) * 1e3:.2f} ms, the longest {max(waited) * 1e3:.2f} ms"
    )


def compare_rates(folder: Path, name: CodecName, samples: int, repeats: int) -> None:
    """Print what both sides take for an epoch, and their ratio."""
    checked = write_dataset(folder, samples, side=336, grid=(4, 3), tokens=2000, codec=Codec(name))
    dataset = Dataset(folder, "train", verify="size")
    plan = make_plan(dataset, Budget(8192, 64, samples), packs=1)
    packs = [pack for step in plan.steps(Position(), epochs=1) for pack in step.packs]
    pixels = sum(image.pixels.nbytes for sample in dataset for image in sample.images)
    with (
        closing(Loader(dataset, plan, rank=0, world_size=1).steps(Position())) as steps,
        closing(Loader(checked, plan, rank=0, world_size=1).steps(Position())) as checking,
    ):
        take, take_checked = (partial(take_all, side, len(packs)) for side in (steps, checking))
        assert take() == take_checked() == collate_all(dataset, packs) == pixels
        # By themselves: what a loader reads ahead is done while the next side is timed.
        sampled = lambda: forget(checked) or take_checked()  # noqa: E731
        costs = measure({"loader": take, "sampled": sampled}, 3 * repeats)
        sides = {"loader": take, "in turn": partial(collate_all, dataset, packs)}
        times = measure(sides, repeats)
    times |= {"sampled": costs["sampled"]} | measure({"digest": dataset.verify}, repeats)
    for side, taken in times.items():
        seconds = float(np.median(taken.wall))
        print(
            f"{name:4} {side:7} {taken}; {samples / seconds:,.0f} samples/s, "
            f"{pixels / seconds / 1e6:,.0f} MB/s"
        )
    print(f"{name:4} ratio   of in turn  {ratios(times['in turn'], times['loader'])}")
    print(f"{name:4} ratio   of sampled  {ratios(costs['sampled'], costs['loader'])}")


def forget(dataset: Dataset) -> None:
    """Have every record be new to a dataset, as the first epoch finds them."""
    assert dataset._is_right
    for is_right in dataset._is_right.values():
        is_right[:] = False


def take_all(steps: Iterator[Step], count: int) -> int:
    return sum(pixel_bytes(batch) for step in islice(steps, count) for batch in step.batches)


def collate_all(dataset: Dataset, packs: Iterable[np.ndarray]) -> int:
    return sum(pixel_bytes(collate([dataset[int(i)] for i in pack])) for pack in packs)


def pixel_bytes(batch: Batch) -> int:
    return sum(canvas.nbytes for canvas in batch.canvases)


def compute(seconds: float) -> None:
    matrix = torch.ones(256, 256)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        matrix @ matrix


def make_plan(dataset: Dataset, budget: Budget, packs: int) -> Plan:
    return Plan(
        fingerprint="benchmark",
        seed=0,
        tokens=dataset.tokens,
        views=dataset.views,
        costs=dataset.tokens.astype(float),
        budget=budget,
        packs_per_step=packs,
        window_steps=16,
    )


def write_dataset(
    folder: Path, samples: int, side: int, grid: tuple[int, int], tokens: int, codec: Codec
) -> Dataset:
    """A dataset folder of samples with one image each, of noise that is enlarged twice."""
    folder.mkdir()
    writer = ShardWriter(folder / "train-00000.arrow", codec, side, side=12)
    for sample in islice(make_samples(side, grid, tokens), samples):
        writer.add(sample)
    entries, tables = [writer.finish()], [writer.index]
    manifest = {
        "format_version": FORMAT_VERSION,
        "crop_size": side,
        "pixels": codec.to_manifest(),
        "splits": {"train": finish_split(folder, "train", entries, tables)},
    }
    write_json(folder / MANIFEST, manifest)
    return Dataset(folder, "train")


def make_samples(side: int, grid: tuple[int, int], tokens: int) -> Iterator[Sample]:
    random = np.random.default_rng(0)
    ids = np.arange(tokens, dtype=np.int32)
    labels = np.full_like(ids, IGNORED)
    rows, cols = grid[0] * side, grid[1] * side
    while True:
        noise = random.integers(0, 256, (rows // 2, cols // 2, 3), np.uint8)
        canvas = Canvas(noise.repeat(2, axis=0).repeat(2, axis=1))
        yield Sample("noise", ids, labels, (canvas,), {})


if __name__ == "__main__":
    main()

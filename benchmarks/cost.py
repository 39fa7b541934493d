"""What packs take, and the coefficients of the recipe's `data.cost` that predict it.

    python benchmarks/cost.py
    python benchmarks/cost.py --model MODEL --tokens 8192

Times forward and backward of packs whose tokens, tokens squared, views and trained tokens vary
independently of each other, and fits, with no coefficient below 0 and to relative errors,

    seconds = pack + token * tokens + token_pair * sum of samples' tokens^2 + view * views
              + label_token * trained tokens

`pack` is what every pack takes and not in the recipe: a sample has no part in it. Beside the fit
stands how well model FLOPs predict the same packs, which are the costs without coefficients. Of a
model only config.json is read; its weights are random, which takes as long.
"""

import argparse
import os
from collections.abc import Callable, Sequence
from itertools import chain, combinations

import numpy as np
import torch
from mixture import Mixture
from timing import describe_machine, measure

from phi3v.config import MODULES
from phi3v.data.batch import collate, model_inputs
from phi3v.devices import take_device
from phi3v.geometry import Grid, image_tokens
from phi3v.model import Phi3VConfig, Phi3VForCausalLM
from phi3v.samples.tiny import CLIP_MEAN, CLIP_STD, TinySizes, tiny_config, train_tokenizer
from phi3v.training.metering import sample_flops
from phi3v.training.optimizer import freeze
from phi3v.views import ViewSettings

SMALL = TinySizes(image_size=112, vision_width=256, width=256, mlp_width=768, positions=8192)
TERMS = ("token", "token_pair", "view", "label_token")  # as in the recipe
LEAST_TEXT = 8  # tokens of a sample beside its image


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(1)
    device = take_device()
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    print(f"{describe_machine()}; {name}; load {os.getloadavg()[0]:.1f}")
    torch.manual_seed(0)
    model = make_model(arguments.model, device)
    freeze(model, arguments.freeze)
    random, config = np.random.default_rng(0), model.config
    packs = [draw_pack(random, arguments, config.image_side) for _ in range(arguments.packs)]
    seconds = time_packs(model, packs, device, arguments.repeats)
    counts = np.array([[s.sum() for s in (p.tokens, p.views)] for p in packs])
    (fewest, few_views), (most, many_views) = counts.min(axis=0), counts.max(axis=0)
    print(
        f"{len(packs)} packs of {fewest:,} to {most:,} tokens, {few_views} to {many_views} views; "
        f"least of {arguments.repeats}: {seconds.min() * 1e3:,.1f} to {seconds.max() * 1e3:,.1f} ms"
    )
    flops = np.array([[pack_flops(config, pack, arguments.freeze)] for pack in packs])
    compare(flops, np.array([terms_of(pack) for pack in packs]), seconds)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", help="folder with a config.json; default: a small model")
    parser.add_argument("--freeze", nargs="*", choices=MODULES, default=[], help="as model.freeze")
    parser.add_argument("--tokens", type=int, default=2048, help="of a pack at most")
    parser.add_argument("--views", type=int, default=64, help="of a pack at most")
    parser.add_argument("--num_crops", type=int, default=16)
    parser.add_argument("--packs", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    return parser.parse_args()


def make_model(path: str | None, device: torch.device) -> Phi3VForCausalLM:
    """Random weights on the device, in bf16 on CUDA."""
    if path:
        config = Phi3VConfig.from_pretrained(path)
    else:
        config = tiny_config(SMALL, train_tokenizer(["a b"], 2))
        config.vocab_size = SMALL.width * 32064 // 3072  # logits to a channel as published
    torch.set_default_dtype(torch.bfloat16 if device.type == "cuda" else torch.float32)
    with device:
        model = Phi3VForCausalLM(config).train()
    torch.set_default_dtype(torch.float32)
    return model


def draw_pack(random: np.random.Generator, limits: argparse.Namespace, side: int) -> Mixture:
    """A pack: its length, its samples and which have images, and its trained share are drawn.

    Samples are of like length, so that packs of the same tokens differ in their squares.
    """
    tokens = int(np.exp(random.uniform(np.log(limits.tokens / 16), np.log(limits.tokens))))
    count, pictured, trained = (
        2 ** random.integers(0, 5),
        random.choice([0, 0.5, 1]),
        random.random(),
    )
    room, views = max(LEAST_TEXT, tokens // count), limits.views
    shapes = range(1, limits.num_crops + 1)
    layouts = [Grid(rows, cols) for rows in shapes for cols in shapes]
    grids: list[tuple[Grid, ...]] = []
    for _ in range(count):
        fitting = [
            grid
            for grid in layouts
            if grid.crops <= limits.num_crops
            and grid.views <= views
            and image_tokens(grid, side) <= room - LEAST_TEXT
        ]
        if not fitting or random.random() >= pictured:
            grids.append(())
            continue
        grids.append((fitting[random.integers(len(fitting))],))
        views -= grids[-1][0].views
    texts = np.array([room - sum(image_tokens(grid, side) for grid in of) for of in grids])
    answers = np.maximum(1, (trained * (texts - 1)).astype(np.int64))
    return Mixture(texts - answers, answers, grids, side)


def time_packs(
    model: Phi3VForCausalLM, packs: Sequence[Mixture], device: torch.device, repeats: int
) -> np.ndarray:
    """Seconds of each pack, the least of its repeats: by the clock, on a CPU of the processor.

    Packs take turns; making views of canvases is part of it, as it is in training.
    """
    has_cuda = device.type == "cuda"
    size, vocabulary = model.config.vision_config.image_size, model.config.vocab_size
    settings = ViewSettings(size, CLIP_MEAN, CLIP_STD)

    def trainer(pack: Mixture) -> Callable[[], None]:
        batch = collate(list(pack.samples(size, vocabulary)))

        def train() -> None:
            model(**model_inputs(batch, settings, device)).backward()
            if has_cuda:
                torch.cuda.synchronize(device)

        return train

    sides = {str(number): trainer(pack) for number, pack in enumerate(packs)}
    times = measure(sides, repeats).values()
    return np.array([(each.wall if has_cuda else each.processor).min() for each in times])


def terms_of(pack: Mixture) -> list[float]:
    """What the coefficients multiply, in the order of TERMS."""
    sums = pack.tokens, pack.tokens**2, pack.views, pack.answers
    return [float(of.sum()) for of in sums]


def pack_flops(config: Phi3VConfig, pack: Mixture, frozen: Sequence[str]) -> float:
    counts = pack.tokens, pack.answers, pack.views, pack.image_tokens
    return float(sample_flops(config, *counts, frozen).sum())


def compare(flops: np.ndarray, terms: np.ndarray, seconds: np.ndarray) -> None:
    """Print how well each side predicts, the coefficients, and the line for the recipe.

    flops    (packs, 1)
    terms    (packs, 4)
    seconds  (packs,)
    """
    constant = np.ones_like(flops)
    sides = {
        "FLOPs": flops,
        "FLOPs and pack": np.hstack([flops, constant]),
        "fitted": np.hstack([terms, constant]),
    }
    print(f"{'':16}{'R^2':>7}{'mean error':>12}{'worst':>8}")
    for name, columns in sides.items():
        coefficients = fit(columns, seconds)
        predicted = columns @ coefficients
        errors = np.abs(predicted / seconds - 1)
        left = np.square(predicted - seconds).sum() / np.square(seconds - seconds.mean()).sum()
        print(f"{name:16}{1 - left:7.3f}{errors.mean():12.1%}{errors.max():8.1%}")
    print(f"a pack takes {coefficients[-1] * 1e3:.3g} ms by itself; the rest, in seconds:")
    values = ", ".join(f"{k}: {v:.3g}" for k, v in zip(TERMS, coefficients[:-1], strict=True))
    print(f"data: {{cost: {{{values}}}}}")


def fit(columns: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """Non-negative coefficients of the least squared relative errors.

    columns  (packs, terms)
    seconds  (packs,)
    returns  (terms,)

    The optimum is the ordinary one of the columns it uses: all 2^terms sets are tried, 32 for five.
    """
    relative = columns / seconds[:, None]
    scale = relative.max(axis=0) + (relative.max(axis=0) == 0)  # terms differ by 10^9
    relative = relative / scale
    best, least = np.zeros(columns.shape[1]), float(len(seconds))
    numbers = range(columns.shape[1])
    for chosen in chain.from_iterable(combinations(numbers, size + 1) for size in numbers):
        found = np.linalg.lstsq(relative[:, chosen], np.ones(len(seconds)), rcond=None)[0]
        error = np.square(relative[:, chosen] @ found - 1).sum()
        if (found >= 0).all() and error < least:
            best, least = np.zeros(len(best)), error
            best[list(chosen)] = found
    return best / scale


if __name__ == "__main__":
    main()

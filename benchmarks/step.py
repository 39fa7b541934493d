"""A training step on packs, and the usual padded recipe on the same samples.

    python benchmarks/step.py

Both sides train the same weights on the same conversations (15 % text, 75 % one image, 10 % two to
four), forward, backward and optimizer step; ours makes its views in the step, the other side finds
them made. `padded` fills the images of a row up to the most that its batch has, as a rectangular
tensor asks for; `joined` lays the images of a batch one after the other; `again` is `padded` and
computes every layer a second time in the backward pass, as the cookbook's recipe does. `packed` is
ours, `fused` the same with kernels fused by torch.compile, as `auto` chooses on CUDA. Printed are
real tokens a second: padding counts for nothing. Beside the ratios of times stand those of matrix
products: what a machine that did nothing else would show.
"""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from mixture import draw_mixture
from padded import ROWS, PaddedRecipe, pad_rows
from timing import describe_machine, measure, ratios
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from phi3v.data.batch import Batch, collate, model_inputs
from phi3v.data.packing import Budget, Plan, Position
from phi3v.model import Phi3VForCausalLM
from phi3v.model.execution import Execution
from phi3v.sample import Sample
from phi3v.samples.tiny import TinySizes, tiny_config, train_tokenizer
from phi3v.views import ViewSettings

CPU = torch.device("cpu")
MODELS = {
    "tiny": TinySizes(),
    "middle": TinySizes(
        image_size=112,
        vision_width=256,
        vision_layers=6,
        width=384,
        layers=6,
        heads=6,
        mlp_width=1024,
        original_positions=4096,
    ),
}
CROPS = 4, 16
SAMPLES = {"tiny": 48, "middle": 24}  # at 16 crops the latter take five minutes
REPEATS = {"tiny": 3, "middle": 1}
SETTINGS = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--models", nargs="*", choices=MODELS, default=list(MODELS))
    parser.add_argument("--crops", type=int, nargs="*", default=CROPS)
    parser.add_argument("--samples", type=int, help=f"default: {SAMPLES}")
    parser.add_argument("--repeats", type=int, help=f"default: {REPEATS}")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(describe_machine())
    for name in arguments.models:
        count = arguments.samples or SAMPLES[name]
        for num_crops in arguments.crops:
            print(f"{name}, {num_crops} crops, {count} samples")
            compare(MODELS[name], num_crops, count, arguments.repeats or REPEATS[name])


def compare(sizes: TinySizes, num_crops: int, count: int, repeats: int) -> None:
    """Time both sides on the same samples, and print them."""
    model = make_model(sizes)
    side, settings = model.config.image_side, ViewSettings(sizes.image_size, *SETTINGS)
    text = max(8, side * side * 60 // 144)  # as long beside an image as at full size
    mixture = draw_mixture(count, num_crops, 0, side, (text, text))
    samples = list(mixture.samples(sizes.image_size, model.config.vocab_size))
    tokens = int(mixture.tokens.sum())
    packs = make_packs(samples, mixture.tokens, mixture.views)
    rows = [samples[i : i + ROWS] for i in range(0, len(samples), ROWS)]
    batches, joined = (
        [pad_rows(row, settings, num_crops + 1, 0, CPU, is_square) for row in rows]
        for is_square in (True, False)
    )
    padded = PaddedRecipe(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0, fused=True)

    def ours(pack: Batch) -> Tensor:
        return model(**model_inputs(pack, settings, CPU))

    def fused(pack: Batch) -> Tensor:
        model.set_execution(Execution(compiled=True))
        loss = ours(pack)
        model.set_execution(Execution())
        return loss

    sides: dict[str, Callable[[], float]] = {
        "padded": lambda: train(lambda batch: padded(**batch), batches, optimizer),
        "joined": lambda: train(lambda batch: padded(**batch), joined, optimizer),
        "again": lambda: train(lambda batch: padded(**batch, recompute=True), batches, optimizer),
        "packed": lambda: train(ours, packs, optimizer),
        "fused": lambda: train(fused, packs, optimizer),
    }
    counted = {name: count_flops(call) for name, call in sides.items() if name != "fused"}
    losses = [sides["fused"](), *(loss for loss, _ in counted.values())]
    assert np.allclose(losses, losses[0], rtol=1e-4), f"the sides disagree: {losses}"
    times = measure(sides, repeats)
    positions = sum(batch["input_ids"].numel() for batch in batches)
    real = [mixture.views.sum() / count_slots(side) for side in (batches, joined)]
    print(f"  {tokens / positions:.2f} of the padded positions are real, {len(packs)} packs")
    print(f"  of the views {real[0]:.2f} padded, {real[1]:.2f} joined")
    for name, side_times in times.items():
        print(f"  {name}  {tokens / np.median(side_times.wall):8.0f} real tokens/s  {side_times}")
    for name in ("padded", "joined", "again"):
        both = [ratios(times[name], times[ours]) for ours in ("packed", "fused")]
        products = counted[name][1] / counted["packed"][1]
        print(f"  {name} over packed  {both[0]}; over fused {both[1]}; products {products:.2f}x")


def count_flops(call: Callable[[], float]) -> tuple[float, int]:
    """A side's loss, and the FLOPs of its matrix products (attention's are not among them)."""
    with FlopCounterMode(display=False) as counter:
        loss = call()
    return loss, counter.get_total_flops()


def count_slots(batches: Sequence[dict[str, Any]]) -> int:
    """Views that a side computes, zero or not."""
    shapes = [batch["pixel_values"].shape for batch in batches if batch["pixel_values"] is not None]
    return sum(shape[0] * shape[1] for shape in shapes)


def make_model(sizes: TinySizes) -> Phi3VForCausalLM:
    """Random weights, and as many logits for a channel as the published model has."""
    config = tiny_config(sizes, train_tokenizer(["a b"], 2))
    config.vocab_size = sizes.width * 32064 // 3072
    torch.manual_seed(0)
    return Phi3VForCausalLM(config).train()


def make_packs(samples: Sequence[Sample], tokens: np.ndarray, views: np.ndarray) -> list[Batch]:
    """One epoch of packs, each as large as four samples are."""
    budget = Budget(int(max(tokens.max(), ROWS * tokens.mean())), int(views.sum()), len(samples))
    plan = Plan("benchmark", 0, tokens, views, tokens.astype(float), budget, 1, 1)
    steps = plan.steps(Position(), epochs=1)
    return [collate([samples[i] for i in pack]) for step in steps for pack in step.packs]


def train(call: Callable[[Any], Tensor], batches: Sequence[Any], optimizer: Any) -> float:
    """One optimizer step over all batches; returns the summed loss."""
    total = 0.0
    for batch in batches:
        loss = call(batch)
        loss.backward()
        total += float(loss.detach())
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total


if __name__ == "__main__":
    main()

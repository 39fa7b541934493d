"""The published model's sizes with random weights, data to feed it, and loops to time it in.

Used by gpu.py. `toy()` is the same at a size that a CPU steps through in a moment.
"""

import gc
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mixture import Mixture, alike, draw_mixture
from timing import ROOT
from torch import Tensor, nn

from phi3v.config import DeepSpeedConfig, RunConfig, build_recipe, load_deepspeed
from phi3v.data import Dataset
from phi3v.data.loader import Loader
from phi3v.data.packing import Budget, Plan, Position
from phi3v.geometry import Grid
from phi3v.model import Phi3VConfig, Phi3VForCausalLM
from phi3v.model.execution import Execution
from phi3v.samples.tiny import TinySizes, tiny_config, train_tokenizer
from phi3v.training.metering import device_peak, sample_flops

PUBLISHED = TinySizes(
    image_size=336,
    num_crops=16,
    vision_width=1024,
    vision_layers=24,
    vision_heads=16,
    width=3072,
    layers=32,
    heads=32,
    mlp_width=8192,
    original_positions=4096,
    positions=131072,
)


@dataclass(frozen=True)
class Scale:
    """What is built and timed; lengths in tokens."""

    sizes: TinySizes
    vocabulary: int
    grid: Grid
    max_tokens: int
    question: int
    answer: int
    text: int
    dtype: torch.dtype
    device: torch.device

    @property
    def is_full(self) -> bool:
        """Whether this is the published model, on a GPU."""
        return self.device.type == "cuda"

    @property
    def config(self) -> Phi3VConfig:
        config = tiny_config(self.sizes, train_tokenizer(["a b"], 2))
        config.vocab_size = self.vocabulary
        return config

    def data(self) -> dict[str, Mixture]:
        """Pictures of one size, text alone, and the mixture of both."""
        side = self.config.image_side
        return {
            "pictures": alike(32, self.question, self.answer, (self.grid,), side),
            "text": alike(32, self.text // 2, self.text - self.text // 2, (), side),
            "mixture": draw_mixture(
                64, self.sizes.num_crops, 0, side, (self.question, self.answer)
            ),
        }


def full() -> Scale:
    """Phi-3-Vision itself: 8k packs of pictures of 1344x1008, 1,921 tokens and 100 of text each."""
    device = torch.device("cuda", 0)
    return Scale(PUBLISHED, 32064, Grid(3, 4), 8192, 40, 60, 2048, torch.bfloat16, device)


def toy() -> Scale:
    """The same in small, on a CPU."""
    cpu = torch.device("cpu")
    return Scale(TinySizes(), 1024, Grid(2, 2), 256, 10, 20, 64, torch.float32, cpu)


def make_model(scale: Scale) -> Phi3VForCausalLM:
    """The model on its device, weights drawn at random as transformers would."""
    with torch.device("meta"):
        model = Phi3VForCausalLM(scale.config).to(scale.dtype)
    model = model.to_empty(device=scale.device).train()
    generator = torch.Generator(scale.device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.02, generator=generator)
            else:
                parameter.fill_("norm" in name and name.endswith("weight"))
    return model


def run_recipe(folder: Path, shards: Path, scale: Scale) -> RunConfig:
    """A recipe for one of the datasets; nothing of it is written."""
    values = {
        "run": {"out": str(folder / "run")},
        "model": {"path": "unused"},
        "data": {"shards": str(shards), "max_tokens": scale.max_tokens, "max_views": 128},
        "optim": {"lr": 1e-6},
        "train": {"max_steps": 1000},
    }
    return build_recipe(RunConfig, values, folder / "recipe.yaml", [])


def engine_settings(folder: Path, scale: Scale) -> DeepSpeedConfig:
    """The shipped JSON for one pack on one rank, and gradients in bf16 on one GPU.

    One rank holds everything: float32 gradients of 4.15 B weights would take 16.6 GB more, and with
    one round there is nothing to add up.
    """
    name = "zero3.json" if scale.device.type == "cuda" else "zero3_cpu.json"
    content = json.loads((ROOT / "ds_configs" / name).read_text(encoding="utf-8"))
    content["train_batch_size"] = 1
    content["optimizer"]["params"] |= {"torch_adam": True, "fused": True}  # compiles nothing
    if scale.device.type == "cuda":
        content["data_types"] = {"grad_accum_dtype": "bf16"}
        content["communication_data_type"] = "bf16"
    path = folder / name
    path.write_text(json.dumps(content), encoding="utf-8")
    return load_deepspeed(path, 1)


def make_loader(dataset: Dataset, cfg: RunConfig) -> Loader:
    """One rank's packs of a dataset, one a step."""
    budget = Budget(cfg.data.max_tokens, cfg.data.max_views, cfg.data.window)
    costs = dataset.tokens.astype(float)
    plan = Plan(dataset.fingerprint, 0, dataset.tokens, dataset.views, costs, budget, 1, 1)
    return Loader(dataset, plan, 0, 1)


@dataclass(frozen=True)
class Timed:
    """Some steps: seconds of each, what they trained on, and memory at their highest."""

    seconds: np.ndarray
    wait_seconds: float
    tokens: int
    flops: float
    peak_bytes: int

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / float(self.seconds.sum())

    def mfu(self, device: torch.device) -> float | None:
        peak = device_peak(device)
        return self.flops / (float(self.seconds.sum()) * peak) if peak else None

    def describe(self, device: torch.device) -> str:
        mfu = self.mfu(device)
        return (
            f"{np.median(self.seconds) * 1e3:8.1f} ms a step, {self.tokens_per_second:9,.0f} real "
            f"tokens/s, MFU {'unknown' if mfu is None else f'{mfu:.1%}'}, data wait "
            f"{self.wait_seconds / self.seconds.sum():.2%}, memory {self.peak_bytes / 1e9:.1f} GB"
        )


def time_packs(
    scale: Scale, dataset: Dataset, cfg: RunConfig, step: Callable[[Any], None], steps: int
) -> Timed:
    """Time `step` on so many packs as the loader gives them, after two that are not counted."""
    loader = make_loader(dataset, cfg).steps(Position())
    seconds, waited, tokens, flops = [], 0.0, 0, 0.0
    reset_peak(scale.device)
    for number in range(steps + 2):
        began = time.perf_counter()
        planned = next(loader)
        (batch,) = planned.batches
        step(batch)
        synchronize(scale.device)
        if number >= 2:
            (pack,) = planned.packs
            seconds.append(time.perf_counter() - began)
            waited += planned.wait_seconds
            tokens += batch.tokens
            flops += pack_flops(scale.config, dataset, pack)
    loader.close()
    return Timed(np.array(seconds), waited, tokens, flops, peak_bytes(scale.device))


def pack_flops(config: Phi3VConfig, dataset: Dataset, pack: np.ndarray) -> float:
    """Model FLOPs of training on a pack, everything trained."""
    counts = dataset.label_tokens[pack], dataset.views[pack], dataset.image_tokens[pack]
    return float(sample_flops(config, dataset.tokens[pack], *counts).sum())


class PlainLoop:
    """Training without DeepSpeed: bf16 weights, float32 copies, torch's fused AdamW on these.

    A parameter at a time, so that only one gradient is ever held in float32. Clips nothing.
    """

    def __init__(self, model: nn.Module, lr: float = 1e-6) -> None:
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.copies = [nn.Parameter(p.detach().float()) for p in self.parameters]
        self.optimizers = [torch.optim.AdamW([c], lr=lr, fused=True) for c in self.copies]

    def step(self, loss: Tensor) -> None:
        """Backward, and one optimizer step."""
        loss.backward()
        for parameter, copy, optimizer in zip(
            self.parameters, self.copies, self.optimizers, strict=True
        ):
            if parameter.grad is None:
                continue
            copy.grad = parameter.grad.float()
            parameter.grad = None
            optimizer.step()
            copy.grad = None
            parameter.data.copy_(copy.data)


def variants(scale: Scale, execution: Execution) -> Iterable[Execution]:
    """From what takes the least memory to what computes the least."""
    for language, vision in (("full", "full"), ("selective", "selective"), ("none", "none")):
        yield replace(execution, checkpointing=language, vision_checkpointing=vision)


def free(device: torch.device) -> None:
    """Give back what nobody holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int:
    """0 on a CPU, whose process has more in memory than the model."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0

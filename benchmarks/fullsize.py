"""The published model's sizes with random weights, data to feed it, and loops to time it in.

Used by gpu.py. `toy()` is the same at a size that a CPU steps through in a moment.
"""

import gc
import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mixture import Mixture, alike, draw_mixture
from timing import ROOT
from torch import Tensor, nn

from phi3v.config import DeepSpeedConfig, RunConfig, build_recipe, load_deepspeed
from phi3v.config.schema import ModelSection
from phi3v.data import Dataset
from phi3v.data.batch import Batch
from phi3v.data.loader import Loader
from phi3v.data.packing import Budget, Plan, Position
from phi3v.geometry import Grid
from phi3v.model import Phi3VConfig, Phi3VForCausalLM
from phi3v.model.execution import Execution, choose_execution
from phi3v.samples.tiny import TinySizes, tiny_config, train_tokenizer
from phi3v.training.metering import device_peak, sample_flops
from phi3v.training.ranks import Ranks

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


def full(local_rank: int = 0) -> Scale:
    """Phi-3-Vision itself: 8k packs of pictures of 1344x1008, 1,921 tokens and 100 of text each."""
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return Scale(PUBLISHED, 32064, Grid(3, 4), 8192, 40, 60, 2048, torch.bfloat16, device)


def toy() -> Scale:
    """The same in small, on a CPU."""
    cpu = torch.device("cpu")
    return Scale(TinySizes(), 1024, Grid(2, 2), 256, 10, 20, 64, torch.float32, cpu)


@dataclass(frozen=True)
class Bench:
    """What the sections of gpu.py work with.

    folder     for files that need not be kept, the same for all sections and ranks
    out        for those that are
    steps      to be timed, of each kind
    ranks      this process and those that it works with
    num_ranks  that there can be: one a GPU
    """

    scale: Scale
    folder: Path
    out: Path
    steps: int
    ranks: Ranks
    num_ranks: int

    def dataset(self, name: str) -> Dataset:
        """One of the scale's datasets; each rank has its own copy."""
        path = self.folder / f"{name}-{self.ranks.rank}" / name
        if not path.exists():
            size = self.scale.sizes.image_size
            self.scale.data()[name].write(path, size, self.scale.vocabulary)
        return Dataset(path, "train")

    @cached_property
    def execution(self) -> Execution:
        """What `auto` chooses."""
        section = ModelSection(path="unused")
        return choose_execution(section, self.scale.device, self.scale.dtype)

    def join(self) -> None:
        """Form the process group, if that is not done."""
        from phi3v.training import zero  # DeepSpeed reads its environment when it is imported

        if not torch.distributed.is_initialized():
            zero.start_process_group()

    @contextmanager
    def engine(self) -> Iterator[tuple[Any, Phi3VForCausalLM]]:
        """The engine under ZeRO-3 and its model while inside; both are freed at the end."""
        from phi3v.training import zero
        from phi3v.training.optimizer import parameter_groups

        self.join()
        self.free()  # of what a caller held until now
        model = make_model(self.scale)
        cfg = run_recipe(self.folder, self.folder, self.scale)
        ds = engine_settings(self.folder, self.scale, self.ranks)
        engine = zero.build_engine(model, parameter_groups(model, cfg), ds)
        yield engine, model
        engine.destroy()
        del engine, model
        self.free()

    def free(self) -> None:
        """Give back what nobody holds any more."""
        gc.collect()
        if self.scale.device.type == "cuda":
            torch.cuda.empty_cache()


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


def recipe_of(bench: Bench, dataset: Dataset) -> RunConfig:
    """A recipe for a dataset, of a budget that its longest sample fits into."""
    cfg = run_recipe(bench.folder, dataset.folder, bench.scale)
    max_tokens = max(int(dataset.tokens.max()), cfg.data.max_tokens)
    max_views = max(int(dataset.views.max()), cfg.data.max_views)
    return replace(cfg, data=replace(cfg.data, max_tokens=max_tokens, max_views=max_views))


def engine_settings(folder: Path, scale: Scale, ranks: Ranks) -> DeepSpeedConfig:
    """The shipped JSON for one pack on each rank, and gradients in bf16 on a single GPU.

    One rank holds everything: float32 gradients of 4.15 B weights would take 16.6 GB more, and with
    one round there is nothing to add up.
    """
    name = "zero3.json" if scale.device.type == "cuda" else "zero3_cpu.json"
    content = json.loads((ROOT / "ds_configs" / name).read_text(encoding="utf-8"))
    content["train_batch_size"] = ranks.world_size
    content["optimizer"]["params"] |= {"torch_adam": True, "fused": True}  # compiles nothing
    if scale.device.type == "cuda" and ranks.world_size == 1:
        content["data_types"] = {"grad_accum_dtype": "bf16"}
        content["communication_data_type"] = "bf16"
    path = folder / f"{ranks.rank}-{name}"
    path.write_text(json.dumps(content), encoding="utf-8")
    return load_deepspeed(path, ranks.world_size)


def make_loader(dataset: Dataset, cfg: RunConfig, ranks: Ranks, device: torch.device) -> Loader:
    """This rank's packs of a dataset, one a step."""
    budget = Budget(cfg.data.max_tokens, cfg.data.max_views, cfg.data.window)
    costs, packs = dataset.tokens.astype(float), ranks.world_size
    plan = Plan(dataset.fingerprint, 0, dataset.tokens, dataset.views, costs, budget, packs, 1)
    return Loader(dataset, plan, ranks.rank, packs, device)


@dataclass(frozen=True)
class Timed:
    """Some steps of all ranks: seconds of each, what they trained on, and this rank's memory."""

    seconds: np.ndarray
    wait_seconds: float
    tokens: int
    flops: float
    peak_bytes: int
    ranks: int

    @property
    def tokens_per_second(self) -> float:
        """Of one rank."""
        return self.tokens / float(self.seconds.sum()) / self.ranks

    def mfu(self, device: torch.device) -> float | None:
        peak = device_peak(device)
        seconds = float(self.seconds.sum()) * self.ranks
        return self.flops / (seconds * peak) if peak else None

    def describe(self, device: torch.device) -> str:
        mfu = self.mfu(device)
        return (
            f"{np.median(self.seconds) * 1e3:.1f} ms a step, {self.tokens_per_second:,.0f} real "
            f"tokens/s a rank, MFU {'unknown' if mfu is None else f'{mfu:.1%}'}, data wait "
            f"{self.wait_seconds / self.seconds.sum():.2%}, memory {self.peak_bytes / 1e9:.1f} GB"
        )


def time_packs(
    bench: Bench, dataset: Dataset, cfg: RunConfig, step: Callable[[Batch], object], steps: int
) -> Timed:
    """Time `step` on so many packs as the loader gives them, after two that are not counted."""
    device = bench.scale.device
    loader = make_loader(dataset, cfg, bench.ranks, device)
    coming = loader.steps(Position())
    seconds, waited, tokens, flops = [], 0.0, 0, 0.0
    reset_peak(device)
    for number in range(steps + 2):
        began = time.perf_counter()
        planned = next(coming)
        for batch in loader.on_device(planned.batches):
            step(batch)
        synchronize(device)
        if number >= 2:
            seconds.append(time.perf_counter() - began)
            waited += planned.wait_seconds
            for pack in planned.packs:
                tokens += int(dataset.tokens[pack].sum())
                flops += pack_flops(bench.scale.config, dataset, pack)
    coming.close()
    peak = peak_bytes(device)
    return Timed(np.array(seconds), waited, tokens, flops, peak, bench.ranks.world_size)


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


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int:
    """0 on a CPU, whose process has more in memory than the model."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0

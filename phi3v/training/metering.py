"""What a step cost: model FLOPs, and the share of the hardware's peak (MFU)."""

import resource
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from phi3v.config import MODULES, DeepSpeedConfig, RunConfig
from phi3v.data import Dataset
from phi3v.data.loader import Step
from phi3v.model import Phi3VConfig

# Dense bf16 peak of a device in FLOP/s, by a word of its name. MFU is null for any other.
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}


@dataclass(frozen=True)
class Meter:
    """Turns a step and its seconds into the numbers of metrics.jsonl."""

    dataset: Dataset
    config: Phi3VConfig
    cfg: RunConfig
    ds: DeepSpeedConfig
    world_size: int
    device: torch.device

    def measure(self, step: Step, seconds: float) -> dict[str, Any]:
        """Counts over all ranks; seconds and memory of this one."""
        samples = np.concatenate(step.packs)
        tokens = int(self.dataset.tokens[samples].sum())
        costs = [self._flops(pack) for pack in step.packs]
        flops, peak = sum(costs), device_peak(self.device)
        return {
            "samples": len(samples),
            "tokens": tokens,
            "label_tokens": int(self.dataset.label_tokens[samples].sum()),
            "views": int(self.dataset.views[samples].sum()),
            "step_seconds": seconds,
            "data_wait_seconds": step.wait_seconds,
            "tokens_per_second": tokens / seconds,
            "flops": flops,
            "mfu": flops / (seconds * self.world_size * peak) if peak else None,
            "memory_gb": self._memory(),
            "packing": tokens / (len(step.packs) * self.cfg.data.max_tokens),
            "balance": self._balance(costs),
        }

    def _flops(self, pack: np.ndarray) -> float:
        data = self.dataset
        trained, views = int(data.label_tokens[pack].sum()), int(data.views[pack].sum())
        image_tokens = int(data.image_tokens[pack].sum())
        frozen = self.cfg.model.freeze
        return step_flops(self.config, data.tokens[pack], trained, views, image_tokens, frozen)

    def _balance(self, costs: Sequence[float]) -> float:
        """Mean over maximum cost of the packs that run side by side, over the step's rounds."""
        rounds = np.array(costs).reshape(-1, self.world_size)
        return float(rounds.mean() * len(rounds) / max(rounds.max(axis=1).sum(), 1))

    def _memory(self) -> float:
        """Peak memory of this rank so far, in GB: the device's, or the process's on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 1e9
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def step_flops(
    config: Phi3VConfig,
    tokens: np.ndarray,
    label_tokens: int,
    views: int,
    image_tokens: int,
    frozen: Sequence[str] = (),
) -> float:
    """Model FLOPs of training on some samples, forward and backward.

    tokens        (samples,) lengths; attention counts its causal half
    label_tokens  positions where logits are made
    A matrix of n weights costs 2n per token forward and 4n backward: half of that for its own
    gradient, which a frozen part does not need, half for the gradient of what comes in, which is
    needed where something below it is trained. Padding and recomputation are never counted.
    """
    width, mlp, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    keys = width * config.num_key_value_heads // config.num_attention_heads
    matrices = layers * (2 * width * width + 2 * width * keys + 3 * width * mlp)
    language = 2 * matrices * int(tokens.sum())
    attention = 2 * layers * width * float(np.square(tokens.astype(np.float64)).sum())
    head = 2 * width * config.vocab_size * label_tokens
    trained = {name for name in MODULES if name not in frozen}
    pictures = bool(trained & {"vision", "projector"})
    body = pictures or bool(trained & {"embeddings", "language"})
    return (
        head * (1 + body + ("head" in trained))
        + language * (1 + body + ("language" in trained))
        + attention * (1 + 2 * body)
        + image_tokens * projector_flops(config) * (1 + pictures + ("projector" in trained))
        + views * view_flops(config) * (3 if "vision" in trained else 1)
    )


def view_flops(config: Phi3VConfig) -> float:
    """Forward FLOPs of the tower on one view; only the layers that are used."""
    tower = config.vision_config
    width, patches = tower.hidden_size, (tower.image_size // tower.patch_size) ** 2
    tokens = patches + 1
    layer = 2 * (4 * width * width + 2 * width * tower.intermediate_size) * tokens
    layer += 4 * tokens * tokens * width
    return config.tower_layers * layer + 2 * 3 * tower.patch_size**2 * width * patches


def projector_flops(config: Phi3VConfig) -> float:
    """Forward FLOPs of the projector on one image token."""
    width = config.hidden_size
    return 2 * (4 * config.vision_config.hidden_size * width + width * width)


def device_peak(device: torch.device) -> float | None:
    """Peak FLOP/s of one device in bf16, None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for word, peak in PEAKS.items() if word in name), None)

"""What samples cost and what a step achieved: model FLOPs, their share of the peak (MFU), rates.

    costs = sample_costs(config, dataset, cfg.data.cost, cfg.model.freeze)  # for data.packing.Plan
    metrics |= meter.measure(step, seconds)

There is one formula, `sample_flops`; what a pack, a step or a run costs is a sum of it. It leaves
out the blank view that a pack without images runs through the tower, which is no useful work: with
the published sizes as much as 49 trained tokens are.
"""

import re
import resource
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch

from phi3v.config import MODULES, DeepSpeedConfig, RunConfig
from phi3v.config.schema import CostSection
from phi3v.data.loader import Step
from phi3v.model import Phi3VConfig

# Dense bf16 peak in FLOP/s by words of a device's name; the first line that fits counts.
# Source: NVIDIA's data sheets of these products; half of a figure that is given with sparsity.
PEAKS = {
    "MIG": None,  # a slice of a device, with a slice of its peak
    "B200": 2250e12,
    "GH200": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "A40": 149.7e12,
}


class Lengths(Protocol):
    """What is known of all samples before any is read, each (samples,); a Dataset or a Mixture."""

    @property
    def tokens(self) -> np.ndarray: ...
    @property
    def label_tokens(self) -> np.ndarray: ...
    @property
    def views(self) -> np.ndarray: ...
    @property
    def image_tokens(self) -> np.ndarray: ...


class Meter:
    """Turns each step of this process and its seconds into the numbers of metrics.jsonl."""

    def __init__(
        self,
        dataset: Lengths,
        config: Phi3VConfig,
        cfg: RunConfig,
        ds: DeepSpeedConfig,
        world_size: int,
        device: torch.device,
    ) -> None:
        self._dataset, self._world_size, self._device = dataset, world_size, device
        self._max_tokens, frozen = cfg.data.max_tokens, cfg.model.freeze
        self._flops = dataset_flops(config, dataset, frozen)
        self._costs = sample_costs(config, dataset, cfg.data.cost, frozen)
        self._peak = device_peak(device) if ds.bf16 else None
        self._num_measured = 0

    def measure(self, step: Step, seconds: float) -> dict[str, Any]:
        """Counts, rates and balance over all ranks; seconds, data wait and memory of this one.

        Rank 0, whose numbers are kept, takes the dearest pack of every round, so its peak memory is
        the largest or close to it; to ask all ranks would be one more collective in every step.
        `is_warmup` marks the process's first step, in which kernels are compiled and chosen.
        """
        samples, data = np.concatenate(step.packs), self._dataset
        tokens, views = int(data.tokens[samples].sum()), int(data.views[samples].sum())
        flops = float(self._flops[samples].sum())
        self._num_measured += 1
        return {
            "samples": len(samples),
            "tokens": tokens,
            "label_tokens": int(data.label_tokens[samples].sum()),
            "views": views,
            "step_seconds": seconds,
            "data_wait_seconds": step.wait_seconds,
            "tokens_per_second": tokens / seconds,
            "flops": flops,
            "mfu": flops / (seconds * self._world_size * self._peak) if self._peak else None,
            "memory_gb": peak_memory(self._device),
            "packing": tokens / (len(step.packs) * self._max_tokens),
            "balance": balance([self._costs[pack].sum() for pack in step.packs], self._world_size),
            "views_per_second": views / seconds,
            "is_warmup": self._num_measured == 1,
        }


def balance(costs: Sequence[float], world_size: int) -> float:
    """Mean over maximum cost of the packs that run side by side, over all rounds of a step.

    costs  of the step's packs; those of a round follow each other
    """
    rounds = np.reshape(costs, (-1, world_size))
    longest = rounds.max(axis=1).sum() * world_size
    return float(rounds.sum() / longest) if longest else 1.0


def sample_costs(
    config: Phi3VConfig, dataset: Lengths, cost: CostSection, frozen: Sequence[str] = ()
) -> np.ndarray:
    """What each sample is expected to take, by which packs are grouped and balance is measured.

    cost     the recipe's `data.cost`: its linear form, or model FLOPs where it is not given
    returns  (samples,) float64, in the recipe's unit or FLOPs
    """
    if not cost.is_given:
        return dataset_flops(config, dataset, frozen)
    tokens = dataset.tokens.astype(np.float64)
    return (
        cost.token * tokens
        + cost.token_pair * tokens**2
        + cost.view * dataset.views
        + cost.label_token * dataset.label_tokens
    )


def dataset_flops(config: Phi3VConfig, dataset: Lengths, frozen: Sequence[str]) -> np.ndarray:
    """Model FLOPs of training on each sample of a dataset, float64 (samples,)."""
    counts = dataset.label_tokens, dataset.views, dataset.image_tokens
    return sample_flops(config, dataset.tokens, *counts, frozen)


def sample_flops(
    config: Phi3VConfig,
    tokens: np.ndarray,
    label_tokens: np.ndarray,
    views: np.ndarray,
    image_tokens: np.ndarray,
    frozen: Sequence[str] = (),
) -> np.ndarray:
    """Model FLOPs of training on each sample, forward and backward.

    tokens        (samples,) lengths; attention counts its causal half
    label_tokens  (samples,) positions where logits are made, which alone go on behind the last
                  layer's attention
    views         (samples,) views in the tower
    image_tokens  (samples,) positions that the projector fills
    returns       (samples,) float64

    A matrix of n weights costs 2n per token forward and 4n backward: half of that for its own
    gradient, which a frozen part does not need, half for the gradient of what comes in, which is
    needed where something below it is trained. Padding and recomputation are never counted.
    """
    tokens, label_tokens, views, image_tokens = (
        np.asarray(counts, dtype=np.float64)
        for counts in (tokens, label_tokens, views, image_tokens)
    )
    width, mlp, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    keys = width * config.num_key_value_heads // config.num_attention_heads
    before, behind = width * (width + 2 * keys), width * (width + 3 * mlp)  # of a layer's attention
    trained = {name for name in MODULES if name not in frozen}
    pictures = bool(trained & {"vision", "projector"})
    body = pictures or bool(trained & {"embeddings", "language"})
    factor = 1 + body + ("language" in trained)
    return (
        label_tokens * 2 * width * config.vocab_size * (1 + body + ("head" in trained))
        + tokens * 2 * (layers * before + (layers - 1) * behind) * factor
        + label_tokens * 2 * behind * factor
        + tokens**2 * 2 * layers * width * (1 + 2 * body)
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
    """Dense peak FLOP/s of one device in bf16, None where it is not known."""
    if device.type != "cuda":
        return None
    words = set(re.split("[ -]", torch.cuda.get_device_name(device)))
    return next((peak for name, peak in PEAKS.items() if words.issuperset(name.split())), None)


def peak_memory(device: torch.device) -> float:
    """Peak memory of this process so far, in GB: the device's, or on a CPU the process's own."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9

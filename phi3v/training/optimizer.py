"""Which parameters are trained, at what learning rate, and how it changes over the run."""

import math
import re
from typing import Any

from torch import nn

from phi3v.config import MODULES, Module, RunConfig
from phi3v.model import Phi3VForCausalLM

PREFIXES: tuple[tuple[str, Module], ...] = (
    ("model.vision_embed_tokens.img_processor.", "vision"),
    ("model.vision_embed_tokens.", "projector"),
    ("model.embed_tokens.", "embeddings"),
    ("lm_head.", "head"),
    ("model.", "language"),
)
TOWER_LAYER = re.compile(r"\.encoder\.layers\.(\d+)\.")
# Not matrices, or no matrix that anything is multiplied with: they are put into the sequence
# (separators, in two or three empty dimensions) or added to it (a bias for each place of a view).
ADDED = ("_GN", "position_embedding.weight")


def module_of(name: str) -> Module:
    """The part of the model that a parameter belongs to; the first prefix that fits."""
    return next(module for prefix, module in PREFIXES if name.startswith(prefix))


def freeze(model: nn.Module, modules: tuple[Module, ...]) -> None:
    """Exclude whole parts of the model from training."""
    for name, parameter in model.named_parameters():
        if module_of(name) in modules:
            parameter.requires_grad_(False)


def parameter_groups(model: Phi3VForCausalLM, cfg: RunConfig) -> list[dict[str, Any]]:
    """Group what is trained by module, by decay, and in the tower by layer if layers differ.

    Matrices and token embeddings decay. Norms, biases, separators, the class token and the tower's
    positions do not. A group's `lr_scale` is its share of its module's learning rate, which
    `zero.set_learning_rates` sets. 23 layers of their own learning rates make 46 groups more, and
    as many calls of the optimizer's kernel.
    """
    groups: dict[tuple[Module, float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = (module_of(name), _lr_scale(name, model, cfg), _decays(name, parameter))
            groups.setdefault(key, []).append(parameter)
    return [
        {
            "params": groups[module, scale, decays],
            "name": module,
            "lr": cfg.optim.peak_lr(module) * scale,
            "lr_scale": scale,
            "weight_decay": cfg.optim.weight_decay if decays else 0.0,
        }
        for module, scale, decays in sorted(groups, key=_order)
    ]


def _order(key: tuple[Module, float, bool]) -> tuple[int, float, bool]:
    """Modules in their order, upper layers first, what decays first."""
    module, scale, decays = key
    return MODULES.index(module), -scale, not decays


def _lr_scale(name: str, model: Phi3VForCausalLM, cfg: RunConfig) -> float:
    """A parameter's share of its module's learning rate.

    The tower's top layer that is used has all of it, each below `optim.vision_layer_decay` times
    that of the one above; embeddings and the norm before the layers stand below the lowest. With
    3 layers and 0.5: 1, 0.5, 0.25, and 0.125 for the embeddings.

    Source: BEiT (arXiv 2106.08254), layer-wise learning rate decay.
    """
    if module_of(name) != "vision":
        return 1.0
    layer = TOWER_LAYER.search(name)
    height = int(layer[1]) + 1 if layer else 0
    scale: float = cfg.optim.vision_layer_decay ** (model.config.tower_layers - height)
    return scale


def _decays(name: str, parameter: nn.Parameter) -> bool:
    shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 leaves a divided one empty
    return len(shape) > 1 and not name.endswith(ADDED)


def lr_factor(step: int, total_steps: int, cfg: RunConfig) -> float:
    """The learning rate of step 1, 2, ... as a share of the peak.

    Rises in a line over the warm-up, then falls to `min_lr_ratio` at the last step.
    """
    optim = cfg.optim
    warmup = optim.warmup(total_steps)
    if step <= warmup:
        return step / warmup
    done = (step - warmup) / max(1, total_steps - warmup)
    shapes = {
        "constant": 1.0,
        "linear": 1 - done,
        "cosine": 0.5 * (1 + math.cos(math.pi * min(done, 1.0))),
    }
    return optim.min_lr_ratio + (1 - optim.min_lr_ratio) * shapes[optim.schedule]


def learning_rates(step: int, total_steps: int, cfg: RunConfig) -> dict[Module, float]:
    """The learning rate of every trained module at a step; of the tower, that of its top layer."""
    factor = lr_factor(step, total_steps, cfg)
    return {module: cfg.optim.peak_lr(module) * factor for module in cfg.model.trained}

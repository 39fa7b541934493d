"""Which parameters are trained, at what learning rate, and how it changes over the run."""

import math
from typing import Any

from torch import nn

from phi3v.config import MODULES, Module, RunConfig

PREFIXES: tuple[tuple[str, Module], ...] = (
    ("model.vision_embed_tokens.img_processor.", "vision"),
    ("model.vision_embed_tokens.", "projector"),
    ("model.embed_tokens.", "embeddings"),
    ("lm_head.", "head"),
    ("model.", "language"),
)


def module_of(name: str) -> Module:
    """The part of the model that a parameter belongs to; the first prefix that fits."""
    return next(module for prefix, module in PREFIXES if name.startswith(prefix))


def freeze(model: nn.Module, modules: tuple[Module, ...]) -> None:
    """Exclude whole parts of the model from training."""
    for name, parameter in model.named_parameters():
        if module_of(name) in modules:
            parameter.requires_grad_(False)


def parameter_groups(model: nn.Module, cfg: RunConfig) -> list[dict[str, Any]]:
    """Group what is trained by module, matrices apart from norms and biases.

    Norms, biases, separators and the class token have no weight decay.
    """
    groups: list[dict[str, Any]] = []
    for module in MODULES:
        named = [
            (name, p)
            for name, p in model.named_parameters()
            if p.requires_grad and module_of(name) == module
        ]
        for decays in (True, False):
            chosen = [p for name, p in named if _decays(name, p) == decays]
            if chosen:
                decay = cfg.optim.weight_decay if decays else 0.0
                lr = cfg.optim.peak_lr(module)
                groups.append({"params": chosen, "lr": lr, "weight_decay": decay, "name": module})
    return groups


def _decays(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim > 1 and not name.endswith("_GN")


def lr_factor(step: int, total_steps: int, cfg: RunConfig) -> float:
    """The learning rate of step 1, 2, ... as a share of the peak.

    Rises in a line over `warmup_steps`, then falls to `min_lr_ratio` at the last step.
    """
    optim = cfg.optim
    if step <= optim.warmup_steps:
        return step / optim.warmup_steps
    done = (step - optim.warmup_steps) / max(1, total_steps - optim.warmup_steps)
    shapes = {
        "constant": 1.0,
        "linear": 1 - done,
        "cosine": 0.5 * (1 + math.cos(math.pi * min(done, 1.0))),
    }
    return optim.min_lr_ratio + (1 - optim.min_lr_ratio) * shapes[optim.schedule]


def learning_rates(step: int, total_steps: int, cfg: RunConfig) -> dict[Module, float]:
    """The learning rate of every trained module at a step."""
    factor = lr_factor(step, total_steps, cfg)
    trained = [module for module in MODULES if module not in cfg.model.freeze]
    return {module: cfg.optim.peak_lr(module) * factor for module in trained}

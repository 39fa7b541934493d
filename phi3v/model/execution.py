"""How a model computes: kernels, what is computed twice, where memory is. Not what it computes.

execution = choose_execution(cfg.model, device, torch.bfloat16)    # once, and logged
model.set_execution(execution)
"""

from dataclasses import asdict, dataclass

import torch

from phi3v.config.schema import Checkpointing, ModelSection
from phi3v.errors import ConfigError
from phi3v.model.attention import SDPA, choose_attention
from phi3v.model.kernels import kernel_obstacle
from phi3v.model.loss import Loss, choose_loss


@dataclass(frozen=True, kw_only=True)
class Execution:
    """The defaults run everywhere; `attention` is a registered name (see attention.py).

    eager_because  why kernels are not compiled although `model.kernels: auto` would have them so
    """

    attention: str = SDPA
    loss: Loss = "chunked"
    compiled: bool = False
    eager_because: str | None = None
    checkpointing: Checkpointing = "none"
    vision_checkpointing: Checkpointing = "none"
    offload: bool = False

    def __str__(self) -> str:
        values = {name: value for name, value in asdict(self).items() if value is not None}
        return ", ".join(f"{name} {value}" for name, value in values.items())


def choose_execution(
    section: ModelSection, device: torch.device, dtype: torch.dtype = torch.float32
) -> Execution:
    """Find what a recipe's `model` section asks for on a device, for weights of `dtype`.

    Raises: ConfigError if a kernel that it names cannot run there.
    """
    compiled = section.kernels == "compiled" or (
        section.kernels == "auto" and device.type == "cuda"
    )
    obstacle = kernel_obstacle(device) if compiled else None
    if obstacle and section.kernels == "compiled":
        raise ConfigError(
            f"model.kernels=compiled cannot be had on this {device.type} device: {obstacle}; or "
            "set model.kernels=eager"
        )
    return Execution(
        attention=choose_attention(section.attention, device, dtype),
        loss=choose_loss(section.loss, device),
        compiled=compiled and obstacle is None,
        eager_because=obstacle,
        checkpointing=section.checkpointing,
        vision_checkpointing=section.tower_checkpointing,
        offload=section.offload_activations,
    )

"""From the host to the device without waiting for what the device still computes."""

import torch
from torch import Tensor


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Ask for a copy on the device; from pinned memory, since CUDA waits to read any other.

    A tensor that lies on a CUDA device, or is wanted elsewhere than there, is moved as usual.
    """
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)

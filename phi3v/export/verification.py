"""Reading an export back before it is announced.

Two things are compared, bit for bit: every tensor of the new files with the checkpoint's, and the
logits of a prompt with a picture, of the folder as from_pretrained opens it and of the checkpoint's
weights in the base's own configuration. The first finds a bad disk or writer, the second a folder
whose config.json, tokenizer or image settings do not belong to its weights.

Memory: transformers maps the new files, and the other side holds one layer at a time beside the
embeddings, the head and the projector.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoProcessor

from phi3v.errors import CheckpointError
from phi3v.model import LAYERS, Phi3VConfig, Phi3VForCausalLM
from phi3v.model.weights import WeightFiles, parameter_places
from phi3v.processing import Phi3VProcessor
from phi3v.processing.prompt import encode
from phi3v.progress import progress
from phi3v.training.checkpoints.reading import CheckpointWeights

PROMPT = "<|user|>\n<|image_1|>\nWhat is shown in this image?<|end|>\n<|assistant|>\n"
ADVICE = "check the disk and export again"


def compare_tensors(
    folder: Path, weights: CheckpointWeights, names: Sequence[str], dtype: torch.dtype
) -> None:
    """Compare the files of a folder with the checkpoint.

    Raises: CheckpointError naming the first tensor that came back changed.
    """
    bar = progress(names, "compare", "tensor", leave=False)
    with bar, WeightFiles(folder) as files:
        if differing := sorted(set(names) ^ files.shapes().keys()):
            raise CheckpointError(f"{folder} does not hold the tensors it should: {differing[0]}")
        for name in bar:
            if not is_same(files.read(name), weights.read(name).to(dtype)):
                raise CheckpointError(f"{folder} does not read back as written: {name}; {ADVICE}")


def compare_logits(
    folder: Path, weights: CheckpointWeights, config: Phi3VConfig, dtype: torch.dtype
) -> None:
    """Compare what the folder computes with what the checkpoint does.

    config  the base's
    Raises: CheckpointError if they differ.
    """
    processor = AutoProcessor.from_pretrained(folder, num_crops=1)
    inputs = golden_inputs(processor)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    found, expected = _logits(model, inputs), _logits(by_layers(weights, config, dtype), inputs)
    if not is_same(found, expected):
        far = float((found - expected).abs().max())
        raise CheckpointError(
            f"{folder} gives other logits than {weights.folder}, by up to {far:.2g}, with equal "
            f"weights: its config.json is read as another model; {ADVICE}"
        )


def is_same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal in dtype, shape and every bit; so are two NaN."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    pair = (tensor.contiguous().flatten().view(torch.uint8) for tensor in (one, other))
    return torch.equal(*pair)


def golden_inputs(processor: Phi3VProcessor) -> dict[str, Tensor]:
    """A prompt with a picture of one crop, drawn by a formula: 340 published tokens."""
    side = processor.crop_size
    values = np.arange(side * side * 3) * 7919 % 251
    canvas = values.reshape(side, side, 3).astype(np.uint8)
    ids = encode(processor.tokenizer, PROMPT, [processor.canvas_tokens(canvas)])
    return {
        "input_ids": torch.tensor([ids]),
        "pixel_values": processor.pixel_values([canvas]),
        "image_sizes": torch.tensor([canvas.shape[:2]]),
    }


def _logits(model: Phi3VForCausalLM, inputs: dict[str, Tensor]) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = model.eval()(**inputs).logits
    return logits


def by_layers(
    weights: CheckpointWeights, config: Phi3VConfig, dtype: torch.dtype
) -> Phi3VForCausalLM:
    """The checkpoint's model, each layer of which has its weights while it computes."""
    with torch.device("meta"):
        model = Phi3VForCausalLM(config)
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, LAYERS)]
    for name, module, own in list(parameter_places(model)):
        if not name.startswith(tuple(f"{layer}." for layer, _ in layers)):
            setattr(module, own, _parameter(weights.read(name).to(dtype)))
    for prefix, layer in layers:
        layer.register_forward_pre_hook(_filling(weights, prefix, dtype))
        layer.register_forward_hook(_empty)
    return model


def _filling(
    weights: CheckpointWeights, prefix: str, dtype: torch.dtype
) -> Callable[[nn.Module, object], None]:
    """A hook that gives a layer its weights."""

    def fill(layer: nn.Module, _: object) -> None:
        for name, module, own in list(parameter_places(layer)):
            setattr(module, own, _parameter(weights.read(f"{prefix}.{name}").to(dtype)))

    return fill


def _empty(layer: nn.Module, *_: object) -> None:
    """A hook that takes a layer's weights away."""
    layer.to("meta")


def _parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)

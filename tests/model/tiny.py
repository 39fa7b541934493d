"""A model of two small layers, and conversations drawn at random to feed it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from phi3v.geometry import Grid, image_tokens
from phi3v.model import Phi3VConfig, Phi3VForCausalLM
from phi3v.sample import IGNORED
from phi3v.samples.tiny import TinySizes, tiny_config, train_tokenizer

LIMIT = 64  # tokens up to which the short rotary factors hold
SLOTS = 5
SIZES = TinySizes(
    vision_width=16,
    vision_layers=3,
    vision_heads=2,
    width=32,
    layers=2,
    heads=4,
    mlp_width=64,
    text_pieces=40,
    original_positions=LIMIT,
    positions=1024,
)
TOKENIZER = train_tokenizer(["a red cat", "a green boat, 12.50 EUR"], SIZES.text_pieces)
SIDE = SIZES.image_size // (2 * SIZES.patch_size)


def make_model(**changes: Any) -> Phi3VForCausalLM:
    """A float32 model in which every weight matters: no separator, bias or norm is 0 or 1."""
    config = Phi3VConfig.from_dict(tiny_config(SIZES, TOKENIZER).to_dict() | changes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Phi3VForCausalLM(config)
        for name, parameter in model.named_parameters():
            is_norm = "norm" in name and name.endswith("weight")
            nn.init.normal_(parameter, mean=1.0 if is_norm else 0.0, std=0.2)
    model.generation_config.eos_token_id = None  # generate as many tokens as are asked for
    return model.eval()


@dataclass(frozen=True)
class Drawn:
    """One conversation: ids and labels (1, T), views (N, 3, size, size) of its images, or None."""

    ids: Tensor
    labels: Tensor
    views: Tensor | None
    grids: tuple[Grid, ...]

    @property
    def tokens(self) -> int:
        return self.ids.shape[1]

    @property
    def inputs(self) -> dict[str, Tensor]:
        """The arguments of the published call, without labels."""
        if self.views is None:
            return {"input_ids": self.ids}
        size = SIZES.image_size
        pixels = torch.zeros(len(self.grids), SLOTS, 3, size, size)
        views = self.views.split([grid.views for grid in self.grids])
        for slots, of_image in zip(pixels, views, strict=True):
            slots[: len(of_image)] = of_image
        sizes = torch.tensor([[grid.rows * size, grid.cols * size] for grid in self.grids])
        return {"input_ids": self.ids, "pixel_values": pixels, "image_sizes": sizes}


def draw(seed: int, text_tokens: int, grids: Sequence[Grid] = ()) -> Drawn:
    """A conversation: text, then the images with a token behind each; labels on half the text."""
    source = torch.Generator().manual_seed(seed)
    text = torch.randint(1, TOKENIZER.get_vocab_size(), (text_tokens,), generator=source)
    pieces = [text]
    for number, grid in enumerate(grids, start=1):
        pieces += [torch.full((image_tokens(grid, SIDE),), -number), torch.tensor([1])]
    ids = torch.cat(pieces)
    is_trained = (torch.rand(len(ids), generator=source) < 0.5) & (ids >= 0)
    labels = torch.where(is_trained, ids, IGNORED)
    views = None
    if grids:
        shape = (sum(grid.views for grid in grids), 3, SIZES.image_size, SIZES.image_size)
        views = torch.randn(shape, generator=source)
    return Drawn(ids[None], labels[None], views, tuple(grids))


def pack(samples: Sequence[Drawn]) -> dict[str, Any]:
    """The arguments of the packed call."""
    views = [sample.views for sample in samples if sample.views is not None]
    return {
        "input_ids": torch.cat([sample.ids for sample in samples], dim=1),
        "labels": torch.cat([sample.labels for sample in samples], dim=1),
        "segment_lengths": [sample.tokens for sample in samples],
        "views": torch.cat(views) if views else None,
        "grids": [grid for sample in samples for grid in sample.grids],
    }


def gradients(model: Phi3VForCausalLM) -> dict[str, Tensor | None]:
    """Take the gradients out of a model."""
    taken = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return taken

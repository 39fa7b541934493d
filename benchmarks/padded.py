"""The usual recipe, to be timed beside ours: padded batches, zero slots, all layers, full logits.

What loaders and trainers for this model do: every row padded to its batch's longest, every image to
num_crops + 1 views of which the unused are zeros, all layers of the tower computed, logits at every
position. Its layers are transformers' own; its parameters are those of the model it is given, so
both sides train the same weights and their losses can be compared.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad
from torch.utils.checkpoint import checkpoint
from transformers.models.clip.modeling_clip import CLIPEncoderLayer
from transformers.models.phi3.modeling_phi3 import Phi3DecoderLayer

from phi3v.geometry import grid_of
from phi3v.model import Phi3VForCausalLM
from phi3v.model.rotary import rotary
from phi3v.sample import IGNORED, Canvas, Sample
from phi3v.views import ViewSettings, make_views

ROWS = 4


class PaddedRecipe(nn.Module):
    """transformers' layers around the parameters of `model`; called with what `pad_rows` gives."""

    def __init__(self, model: Phi3VForCausalLM) -> None:
        super().__init__()
        self.model = model
        self.config = copy.deepcopy(model.config)
        self.config._attn_implementation = "sdpa"
        self.config.vision_config._attn_implementation = "sdpa"
        tower = model.model.vision_embed_tokens.img_processor.vision_model
        with torch.device("meta"):
            decoder = [Phi3DecoderLayer(self.config, i) for i in range(len(model.model.layers))]
            vision = [CLIPEncoderLayer(self.config.vision_config) for _ in tower.encoder.layers]
        self.decoder, self.vision = nn.ModuleList(decoder), nn.ModuleList(vision)
        pairs = (self.decoder, model.model.layers), (self.vision, tower.encoder.layers)
        for stock, ours in pairs:
            stock.load_state_dict(ours.state_dict(keep_vars=True), assign=True)

    def take_over(self) -> None:
        """Remove the model's own layers, so that every parameter has one module."""
        body = self.model.model
        body.layers = nn.ModuleList()
        body.vision_embed_tokens.img_processor.vision_model.encoder.layers = nn.ModuleList()

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        pixel_values: Tensor | None,
        grids: Sequence[Any],
        recompute: bool = False,
    ) -> Tensor:
        """Sum of the losses of the trained tokens.

        input_ids, labels  (B, T), padded on the right, where causal attention needs no mask
        pixel_values       (I, slots, 3, size, size) float32
        grids              of each image, None for a blank one
        """
        body = self.model.model
        hidden = body.embed_tokens(input_ids.clamp(min=0))
        if pixel_values is not None:
            images = self.embed_images(pixel_values, grids, recompute).to(hidden.dtype)
            hidden = hidden.masked_scatter(input_ids[..., None] < 0, images)
        positions = torch.arange(input_ids.shape[1], device=hidden.device)[None]
        is_long = positions.shape[1] > self.config.original_max_position_embeddings
        angles = rotary(self.config, positions, is_long, hidden.dtype)
        for layer in self.decoder:
            hidden = _run(layer, recompute, hidden, attention_mask=None, position_embeddings=angles)
        logits = self.model.lm_head(body.norm(hidden)).float()  # (B, T, V)
        targets = labels[:, 1:].flatten()
        flat = logits[:, :-1].flatten(0, 1)
        return cross_entropy(flat, targets, ignore_index=IGNORED, reduction="sum")

    def embed_images(self, pixel_values: Tensor, grids: Sequence[Any], recompute: bool) -> Tensor:
        embedding = self.model.model.vision_embed_tokens
        tower = embedding.img_processor.vision_model
        states = [tower.pre_layrnorm(tower.embeddings(pixel_values.flatten(0, 1)))]
        for layer in self.vision:
            states.append(_run(layer, recompute, states[-1], attention_mask=None))
        patches = states[-2][:, 1:].unflatten(0, pixel_values.shape[:2])  # (I, slots, P, C)
        sequences = [
            embedding.arrange(of_image[: grid.views], grid)
            for of_image, grid in zip(patches, grids, strict=True)
            if grid is not None
        ]
        return embedding.img_projection(torch.cat(sequences))


def _run(layer: nn.Module, recompute: bool, hidden: Tensor, **arguments: Any) -> Tensor:
    if not recompute:
        return layer(hidden, **arguments)
    return checkpoint(layer, hidden, use_reentrant=False, **arguments)


def pad_rows(
    samples: Sequence[Sample],
    settings: ViewSettings,
    slots: int,
    pad_id: int,
    device: torch.device,
    is_square: bool = False,
) -> dict[str, Any]:
    """A batch of the usual recipe; views are made here, as its data loader does.

    With `is_square` every row has as many images as the row that has most, blank ones if need be.
    """
    longest = max(len(sample.input_ids) for sample in samples)

    def rows(name: str, filler: int) -> Tensor:
        arrays = [torch.from_numpy(getattr(sample, name)).long() for sample in samples]
        return torch.stack([pad(a, (0, longest - len(a)), value=filler) for a in arrays]).to(device)

    most = max(len(sample.images) for sample in samples) if is_square else 0
    images: list[Canvas | None] = []
    for sample in samples:
        images += [*sample.images, *[None] * (most - len(sample.images))]
    size = settings.crop_size
    pixels = torch.zeros(len(images), slots, 3, size, size)
    for slot, image in zip(pixels, images, strict=True):
        if image is not None:
            views = make_views(torch.tensor(image.pixels), settings)
            slot[: len(views)] = views
    return {
        "input_ids": rows("input_ids", pad_id),
        "labels": rows("labels", IGNORED),
        "pixel_values": pixels.to(device) if images else None,
        "grids": [image and grid_of(*image.size, size) for image in images],
    }

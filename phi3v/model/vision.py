"""Views to image embeddings: CLIP tower, 2x2 merge, separators, projector.

Letters: N views (an image's global view first, then its crops row by row), P patches of a view
(576 = 24 x 24 in the published model), s merged patches along a side (12), C tower width, D decoder
width, L image tokens.

Only real views are computed: no zero slots, and no tower layer behind the one whose output is
used. Those weights stay, frozen, so that a saved folder has every published name.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig

from phi3v.geometry import Grid
from phi3v.model.checkpointing import run_layer
from phi3v.model.configuration import Phi3VConfig
from phi3v.model.execution import Execution
from phi3v.model.layers import TowerLayer


class PatchEmbeddings(nn.Module):
    """Patches by a convolution, a class token before them, learned positions."""

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.patch_embedding = nn.Conv2d(config.num_channels, width, patch, patch, bias=False)
        positions = (config.image_size // patch) ** 2 + 1
        self.position_embedding = nn.Embedding(positions, width)

    def forward(self, views: Tensor) -> Tensor:
        patches = self.patch_embedding(views.to(self.patch_embedding.weight.dtype))
        patches = patches.flatten(2).transpose(1, 2)  # (N, P, C)
        first = self.class_embedding.expand(len(views), 1, -1)
        embedded = torch.cat([first, patches], dim=1)  # (N, 1 + P, C)
        positions = torch.arange(embedded.shape[1], device=views.device)
        return embedded + self.position_embedding(positions)


class Encoder(nn.Module):
    """The tower's layers; `used` of them are computed, the rest kept frozen."""

    def __init__(self, config: CLIPVisionConfig, used: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(TowerLayer(config) for _ in range(config.num_hidden_layers))
        self.used = used
        self.gradient_checkpointing = False  # transformers' switch: full
        self.execution = Execution()

    def forward(self, hidden: Tensor) -> Tensor:
        """(N, 1 + P, C) -> (N, 1 + P, C)."""
        how = "full" if self.gradient_checkpointing else self.execution.vision_checkpointing
        how = how if torch.is_grad_enabled() else "none"
        for layer in self.layers[: self.used]:
            hidden = run_layer(layer, how, self.execution.offload, hidden)
        return hidden


class VisionTower(nn.Module):
    """CLIP ViT up to the layer whose output Phi-3-Vision reads, class token dropped."""

    def __init__(self, config: CLIPVisionConfig, used: int) -> None:
        super().__init__()
        self.embeddings = PatchEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.encoder = Encoder(config, used)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.freeze_unused()

    def freeze_unused(self) -> None:
        """Exclude what never receives a gradient from training, and so from weight decay."""
        self.encoder.layers[self.encoder.used :].requires_grad_(False)
        self.post_layernorm.requires_grad_(False)

    def forward(self, views: Tensor) -> Tensor:
        """(N, 3, size, size) -> (N, P, C)."""
        return self.encoder(self.pre_layrnorm(self.embeddings(views)))[:, 1:]


class ImageProcessor(nn.Module):
    """A level of the published parameter names (`img_processor.vision_model`)."""

    def __init__(self, config: Phi3VConfig) -> None:
        super().__init__()
        self.vision_model = VisionTower(config.vision_config, config.tower_layers)

    def forward(self, views: Tensor) -> Tensor:
        return self.vision_model(views)


class ImageEmbedding(nn.Module):
    """The views of images to the vectors that take their places in the sequence."""

    def __init__(self, config: Phi3VConfig) -> None:
        super().__init__()
        merged = 4 * config.vision_config.hidden_size
        self.side = config.image_side
        self.view_shape = (3, config.vision_config.image_size, config.vision_config.image_size)
        self.img_processor = ImageProcessor(config)
        self.glb_GN = nn.Parameter(torch.zeros(1, 1, merged))
        self.sub_GN = nn.Parameter(torch.zeros(1, 1, 1, merged))
        self.img_projection = nn.Sequential(
            nn.Linear(merged, config.hidden_size),
            nn.GELU(),
            nn.Linear(config.hidden_size, config.hidden_size),
        )

    def forward(self, views: Tensor | None, grids: Sequence[Grid]) -> Tensor:
        """Embed the images of a batch, one after the other.

        views    (N, 3, size, size), N = sum of the grids' views; None for a batch without images
        returns  (L, D); without images a blank view's embedding, times zero

        Under ZeRO-3 all ranks must run the same modules in the same order: a rank whose pack has
        no image would otherwise leave the others waiting for it. The blank costs one view.
        """
        if views is None:
            return self.img_projection(self.blank()) * 0
        patches = self.img_processor(views)  # (N, P, C)
        per_image = patches.split([grid.views for grid in grids])
        sequences = [self.arrange(p, grid) for p, grid in zip(per_image, grids, strict=True)]
        return self.img_projection(torch.cat(sequences))

    def arrange(self, patches: Tensor, grid: Grid) -> Tensor:
        """One image's sequence: the crops' map, the separator of views, the global view.

        patches  (1 + crops, P, C)
        returns  (tokens of the image, 4C)

        Source: Phi-3-V image_embedding_phi3_v.py, `hd_transform_order` "sub_glb".
        """
        crops = merge_crops(patches[1:], grid, self.side)
        overview = merge_crops(patches[:1], Grid(1, 1), self.side)
        return torch.cat([self.end_lines(crops), self.glb_GN[0], self.end_lines(overview)])

    def end_lines(self, image_map: Tensor) -> Tensor:
        """End every line of a (rows, cols, 4C) map with the separator; lay the lines in a row."""
        separator = self.sub_GN[0].expand(image_map.shape[0], 1, -1)
        return torch.cat([image_map, separator], dim=1).flatten(0, 1)

    def blank(self) -> Tensor:
        """The sequence of a blank global view, in which every parameter has its part."""
        parameter = self.glb_GN
        view = torch.zeros(1, *self.view_shape, dtype=parameter.dtype, device=parameter.device)
        overview = merge_crops(self.img_processor(view), Grid(1, 1), self.side)
        return torch.cat([self.end_lines(overview), self.glb_GN[0]])


def merge_crops(crops: Tensor, grid: Grid, side: int) -> Tensor:
    """Put crops back on their grid and merge each 2x2 block of patches into one vector.

    crops    (rows * cols, P, C), P = (2 * side) ** 2
    returns  (rows * side, cols * side, 4C), channels of a block in the order (dy, dx, c)

    Source: Phi-3-V image_embedding_phi3_v.py `reshape_hd_patches_2x2merge`.
    """
    width = crops.shape[-1]
    blocks = crops.reshape(grid.rows, grid.cols, side, 2, side, 2, width)
    blocks = blocks.permute(0, 2, 1, 4, 3, 5, 6)  # (rows, side, cols, side, dy, dx, C)
    return blocks.reshape(grid.rows * side, grid.cols * side, 4 * width)

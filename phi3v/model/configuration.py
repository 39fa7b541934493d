"""Phi3VConfig: the published config.json, read as it is and written as it was."""

from pathlib import Path
from typing import Any

from transformers import CLIPVisionConfig, Phi3Config

from phi3v.errors import ConfigError, Phi3VError
from phi3v.stored import parse_file

# The published tower is ViT-L/14-336 and its sizes are in no config.json; a folder says only
# where it differs, under `vision_config`.
PUBLISHED_TOWER: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
    "image_size": 336,
    "num_channels": 3,
    "projection_dim": 768,
    "hidden_act": "quick_gelu",
    "attention_dropout": 0.0,
    "layer_norm_eps": 1e-5,
}
EMBEDDING_LAYER = {
    "embedding_cls": "image",
    "hd_transform_order": "sub_glb",
    "projection_cls": "mlp",
    "use_hd_transform": True,
    "with_learnable_separator": True,
}
IMAGE_PROCESSOR = {
    "image_dim_out": 1024,
    "model_name": "openai/clip-vit-large-patch14-336",
    "name": "clip_vision_model",
    "num_img_tokens": 144,
}
ROPE_TYPES = ("su", "longrope")  # one thing by two names; "yarn" would scale differently
ROPE_LENGTHS = ("positions", "keys")
ROPE_KEYS = ("type", "short_factor", "long_factor")


class Phi3VConfig(Phi3Config):
    """Phi-3's configuration, the vision tower's, and how a padded batch chooses its rotary factors.

    vision_config  CLIPVisionConfig fields that differ from ViT-L/14-336
    rope_length    what is compared with original_max_position_embeddings to choose between short
                   and long factors: `positions` (largest position + 1, the rule of Phi-3-vision)
                   or `keys` (keys including padding, the rule of Phi-3.5-vision)
    """

    model_type = "phi3_v"

    def __init__(
        self,
        vision_config: dict[str, Any] | CLIPVisionConfig | None = None,
        embd_layer: dict[str, Any] | None = None,
        img_processor: dict[str, Any] | None = None,
        rope_length: str = "positions",
        **kwargs: Any,
    ) -> None:
        # The published file asks for flash_attention_2; what is present decides.
        kwargs.pop("_attn_implementation", None)
        if isinstance(vision_config, CLIPVisionConfig):
            vision_config = vision_config.to_dict()
        sizes = {
            key: (vision_config or {}).get(key, PUBLISHED_TOWER[key]) for key in PUBLISHED_TOWER
        }
        self.vision_config = CLIPVisionConfig(**sizes)
        self.embd_layer = dict(embd_layer or EMBEDDING_LAYER)
        self.img_processor = dict(img_processor or IMAGE_PROCESSOR)
        if rope_length not in ROPE_LENGTHS:
            raise ConfigError(
                f"rope_length {rope_length!r} in config.json must be one of "
                f"{', '.join(ROPE_LENGTHS)}"
            )
        self.rope_length = rope_length
        super().__init__(**_with_rope_parameters(kwargs))

    @classmethod
    def from_pretrained(cls, path: Any, **where: Any) -> "Phi3VConfig":
        """The configuration of a model folder or hub name.

        Raises: ConfigError if config.json is missing or describes another kind of model.
        """
        own = Path(path, where.get("subfolder") or "", "config.json")
        try:
            if own.exists():
                parse_file(own)  # transformers would wait for a pipe
            return super().from_pretrained(path, **where)
        except Phi3VError:
            raise
        except Exception as error:  # a file of anybody's making fails in any way it likes
            if isinstance(error, OSError) and error.errno:
                raise
            reason = " ".join(str(error).split())
            raise ConfigError(
                f"the config.json of {path} describes no Phi-3-Vision ({type(error).__name__}: "
                f"{reason[:300]}); take the one that was published with its weights"
            ) from error

    @property
    def image_side(self) -> int:
        """Merged patches along a side of a view, 12 in the published model."""
        return self.vision_config.image_size // (2 * self.vision_config.patch_size)

    @property
    def tower_layers(self) -> int:
        """Layers of the tower that are computed: its feature is an inner layer's output."""
        return self.vision_config.num_hidden_layers + 1 + self.img_processor.get("layer_idx", -2)

    def to_dict(self) -> dict[str, Any]:
        """The published keys: three-key rope_scaling, rope_theta beside it, no vision_config."""
        values = super().to_dict()
        rope = self.rope_parameters
        values["rope_theta"] = rope["rope_theta"]
        is_scaled = "short_factor" in rope  # not in a bare Phi3VConfig(), which can only be shown
        values["rope_scaling"] = {key: rope[key] for key in ROPE_KEYS} if is_scaled else None
        sizes = {key: getattr(self.vision_config, key) for key in PUBLISHED_TOWER}
        different = {key: sizes[key] for key in sizes if sizes[key] != PUBLISHED_TOWER[key]}
        for key in ("rope_parameters", "vision_config"):
            values.pop(key, None)
        if different:
            values["vision_config"] = different
        if self.rope_length == "positions":
            values.pop("rope_length", None)
        return values


def _with_rope_parameters(values: dict[str, Any]) -> dict[str, Any]:
    """Move the published rope keys to where transformers 5 reads them, `type` kept for others."""
    scaling = values.pop("rope_scaling", None) or values.pop("rope_parameters", None)
    if scaling is None:
        return values
    if scaling.get("type", "su") not in ROPE_TYPES:
        raise ConfigError(
            f"rope_scaling.type {scaling['type']!r} in config.json is not supported; "
            "the published models have 'su'"
        )
    theta = values.pop("rope_theta", scaling.get("rope_theta", 10000.0))
    original = values.get("original_max_position_embeddings", 4096)
    longest = values.get("max_position_embeddings", original)
    parameters = {
        "rope_type": "longrope",
        "type": scaling.get("type", "su"),
        "rope_theta": theta,
        "original_max_position_embeddings": original,
        "factor": longest / original,
        "short_factor": scaling["short_factor"],
        "long_factor": scaling["long_factor"],
    }
    return values | {"rope_parameters": parameters}

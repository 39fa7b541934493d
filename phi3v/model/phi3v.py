"""Phi-3-Vision as a transformers model: `from_pretrained`, `save_pretrained`, `generate`.

Its layers compute what transformers' Phi-3 and CLIP layers compute, under the published parameter
names. A padded batch is called as the published model is; a pack, in training, by `packed_loss`.

Letters: B sequences, T tokens, N views, I images, D width, V vocabulary.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from phi3v.geometry import Grid, grid_of, image_tokens
from phi3v.model.attention import TOWER, Segments, padding_mask
from phi3v.model.checkpointing import run_layer
from phi3v.model.configuration import Phi3VConfig
from phi3v.model.execution import Execution
from phi3v.model.layers import DecoderLayer, RMSNorm, TowerLayer, use_compiled
from phi3v.model.loss import Head, mean_loss, next_tokens
from phi3v.model.rotary import rotary
from phi3v.model.sending import send
from phi3v.model.vision import ImageEmbedding
from phi3v.model.weights import WeightFiles, check_shapes, find_stop_ids
from phi3v.sample import IGNORED

# Modules whose parameters are best gathered at once, under ZeRO-3: a layer at a time.
LAYERS = (DecoderLayer, TowerLayer)
# What from_pretrained is told about where a model lies.
WHERE = {"revision", "subfolder", "cache_dir", "token", "local_files_only", "force_download"}


class Phi3VPreTrainedModel(PreTrainedModel):
    config: Phi3VConfig
    config_class = Phi3VConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = [layer.__name__ for layer in LAYERS]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, config: Phi3VConfig) -> None:
        super().__init__(config)
        # Whatever a folder or caller asks for, the layers call our functions: only they know packs.
        # A configuration that has another model already keeps what was chosen for that.
        if config._attn_implementation not in TOWER:
            config._attn_implementation = Execution().attention
        config.vision_config._attn_implementation = TOWER[config._attn_implementation]


class Phi3VModel(Phi3VPreTrainedModel):
    """Embeddings, images in their places, decoder layers, final norm."""

    def __init__(self, config: Phi3VConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.vision_embed_tokens = ImageEmbedding(config)
        self.layers = nn.ModuleList(
            DecoderLayer(config, index) for index in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False  # transformers' switch: full
        self.execution = Execution()
        self.post_init()

    @property
    def trains_layers(self) -> bool:
        """Whether any decoder layer is trained."""
        return any(parameter.requires_grad for parameter in self.layers.parameters())

    def embed(self, input_ids: Tensor, views: Tensor | None, grids: Sequence[Grid]) -> Tensor:
        """Token embeddings, with the images' vectors where the ids are negative.

        input_ids  (B, T); the negative ones take the images in the order of `grids`. From the host
                   they are sent; where they lie on the device it is waited for, to find those
        views      (N, 3, size, size), or None without images
        returns    (B, T, D)
        """
        # Not `self.embed_tokens.weight`: to name it here would have ZeRO-3 gather it a second time.
        device, words = next(self.embed_tokens.parameters()).device, input_ids.clamp(min=0)
        embedded = self.embed_tokens(send(words, device) if device.type == "cuda" else words)
        if views is None:
            return embedded
        images = self.vision_embed_tokens(views, grids).to(embedded.dtype)
        places = (input_ids.flatten() < 0).nonzero()[:, 0]
        filled = embedded.flatten(0, 1).index_copy(0, send(places, embedded.device), images)
        return filled.view_as(embedded)

    def decode(
        self,
        embedded: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        segments: Segments | None = None,
        kept: list[Tensor] | None = None,
        places: Tensor | None = None,
    ) -> Tensor:
        """Run the decoder layers and the final norm: (B, T, D) -> (B, T, D).

        kept    collects each layer's input
        places  (P,) positions that are wanted, all by default: (B, T, D) -> (B, P, D); the last
                layer's output projection and MLP run on them alone
        """
        how = "full" if self.gradient_checkpointing else self.execution.checkpointing
        hidden = embedded
        for layer in self.layers:
            if kept is not None:
                kept.append(hidden)
            hidden = run_layer(
                layer,
                how if torch.is_grad_enabled() else "none",
                self.execution.offload,
                hidden,
                attention_mask=mask,
                past_key_values=past_key_values,
                position_embeddings=position_embeddings,
                segments=segments,
                places=places if layer is self.layers[-1] else None,
            )
        return self.norm(hidden)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_sizes: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Run a padded batch; arguments as in Phi3VForCausalLM.forward."""
        if inputs_embeds is None:
            assert input_ids is not None, "give input_ids or inputs_embeds"
            views, grids = self.used_views(input_ids, pixel_values, image_sizes)
            inputs_embeds = self.embed(input_ids, views, grids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        queries, keys = inputs_embeds.shape[1], past + inputs_embeds.shape[1]
        device = inputs_embeds.device
        if position_ids is None:
            position_ids = torch.arange(past, keys, device=device)[None]
        is_long = self.is_long(int(position_ids.max()) + 1, keys)
        window = self.config.sliding_window
        kept: list[Tensor] | None = [] if output_hidden_states else None
        hidden = self.decode(
            inputs_embeds,
            rotary(self.config, position_ids, is_long, inputs_embeds.dtype),
            padding_mask(attention_mask, queries, keys, window, device),
            past_key_values,
            kept=kept,
        )
        states = (*kept, hidden) if kept is not None else None
        return BaseModelOutputWithPast(
            last_hidden_state=hidden, past_key_values=past_key_values, hidden_states=states
        )

    def packed_angles(self, segments: Segments, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosine and sine (1, T, K) of each sample's positions, by its own choice of factors."""
        ends = segments.boundaries
        places = torch.arange(sum(segments.lengths), device=ends.device)
        sample = torch.searchsorted(ends, places, right=True) - 1  # (T,)
        is_long = (ends.diff() > self.config.original_max_position_embeddings)[sample]
        return rotary(self.config, (places - ends[sample])[None], is_long[None], dtype)

    def is_long(self, positions: int, keys: int) -> bool:
        """Whether a padded batch takes the long factors, by the published rule of `rope_length`."""
        length = keys if self.config.rope_length == "keys" else positions
        return length > self.config.original_max_position_embeddings

    def used_views(
        self, input_ids: Tensor, pixel_values: Tensor | None, image_sizes: Tensor | None
    ) -> tuple[Tensor | None, list[Grid]]:
        """Drop the zero slots of the published `pixel_values` (I, slots, 3, size, size).

        Raises: ValueError if the images do not fill the negative ids exactly.
        """
        places = int((input_ids < 0).sum())
        if pixel_values is None or image_sizes is None:
            if places:
                raise ValueError(
                    f"input_ids have {places} image positions but pixel_values or image_sizes are "
                    "missing; pass both as the processor returns them"
                )
            return None, []
        if not places:
            return None, []
        size = self.config.vision_config.image_size
        grids = [grid_of(int(height), int(width), size) for height, width in image_sizes.tolist()]
        tokens = sum(image_tokens(grid, self.config.image_side) for grid in grids)
        if tokens != places:
            raise ValueError(
                f"input_ids have {places} image positions, the images of pixel_values need "
                f"{tokens}; do not truncate a prompt through its images"
            )
        images, slots = pixel_values.shape[:2]
        if images != len(grids) or slots < max(grid.views for grid in grids):
            raise ValueError(
                f"pixel_values hold {images} images of {slots} views, image_sizes describe "
                f"{[grid.views for grid in grids]} views; pass both as the processor returns them"
            )
        return torch.cat([p[: g.views] for p, g in zip(pixel_values, grids, strict=True)]), grids


class Phi3VForCausalLM(Phi3VPreTrainedModel, GenerationMixin):
    """The published model, called as the published one is.

    input_ids       (B, T); negative ids mark the positions of images
    pixel_values    (I, slots, 3, size, size), unused slots are ignored
    image_sizes     (I, 2) height and width of each canvas in pixels
    labels          (B, T), -100 is not trained
    returns         logits (B, T, V) in float32; with labels the mean loss over trained positions
                    (0, with zero gradients, if there is none)
    """

    _keys_to_ignore_on_load_unexpected = [r"model\.vision_embed_tokens\.wte\.weight"]

    def __init__(self, config: Phi3VConfig) -> None:
        super().__init__(config)
        self.model = Phi3VModel(config)
        self.lm_head = Head(config.hidden_size, config.vocab_size)
        self.post_init()

    def set_execution(self, execution: Execution) -> None:
        """Choose kernels and recomputation; results change by rounding at most."""
        self.config._attn_implementation = execution.attention
        self.config.vision_config._attn_implementation = TOWER[execution.attention]
        self.lm_head.loss = execution.loss
        self.model.execution = execution
        self.model.vision_embed_tokens.img_processor.vision_model.encoder.execution = execution
        use_compiled(self, execution.compiled)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *args: Any, **kwargs: Any
    ) -> Any:
        """Load a folder or hub name, as transformers does, but only weights that are the model's.

        Raises: CheckpointError listing names that are missing, unknown or of another shape, which
        transformers would draw at random, or pass over.
        """
        where = {key: kwargs[key] for key in WHERE & kwargs.keys()}
        config = kwargs.get("config") or Phi3VConfig.from_pretrained(
            pretrained_model_name_or_path, **where
        )
        with torch.device("meta"):
            skeleton = cls(config)
        with WeightFiles(pretrained_model_name_or_path, **where) as files:
            check_shapes(files.path, files.shapes(), skeleton)
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        # transformers makes every parameter that it loads trainable.
        model.model.vision_embed_tokens.img_processor.vision_model.freeze_unused()
        if ends := find_stop_ids(str(pretrained_model_name_or_path), **where):
            model.generation_config.eos_token_id = ends
            model.generation_config.pad_token_id = ends[-1]
        return loaded

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, **kwargs: Any) -> Any:
        """As transformers', and prompts may be padded on the right as well as on the left.

        A row padded on the right would go on behind its padding: tokens are moved to the right
        first, and the sequences that come back hold the prompts as they were given.
        """
        ids, mask = kwargs.get("input_ids", inputs), kwargs.get("attention_mask")
        if ids is None or mask is None or bool(mask[:, -1].all()):
            return super().generate(inputs, **kwargs)
        order = mask.argsort(dim=1, stable=True)  # padding first, tokens in their order
        for name in ("attention_mask", "position_ids"):
            if kwargs.get(name) is not None:
                kwargs[name] = kwargs[name].gather(1, order)
        out = super().generate(**kwargs | {"input_ids": ids.gather(1, order)})
        sequences = out if isinstance(out, Tensor) else out.sequences
        sequences[:, : ids.shape[1]] = ids.repeat_interleave(len(sequences) // len(ids), dim=0)
        return out

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_sizes: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        views: Tensor | None = None,
        grids: Sequence[Grid] = (),
        segment_lengths: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> Any:
        if segment_lengths is not None:
            assert input_ids is not None and labels is not None
            return self.packed_loss(input_ids, labels, segment_lengths, views, grids)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            pixel_values=pixel_values,
            image_sizes=image_sizes,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
        )
        hidden = outputs.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden[:, kept]).float()
        return CausalLMOutputWithPast(
            loss=None if labels is None else mean_loss(logits, labels),
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )

    def packed_loss(
        self,
        input_ids: Tensor,
        labels: Tensor,
        segment_lengths: Sequence[int],
        views: Tensor | None,
        grids: Sequence[Grid],
    ) -> Tensor:
        """Sum of the losses of a pack's trained tokens; each sample gets the numbers it gets alone.

        input_ids, labels  (1, T), the samples laid end to end; if both lie on the host the device
                           is waited for nowhere
        segment_lengths    tokens of each sample
        views, grids       the images of all samples in order; None for a pack of text, which then
                           takes a blank view through the tower (see ImageEmbedding.forward)
        returns            scalar float32, not divided by anything

        Behind the last layer's attention only trained positions go on, to the logits too.
        """
        embedded = self.model.embed(input_ids, views, grids)
        if views is None:
            nothing = self.model.vision_embed_tokens(None, ())
            embedded = embedded + nothing.sum().to(embedded.dtype)
        if torch.is_grad_enabled() and not embedded.requires_grad and self.model.trains_layers:
            # Under ZeRO-3 a layer whose input needs no gradient is released before its backward.
            embedded.requires_grad_()
        segments = Segments.of(segment_lengths, embedded.device)
        angles = self.model.packed_angles(segments, embedded.dtype)
        targets = next_tokens(labels, segment_lengths)[0]
        places = (targets != IGNORED).nonzero()[:, 0]
        places, targets = (send(t, embedded.device) for t in (places, targets[places]))
        wanted = places if len(places) else None  # few kernels take a matrix without rows
        hidden = self.model.decode(embedded, angles, segments=segments, places=wanted)[0]
        return self.lm_head(hidden[places] if wanted is None else hidden, targets)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_sizes: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Feed images with the prompt only, and start the cache anew where the factors change.

        Keys already in the cache were turned by the short factors; behind the limit the whole
        sequence, pictures included, is computed again with the long ones.
        """
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        if past and self._crosses_limit(past, input_ids.shape[1], attention_mask):
            past_key_values, past = None, 0
            kwargs["next_sequence_length"] = None
        inputs = super().prepare_inputs_for_generation(
            input_ids, past_key_values=past_key_values, attention_mask=attention_mask, **kwargs
        )
        if not past:
            inputs |= {"pixel_values": pixel_values, "image_sizes": image_sizes}
        return inputs

    def _crosses_limit(self, past: int, keys: int, attention_mask: Tensor | None) -> bool:
        """Whether `past` keys took the short factors and `keys` of them take the long."""

        def is_long(length: int) -> bool:
            mask = None if attention_mask is None else attention_mask[:, :length]
            positions = length if mask is None else int(mask.sum(1).max())
            return self.model.is_long(positions, length)

        return is_long(keys) and not is_long(past)

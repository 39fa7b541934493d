"""A tiny Phi-3-Vision: a genuine phi3_v folder, only small, with random weights.

Phi-3 decoder, CLIP tower, HD transform, separators, projector, longrope and a tokenizer of the
published kind (BPE with byte fallback, Phi-3's added tokens and chat template), trained on the
texts that it will have to say. Everything downstream reads the same files as of a published folder.
"""

import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    normalizers,
    pre_tokenizers,
    processors,
)
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from phi3v.errors import ConfigError
from phi3v.files import publish, write_json
from phi3v.model import Phi3VConfig, Phi3VForCausalLM
from phi3v.pictures import PictureSettings

SPACE = "\u2581"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{'<|' + message['role'] + '|>' + '\n' + message['content'] + "
    "'<|end|>\n' }}{% endfor %}{% if add_generation_prompt and messages[-1]['role'] != 'assistant' "
    "%}{{- '<|assistant|>\n' -}}{% endif %}"
)
# In the published order; those that swallow the white space behind them are marked.
CONTROL_TOKENS: tuple[tuple[str, bool], ...] = (
    ("<|endoftext|>", False),
    ("<|assistant|>", True),
    *((f"<|placeholder{n}|>", True) for n in range(1, 5)),
    ("<|system|>", False),
    ("<|end|>", False),
    *((f"<|placeholder{n}|>", True) for n in range(5, 7)),
    ("<|user|>", False),
    *((f"<|placeholder{n}|>", True) for n in range(7, 40)),
    ("<|image|>", True),
)
FILES = (
    *("config.json", "generation_config.json", "model.safetensors"),
    *("preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"),
)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, kw_only=True)
class TinySizes:
    """The sizes of a tiny model; the defaults learn the sample products in minutes on a CPU."""

    image_size: int = 56
    """Pixels of a crop's side."""
    patch_size: int = 14
    """Pixels of a patch's side; a view has an even number of patches along each side."""
    num_crops: int = 4
    """Crops of an image at most."""
    vision_width: int = 96
    vision_layers: int = 4
    """Layers of the tower, the last of which is never used, as in the published model."""
    vision_heads: int = 4
    width: int = 128
    layers: int = 3
    heads: int = 4
    mlp_width: int = 384
    text_pieces: int = 400
    """Pieces learnt from the texts, beside the 256 bytes and the control tokens."""
    original_positions: int = 512
    """Tokens up to which the short rotary factors hold."""
    positions: int = 4096
    """Tokens of the longest sequence."""

    def __post_init__(self) -> None:
        for size in fields(self):
            least = 2 if size.name in ("vision_layers", "original_positions") else 1
            if getattr(self, size.name) < least:
                raise ConfigError(
                    f"{size.name} must be at least {least}, got {getattr(self, size.name)}"
                )
        if self.image_size % (2 * self.patch_size):
            raise ConfigError(
                f"image_size {self.image_size} is not a multiple of twice patch_size "
                f"{self.patch_size}; use {2 * self.patch_size * 2} or another multiple"
            )
        for part in ("", "vision_"):
            width, heads = getattr(self, f"{part}width"), getattr(self, f"{part}heads")
            if width % (2 * heads):
                raise ConfigError(
                    f"{part}width {width} is not a multiple of twice {part}heads {heads}; "
                    f"use {16 * heads}"
                )


def make_tiny_model(
    out: Path, texts: Iterable[str], sizes: TinySizes | None = None, seed: int = 0
) -> None:
    """Write a model folder: config, weights, tokenizer, processor settings.

    Raises: ConfigError if `out` exists and is not such a folder.
    """
    sizes = sizes or TinySizes()
    if out.is_file() or (out.exists() and any(path.name not in FILES for path in out.iterdir())):
        raise ConfigError(f"{out} exists and is no tiny model; name another folder, or remove it")
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tokenizer = train_tokenizer(texts, sizes.text_pieces)
    tokenizer.save(str(partial / "tokenizer.json"))
    write_json(partial / "tokenizer_config.json", tokenizer_settings(tokenizer))
    write_json(partial / "preprocessor_config.json", processor_settings(sizes))
    _write_model(partial, sizes, tokenizer, seed)
    publish(partial, out)


def train_tokenizer(texts: Iterable[str], pieces: int) -> Tokenizer:
    """Train a tokenizer of the published kind: BPE, byte fallback, a space before each text.

    Pieces are learnt within words, digits one by one; the published one has no pre-tokenizer, and
    none is kept here.
    """
    normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    learner = Tokenizer(BPE(unk_token="<unk>"))
    learner.normalizer = normalizer
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(SPACE, "merged_with_next"),
            pre_tokenizers.Split(Regex(r"\d|[^\w\u2581]"), "isolated"),
        ]
    )
    learner.train_from_iterator(
        texts, BpeTrainer(vocab_size=pieces, show_progress=False, special_tokens=["<unk>"])
    )
    learnt = json.loads(learner.to_str())["model"]
    learnt_pieces = [p for p in sorted(learnt["vocab"], key=learnt["vocab"].get) if p != "<unk>"]
    byte_pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    vocab = {p: i for i, p in enumerate(["<unk>", "<s>", "</s>", *byte_pieces, *learnt_pieces])}
    merges = [tuple(merge) for merge in learnt["merges"]]
    model = BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    _add_control_tokens(tokenizer)
    return tokenizer


def _add_control_tokens(tokenizer: Tokenizer) -> None:
    def token(text: str, strips: bool) -> AddedToken:
        return AddedToken(text, rstrip=strips, normalized=False)

    tokenizer.add_special_tokens([token("<unk>", False), token("<s>", False)])
    tokenizer.add_tokens([token("</s>", True)])
    tokenizer.add_special_tokens([token(text, strips) for text, strips in CONTROL_TOKENS])
    start = ("<s>", tokenizer.token_to_id("<s>"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[start]
    )


def tokenizer_settings(tokenizer: Tokenizer) -> dict[str, Any]:
    """tokenizer_config.json with the published keys."""
    added = json.loads(tokenizer.to_str())["added_tokens"]
    return {
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": {str(t.pop("id")): t for t in added},
        "bos_token": "<s>",
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|endoftext|>",
        "legacy": False,
        "model_max_length": 131072,
        "pad_token": "<|endoftext|>",
        "padding_side": "right",
        "tokenizer_class": "LlamaTokenizer",
        "unk_token": "<unk>",
        "use_default_system_prompt": False,
    }


def processor_settings(sizes: TinySizes) -> dict[str, Any]:
    """preprocessor_config.json with the published keys."""
    side = sizes.image_size // (2 * sizes.patch_size)
    views = {"image_mean": CLIP_MEAN, "image_std": CLIP_STD, "image_side": side}
    return PictureSettings(sizes.num_crops).whole_preprocessor(views)


def _write_model(folder: Path, sizes: TinySizes, tokenizer: Tokenizer, seed: int) -> None:
    config = tiny_config(sizes, tokenizer)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Phi3VForCausalLM(config)
        _initialise(model)
    model.save_pretrained(folder)
    ends = [tokenizer.token_to_id(token) for token in ("<|end|>", "<|endoftext|>")]
    generation = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": ends,
        "pad_token_id": ends[1],
    }
    write_json(folder / "generation_config.json", generation)


def tiny_config(sizes: TinySizes, tokenizer: Tokenizer) -> Phi3VConfig:
    """The configuration of a tiny model for a tokenizer."""
    factors = sizes.width // sizes.heads // 2
    return Phi3VConfig(
        architectures=["Phi3VForCausalLM"],
        vocab_size=-(-tokenizer.get_vocab_size() // 64) * 64,
        hidden_size=sizes.width,
        intermediate_size=sizes.mlp_width,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.heads,
        max_position_embeddings=sizes.positions,
        original_max_position_embeddings=sizes.original_positions,
        sliding_window=sizes.positions,
        initializer_range=0.06,
        bos_token_id=tokenizer.token_to_id("<s>"),
        eos_token_id=tokenizer.token_to_id("</s>"),
        pad_token_id=tokenizer.token_to_id("<|endoftext|>"),
        tie_word_embeddings=False,
        dtype="float32",
        rope_scaling={
            "type": "su",
            "short_factor": [round(1 + 0.5 * i / factors, 4) for i in range(factors)],
            "long_factor": [round(1 + 31 * (i / factors) ** 2, 4) for i in range(factors)],
        },
        img_processor={
            "image_dim_out": sizes.vision_width,
            "model_name": "openai/clip-vit-large-patch14-336",
            "name": "clip_vision_model",
            "num_img_tokens": (sizes.image_size // (2 * sizes.patch_size)) ** 2,
        },
        vision_config={
            "hidden_size": sizes.vision_width,
            "intermediate_size": 4 * sizes.vision_width,
            "num_hidden_layers": sizes.vision_layers,
            "num_attention_heads": sizes.vision_heads,
            "patch_size": sizes.patch_size,
            "image_size": sizes.image_size,
            "projection_dim": sizes.vision_width,
        },
    )


def _initialise(model: Phi3VForCausalLM) -> None:
    """Draw weights with which so small a model learns quickly.

    0.02, the published deviation, suits a width of 3,072; here it is about 1/sqrt(width), and the
    tower's positions are strong enough to be told apart from the start. With 0.02 a tiny model
    learnt in 240 s less than with 0.1 in 60.
    """
    tower = model.config.vision_config
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and not name.endswith("_GN"):
            deviation = model.config.initializer_range
            if "img_processor" in name:
                deviation = tower_deviation(name, tower.hidden_size, tower.num_hidden_layers)
            torch.nn.init.normal_(parameter, std=deviation)
        elif name.endswith("class_embedding"):
            torch.nn.init.normal_(parameter, std=parameter.numel() ** -0.5)
        else:
            is_norm = "norm" in name and name.endswith("weight")
            torch.nn.init.constant_(parameter, 1.0 if is_norm else 0.0)


def tower_deviation(name: str, width: int, layers: int) -> float:
    """Standard deviation of a matrix of the tower: CLIP's, by its place in the layer.

    Source: transformers modeling_clip.py `CLIPPreTrainedModel._init_weights`, but for patches
    (1/sqrt of the pixels they sum) and positions.
    """
    if "position_embedding" in name:
        return 0.3
    if "patch_embedding" in name:
        return 0.04
    if "out_proj" in name:
        return width**-0.5
    if "fc1" in name:
        return (2 * width) ** -0.5
    return (2 * layers * width) ** -0.5

"""Phi3VProcessor: pictures and text to the published model's inputs, without remote code.

It is a ProcessorMixin, which vLLM asks for, but takes nothing from it: the mixin's calls are its
own, and it is not saved, for an export copies the base's files.
"""

import hashlib
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import (
    HFValidationError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from PIL import Image
from torch import Tensor
from transformers import BatchFeature, PreTrainedTokenizerFast, ProcessorMixin
from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils.hub import cached_file

from phi3v.config.dataset import ImagesSection
from phi3v.content import disguise
from phi3v.errors import ConfigError
from phi3v.geometry import Layout, grid_of, hd_layout, image_tokens
from phi3v.pictures import PREPROCESSOR, PUBLISHED, PictureSettings
from phi3v.processing.canvas import hd_canvas
from phi3v.processing.prompt import encode
from phi3v.reading import HIDDEN, PLAIN, is_of_machine, kind_at, machine_error
from phi3v.stored import parse_file
from phi3v.views import ViewSettings, pixel_values

PUBLISHED_IMAGE_SIZE, PUBLISHED_PATCH_SIZE = 336, 14  # CLIP ViT-L/14-336
RUN_CONFIG = "config.yaml"  # what every run folder has, and no model folder
HUB_SECONDS = 10.0  # that the hub may take to say whether it has a model
TAGS = 1000  # of images that `img_tokens` lists; the published one has a million


class Phi3VProcessor(ProcessorMixin):
    """The published processor: HD transform, image placeholders, Llama tokens.

    Its settings come from a model folder: `num_crops`, `image_mean`, `image_std`, and what an
    export adds to them (`phi3v.pictures`), from preprocessor_config.json; the tower's image and
    patch size from config.json's `vision_config` (the published model has none there and uses 336
    and 14).
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        num_crops: int,
        image_mean: Sequence[float],
        image_std: Sequence[float],
        crop_size: int = PUBLISHED_IMAGE_SIZE,
        patch_size: int = PUBLISHED_PATCH_SIZE,
        never_upscale: bool = False,
        rules: ImagesSection = PUBLISHED,
    ) -> None:
        self.tokenizer = tokenizer
        self.num_crops = num_crops
        self.image_mean = tuple(image_mean)
        self.image_std = tuple(image_std)
        self.crop_size = crop_size
        self.side = crop_size // (2 * patch_size)
        self.never_upscale = never_upscale
        self.rules = rules

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        num_crops: int | None = None,
        never_upscale: bool | None = None,
        rules: ImagesSection | None = None,
        settings: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> "Phi3VProcessor":
        """Read a model folder or hub name; what is given here overrides the folder's.

        settings  stand for the folder's preprocessor_config.json, which it may then lack

        `never_upscale` (`phi3v.geometry.hd_layout`) and `rules` (`phi3v.processing.pixels`) depart
        from the published transform, which a folder means that says nothing of them.

        The tokenizer is loaded by class: transformers' guess (LlamaTokenizerFast) would rebuild
        its normaliser and give other ids than the published ones.
        Raises: ConfigError if a file is missing, or says what this program does not know.
        """
        path = str(pretrained_model_name_or_path)
        if Path(path).is_dir():  # what the libraries read besides
            for file in Path(path).glob("*.json"):
                check_content(file)
        place = f"{path}/{PREPROCESSOR}" if settings is None else "what stands for it"
        settings = _read_json(path, PREPROCESSOR) if settings is None else settings
        pictures = PictureSettings.from_preprocessor(settings, place)
        return cls(
            open_tokenizer(path),
            num_crops or pictures.num_crops,
            settings["image_mean"],
            settings["image_std"],
            *_tower_sizes(path),
            pictures.never_upscale if never_upscale is None else never_upscale,
            rules or pictures.images,
        )

    @property
    def pictures(self) -> PictureSettings:
        """How pictures become canvases."""
        return PictureSettings(self.num_crops, self.never_upscale, self.rules)

    def __call__(self, text: str | list[str], images: Any = None, **kwargs: Any) -> BatchFeature:
        """Make the model's inputs for one prompt.

        input_ids, attention_mask  (1, T) int64
        pixel_values               (I, num_crops + 1, 3, crop_size, crop_size) float32
        image_sizes                (I, 2) int64, height and width of each canvas

        These are what the model's forward and generate take, as published.
        """
        if images is None or (isinstance(images, (list, tuple)) and not images):
            kwargs["return_tensors"] = "pt"
            return BatchFeature(dict(self.tokenizer(text, **kwargs)))
        if not isinstance(text, str):
            raise TypeError("with images, text must be one string")
        pictures = [images] if isinstance(images, Image.Image) else list(images)
        return self._with_images(text, pictures)

    def _with_images(self, text: str, pictures: list[Image.Image]) -> BatchFeature:
        images = self.image_inputs(pictures)
        input_ids = torch.tensor([encode(self.tokenizer, text, images.pop("num_img_tokens"))])
        inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
        return BatchFeature(inputs | images)

    def image_inputs(self, pictures: Sequence[Image.Image]) -> dict[str, Any]:
        """What the model takes of pictures, and num_img_tokens: the positions that each fills."""
        canvases = [self.canvas(picture) for picture in pictures]
        return {
            "pixel_values": self.pixel_values(canvases),
            "image_sizes": torch.tensor([canvas.shape[:2] for canvas in canvases]),
            "num_img_tokens": [self.canvas_tokens(canvas) for canvas in canvases],
        }

    def canvas(self, image: Image.Image) -> np.ndarray:
        """The HD transform of a picture: uint8 (height, width, 3)."""
        return hd_canvas(image, self.num_crops, self.crop_size, self.never_upscale, self.rules)

    def layout(self, width: int, height: int) -> Layout:
        """What the HD transform does to a picture of width x height pixels, upright."""
        return hd_layout(width, height, self.num_crops, self.crop_size, self.never_upscale)

    def canvas_tokens(self, canvas: np.ndarray) -> int:
        """Sequence positions that a canvas fills."""
        return image_tokens(grid_of(canvas.shape[0], canvas.shape[1], self.crop_size), self.side)

    def pixel_values(self, canvases: Sequence[np.ndarray]) -> Tensor:
        """Views of each canvas, then zero slots: (I, num_crops + 1, 3, crop_size, crop_size)."""
        return pixel_values(canvases, self.num_crops + 1, self.views)

    @property
    def tokenizer_digest(self) -> str:
        """SHA-256 of the tokenizer's whole definition."""
        return tokenizer_digest(self.tokenizer)

    @property
    def views(self) -> ViewSettings:
        """How canvases become views."""
        return ViewSettings(self.crop_size, self.image_mean, self.image_std)

    def calc_num_image_tokens_from_image_size(self, width: int, height: int) -> int:
        """Sequence positions of a picture of width x height pixels; a published name."""
        return image_tokens(self.layout(width, height).grid, self.side)

    @property
    def img_tokens(self) -> list[str]:
        """The tags of the first images in a prompt; a published name, which vLLM reads."""
        return [f"<|image_{number}|>" for number in range(1, TAGS + 1)]

    def count_tokens(self, text: str, sizes: Sequence[tuple[int, int]]) -> int:
        """Tokens of a rendered chat from its pictures' (width, height) alone, none decoded.

        Raises: SampleError if a picture is too narrow, or the tags do not fit the sizes.
        """
        counts = [self.calc_num_image_tokens_from_image_size(*size) for size in sizes]
        return len(encode(self.tokenizer, text, counts))

    def apply_chat_template(self, messages: list[dict[str, str]], **kwargs: Any) -> Any:
        """The tokenizer's own chat template."""
        return self.tokenizer.apply_chat_template(messages, **kwargs)

    def decode(self, ids: Any, **kwargs: Any) -> str:
        return self.tokenizer.decode(ids, **kwargs)

    def batch_decode(self, ids: Any, **kwargs: Any) -> list[str]:
        return self.tokenizer.batch_decode(ids, **kwargs)


class Phi3VImageProcessor(BaseImageProcessor):
    """The pictures' half of the processor, for those who ask AutoImageProcessor for it."""

    model_input_names = ["pixel_values", "image_sizes"]

    def __init__(self, processor: Phi3VProcessor) -> None:
        self.processor = processor

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, num_crops: int | None = None, **kwargs: Any
    ) -> "Phi3VImageProcessor":
        """Read a model folder or hub name, as Phi3VProcessor does.

        Raises: ConfigError if a file is missing.
        """
        return cls(Phi3VProcessor.from_pretrained(pretrained_model_name_or_path, num_crops))

    def __call__(self, images: Any, **kwargs: Any) -> BatchFeature:
        """The processor's pixel_values, image_sizes and num_img_tokens of one picture or more."""
        pictures = [images] if isinstance(images, Image.Image) else list(images)
        return BatchFeature(self.processor.image_inputs(pictures))


def open_tokenizer(model: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a model folder or hub model.

    Raises: ConfigError if its file is missing or is no tokenizer.
    """
    model_file(str(model), "tokenizer_config.json")  # without which the library stumbles
    file = model_file(str(model), "tokenizer.json")
    try:
        return PreTrainedTokenizerFast.from_pretrained(model)
    except Exception as error:  # of the tokenizers library: a plain Exception
        raise ConfigError(
            f"{file} is no tokenizer that can be read ({error}); bring it again"
        ) from error


def tokenizer_digest(tokenizer: PreTrainedTokenizerFast) -> str:
    """SHA-256 of a tokenizer's whole definition."""
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()


def own_settings(model: str) -> dict[str, Any]:
    """What a model's own files say of what a dataset's manifest says, too, under its keys.

    The crop size, the tokenizer, and the normalisation where there is a preprocessor_config.json:
    training, evaluation and the page of a dataset need none, the manifest has what it says.
    Raises: ConfigError if config.json or the tokenizer is missing, or cannot be read.
    """
    image_size, patch_size = _tower_sizes(model)
    settings: dict[str, Any] = {
        "crop_size": image_size,
        "image_side": image_size // (2 * patch_size),
    }
    if has_preprocessor(model):
        content = _read_json(model, PREPROCESSOR)
        settings |= {name: list(content[name]) for name in ("image_mean", "image_std")}
    return settings | {"tokenizer": tokenizer_digest(open_tokenizer(model))}


def has_preprocessor(model: str) -> bool:
    """Whether a model folder or hub model has a preprocessor_config.json."""
    model_file(model, "config.json")  # whether there is such a model
    return bool(cached_file(model, PREPROCESSOR, _raise_exceptions_for_missing_entries=False))


def _tower_sizes(model: str) -> tuple[int, int]:
    """Pixels of a crop's and of a patch's side."""
    vision = _read_json(model, "config.json").get("vision_config", {})
    return (
        vision.get("image_size", PUBLISHED_IMAGE_SIZE),
        vision.get("patch_size", PUBLISHED_PATCH_SIZE),
    )


def model_file(model: str, name: str) -> Path:
    """A file of a model folder or of a hub model.

    Raises: ConfigError if it is missing or not what its name says, or there is no such model.
    """
    _check_model(str(model))
    try:
        file, reason = cached_file(model, name), None
    except OSError as error:
        if is_of_machine(error):
            raise machine_error(error, f"{name} of model {model}") from error
        file, reason = None, error
    if file is None and Path(model, RUN_CONFIG).is_file():
        raise ConfigError(
            f"model {model} is the folder of a run, not of a model; export what it has learnt: "
            f"python launch/export.py {model} --out DIR, and name that DIR"
        )
    if file is None:  # what transformers gives for a missing config.json
        raise ConfigError(
            f"model {model} has no {name}; name a model folder such as models/tiny, or a hub model"
        ) from reason
    check_content(Path(file))
    return Path(file)


def check_content(file: Path) -> None:
    """Refuse a file that is not what its name says, which a library would do by a riddle.

    Raises: ConfigError naming it and the likely cause.
    """
    if (kind := kind_at(file)) not in (PLAIN, HIDDEN):
        raise ConfigError(f"{file} is {kind or 'gone'}, not a file; bring it again")
    if cause := disguise(file):
        raise ConfigError(f"{file} is {cause}")
    if file.suffix != ".json" or file.name == "tokenizer.json":  # see open_tokenizer
        return
    try:
        parse_file(file)
    except ValueError as error:
        size = file.stat().st_size
        raise ConfigError(
            f"{file} {error}, it has {size:,} bytes: half a download, perhaps; bring it again"
        ) from error


@cache
def _check_model(model: str) -> None:
    """Ask the hub once whether it has a model that is no folder here.

    Most often the path is mistyped. transformers would ask for each file, and each time five times
    again where there is no network.
    """
    try:
        if Path(model).is_dir() or try_to_load_from_cache(model, "config.json"):
            return
        HfApi().model_info(model, timeout=HUB_SECONDS)
    except RepositoryNotFoundError as error:
        raise _no_model(model, "the hub has no such model") from error
    except HFValidationError as error:
        raise _no_model(model, "its name is none of the hub's") from error
    except OfflineModeIsEnabled as error:
        raise _no_model(model, "HF_HUB_OFFLINE keeps the hub from being asked") from error
    except HTTPError as error:
        raise _no_model(model, f"the hub cannot be asked ({error})") from error


def _no_model(model: str, reason: str) -> ConfigError:
    return ConfigError(
        f"there is no folder {model}, and {reason}; name a model folder or a hub model such as "
        f"microsoft/Phi-3.5-vision-instruct, or make a tiny one there: python launch/tiny_model.py "
        f"{model}"
    )


def _read_json(model: str, name: str) -> dict[str, Any]:
    return parse_file(model_file(model, name))

"""Opening a Hugging Face folder, and whether a dataset was prepared for it."""

from pathlib import Path
from typing import Any

from phi3v.data import Dataset
from phi3v.data.format import MANIFEST, PREPARE_AGAIN
from phi3v.devices import take_device
from phi3v.errors import ConfigError, ShardError
from phi3v.evaluation.generation import Generator
from phi3v.model import Phi3VForCausalLM
from phi3v.processing import Phi3VProcessor
from phi3v.processing.processor import own_settings


def open_model(path: str | Path, max_new_tokens: int, batch_rows: int = 1) -> Generator:
    """Load a model folder or hub name, ready to answer.

    Raises: ConfigError if it is no model folder; CheckpointError if its weights do not fit.
    """
    processor = Phi3VProcessor.from_pretrained(path)
    model = Phi3VForCausalLM.from_pretrained(path, dtype="auto")
    return as_generator(model, processor, max_new_tokens, batch_rows)


def as_generator(
    model: Phi3VForCausalLM, processor: Phi3VProcessor, max_new_tokens: int, batch_rows: int
) -> Generator:
    """Put a model on the device there is.

    Raises: ConfigError if there is a GPU that torch does not see.
    """
    placed = model.to(take_device()).eval()
    return Generator(placed, processor.tokenizer, processor.views, max_new_tokens, batch_rows)


def check_model(dataset: Dataset, path: str) -> None:
    """Refuse shards that were prepared for another tokenizer, crop size or normalisation.

    The manifest says how canvases become views; a preprocessor_config.json of the model, if it has
    one, must say the same.
    Raises: ConfigError naming what differs; ShardError if the manifest does not say it.
    """
    for name, own in own_settings(path).items():
        if name not in dataset.manifest:
            raise ShardError(
                f"{dataset.folder / MANIFEST} does not say {name}, so nobody knows how its "
                f"canvases become views; {PREPARE_AGAIN}"
            )
        if dataset.manifest[name] != own:
            raise ConfigError(
                f"shards {dataset.folder} were prepared with {name} "
                f"{_short(dataset.manifest[name])}, {path} has {_short(own)}; prepare them again "
                "with this model"
            )


def _short(value: Any) -> str:
    return f"{value[:12]}..." if isinstance(value, str) else str(value)

"""Opening a Hugging Face folder, and whether a dataset was prepared for it."""

from pathlib import Path

from phi3v.data import Dataset
from phi3v.devices import take_device
from phi3v.errors import ConfigError
from phi3v.evaluation.generation import Generator
from phi3v.model import Phi3VForCausalLM
from phi3v.processing import Phi3VProcessor


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

    Raises: ConfigError naming what differs.
    """
    processor = Phi3VProcessor.from_pretrained(path)
    made_for = dataset.view_settings, dataset.manifest["image_side"]
    found = processor.views, processor.side
    tokenizer = dataset.manifest["tokenizer"]
    if made_for != found or tokenizer != processor.tokenizer_digest:
        what = "image settings" if made_for != found else "tokenizer"
        raise ConfigError(
            f"shards {dataset.folder} were prepared for a model with another {what} than {path}; "
            "prepare them again with this model"
        )

"""Opening a Hugging Face folder, and whether a dataset was prepared for it."""

from pathlib import Path

import torch
from safetensors import SafetensorError

from phi3v.data import Dataset
from phi3v.errors import ConfigError
from phi3v.evaluation.generation import Generator
from phi3v.model import Phi3VForCausalLM
from phi3v.processing import Phi3VProcessor


def open_model(path: str | Path, max_new_tokens: int, batch_rows: int = 1) -> Generator:
    """Load a model folder, ready to answer.

    Raises: ConfigError if a file is missing.
    """
    model = read_model(path, "auto")
    return as_generator(model, path, max_new_tokens, batch_rows)


def read_model(path: str | Path, dtype: torch.dtype | str) -> Phi3VForCausalLM:
    """Read a model's configuration and weights from a folder or the hub.

    Raises: ConfigError if a file is missing or damaged, or a weight is missing or of another shape,
    which transformers would replace by a random one.
    """
    try:
        model, report = Phi3VForCausalLM.from_pretrained(
            path, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"{path} holds no model that can be read ({str(error).splitlines()[0]}); name a model "
            "folder such as models/tiny, or a hub model"
        ) from error
    absent = sorted(report["missing_keys"])
    wrong = absent + sorted(name for name, *_ in report["mismatched_keys"])
    if wrong:
        fault = "missing" if absent else "of another shape than config.json says"
        raise ConfigError(
            f"{path} lacks {len(wrong)} of the model's weights: {wrong[0]} is {fault}; "
            "fetch or export the folder again"
        )
    return model


def as_generator(
    model: Phi3VForCausalLM, path: str | Path, max_new_tokens: int, batch_rows: int
) -> Generator:
    """Put a model on the device there is, with the tokenizer and image settings of a folder."""
    processor = Phi3VProcessor.from_pretrained(path)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    placed = model.to(device).eval()
    return Generator(placed, processor.tokenizer, processor.views, max_new_tokens, batch_rows)


def check_model(dataset: Dataset, path: str) -> None:
    """Refuse shards that were prepared for another tokenizer, crop size or normalisation.

    Raises: ConfigError naming what differs.
    """
    processor = Phi3VProcessor.from_pretrained(path)
    made_for, found = dataset.view_settings, processor.views
    tokenizer = dataset.manifest["tokenizer"]
    if made_for != found or tokenizer != processor.tokenizer_digest:
        what = "image settings" if made_for != found else "tokenizer"
        raise ConfigError(
            f"shards {dataset.folder} were prepared for a model with another {what} than {path}; "
            "prepare them again with this model"
        )

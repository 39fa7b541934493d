"""Opening a Hugging Face folder to ask it something."""

from pathlib import Path

import torch

from phi3v.evaluation.generation import Generator
from phi3v.model import Phi3VForCausalLM
from phi3v.processing import Phi3VProcessor


def open_model(path: str | Path, max_new_tokens: int, batch_rows: int = 1) -> Generator:
    """Load a model folder, ready to answer.

    Raises: ConfigError if a file is missing.
    """
    model = Phi3VForCausalLM.from_pretrained(path, dtype="auto")
    return as_generator(model, path, max_new_tokens, batch_rows)


def as_generator(
    model: Phi3VForCausalLM, path: str | Path, max_new_tokens: int, batch_rows: int
) -> Generator:
    """Put a model on the device there is, with the tokenizer and image settings of a folder."""
    processor = Phi3VProcessor.from_pretrained(path)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    placed = model.to(device).eval()
    return Generator(placed, processor.tokenizer, processor.views, max_new_tokens, batch_rows)

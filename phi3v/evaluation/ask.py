"""One question to one model."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from phi3v.errors import ConfigError
from phi3v.evaluation.generation import Prompt
from phi3v.evaluation.models import open_model
from phi3v.processing import Phi3VProcessor
from phi3v.processing.prompt import Message, encode, image_tags, render
from phi3v.sample import Canvas


def ask(model: str, prompt: str, images: Sequence[Path], max_new_tokens: int) -> str:
    """Answer a prompt about some pictures.

    Raises: ConfigError if a picture cannot be read; SampleError if the tags do not fit them.
    """
    processor = Phi3VProcessor.from_pretrained(model)
    canvases = [processor.canvas(_open(path)) for path in images]
    if not image_tags(prompt):
        prompt = "".join(f"<|image_{n}|>\n" for n in range(1, len(images) + 1)) + prompt
    text = render([Message(role="user", content=prompt)], for_answer=True)
    counts = [processor.canvas_tokens(canvas) for canvas in canvases]
    ids = np.array(encode(processor.tokenizer, text, counts))
    # The model takes pictures in order of appearance, whatever their tags' numbers are.
    shown = tuple(Canvas(canvases[tag - 1]) for tag in image_tags(prompt))
    generator = open_model(model, max_new_tokens)
    return generator.answer([Prompt(ids, shown)], quiet=True)[0]


def _open(path: Path) -> Image.Image:
    try:
        image = Image.open(path)
        image.load()
    except Exception as error:  # Pillow's decoders: OSError, SyntaxError, RuntimeError and others
        raise ConfigError(f"--image {path} cannot be read ({error}); name a picture") from error
    return image

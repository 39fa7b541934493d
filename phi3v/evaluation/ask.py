"""One question to one model."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from phi3v.errors import ConfigError
from phi3v.evaluation.generation import Prompt
from phi3v.evaluation.models import open_model
from phi3v.processing import Phi3VProcessor
from phi3v.processing.prompt import Message, encode_messages, image_tags
from phi3v.sample import Canvas


def ask(model: str, prompt: str, images: Sequence[Path], max_new_tokens: int) -> str:
    """Answer a prompt about some pictures.

    Raises: ConfigError if a picture cannot be read; SampleError if the tags do not fit them.
    """
    processor = Phi3VProcessor.from_pretrained(model)
    asked = make_prompt(processor, prompt, [_open(path) for path in images])
    return open_model(model, max_new_tokens).answer([asked], quiet=True)[0]


def make_prompt(processor: Phi3VProcessor, text: str, pictures: Sequence[Image.Image]) -> Prompt:
    """One user's turn; the pictures stand before the text unless its tags place them.

    Raises: SampleError if the tags do not fit the pictures.
    """
    canvases = [processor.canvas(picture) for picture in pictures]
    if not image_tags(text):
        text = "".join(f"<|image_{n}|>\n" for n in range(1, len(pictures) + 1)) + text
    counts = [processor.canvas_tokens(canvas) for canvas in canvases]
    messages = [Message(role="user", content=text)]
    ids = encode_messages(processor.tokenizer, messages, counts, for_answer=True)
    # The model takes pictures in order of appearance, whatever their tags' numbers are.
    shown = tuple(Canvas(canvases[tag - 1]) for tag in image_tags(text))
    return Prompt(np.array(ids), shown)


def _open(path: Path) -> Image.Image:
    try:
        image = Image.open(path)
        image.load()
    except Exception as error:  # Pillow's decoders: OSError, SyntaxError, RuntimeError and others
        raise ConfigError(f"--image {path} cannot be read ({error}); name a picture") from error
    return image

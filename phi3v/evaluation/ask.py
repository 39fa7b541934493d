"""Questions to one model: a question or a whole conversation, with pictures, becomes a prompt.

    asker = Asker(generator, processor, system="Answer in one word.")
    asker.ask("Which colour?", [Path("bag.jpg")], show=print)

Pictures stand before the text unless its tags <|image_1|>, <|image_2|>, ... place them, or <image>,
the k-th of which is the k-th picture.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from phi3v.addresses import shown_reference
from phi3v.config.dataset import MAX_CHARACTERS, MAX_PIXELS, MAX_ROW_BYTES, ImagesSection
from phi3v.errors import ConfigError, SampleError
from phi3v.evaluation.generation import Generator, Prompt
from phi3v.evaluation.models import open_model
from phi3v.pictures import PUBLISHED
from phi3v.places import local_path, missing_image, read_image, shortened
from phi3v.processing import Phi3VProcessor, decoding
from phi3v.processing.prompt import Message, encode_messages, image_tags, settle_tags
from phi3v.reading import EVERYWHERE, Reach
from phi3v.sample import Canvas

ADDRESS = re.compile(r"(?:(https?|s3|gs|ftp|file):/+|(data):(?=\w+/))", re.IGNORECASE)

Show = Callable[[str], None]


@dataclass(frozen=True)
class Asker:
    """A model and how it is talked to; `system` is what it is told first."""

    generator: Generator
    processor: Phi3VProcessor
    system: str | None = None

    def ask(self, text: str, images: Sequence[Path] = (), show: Show | None = None) -> str:
        """Answer a question about some pictures; `show` gets the answer in pieces as it comes.

        Raises: ConfigError if a picture cannot be read; SampleError if the tags do not fit them, or
        the prompt is too long.
        """
        pictures = [open_shown(path, self.processor.rules) for path in images]
        prompt = self.prompt([user_turn(text, len(pictures))], pictures)
        if show:
            return self.generator.stream(prompt, show)
        return self.generator.answer([prompt], quiet=True)[0]

    def prompt(self, messages: Sequence[Message], pictures: Iterable[Image.Image]) -> Prompt:
        """A conversation up to the answer that is wanted.

        pictures  each is done with before the next is asked for

        Raises: SampleError if the tags do not fit the pictures, or it is too long.
        """
        has_own = bool(messages) and messages[0]["role"] == "system"
        told = [Message(role="system", content=self.system)] if self.system and not has_own else []
        prompt = encode_prompt(self.processor, [*told, *messages], pictures)
        self.generator.check(prompt)
        return prompt


def ask(model: str, text: str, images: Sequence[Path], max_new_tokens: int) -> str:
    """Answer a question by a model folder or hub model.

    Raises: as `open_model` and `Asker.ask`.
    """
    processor = Phi3VProcessor.from_pretrained(model)
    return Asker(open_model(model, max_new_tokens), processor).ask(text, images)


def make_prompt(processor: Phi3VProcessor, text: str, pictures: Sequence[Image.Image]) -> Prompt:
    """One user's turn; the pictures stand before the text unless its tags place them.

    Raises: SampleError if the tags do not fit the pictures.
    """
    return encode_prompt(processor, [user_turn(text, len(pictures))], pictures)


def encode_prompt(
    processor: Phi3VProcessor, messages: Sequence[Message], pictures: Iterable[Image.Image]
) -> Prompt:
    """A conversation, ready to be answered.

    Raises: SampleError if the tags do not fit the pictures, or it is more than a row of a dataset
    may be by default.
    """
    characters = sum(len(message["content"]) for message in messages)
    if characters > MAX_CHARACTERS:
        raise SampleError(f"too much text: {characters:,} characters, {MAX_CHARACTERS:,} at most")
    canvases = []
    taken = 0
    for picture in pictures:
        canvases.append(processor.canvas(picture))
        taken += canvases[-1].nbytes
        if taken > MAX_ROW_BYTES:
            raise SampleError(
                f"images take too many bytes: {taken:,} for {len(canvases):,} images, "
                f"{MAX_ROW_BYTES:,} at most"
            )
    counts = [processor.canvas_tokens(canvas) for canvas in canvases]
    ids = encode_messages(processor.tokenizer, messages, counts, for_answer=True)
    # The model takes pictures in order of appearance, whatever their tags' numbers are.
    tags = [tag for message in messages for tag in image_tags(message["content"])]
    return Prompt(np.array(ids), tuple(Canvas(canvases[tag - 1]) for tag in tags))


def user_turn(text: str, num_pictures: int, first: int = 1) -> Message:
    """What a user says, with the tags of the pictures from `first` on unless the text has tags.

    Raises: SampleError if it has a tag that no picture answers to, such as <video>.
    """
    (text,) = settle_tags([text], first)
    if not image_tags(text):
        text = "".join(f"<|image_{first + n}|>\n" for n in range(num_pictures)) + text
    return Message(role="user", content=text)


def open_picture(
    path: Path | str, rules: ImagesSection, root: Path = Path(), reach: Reach = EVERYWHERE
) -> Image.Image:
    """Open a picture and decode it to RGB, as prepare opens and decodes it.

    path   as prepare takes it, written by another system too (phi3v/places.py)
    root   where a relative one starts
    reach  where it may lie

    Raises: SampleError if it cannot be read, may not be, or its pixels have no agreed meaning.
    """
    text = _local(str(path))
    data = read_image(root, text, reach, MAX_ROW_BYTES)
    if data is None:
        raise missing_image(root, text, reach)
    return decoding.open_picture(data, shortened(text), MAX_PIXELS, rules).decode().image


def _local(text: str) -> str:
    """The path in a text that may be an address, from which `Path` may have taken a slash."""
    scheme = ADDRESS.match(text)
    if scheme is None:
        return text
    if (scheme[1] or scheme[2]).lower() != "file":
        shown = shortened(shown_reference(text))
        raise SampleError(f"{shown} is an address; bring the file and name its path")
    return str(local_path(f"file://{text[scheme.end() :]}"))


def open_shown(path: Path, rules: ImagesSection = PUBLISHED) -> Image.Image:
    """Open a picture of --image.

    Raises: ConfigError if it cannot be read.
    """
    try:
        return open_picture(path, rules)
    except SampleError as error:
        raise ConfigError(f"--image: {error}; name another") from error

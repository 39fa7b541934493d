"""What launch/generate.py is asked to do, checked before a model is loaded, and done."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from phi3v.config.running import EvalSection
from phi3v.config.values import real_breaks
from phi3v.errors import ConfigError
from phi3v.evaluation.ask import Asker, open_shown
from phi3v.evaluation.chat import Chat
from phi3v.evaluation.generation import Generator, Sampling
from phi3v.evaluation.requests import ReadMessages, answer_file, check_files
from phi3v.printing import LINES, print, printable
from phi3v.processing import Phi3VProcessor
from phi3v.reading import FOLDER, kind_at


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """The command's options; one of `prompt`, `chat` and `jsonl` is set.

    stream  None: on a terminal
    """

    prompt: str | None = None
    chat: bool = False
    jsonl: Path | None = None
    out: Path | None = None
    images: tuple[Path, ...] | list[Path] = ()
    image_root: tuple[Path, ...] | list[Path] = ()
    system: str | None = None
    stream: bool | None = None
    max_new_tokens: int = 256
    batch_rows: int = 8
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        ways = {"--prompt": self.prompt is not None, "--chat": self.chat, "--jsonl": self.jsonl}
        given = [name for name, value in ways.items() if value]
        if len(given) != 1:
            raise ConfigError(
                f"give exactly one of {', '.join(ways)}, got {' and '.join(given) or 'none'}"
            )
        self._check_companions(given[0])
        real_breaks(
            "--",
            "type a real one, in most shells by $'a\\nb', or ask by --jsonl",
            prompt=self.prompt,
            system=self.system,
        )
        for name in ("max_new_tokens", "batch_rows"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name} must be at least 1, got {getattr(self, name)}")
        if self.temperature is not None and not self.temperature > 0:
            raise ConfigError(
                f"--temperature must be above 0, got {self.temperature}; leave it out for the "
                "likeliest tokens"
            )
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"--top_p must be above 0 and at most 1, got {self.top_p}")

    def _check_companions(self, way: str) -> None:
        if (self.jsonl is None) != (self.out is None):
            raise ConfigError("--jsonl and --out go together: the questions and their answers")
        if way == "--jsonl" and (self.images or self.stream):
            other = "--image" if self.images else "--stream"
            raise ConfigError(f"--jsonl does not go with {other}; each row names its images")
        if self.image_root and way != "--jsonl":
            raise ConfigError(f"--image_root goes with --jsonl alone, got {way}; remove it")
        if way == "--chat" and self.stream is False:
            raise ConfigError("--chat does not go with --no-stream; it shows answers as they come")
        drawn = [name for name in ("top_p", "seed") if getattr(self, name) is not None]
        if drawn and self.temperature is None:
            raise ConfigError(f"--{drawn[0]} needs --temperature; without it nothing is drawn")

    def check_files(self) -> None:
        """Refuse pictures and files that cannot be used, which is quick, unlike to load a model.

        Raises: ConfigError
        """
        for path in self.images:
            open_shown(path)
        for folder in self.image_root:
            if kind_at(folder) != FOLDER:
                raise ConfigError(f"--image_root {folder} is no folder; name one")
        if self.jsonl and self.out:
            check_files(self.jsonl, self.out)

    @property
    def settings(self) -> EvalSection:
        """As a model is opened by."""
        return EvalSection(max_new_tokens=self.max_new_tokens, batch_rows=self.batch_rows)

    @property
    def sampling(self) -> Sampling | None:
        """How tokens are drawn, None if they are not."""
        if self.temperature is None:
            return None
        return Sampling(self.temperature, 1.0 if self.top_p is None else self.top_p)


def fulfil(
    wishes: Wishes,
    open_generator: Callable[[], Generator],
    open_processor: Callable[[], Phi3VProcessor],
    read_messages: ReadMessages,
) -> None:
    """Open the model and answer on stdout or to the file."""
    wishes.check_files()
    processor = open_processor()
    generator = replace(open_generator(), sampling=wishes.sampling)
    asker = Asker(generator, processor, wishes.system)
    torch.manual_seed(wishes.seed or 0)
    if wishes.chat:
        chat = Chat(asker, _say, _note)
        for path in wishes.images:
            chat.add_picture(path)
        chat.run(_typed())
    elif wishes.jsonl and wishes.out:
        total = answer_file(asker, wishes.jsonl, wishes.out, read_messages, wishes.image_root)
        _note(f"rows answered: {total:,}, in {wishes.out}")
    elif wishes.prompt is not None:
        streams = sys.stdout.isatty() if wishes.stream is None else wishes.stream
        answer = asker.ask(wishes.prompt, wishes.images, show=_say if streams else None)
        _say("\n" if streams else f"{answer}\n")


def _typed() -> Iterator[str]:
    """Lines of stdin, each asked for on a terminal."""
    is_terminal = sys.stdin.isatty()
    while True:
        try:
            yield input("> " if is_terminal else "")
        except EOFError:
            return


def _say(text: str) -> None:
    """Show an answer, or a piece of one: clean on a terminal, and as it is to a file or program."""
    sys.stdout.write(printable(text, LINES) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)

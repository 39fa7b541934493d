"""A conversation with a model, line by line.

Each turn encodes the whole conversation anew and computes its keys and values again: a turn costs
what all turns before it have cost in tokens, which for an answer of usual length is little beside
the answer itself.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from phi3v.errors import MachineError, SampleError
from phi3v.evaluation.ask import Asker, open_picture, user_turn
from phi3v.processing.prompt import IMAGE_TAG, Message

HELP = (
    "/image FILE shows a picture with the next question, /reset starts anew, /quit or Ctrl-D ends"
)


@dataclass
class Chat:
    """A conversation so far: its messages, all pictures shown, and those the next turn shows.

    say   shows a piece of an answer
    note  shows a line about the conversation
    """

    asker: Asker
    say: Callable[[str], None]
    note: Callable[[str], None]
    messages: list[Message] = field(default_factory=list)
    pictures: list[Image.Image] = field(default_factory=list)
    num_shown: int = 0

    def run(self, lines: Iterable[str]) -> None:
        """Take line after line until one says /quit or there are no more.

        What cannot be done is said, and the conversation goes on as it was.
        """
        self.note(HELP)
        for line in map(str.strip, lines):
            if line == "/quit":
                return
            try:
                self._take(line)
            except (SampleError, MachineError) as error:
                self.note(str(error))

    def add_picture(self, path: Path) -> None:
        """Show a picture with the next question.

        Raises: SampleError if it cannot be read.
        """
        picture = open_picture(path, self.asker.processor.rules)
        self.pictures.append(picture)
        width, height = picture.size
        self.note(f"image {len(self.pictures)}: {path}, {width} x {height} pixels")

    def _take(self, line: str) -> None:
        command, _, rest = line.partition(" ")
        if command == "/image":
            if not rest:
                raise SampleError("/image needs a file, as in /image picture.jpg")
            self.add_picture(Path(rest.strip()).expanduser())
        elif line == "/reset":
            self.messages, self.pictures, self.num_shown = [], [], 0
            self.note("the conversation starts anew")
        elif line.startswith("/"):
            self.note(f"there is no {command}; {HELP}")
        elif line:
            self._answer(line)

    def _answer(self, line: str) -> None:
        waiting = len(self.pictures) - self.num_shown
        asked = [*self.messages, user_turn(line, waiting, first=self.num_shown + 1)]
        prompt = self.asker.prompt(asked, self.pictures)
        answer = self.asker.generator.stream(prompt, self.say)
        self.say("\n")
        # A tag that the model says is text, where a tag in a conversation shows a picture.
        said = IMAGE_TAG.sub(r"<image_\1>", answer)
        self.messages = [*asked, Message(role="assistant", content=said)]
        self.num_shown = len(self.pictures)

"""Many questions in a file of JSON lines, their answers in another, line for line.

    {"id": "a", "prompt": "What is it?", "images": ["a.jpg"]}      ->  {"id": "a", "prediction": ..}
    {"id": "b", "messages": [{"role": "user", "content": "Hi"}]}   ->  {"id": "b", "error": ..}

A row has a `prompt`, or `messages` as `prepare` takes them, and no key that is not understood
(phi3v/processing/keys.py); if the last of these is an answer, that is what is asked for, and it is
not shown to the model. Images lie in the file's folder, where their paths start, unless
--image_root names others. Rows are read, answered and written some at a time, so a file may be of
any length; the answers have their name when all are written.
"""

import codecs
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from phi3v.config.dataset import MAX_IMAGES
from phi3v.errors import ConfigError, MachineError, SampleError
from phi3v.evaluation.ask import Asker, open_picture, user_turn
from phi3v.evaluation.generation import Prompt
from phi3v.files import replacing
from phi3v.lines import line_of, numbered_lines, parse_line
from phi3v.processing.keys import (
    FORMATS,
    PICTURES,
    as_list,
    check_keys,
    is_empty,
    pictures_of,
    unique,
)
from phi3v.processing.prompt import Message
from phi3v.progress import progress
from phi3v.reading import PLAIN, Reach, is_of_machine, kind_at, machine_error

ASKING = ("prompt", "messages")  # keys of a row, one of which it has
BATCH_BYTES = 1 << 28  # canvases held at once
BATCHES = 8  # read at once, so that rows of a length can share a batch

ReadMessages = Callable[[Mapping[str, Any]], tuple[list[Message], list[Any]]]
"""The messages of a row, and the images that their tags stand for."""


def check_files(source: Path, out: Path) -> None:
    """Refuse files that cannot be read or written, before a model is loaded.

    Raises: ConfigError
    """
    if (kind := kind_at(source)) != PLAIN:
        fault = f"is {kind}" if kind else "does not exist"
        raise ConfigError(f"--jsonl {source} {fault}; name a file of JSON lines")
    if source.resolve() == out.resolve():
        raise ConfigError(f"--out {out} is the file that is read; name another")
    if not out.parent.is_dir():
        raise ConfigError(f"--out {out}: there is no folder {out.parent}; make it")
    if out.exists() and not out.is_file():
        raise ConfigError(
            f"--out {out} is {'a folder' if out.is_dir() else 'no file'}; name a file"
        )


def answer_file(
    asker: Asker,
    source: Path,
    out: Path,
    read_messages: ReadMessages,
    image_root: Sequence[Path] = (),
) -> int:
    """Answer every row of a file; a row that cannot be has its reason in the place of an answer.

    image_root  folders in which the rows' pictures lie, relative paths start at the first; none:
                the file's folder

    Returns the number of rows.
    Raises: ConfigError if the file cannot be read; SampleError at the end, when all is written, if
    there are rows without an answer.
    """
    num_failed = 0
    shown = _Shown.of(image_root or [source.parent])
    total = sum(1 for _ in _lines(source))
    bar = progress(None, "answer", "row", total)
    with bar, replacing(out) as temporary, temporary.open("wb") as file:
        lines = _lines(source)
        while results := _answer(asker, lines, shown, read_messages):
            for result in results:
                num_failed += "error" in result
                file.write(line_of(result))
            bar.update(len(results))
    if num_failed:
        raise SampleError(
            f"{num_failed:,} of {total:,} rows of {source} have no answer; {out} says why in "
            "'error' of their lines, mend them and run again"
        )
    return total


def _lines(source: Path) -> Iterator[tuple[int, bytes]]:
    """The lines that hold something, each with its number from 1."""
    try:
        yield from numbered_lines(source)
    except OSError as error:
        if is_of_machine(error):
            raise machine_error(error, f"--jsonl {source}") from error
        reason = error.strerror
        raise ConfigError(f"--jsonl {source} cannot be read ({reason}); name another") from error


@dataclass(frozen=True)
class _Shown:
    """Where the rows' pictures are."""

    root: Path
    reach: Reach

    @classmethod
    def of(cls, folders: Sequence[Path]) -> "_Shown":
        return cls(folders[0], Reach.of(*folders, key="--image_root"))


def _answer(
    asker: Asker, lines: Iterator[tuple[int, bytes]], shown: _Shown, read_messages: ReadMessages
) -> Sequence[dict[str, Any]]:
    """What becomes of the next rows, in their order; as many as BATCH_BYTES allow."""
    results: list[dict[str, Any]] = []
    prompts: dict[int, Prompt] = {}
    held = 0
    for place, (number, line) in enumerate(islice(lines, BATCHES * asker.generator.batch_rows)):
        result: dict[str, Any] = {"id": str(number)}
        results.append(result)
        try:
            values = _parse(line, number)
            if not is_empty(values.get("id")):
                result["id"] = _writable(values["id"])
            prompts[place] = _prompt(asker, values, shown, read_messages)
            held += sum(canvas.pixels.nbytes for canvas in prompts[place].images)
        except (SampleError, MachineError) as error:  # the answers to other rows took hours
            result["error"] = str(error)
        if held > BATCH_BYTES:
            break
    answers = asker.generator.answer(list(prompts.values()), quiet=True)
    for place, answer in zip(prompts, answers, strict=True):
        results[place]["prediction"] = answer
    return results


def _parse(line: bytes, number: int) -> dict[str, Any]:
    """Read a line of the file, which has this number there."""
    try:
        return parse_line(
            line.removeprefix(codecs.BOM_UTF8), partial(json.loads, object_pairs_hook=unique)
        )
    except ValueError as error:
        raise SampleError(f"line {number} {error}") from error


def _writable(name: Any) -> Any:
    """An id that can be written down again: Python reads NaN and 1e999, which are no JSON."""
    try:
        line_of({"id": name})
    except ValueError as error:
        raise SampleError(f"'id' cannot be written as JSON: {error}") from error
    return name


def _prompt(
    asker: Asker, values: Mapping[str, Any], shown: _Shown, read_messages: ReadMessages
) -> Prompt:
    given = [key for key in ASKING if values.get(key) is not None]
    if len(given) > 1:
        raise SampleError("a row has both a 'prompt' and 'messages'; leave one of them out")
    if not given:
        raise SampleError(f"a row has neither a 'prompt' nor 'messages'; {_advice(values)}")
    messages, images = _asked(values) if given == ["prompt"] else _chat(values, read_messages)
    if strange := [image for image in images if not isinstance(image, str)]:
        raise SampleError(f"an image is a {type(strange[0]).__name__}, not a path")
    rules = asker.processor.rules
    if len(images) > MAX_IMAGES:
        raise SampleError(f"too many images: {len(images):,}, {MAX_IMAGES:,} at most")
    pictures = (open_picture(image, rules, shown.root, shown.reach) for image in images)
    return asker.prompt(messages, pictures)


def _asked(values: Mapping[str, Any]) -> tuple[list[Message], list[Any]]:
    """The question of a row with a `prompt`, after its system text if it has one; its images."""
    check_keys(values, FORMATS["prompt"].row, (), "the row")
    text, system = values["prompt"], values.get("system")
    if not isinstance(text, str):
        raise SampleError(f"'prompt' is a {type(text).__name__}, not a text")
    if not isinstance(system, str | None):
        raise SampleError(f"'system' is a {type(system).__name__}, not a text")
    key, held = pictures_of(values, ())
    if key == "images" and not isinstance(held, list):
        raise SampleError(f"'images' is a {type(held).__name__}, not a list of paths")
    told = [Message(role="system", content=system)] if system else []
    images = as_list(held)
    return [*told, user_turn(text, len(images))], images


def _chat(
    values: Mapping[str, Any], read_messages: ReadMessages
) -> tuple[list[Message], list[Any]]:
    """The messages of a row up to the answer that is asked for, and their images."""
    messages, images = read_messages(values)
    if messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages or messages[-1]["role"] != "user":
        raise SampleError("'messages' holds nothing that asks for an answer")
    return messages, images


def _advice(values: Mapping[str, Any]) -> str:
    """What a key of a row that asks nothing may have meant, or the keys that it has."""
    others = [key for key in values if key not in (*ASKING, *PICTURES)]
    for wanted in ASKING:
        if close := get_close_matches(wanted, others, n=1):
            return f"it has {close[0]!r}: did you mean {wanted!r}?"
    return f"its keys are {', '.join(values) or 'none'}; write what is asked as its 'prompt'"

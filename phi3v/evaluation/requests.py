"""Many questions in a file of JSON lines, their answers in another, line for line.

    {"id": "a", "prompt": "What is it?", "images": ["a.jpg"]}      ->  {"id": "a", "prediction": ..}
    {"id": "b", "messages": [{"role": "user", "content": "Hi"}]}   ->  {"id": "b", "error": ..}

A row with `messages` is as `prepare` takes it; if its last message is an answer, that is what is
asked for, and it is not shown to the model. Paths of images start at the file's folder. Rows are
read, answered and written some at a time, so a file may be of any length; the answers have their
name when all are written.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from phi3v.errors import ConfigError, SampleError
from phi3v.evaluation.ask import Asker, open_picture, user_turn
from phi3v.evaluation.generation import Prompt
from phi3v.files import replacing
from phi3v.processing.prompt import Message
from phi3v.progress import progress

BATCHES = 8  # read at once, so that rows of a length can share a batch

ReadMessages = Callable[[Mapping[str, Any]], tuple[list[Message], list[Any]]]
"""The messages of a row, and the images that their tags stand for."""


def answer_file(asker: Asker, source: Path, out: Path, read_messages: ReadMessages) -> None:
    """Answer every row of a file; a row that cannot be has its reason in the place of an answer.

    Raises: ConfigError if a file cannot be opened; SampleError at the end, when all is written, if
    there are rows without an answer.
    """
    if source.resolve() == out.resolve():
        raise ConfigError(f"--out {out} is the file that is read; name another")
    num_failed = 0
    total = sum(1 for _ in _lines(source))
    out.parent.mkdir(parents=True, exist_ok=True)
    bar = progress(None, "answer", "row", total)
    with bar, replacing(out) as temporary, temporary.open("w", encoding="utf-8") as file:
        lines = _lines(source)
        while rows := list(islice(lines, BATCHES * asker.generator.batch_rows)):
            for result in _answer(asker, rows, source.parent, read_messages):
                num_failed += "error" in result
                file.write(json.dumps(result, ensure_ascii=False) + "\n")
            bar.update(len(rows))
    if num_failed:
        raise SampleError(
            f"{num_failed:,} of {total:,} rows of {source} have no answer; {out} says why in "
            "'error' of their lines, mend them and run again"
        )


def _lines(source: Path) -> Iterator[tuple[int, str]]:
    """The lines that hold something, each with its number from 1."""
    try:
        with source.open(encoding="utf-8", errors="replace") as file:
            yield from ((number, line) for number, line in enumerate(file, 1) if line.strip())
    except OSError as error:
        raise ConfigError(f"--jsonl {source} cannot be read ({error}); name another") from error


def _answer(
    asker: Asker, rows: Sequence[tuple[int, str]], root: Path, read_messages: ReadMessages
) -> Iterable[dict[str, Any]]:
    """What becomes of each row, in their order."""
    results: list[dict[str, Any]] = []
    prompts: dict[int, Prompt] = {}
    for place, (number, line) in enumerate(rows):
        result: dict[str, Any] = {"id": str(number)}
        results.append(result)
        try:
            values = _parse(line)
            result["id"] = values.get("id", result["id"])
            prompts[place] = _prompt(asker, values, root, read_messages)
        except SampleError as error:
            result["error"] = str(error)
    answers = asker.generator.answer(list(prompts.values()), quiet=True)
    for place, answer in zip(prompts, answers, strict=True):
        results[place]["prediction"] = answer
    return results


def _parse(line: str) -> dict[str, Any]:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise SampleError(f"no JSON: {error}") from error
    if not isinstance(values, dict):
        raise SampleError(f"a row is a {type(values).__name__}, not an object of JSON")
    return values


def _prompt(
    asker: Asker, values: Mapping[str, Any], root: Path, read_messages: ReadMessages
) -> Prompt:
    text = values.get("prompt")
    if isinstance(text, str):
        images = values.get("images") or []
        if not isinstance(images, list):
            raise SampleError(f"'images' is a {type(images).__name__}, not a list of paths")
        messages = [user_turn(text, len(images))]
    elif "messages" in values:
        messages, images = read_messages(values)
        if messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        if not messages or messages[-1]["role"] != "user":
            raise SampleError("'messages' holds nothing that asks for an answer")
    else:
        raise SampleError("a row has neither a 'prompt' text nor 'messages'")
    if strange := [image for image in images if not isinstance(image, str)]:
        raise SampleError(f"an image is a {type(strange[0]).__name__}, not a path")
    return asker.prompt(messages, [open_picture(root / image) for image in images])

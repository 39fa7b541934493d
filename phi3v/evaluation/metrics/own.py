"""A metric of the user's own: module:function, which says how right one answer is.

    def brevity(prediction, references):  # my_metrics.py
        return min(1.0, min(map(len, references)) / max(1, len(prediction)))

    eval: {metrics: [anls, "my_metrics:brevity"]}

It is given what the model said and the tuple of all accepted answers, and, if it has a parameter
called `prompt`, what was asked, as predictions.jsonl has it. It gives a number from 0 to 1, of
which 1 is right, and the same one each time: it is asked once for the same answer to the same row.
An interval, the controls, the comparison of models and checkpoint.best are as of any mean over
rows.
"""

import inspect
import traceback
from collections.abc import Callable
from functools import lru_cache
from numbers import Real
from typing import Any

import numpy as np

from phi3v.errors import ConfigError
from phi3v.evaluation.metrics.answers import Answer
from phi3v.functions import find_function

PROMPT = "prompt"
SHAPE = "write one of (prediction, references), or of (prediction, references, prompt)"


def is_own(name: str) -> bool:
    """Whether a metric's name is module:function."""
    return ":" in name


@lru_cache(maxsize=64)
def takes_prompt(name: str) -> bool:
    """Find the function, and say whether it asks for the prompt.

    Raises: ConfigError if there is none, or it takes something else.
    """
    function = _find(name)
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # of a builtin nobody knows what it takes
        raise ConfigError(f"eval.metrics {name} does not say what it takes; {SHAPE}") from None
    prompt = {PROMPT: ""} if PROMPT in parameters else {}
    try:
        inspect.signature(function).bind("", (), **prompt)
    except TypeError as error:
        raise ConfigError(
            f"eval.metrics {name} takes {inspect.signature(function)}: {error}; {SHAPE}"
        ) from None
    return bool(prompt)


def own_value(name: str, answer: Answer) -> float:
    """How right an answer is by the user's function, 0 to 1.

    Raises: ConfigError naming the row if the function raises or gives something else.
    """
    prompt = answer.prompt if takes_prompt(name) else None
    try:
        value = _call(name, answer.prediction, answer.accepted, prompt)
    except Exception as error:  # whatever the user's function raises
        raise ConfigError(
            f"eval.metrics {name} raised {type(error).__name__}, {error}, for row '{answer.id}' "
            f"{_place(error)}with the answer {answer.prediction!r}; mend it, or leave it out"
        ) from error
    wanted = f"for row '{answer.id}'; it is to give a number from 0 to 1, of which 1 is right"
    if not isinstance(value, Real | np.bool_):
        raise ConfigError(f"eval.metrics {name} gave {value!r}, a {type(value).__name__}, {wanted}")
    number = float(value)
    if not 0 <= number <= 1:  # nan neither
        raise ConfigError(f"eval.metrics {name} gave {number} {wanted}")
    return number


def _find(name: str) -> Callable[..., Any]:
    return find_function(name, "eval.metrics", SHAPE)


@lru_cache(maxsize=65_536)
def _call(name: str, prediction: str, references: tuple[str, ...], prompt: str | None) -> Any:
    """Kept: a row's value is asked for in the score, for the row itself and in a comparison."""
    asked = {} if prompt is None else {PROMPT: prompt}
    return _find(name)(prediction, references, **asked)


def _place(error: BaseException) -> str:
    """Where in the user's files an error arose."""
    frames = traceback.extract_tb(error.__traceback__)
    last = frames[-1]
    return f"(line {last.lineno} of {last.filename}) " if len(frames) > 2 else ""

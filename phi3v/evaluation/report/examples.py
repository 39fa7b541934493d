"""Held-out rows as the model saw and answered them, in the order given: the worst first."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

import numpy as np

from phi3v.evaluation.report.words import metric_value, shortened
from phi3v.page import jpeg_url

PICTURE_PIXELS = 200
PICTURE_BYTES = 20_000  # of a JPEG, above which its quality is lowered
MOST_EXAMPLES = 24
CONTROL = re.compile(r"<s>|<\|(?:user|end|assistant)\|>")
IMAGE = re.compile(r"<\|image(?:_\d+)?\|>(?:<s>)?\n?")


@dataclass(frozen=True)
class Example:
    """One held-out row as the model saw and answered it.

    image   (H, W, 3) uint8, or None for a row without a picture
    blind   the answer when shown another row's picture, or None where that was not asked
    scores  by metric; None where the row has no value
    """

    image: np.ndarray | None
    prompt: str
    reference: str
    prediction: str
    blind: str | None
    is_right: bool
    scores: Mapping[str, float | None] = field(default_factory=dict)
    id: str = ""


def examples_section(examples: Sequence[Example]) -> str:
    """A table of rows with their pictures."""
    examples = examples[:MOST_EXAMPLES]
    if not examples:
        return ""
    prompt, shows_prompts = examples[0].prompt, len({example.prompt for example in examples}) > 1
    has_blind = any(example.blind is not None for example in examples)
    rows = "".join(
        _row(example, number, shows_prompts, has_blind)
        for number, example in enumerate(examples, start=1)
    )
    asked = f'Asked each time: <span class="text">{escape(shortened(_question(prompt)))}</span>'
    num_right = sum(example.is_right for example in examples)
    blind_head = "<th>blind prediction</th>" * has_blind
    return (
        '<section id="examples"><h2>Examples, worst rows first</h2>'
        f'<p class="note">{num_right} of the {len(examples)} shown are right. '
        f"{'' if shows_prompts else asked}</p>"
        '<table class="examples"><thead><tr><th>picture</th><th>reference</th><th>prediction</th>'
        f"{blind_head}<th>result</th></tr></thead><tbody>{rows}</tbody></table></section>\n"
    )


def _row(example: Example, number: int, shows_prompt: bool, has_blind: bool) -> str:
    blind = _text_cell("blind prediction", example.blind) if has_blind else ""
    prompt = f'<div class="prompt text">{escape(shortened(_question(example.prompt)))}</div>'
    verdict = "right" if example.is_right else "wrong"
    mark = "&#10003;" if example.is_right else "&#10007;"
    return (
        f'<tr><td class="picture">{_picture(example.image, number)}'
        f"{f'<small>{escape(shortened(example.id))}</small>' if example.id else ''}"
        f"{prompt if shows_prompt else ''}</td>"
        f"{_text_cell('reference', example.reference)}"
        f"{_text_cell('prediction', example.prediction)}{blind}"
        f'<td data-label="result"><span class="{verdict}">{mark} {verdict}</span>'
        f"{_scores(example.scores)}</td></tr>\n"
    )


def _question(prompt: str) -> str:
    """A prompt of one turn without the chat template's tokens; longer ones need them."""
    prompt = IMAGE.sub("[image] ", prompt)
    is_one_turn = prompt.count("<|user|>") == 1 and "<|system|>" not in prompt
    return CONTROL.sub("", prompt).strip() if is_one_turn else prompt


def _scores(scores: Mapping[str, float | None]) -> str:
    known = ((name, value) for name, value in scores.items() if value is not None)
    return "".join(
        f" <small>{escape(name).replace('_', '_<wbr>')} <b>{metric_value(name, value)}</b></small>"
        for name, value in known
    )


def _text_cell(label: str, text: str | None) -> str:
    if text is None:
        return f'<td data-label="{label}"><span class="muted">not asked</span></td>'
    return f'<td data-label="{label}"><span class="text">{escape(shortened(text))}</span></td>'


def _picture(image: np.ndarray | None, number: int) -> str:
    if image is None:
        return '<span class="muted">no picture</span>'
    url = jpeg_url(image, PICTURE_PIXELS, PICTURE_BYTES)
    return f'<img src="{url}" alt="picture of example {number}">'

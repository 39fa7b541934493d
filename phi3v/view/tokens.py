"""A sample's tokens as HTML: what is trained, what is masked, where the images are."""

import re
from dataclasses import dataclass
from html import escape
from itertools import pairwise

import numpy as np
from transformers import PreTrainedTokenizerFast

from phi3v.geometry import Grid
from phi3v.sample import IGNORED, Sample

LONGEST_RUN = 600  # tokens shown of a run of one kind; of a longer one, its two ends
WORD_START = "\u2581"  # how a piece says that a space stands before it
BYTE, NEWLINE = re.compile("<0x([0-9A-F]{2})>"), "<0x0A>"  # pieces of one byte
MASKED, TRAINED = 0, 1  # kinds of runs; -k is image k


@dataclass(frozen=True)
class Run:
    """Positions `start` to `stop` of one kind: MASKED, TRAINED or minus the image's number."""

    kind: int
    start: int
    stop: int


def runs_of(sample: Sample) -> list[Run]:
    """Cut a sample where its kind of token changes; a trained image counts as trained."""
    kinds = np.where(sample.input_ids < 0, sample.input_ids, MASKED)
    kinds = np.where(sample.labels != IGNORED, TRAINED, kinds)
    edges = [0, *(np.flatnonzero(np.diff(kinds)) + 1).tolist(), len(kinds)]
    return [Run(int(kinds[a]), a, b) for a, b in pairwise(edges) if a < b]


class TokenText:
    """Writes tokens of one tokenizer as text."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self._controls = set(tokenizer.added_tokens_decoder)
        self._html: dict[int, str] = {}

    def sequence(self, sample: Sample, grids: list[Grid]) -> str:
        """The coloured sequence; every token has its id as a tooltip."""
        ids = sample.input_ids.tolist()
        return "".join(self._run(run, ids[run.start : run.stop], grids) for run in runs_of(sample))

    def plain(self, ids: np.ndarray) -> str:
        """Ids as a text with control tokens; an image's positions are its tag."""
        edges = [0, *(np.flatnonzero(np.diff(np.minimum(ids, 0))) + 1).tolist(), len(ids)]
        return "".join(
            f"<|image_{-ids[a]}|>" if ids[a] < 0 else self.tokenizer.decode(ids[a:b].tolist())
            for a, b in pairwise(edges)
            if a < b
        )

    def _run(self, run: Run, ids: list[int], grids: list[Grid]) -> str:
        if run.kind < 0:
            return f'<span class="image">{_image_text(run, grids)}</span>'
        style, text = "trained" if run.kind == TRAINED else "masked", self._tokens(ids)
        if len(ids) > LONGEST_RUN:
            end = LONGEST_RUN // 2
            more = f'<b class="more">{len(ids) - 2 * end:,} tokens more</b>'
            text = f"{self._tokens(ids[:end])}{more}{self._tokens(ids[-end:])}"
        return f'<span class="{style}">{text}</span>'

    def _tokens(self, ids: list[int]) -> str:
        for token in set(ids) - self._html.keys():
            self._html[token] = self._token(token)
        return "".join(self._html[token] for token in ids)

    def _token(self, token: int) -> str:
        if token < 0:
            return f'<b title="{token}">image {-token}</b>'
        piece = self.tokenizer.convert_ids_to_tokens(token)
        if piece is None or token in self._controls:
            return f'<b title="{token}">{escape(piece or "unknown token")}</b>'
        if byte := BYTE.fullmatch(piece):
            value = chr(int(byte[1], 16))
            piece = value if value.isascii() and value.isprintable() else piece
        if piece == NEWLINE:
            return f'<i title="{token}">&#8629;</i>\n'
        return f'<i title="{token}">{escape(piece.replace(WORD_START, " "))}</i>'


def _image_text(run: Run, grids: list[Grid]) -> str:
    text = f"image {-run.kind}: {run.stop - run.start:,} tokens"
    if -run.kind > len(grids):
        return f"{text}, but no such image"
    grid = grids[-run.kind - 1]
    return f"{text}, {grid.rows} &times; {grid.cols} crops"

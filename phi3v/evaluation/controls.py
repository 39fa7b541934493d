"""What a score is worth: the same rows answered without their picture, or always with one answer.

Blind, each row is asked about another row's pictures (`exchange`). The constant answer is the most
frequent one of the training split (`constant_answers`). A model that scores no better than either
has not learnt to look.
"""

import hashlib
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from functools import cache
from pathlib import Path

import numpy as np

from phi3v.config.running import EvalSection
from phi3v.data.format import read_manifest
from phi3v.data.mixture import open_datasets
from phi3v.evaluation.held_out import pattern_of, spread
from phi3v.evaluation.metrics import Pattern, find_metrics
from phi3v.evaluation.metrics.names import Subject
from phi3v.evaluation.metrics.scores import content
from phi3v.evaluation.metrics.text import normalise
from phi3v.sample import Canvas

MOST_TRAINING_ROWS = 10_000  # that are read for the most frequent answer, evenly spaced
_CLASH = 3  # more than the two rows of a swap can gain by getting other answers


def digest(canvas: Canvas) -> bytes:
    """Say which picture it is: the same for the same pixels only."""
    found = hashlib.sha256(repr(canvas.pixels.shape).encode())
    found.update(np.ascontiguousarray(canvas.pixels).data)
    return found.digest()


def exchange(pictures: Sequence[Sequence[Hashable]], answers: Sequence[str]) -> list[int | None]:
    """Whose pictures each row gets: a row of as many, none of which is one of its own.

    pictures  what each row shows, by content; answers what each should say
    returns   [1, 0, None] for pictures [["a"], ["b"], []]; None where a row shows no picture, or
              every row with as many shows one of its own

    Each row's pictures are given away once, if no picture is shown by more than half of the rows;
    else some are given away more often. Among the ways to do so, few rows get pictures of a row
    with the same answer: swaps of two are made as long as one gains. Rows that are all different
    get those half way round, which takes nothing; the worst, 10,000 rows of two answers, 1 s.
    """
    partners: list[int | None] = [None] * len(pictures)
    numbers: dict[Hashable, int] = {}
    texts: dict[str, int] = {}
    for count in sorted({len(shown) for shown in pictures} - {0}):
        rows = [row for row, shown in enumerate(pictures) if len(shown) == count]
        shown = [[numbers.setdefault(p, len(numbers)) for p in pictures[row]] for row in rows]
        said = [texts.setdefault(normalise(answers[row]), len(texts)) for row in rows]
        donors = _Donors(np.array(shown), np.array(said)).find()
        for row, donor in zip(rows, donors, strict=True):
            partners[row] = None if donor is None else rows[donor]
    return partners


class _Donors:
    """Rows of one number of pictures: shown (n, count) and said (n,) number contents from 0."""

    def __init__(self, shown: np.ndarray, said: np.ndarray) -> None:
        self._shown, self._said = shown, said

    def find(self) -> list[int | None]:
        n = len(self._said)
        every = np.arange(n)
        donors = (every + n // 2) % n
        while self._swap(donors):
            pass
        for row in every[self._costs(every, donors) >= _CLASH]:
            others = (row + n // 2 + every) % n
            donors[row] = others[np.argmin(self._costs(row, others))]
        has_none = self._costs(every, donors) >= _CLASH
        pairs = zip(donors.tolist(), has_none, strict=True)
        return [None if is_alone else donor for donor, is_alone in pairs]

    def _swap(self, donors: np.ndarray) -> bool:
        """Let each row that is not content swap with whom both gain most by; whether any did.

        A row that gets its own picture finds one to swap with unless more than half of the rows
        show that picture: fewer than all others show it or get it.
        """
        every = np.arange(len(donors))
        has_swapped = False
        for row in every[self._costs(every, donors) > 0]:
            before = self._costs(row, donors[row]) + self._costs(every, donors)
            after = self._costs(row, donors) + self._costs(every, donors[row])
            other = np.argmin(after - before)
            if row != other and after[other] < before[other]:
                donors[[row, other]] = donors[[other, row]]
                has_swapped = True
        return has_swapped

    def _costs(self, rows: np.ndarray, donors: np.ndarray) -> np.ndarray:
        one, other = self._shown[rows], self._shown[donors]
        is_own = (one[..., :, None] == other[..., None, :]).any(axis=(-1, -2))
        return _CLASH * is_own + (self._said[rows] == self._said[donors])


def constant_answers(
    folders: Sequence[str], settings: EvalSection, names: Iterable[str]
) -> dict[str, str]:
    """The most frequent answer of training, for each of the metrics named; {} without training.

    A metric of a field is given an answer with the field's most frequent value. Of values that are
    as frequent the first counts.
    """
    references = _training_references(tuple(folders))
    pattern, names = pattern_of(settings), list(names)
    subjects = {
        name: metric.subject
        for name, metric in zip(names, find_metrics(names, pattern), strict=True)
    }
    answers = {
        subject: _most_frequent(references, subject, pattern) for subject in set(subjects.values())
    }
    found = ((name, answers[subject]) for name, subject in subjects.items())
    return {name: text for name, text in found if text is not None}


def _most_frequent(
    references: Sequence[str], subject: Subject, pattern: Pattern | None
) -> str | None:
    """The first text whose field, or whole text, is the most frequent; None if none has it."""
    held = [(text, content(subject, text, pattern)) for text in references]
    counts = Counter(value for _, value in held if value is not None)
    if not counts:
        return None
    ((most, _),) = counts.most_common(1)  # the first of those as frequent
    return next(text for text, value in held if value == most)


@cache
def _training_references(folders: tuple[str, ...]) -> tuple[str, ...]:
    """Kept: every evaluation of a run asks for them."""
    found = [f for f in folders if "train" in read_manifest(Path(f))["splits"]]
    if not found:
        return ()
    dataset = open_datasets(found, "train")
    if not len(dataset):
        return ()
    rows = spread(len(dataset), MOST_TRAINING_ROWS)
    return tuple(dataset.read_meta(row)["reference"] for row in rows)

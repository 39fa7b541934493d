"""Evaluate a model on held-out rows: loss, answers, scores, and what these are worth (controls).

    evaluation = evaluate(generator, ["shards/products"], settings)

In a run all ranks call it together. Each does its share without waiting for any other; they meet
once, at the end, in `gather`. So a rank may have few rows, none, or slow ones, and nothing hangs.
"""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from phi3v.config.running import EvalSection
from phi3v.evaluation.controls import constant_answers
from phi3v.evaluation.generation import Generator
from phi3v.evaluation.held_out import (
    HeldOut,
    open_held_out,
    pattern_of,
    spread,
    train_references,
)
from phi3v.evaluation.losses import PackLoss, mean_loss, sum_losses
from phi3v.evaluation.metrics import Score, is_lower_better, row_scores, score
from phi3v.evaluation.metrics.names import BLIND, CONSTANT
from phi3v.evaluation.metrics.text import normalise
from phi3v.evaluation.outcomes import Job, Outcome, answer_share, is_teacher_forced
from phi3v.evaluation.report import Example
from phi3v.printing import print
from phi3v.sample import Sample

EXAMPLES = 12  # rows shown in the report and the W&B table
LOSS_SHARE = 0.5  # of eval.max_seconds, that the loss may take
Gather = Callable[[Any], list[Any]]


class Interrupted(Exception):
    """Raised by a generator's `tick`: this rank gives its share of an evaluation up."""


_Share = tuple[list[Outcome], list[PackLoss]]


@dataclass(frozen=True)
class Evaluation:
    """Scores by name, loss, and every answer.

    scores      those of the blind control begin with blind_, of the constant answer with constant_

    loss        mean over the trained tokens of `loss_rows` rows; None where it is not finite
    unanswered  rows that eval.max_seconds left no time for; the scores are over the others
    """

    scores: dict[str, Score]
    loss: float | None
    outcomes: list[Outcome]
    dataset: HeldOut
    loss_rows: int = 0
    unanswered: int = 0

    def metrics(self) -> dict[str, dict[str, Any]]:
        """The scores as they are written to files."""
        return {name: score.as_dict() for name, score in self.scores.items()}

    def examples(self, count: int = EXAMPLES) -> list[Example]:
        """The worst rows, with their pictures, as people look at them.

        Worst by the first metric of eval.metrics, then by the next; those alike by row number.
        """
        return [
            Example(
                image=_first_picture(self.dataset[outcome.row]),
                prompt=outcome.prompt,
                reference=outcome.reference,
                prediction=outcome.prediction,
                blind=outcome.blind,
                is_right=outcome.is_right,
                scores=outcome.scores,
                id=outcome.id,
            )
            for outcome in sorted(self.outcomes, key=_goodness)[:count]
        ]


def evaluate(
    generator: Generator,
    folders: Sequence[str],
    settings: EvalSection,
    rank: int = 0,
    world_size: int = 1,
    gather: Gather | None = None,
    name: str = "",
) -> Evaluation:
    """Answer `settings.rows` rows of a split of some datasets, shared among ranks, and score them.

    `gather` collects one value of every rank on each, one that JSON can say; all ranks return the
    same evaluation, and without eval.max_seconds it is the same for any number of them. `name` is
    of the model, for a line about rows left out, where several models are evaluated.
    Raises: ConfigError if the split has no rows or a metric does not fit; Interrupted on all ranks
    if one of them was.
    """
    dataset = open_held_out(folders, settings)
    rows = spread(len(dataset), settings.rows)
    share: _Share | None = None
    with suppress(Interrupted):
        share = _do_share(Job(generator, dataset, settings, rank, world_size), rows)
    shares = [_as_share(values) for values in gather(_as_values(share))] if gather else [share]
    whole = [share for share in shares if share is not None]
    if len(whole) < len(shares):
        raise Interrupted
    outcomes = sorted((o for outcomes, _ in whole for o in outcomes), key=lambda o: o.row)
    losses = [loss for _, losses in whole for loss in losses]
    scores, outcomes = _score(settings, folders, outcomes)
    loss_rows, unanswered = sum(loss.rows for loss in losses), len(rows) - len(outcomes)
    if rank == 0:
        _tell_cut(name, settings, len(rows), unanswered, len(dataset), loss_rows)
        _tell_doubtful(settings, outcomes)
        _tell_controls(name, settings, folders, scores, outcomes)
    return Evaluation(scores, mean_loss(losses), outcomes, dataset, loss_rows, unanswered)


def limit_owner(runs: Sequence[str], overrides: Sequence[str]) -> str:
    """Who set eval.max_seconds, where models are asked with the settings of the first of `runs`."""
    is_given = any(value.startswith("eval.max_seconds=") for value in overrides)
    return "the command line" if is_given or not runs else runs[0]


def _do_share(job: Job, rows: Sequence[int]) -> _Share:
    """The loss first: it takes one pass over the rows, and answers take one per token."""
    box, began = job.settings.max_seconds, time.monotonic()
    losses = sum_losses(job, None if box is None else LOSS_SHARE * box)
    left = None if box is None else box - (time.monotonic() - began)
    return answer_share(job, rows, left), losses


def _as_values(share: _Share | None) -> Any:
    """A share as JSON can say it."""
    return share and [[asdict(part) for part in parts] for parts in share]


def _as_share(values: Any) -> _Share | None:
    if values is None:
        return None
    outcomes, losses = values
    made = [Outcome(**row | {"references": tuple(row["references"])}) for row in outcomes]
    return made, [PackLoss(**loss) for loss in losses]


def _score(
    settings: EvalSection, folders: Sequence[str], outcomes: Sequence[Outcome]
) -> tuple[dict[str, Score], list[Outcome]]:
    """The scores of all rows, and the rows with their own."""
    names, pattern = settings.metrics, pattern_of(settings)
    train = train_references(folders, settings)
    answers = [outcome.answer for outcome in outcomes]
    scores = score(names, answers, pattern, train)
    own = row_scores(names, answers, pattern, train)
    generated = [name for name in names if not is_teacher_forced(name)]
    blind = [answer for outcome in outcomes if (answer := outcome.blind_answer)]
    if blind:
        of_blind = score(generated, blind, pattern, train)
        scores |= {BLIND + name: value for name, value in of_blind.items()}
    for name, text in constant_answers(folders, settings, generated).items():
        constant = [replace(answer, prediction=text) for answer in answers]
        scores[CONSTANT + name] = score([name], constant, pattern, train)[name]
    return scores, [replace(o, scores=s) for o, s in zip(outcomes, own, strict=True)]


def _tell_cut(
    name: str, settings: EvalSection, rows: int, unanswered: int, total: int, loss_rows: int
) -> None:
    """Say what the time box left out, if it did."""
    wanted = min(total, settings.loss_rows or total)
    if not unanswered and loss_rows == wanted:
        return
    who = f"{name}: " if name else ""
    print(
        f"{who}eval.max_seconds={settings.max_seconds:g} ended the evaluation: "
        f"{rows - unanswered:,} of {rows:,} rows are answered, the loss is over {loss_rows:,} of "
        f"{wanted:,}; raise it, or lower eval.rows and eval.loss_rows",
        file=sys.stderr,
    )


def _tell_controls(
    name: str,
    settings: EvalSection,
    folders: Sequence[str],
    scores: Mapping[str, Score],
    outcomes: Sequence[Outcome],
) -> None:
    """Say which rows the blind control is without, and what is no control at all."""
    who = f"{name}: " if name else ""
    if settings.blind and (fault := blind_faults(outcomes)):
        print(f"{who}blind control: {fault}", file=sys.stderr)
    if not any(metric.startswith(CONSTANT) for metric in scores) and not all(
        map(is_teacher_forced, settings.metrics)
    ):
        print(
            f"{who}{', '.join(folders)} has no training answers, so there is no score of the most "
            "frequent one beside the model's",
            file=sys.stderr,
        )


def blind_faults(outcomes: Sequence[Outcome]) -> str:
    """What keeps a blind score from being of all rows, or from being quite blind; "" if nothing.

    A row that is shown the picture of a row with its own answer may be right of what it sees.
    """
    without = sum(outcome.pictures == 0 for outcome in outcomes)
    asked = [outcome for outcome in outcomes if outcome.blind is not None]
    alone = len(outcomes) - without - len(asked)
    same = sum(normalise(o.reference) == normalise(o.donor_reference or "") for o in asked)
    left_out = [
        f"{count:,} {text}"
        for count, text in ((without, "without a picture"), (alone, "with no other picture to get"))
        if count
    ]
    parts = []
    if left_out:
        parts.append(
            f"{without + alone:,} of {len(outcomes):,} rows are left out ({', '.join(left_out)})"
        )
    if same:
        parts.append(f"{same:,} of {len(asked):,} rows get pictures of a row with the same answer")
    return "; ".join(parts)


def _tell_doubtful(settings: EvalSection, outcomes: Sequence[Outcome]) -> None:
    """Say how a number is read that elsewhere would be a thousand times as much, if there is one.

    Only true answers count: what a model says is read in the same way.
    """
    pattern = pattern_of(settings)
    if pattern is None:
        return
    found = [number for o in outcomes if (number := pattern.doubtful_number(o.reference))]
    if found:
        print(
            f"{len(found):,} of {len(outcomes):,} true answers have a number like {found[0]}, read "
            f"as {float(found[0]):g}, for a point begins the decimals; where it groups thousands, "
            f"write {found[0].replace('.', '')} in the data",
            file=sys.stderr,
        )


def _goodness(outcome: Outcome) -> tuple[float, ...]:
    """What sorts the worst row first; a row without a value of a metric is not bad by it."""
    scores = (
        np.inf if value is None else -value if is_lower_better(name) else value
        for name, value in outcome.scores.items()
    )
    return (*scores, outcome.row)


def _first_picture(sample: Sample) -> np.ndarray | None:
    return np.array(sample.images[0].pixels) if sample.images else None

"""Scores as a table of text, models side by side."""

from collections.abc import Mapping

from phi3v.evaluation.evaluate import BLIND, Evaluation
from phi3v.evaluation.metrics import Score


def score_table(evaluations: Mapping[str, Evaluation]) -> str:
    """One line per metric; per model its value with the 95 % interval, and the blind control's.

    metric               runs/demo
    category_accuracy    0.981 [0.963, 0.996] n=267   blind 0.112
    """
    lines = [["metric", *evaluations]]
    lines.append(["loss", *(f"{e.loss:.4f}" for e in evaluations.values())])
    first = next(iter(evaluations.values()))
    for name in [name for name in first.scores if not name.startswith(BLIND)]:
        cells = [_cell(e.scores[name], e.scores.get(BLIND + name)) for e in evaluations.values()]
        lines.append([name, *cells])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "   ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _cell(score: Score, blind: Score | None) -> str:
    if score.value is None:
        return "no rows"
    text = f"{score.value:.3f} [{score.low:.3f}, {score.high:.3f}] n={score.n}"
    return f"{text}   blind {blind.value:.3f}" if blind and blind.value is not None else text

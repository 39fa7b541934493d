"""Scores and differences as tables of text, for people."""

from collections.abc import Mapping, Sequence

from phi3v.evaluation.comparison import Comparison
from phi3v.evaluation.evaluate import Evaluation
from phi3v.evaluation.metrics import Difference, Score
from phi3v.evaluation.metrics.names import BLIND
from phi3v.evaluation.report.words import loss_value


def score_table(evaluations: Mapping[str, Evaluation]) -> str:
    """One line per metric; per model its value with the 95 % interval, and the blind control's.

    metric               runs/demo
    category_accuracy    0.981 [0.963, 0.996] n=267   blind 0.112
    """
    lines = [["metric", *evaluations]]
    lines.append(["loss", *(loss_value(e.loss, digits=4) for e in evaluations.values())])
    first = next(iter(evaluations.values()))
    for name in [name for name in first.scores if not name.startswith(BLIND)]:
        cells = [_cell(e.scores[name], e.scores.get(BLIND + name)) for e in evaluations.values()]
        lines.append([name, *cells])
    return _aligned(lines)


def difference_table(comparison: Comparison) -> str:
    """One line per metric: the paired difference with its 95 % interval, p, and what that says.

    runs/demo - models/tiny   difference
    category_accuracy         +0.869 [+0.824, +0.910] n=267   p=0.0001   runs/demo is better
    """
    lines = [[f"{comparison.other} - {comparison.first}", "difference"]]
    for name, difference in comparison.differences.items():
        lines.append([name, *_difference_cells(difference), comparison.verdict(name)])
    return _aligned(lines)


def _cell(score: Score, blind: Score | None) -> str:
    if score.value is None:
        return "no rows"
    text = f"{score.value:.3f} [{score.low:.3f}, {score.high:.3f}] n={score.n}"
    return f"{text}   blind {blind.value:.3f}" if blind and blind.value is not None else text


def _difference_cells(found: Difference) -> list[str]:
    if found.value is None:
        return []
    interval = f"[{found.low:+.3f}, {found.high:+.3f}]"
    return [f"{found.value:+.3f} {interval} n={found.n}", f"p={found.p:.4f}"]


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell; a line may be without its last ones."""
    num_columns = max(map(len, lines))
    padded = [[*line, *[""] * (num_columns - len(line))] for line in lines]
    widths = [max(map(len, column)) for column in zip(*padded, strict=True)]
    return "\n".join(
        "   ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in padded
    )

"""Scores and differences as tables of text, for people."""

from collections.abc import Mapping, Sequence

from phi3v.evaluation.comparison import Comparison
from phi3v.evaluation.evaluate import Evaluation
from phi3v.evaluation.metrics import Difference, Score, is_rate
from phi3v.evaluation.metrics.names import BLIND, CONSTANT, controls
from phi3v.evaluation.report.words import interval_fault, loss_value, metric_value
from phi3v.evaluation.suite import Found


def all_tables(evaluations: Mapping[str, Evaluation], comparisons: Sequence[Comparison]) -> str:
    """The scores, then the differences of each pair; without a metric there are none."""
    pairs = [pair for pair in comparisons if pair.differences]
    return "\n\n".join([score_table(evaluations), *map(difference_table, pairs)])


def found_tables(found: Sequence[Found]) -> str:
    """The same; of a suite one table of scores, then one of differences for each pair.

    dataset   metric   runs/demo
    charts    loss     0.6973
    """
    if not found[0].part.name:
        return all_tables(found[0].evaluations, found[0].comparisons)
    heads: list[list[list[str]]] = []
    for one in found:
        pairs = [pair for pair in one.comparisons if pair.differences]
        tables = [_score_lines(one.evaluations), *map(_difference_lines, pairs)]
        heads += [[] for _ in tables[len(heads) :]]
        for table, lines in zip(heads, tables, strict=False):
            if not table:
                table.append(["dataset", *lines[0]])
            table += [[one.part.name, *line] for line in lines[1:]]
    return "\n\n".join(map(_aligned, heads))


def score_table(evaluations: Mapping[str, Evaluation]) -> str:
    """One line per metric; per model its value with the 95 % interval, and the controls'.

    metric               runs/demo
    category_accuracy    98.1% [96.3%, 99.6%] n=267   blind 11.2% n=267   constant 12.0%
    """
    return _aligned(_score_lines(evaluations))


def _score_lines(evaluations: Mapping[str, Evaluation]) -> list[list[str]]:
    lines = [["metric", *evaluations]]
    lines.append(["loss", *(loss_value(e.loss, digits=4) for e in evaluations.values())])
    first = next(iter(evaluations.values()))
    of_others = controls(first.scores)
    for name in [name for name in first.scores if name not in of_others]:
        lines.append([name, *(_cell(name, e.scores) for e in evaluations.values())])
    return lines


def difference_table(comparison: Comparison) -> str:
    """One line per metric: the paired difference with its 95 % interval, p, and what that says.

    pp are percentage points: from 11.2% to 98.1% are +86.9 pp.

    runs/demo - models/tiny   difference
    category_accuracy         +86.9 pp [+82.4, +91.0] n=267   p=0.0001   runs/demo is better
    """
    return _aligned(_difference_lines(comparison))


def _difference_lines(comparison: Comparison) -> list[list[str]]:
    lines = [[f"{comparison.other} - {comparison.first}", "difference"]]
    for name, difference in comparison.differences.items():
        lines.append([name, *_difference_cells(name, difference), comparison.verdict(name)])
    return lines


def _cell(name: str, scores: Mapping[str, Score]) -> str:
    score, blind, constant = scores[name], scores.get(BLIND + name), scores.get(CONSTANT + name)
    if score.value is None:
        return "no rows"
    value, low, high = (metric_value(name, x) for x in (score.value, score.low, score.high))
    parts = [f"{value} [{low}, {high}] n={score.n}{_fault(name, score)}"]
    if blind and blind.value is not None:
        parts.append(f"blind {metric_value(name, blind.value)} n={blind.n}")
    if constant and constant.value is not None:
        parts.append(f"constant {metric_value(name, constant.value)}")
    return "   ".join(parts)


def _fault(name: str, found: Score | Difference) -> str:
    fault = interval_fault(name, found.low, found.high, found.n)
    return f" ({fault})" if fault else ""


def _difference_cells(name: str, found: Difference) -> list[str]:
    if found.value is None or found.low is None or found.high is None:
        return []
    value, low, high = (_signed(name, x) for x in (found.value, found.low, found.high))
    unit = " pp" if is_rate(name) else ""
    return [f"{value}{unit} [{low}, {high}] n={found.n}{_fault(name, found)}", f"p={found.p:.4f}"]


def _signed(name: str, difference: float) -> str:
    """+86.9 for 0.869 of a rate, in percentage points; another metric in its own unit."""
    return f"{100 * difference:+z,.1f}" if is_rate(name) else f"{difference:+z,.4g}"


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell; a line may be without its last ones."""
    num_columns = max(map(len, lines))
    padded = [[*line, *[""] * (num_columns - len(line))] for line in lines]
    widths = [max(map(len, column)) for column in zip(*padded, strict=True)]
    return "\n".join(
        "   ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in padded
    )

"""A run's figures in words, with their units."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from phi3v.evaluation.metrics import is_bounded, is_rate

# Of log-normal errors a bootstrap interval holds the true mean, instead of 95 times of 100, 76 of 6
# rows, 85 of 30, and 91 of 100 (benchmarks/intervals.py).
FEW_ROWS = 100
MOST_CHARACTERS = 2000  # of one text; a page shows a few dozen of them


def duration(seconds: float) -> str:
    """45 s, 3 min, 2 h 01 min."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


def operations(flops: float) -> str:
    """441 GFLOP, 24.3 EFLOP."""
    value = float(f"{flops:.3g}")  # first, or 999.9 GFLOP would be 1e+03 GFLOP
    unit, prefix = next(((u, p) for u, p in _PREFIXES if value >= u), (1.0, ""))
    return f"{value / unit:,g} {prefix}FLOP"


_PREFIXES = ((1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def metric_value(name: str, value: float | None) -> str:
    """A metric's value as it is read: a rate in percent."""
    if value is None:
        return "?"
    return f"{100 * value:,.1f}%" if is_rate(name) else f"{value:,.4g}"


def interval_fault(name: str, low: float | None, high: float | None, n: int) -> str:
    """Why an interval says too little, "" if it does not: a bootstrap one of few or equal rows."""
    if is_bounded(name) or low is None or high is None:
        return ""
    if low == high:
        return "equal rows: no interval"
    return "few rows: interval too narrow" if n < FEW_ROWS else ""


def loss_value(loss: float | None, digits: int = 3) -> str:
    """A loss as it is read; None stands for one that is not finite."""
    return "not finite" if loss is None else f"{loss:.{digits}f}"


def rows_of(evaluations: Iterable[Mapping[str, Any]]) -> str:
    """What the rows of some evaluations are called: held-out, unless they were trained on.

    evaluations  lines of evaluations.jsonl; older ones do not name their split
    """
    are_trained = {entry.get("split") == "train" for entry in evaluations}
    if are_trained == {True}:
        return "training"
    return "evaluated" if True in are_trained else "held-out"


def shortened(text: str) -> str:
    """The start of a text that would make the page too large."""
    if len(text) <= MOST_CHARACTERS:
        return text
    return f"{text[:MOST_CHARACTERS]} ... ({len(text):,} characters)"


_FIGURES: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("steps", "steps", "{:,}".format),
    ("warmup_steps", "steps left out (a process's first: kernels compile)", "{:,}".format),
    ("samples", "samples", "{:,}".format),
    ("tokens", "tokens", "{:,}".format),
    ("seconds", "time", duration),
    ("tokens_per_second", "tokens per second", "{:,.0f}".format),
    ("views_per_second", "views per second", "{:,.1f}".format),
    ("mfu", "model FLOPs utilisation", "{:.1%}".format),
    ("packing", "packing: real tokens over budget", "{:.1%}".format),
    ("balance", "balance: mean over max cost of the ranks", "{:.1%}".format),
    ("data_wait", "waiting for data", "{:.2%}".format),
    ("memory_gb", "peak memory, GB", "{:,.1f}".format),
)


def throughput_facts(summary: Mapping[str, Any]) -> dict[str, str]:
    """The rates under `throughput`; what is null or absent is left out."""
    figures = summary.get("throughput") or {}
    return {
        label: text(value)
        for name, label, text in _FIGURES
        if (value := figures.get(name)) is not None
    }


def totals_facts(summary: Mapping[str, Any]) -> dict[str, str]:
    """What summary.json says in one value each, `totals` first."""
    entries = {**(summary.get("totals") or {}), **summary}
    return {
        _LABELS.get(name) or name.replace("_", " "): _plain(name, value)
        for name, value in entries.items()
        if isinstance(value, str | int | float)
    }


_LABELS = {
    "label_tokens": "trained tokens",
    "flops": "computed in steps",
    "step_seconds": "time in steps",
    "evaluation_loss": "loss of the evaluation",
    "is_finished": "finished",
}


def _plain(name: str, value: str | float) -> str:
    if isinstance(value, str):
        return shortened(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if name == "flops":
        return operations(value)
    if name.endswith("seconds"):
        return duration(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"

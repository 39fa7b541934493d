"""Models on the same rows: how far apart they are, and whether chance alone would do that."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from phi3v.config.running import EvalSection
from phi3v.errors import ConfigError
from phi3v.evaluation.evaluate import Evaluation
from phi3v.evaluation.held_out import pattern_of, train_references
from phi3v.evaluation.metrics import Difference, compare, is_lower_better

CHANCE = 0.05  # a difference is called one if its p is below this, and its interval holds no 0


@dataclass(frozen=True)
class Comparison:
    """Two models by name; the differences by metric are those of `other` minus `first`."""

    first: str
    other: str
    differences: dict[str, Difference]

    def verdict(self, name: str) -> str:
        """Which of the two is better by a metric, in words."""
        found = self.differences[name]
        if found.value is None or found.p is None:
            return "no rows"
        if found.low is None or found.high is None or found.low <= 0 <= found.high:
            return "no difference seen"
        if found.low == found.high:
            return "no verdict: all rows differ by the same, which gives no interval"
        if found.p >= CHANCE:
            return "no difference seen"
        is_other = (found.value < 0) == is_lower_better(name)
        return f"{self.other if is_other else self.first} is better"


def check_request(models: Sequence[str], out: Path | None) -> None:
    """Refuse what cannot be compared or written, before any work.

    Raises: ConfigError naming the argument.
    """
    if not models:
        raise ConfigError("no MODEL is named, only settings; name a model folder or a run folder")
    places = [Path(model) for model in models]
    for number, place in enumerate(places):
        if place in places[:number]:
            raise ConfigError(f"{models[number]} is named twice; name each model once")
    if out and not out.parent.is_dir():
        raise ConfigError(f"--out {out}: there is no folder {out.parent}; make it")
    if out and out.exists() and not out.is_file():
        kind = "a folder" if out.is_dir() else "no ordinary file"
        raise ConfigError(f"--out {out} is {kind}; name a file, for example comparison.json")


def compare_models(
    evaluations: Mapping[str, Evaluation], folders: Sequence[str], settings: EvalSection
) -> list[Comparison]:
    """Each model against the first, by every metric, over the rows that both have answered.

    eval.max_seconds may leave each with other rows; the first batch is the same for all.
    """
    (first, one), *others = evaluations.items()
    pattern, train = pattern_of(settings), train_references(folders, settings)
    found = []
    for name, other in others:
        common = {o.row for o in one.outcomes} & {o.row for o in other.outcomes}
        answers, theirs = (
            [outcome.answer for outcome in evaluation.outcomes if outcome.row in common]
            for evaluation in (one, other)
        )
        differences = compare(settings.metrics, answers, theirs, pattern, train)
        found.append(Comparison(first, name, differences))
    return found


def comparison_values(
    evaluations: Mapping[str, Evaluation],
    comparisons: Sequence[Comparison],
    folders: Sequence[str],
    settings: EvalSection,
) -> dict[str, Any]:
    """Everything that was found, for a file: settings, scores, every answer, differences."""
    models = {
        name: {
            "loss": found.loss,
            "loss_rows": found.loss_rows,
            "unanswered": found.unanswered,
            "metrics": found.metrics(),
            "answers": [asdict(outcome) for outcome in found.outcomes],
        }
        for name, found in evaluations.items()
    }
    pairs = [
        {
            "first": pair.first,
            "other": pair.other,
            "differences": {
                name: difference.as_dict() | {"verdict": pair.verdict(name)}
                for name, difference in pair.differences.items()
            },
        }
        for pair in comparisons
    ]
    values = {"shards": list(folders), "eval": asdict(settings)}
    return values | {"models": models, "comparisons": pairs}

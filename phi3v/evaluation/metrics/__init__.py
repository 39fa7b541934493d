"""Score generated answers against references, with a 95 % interval on every number.

    pattern = compile_pattern("Product: {title}, Category: {category}, Full Price: {price:float}")
    scores = score(["category_accuracy", "price_mape"], answers, pattern)
    scores["category_accuracy"].as_dict()    # {"value": 0.91, "low": 0.87, "high": 0.95, "n": 256}
    compare(["anls"], answers_of_one_model, answers_of_another, None)["anls"].p

names.py lists the metrics and says which need a pattern; text.py and fields.py define them, each on
one row; bleu.py is the only one that is no mean over rows. Scores are fractions: BLEU is 0.31, not
31. `_unseen` after a name counts only the rows whose value is new: the field's value, or the whole
reference for a metric of the whole text, is in no training answer.
"""

from phi3v.evaluation.metrics.answers import Answer
from phi3v.evaluation.metrics.intervals import Score, interval
from phi3v.evaluation.metrics.names import (
    describe,
    find_metrics,
    is_bounded,
    is_lower_better,
    is_rate,
)
from phi3v.evaluation.metrics.paired import Difference, compare
from phi3v.evaluation.metrics.patterns import Pattern, compile_pattern
from phi3v.evaluation.metrics.scores import row_scores, score

__all__ = [
    "Answer",
    "Difference",
    "Pattern",
    "Score",
    "compare",
    "compile_pattern",
    "describe",
    "find_metrics",
    "interval",
    "is_bounded",
    "is_lower_better",
    "is_rate",
    "row_scores",
    "score",
]

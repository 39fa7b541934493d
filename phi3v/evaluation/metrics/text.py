"""How right a whole text is: each function scores one prediction against one accepted answer.

Of several accepted answers the best score counts. Text is compared as Unicode code points.
"""

import math
import re

from rapidfuzz.distance import LCSseq, Levenshtein

ANLS_THRESHOLD = 0.5
RELAXED_TOLERANCE = 0.05
MOST = 1e15  # a larger "number" is a stuck model's, and a mean over it would be infinite

_WORD = re.compile(r"[a-z0-9]+")


def exact_match(prediction: str, reference: str) -> float:
    """Return 1 for the same text, but for white space around it."""
    return float(prediction.strip() == reference.strip())


def accuracy(prediction: str, reference: str) -> float:
    """Return 1 for the same text after `normalise`: "A  cap." is "a cap"."""
    return float(normalise(prediction) == normalise(reference))


def normalise(text: str) -> str:
    """Fold case, make each run of white space one blank, take off ends and one final period."""
    return _one_line(text.casefold()).removesuffix(".").rstrip()


def anls(prediction: str, reference: str) -> float:
    """Return 1 - d, or 0 where d >= 0.5; d is the edit distance over the longer text's length.

    Case does not count, nor how much white space there is. The challenge's own script differs from
    the definition in one point: it keeps 0.5 where d is exactly 0.5.

    Source: Biten et al., Scene Text Visual Question Answering, ICCV 2019, eq. 1; white space and
    case as in DocVQA's evaluation.
    """
    distance = Levenshtein.normalized_distance(
        _one_line(prediction.lower()), _one_line(reference.lower())
    )
    return 1.0 - distance if distance < ANLS_THRESHOLD else 0.0


def similarity(prediction: str, reference: str) -> float:
    """Return 1 - edit distance / the longer text's length; case and white space count.

    Source: Levenshtein, Binary codes capable of correcting deletions, insertions and reversals.
    """
    return Levenshtein.normalized_similarity(prediction, reference)


def relaxed_accuracy(prediction: str, reference: str) -> float:
    """Return 1 for a number within 5 % of the reference's, else for the same text but for case.

    Exactly what the published figures are made by: a percentage is a fraction ("5%" is 0.05), a
    number with commas between thousands is a text, and so is any answer where the reference is 0.
    The error is a quotient of floats: 2.1 is not within 5 % of 2, 105 is of 100. White space
    around a text does not count. docs/evaluation.md has what other programs do.

    Source: `relaxed_correctness` of Pix2Struct's metrics.py, which lmms-eval and VLMEvalKit have
    as well; Masry et al., ChartQA, ACL 2022, section 5.1.
    """
    guess, truth = read_number(prediction), read_number(reference)
    if guess is None or not truth:
        return float(prediction.strip().lower() == reference.strip().lower())
    return float(abs(guess - truth) / abs(truth) <= RELAXED_TOLERANCE)


def read_number(text: str) -> float | None:
    """Read "-1200.5" or "12.5 %" (0.125) as Python does; None for any other text, and for nan."""
    text = text.strip()
    try:
        value = float(text.rstrip("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def rouge_l(prediction: str, reference: str) -> float:
    """Return the F1 of the longest common subsequence of words; 0 where a text has no word.

    A word is a run of a-z and 0-9 after lower-casing, without a stemmer: what rouge-score does by
    default. A text in another script has no words and scores 0: use anls for it.

    Source: Lin, ROUGE, 2004, section 3.1, with beta = 1; rouge-score 0.1.2 `tokenize`.
    """
    said, wanted = _WORD.findall(prediction.lower()), _WORD.findall(reference.lower())
    if not said or not wanted:
        return 0.0
    return 2 * LCSseq.similarity(said, wanted) / (len(said) + len(wanted))


def last_price(text: str) -> float:
    """Read the last word as a number without its commas; 0 where that fails, or is 1e15 or more.

    Source: the Phi-3 cookbook's W&B walkthrough, Phi-3-vision-Trainingscript.py.
    """
    words = text.split()
    try:
        price = float(words[-1].replace(",", "")) if words else 0.0
    except ValueError:
        return 0.0
    return price if abs(price) < MOST and math.isfinite(price) else 0.0


def _one_line(text: str) -> str:
    return " ".join(text.split())

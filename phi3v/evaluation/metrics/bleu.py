"""BLEU of a corpus, as sacrebleu computes it, from counts that add up over rows.

The score of many rows is not the mean of their scores: counts of matching word sequences are added
first. So a resample, or a swap of two models' rows, needs only sums of the rows' counts, not their
texts. The signature is sacrebleu's default, nrefs:var|case:mixed|eff:no|tok:13a|smooth:exp, by
which answers without four words score 0; the score is a fraction.
"""

from collections.abc import Sequence

import numpy as np
from sacrebleu.metrics import BLEU

from phi3v.evaluation.metrics.answers import Answer

ORDER = 4
COUNTS = 2 + 2 * ORDER


def row_counts(answers: Sequence[Answer]) -> np.ndarray:
    """Count what BLEU is made of, row by row.

    returns  (n, 10) float64: words of the prediction, words of the reference nearest in length,
             then of 1 to 4 words in sequence how many match, and how many there are
    """
    bleu = BLEU(max_ngram_order=ORDER)
    counts = np.empty((len(answers), COUNTS))
    for row, answer in zip(counts, answers, strict=True):
        found = bleu.corpus_score([answer.prediction], [[text] for text in answer.accepted])
        row[:] = [found.sys_len, found.ref_len, *found.counts, *found.totals]
    return counts


def bleu_of(counts: np.ndarray, is_row: bool = False) -> float:
    """Return the BLEU, 0 to 1, of the summed counts (10,) of some rows.

    is_row  the counts are one row's: sequences longer than the prediction are left out, without
            which an answer of three words scores as if it were wrong

    Source: Papineni et al., BLEU, ACL 2002; Post, A call for clarity in reporting BLEU, WMT 2018.
    """
    system, reference, *ngrams = (int(count) for count in counts)
    found = BLEU.compute_bleu(
        ngrams[:ORDER], ngrams[ORDER:], system, reference, "exp", effective_order=is_row
    )
    return min(found.score / 100, 1.0)  # rounding gives 100.00000000000004

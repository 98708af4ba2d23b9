"""Quantities of two sets of documents that are shown beside the tests: exponents, means, curves.

The tests of ``permutation`` compare whole distributions by a distance, which says whether two sets
differ but not how. These numbers, with standard errors over documents, say how.
"""

from typing import Any

import numpy as np

from sedd.evaluation.documents import CHECKPOINTS, LONGEST, Documents
from sedd.evaluation.measured import Measured, mean_of, ratio_of
from sedd.evaluation.permutation import CELLS, descending

ZIPF_RANKS = 1000  # Zipf's law holds for the most frequent words; beyond, frequencies fall faster

# The name of a quantity, and its value for the samples and for real text.
Quantity = tuple[str, Measured | None, Measured | None]


def quantities_of(documents: Documents, is_sample_S: np.ndarray) -> dict[str, Quantity]:
    """Return (name of the quantity, value for samples, value for real text) for each statistic.

    Keys are the names of ``permutation.distances_of``. A value is None if it cannot be estimated,
    for example from texts that are too short. The statistic "words" has no quantity: ("", None,
    None).
    """
    sets = (is_sample_S, ~is_sample_S)
    num_types = [int((documents.counts(s) > 0).sum()) for s in sets]
    ranks = max(min(ZIPF_RANKS, *num_types), 2)
    reached = np.all([(documents.words_S[s, None] >= CHECKPOINTS).mean(0) >= 0.5 for s in sets], 0)

    def mean_length(numbers_SK):
        return lambda s: _ratio_or_none(
            numbers_SK[s] @ np.arange(1, LONGEST + 1), numbers_SK[s].sum(1)
        )

    def both(name, function):
        return name, function(sets[0]), function(sets[1])

    return {
        "rank–frequency": both(
            f"Zipf exponent, ranks 1–{ranks}", lambda s: _zipf(documents, s, ranks)
        ),
        "words": ("", None, None),
        "type–token": both("Heaps exponent", lambda s: _heaps(documents.types_SG[s], reached)),
        "bigram type–token": both(
            "Heaps exponent of pairs", lambda s: _heaps(documents.bigram_types_SG[s], reached)
        ),
        "sentence length": both("words a sentence", mean_length(documents.sentences_SK)),
        "stop-word runs": both("stop words a run", mean_length(documents.stop_runs_SK)),
        "document length": both("words a document", lambda s: mean_of(documents.words_S[s])),
        "stop words": both("share of the words", lambda s: mean_of(documents.stop_share_S[s])),
        "symbols": both("share of the characters", lambda s: mean_of(documents.symbol_share_S[s])),
    }


def _ratio_or_none(top_S: np.ndarray, bottom_S: np.ndarray) -> Measured | None:
    """Σ top / Σ bottom over documents; None if no document has anything to divide by."""
    return ratio_of(top_S, bottom_S) if bottom_S.sum() else None


def _zipf(documents: Documents, chosen_S: np.ndarray, ranks: int) -> Measured | None:
    """The exponent s of p(r) ∝ r^-s over the first ranks r, by maximum likelihood.

    The likelihood is highest where the expected log rank equals the observed one, so s is read from
    a table of expected log ranks. The error is that of a jackknife over documents, since words of
    one document are not independent. The ranks come from the same counts as the frequencies, which
    biases s slightly upwards, in both sets alike.
    """
    total = documents.counts(chosen_S)
    if not total.any():
        return None
    log_rank = np.log(np.arange(1, ranks + 1))
    s = np.linspace(0, 5, 501)
    law = np.exp(-s[:, None] * log_rank)
    expected = (law * log_rank).sum(1) / law.sum(1)  # decreasing in s

    def fit(counts_PV):
        head = descending(counts_PV)[:, :ranks].astype(float)
        mean = (head * log_rank[: head.shape[1]]).sum(1) / np.maximum(head.sum(1), 1)
        return np.interp(mean, expected[::-1], s[::-1])

    chosen, rows = np.flatnonzero(chosen_S), max(1, CELLS // len(total))
    size = len(chosen)
    left_out = np.concatenate(
        [
            fit(total - documents.counts_SV[chosen[i : i + rows]].toarray())
            for i in range(0, size, rows)
        ]
    )
    error = np.sqrt((size - 1) / size * ((left_out - left_out.mean()) ** 2).sum())
    return Measured(float(fit(total[None])[0]), float(error))


def _heaps(curve_SG, reached_G) -> Measured | None:
    """The mean over documents of the exponent β of (distinct words) ∝ words^β.

    β is the slope of a line through the logarithms, by least squares. Only documents that reach all
    lengths of ``reached_G`` count, so that both sets are fitted at the same lengths.
    """
    curve = curve_SG[:, reached_G]
    curve = curve[~np.isnan(curve).any(1)]
    if reached_G.sum() < 2 or len(curve) < 2:
        return None
    x = np.log(CHECKPOINTS[reached_G])
    x = x - x.mean()
    return mean_of(np.log(curve) @ x / (x @ x))


def curves_of(documents: Documents, chosen_S: np.ndarray) -> dict[str, Any]:
    """Return the curves of the chosen documents that the report plots, by name.

    ``rank_frequency`` is (rank, share of the words). ``sentence_length``, ``stop_runs``,
    ``stop_words`` and ``symbols`` are cumulative distributions (value, share of at most it).
    ``growth`` is a dictionary: after ``words`` words, a document has on average ``types`` distinct
    words and ``bigram_types`` distinct pairs, with the standard errors ``types_error`` and
    ``bigram_types_error``.
    """
    counts = descending(documents.counts(chosen_S)[None])[0]
    counts = counts[counts > 0]
    growth: dict[str, Any] = {}
    for name, curve_SG in (
        ("types", documents.types_SG),
        ("bigram_types", documents.bigram_types_SG),
    ):
        curve = curve_SG[chosen_S]
        number = (~np.isnan(curve)).sum(0)
        kept = number > max(1, len(curve) // 10)  # means over a few long documents are too noisy
        growth["words"] = CHECKPOINTS[kept].tolist()
        growth[name] = np.nanmean(curve[:, kept], 0).tolist()
        error = np.nanstd(curve[:, kept], 0, ddof=1) / np.sqrt(number[kept])
        growth[f"{name}_error"] = error.tolist()

    # Cumulative distributions of lengths, given how many have each length, and of values.
    def of_lengths(numbers_SK):
        numbers = numbers_SK[chosen_S].sum(0)
        return np.arange(LONGEST + 1), np.append(0, np.cumsum(numbers)) / max(numbers.sum(), 1)

    def of_values(values_S):
        values = np.sort(values_S[chosen_S])
        return np.append(values[0], values), np.arange(len(values) + 1) / len(values)

    return {
        "rank_frequency": (np.arange(1, len(counts) + 1), counts / counts.sum()),
        "growth": growth,
        "sentence_length": of_lengths(documents.sentences_SK),
        "stop_runs": of_lengths(documents.stop_runs_SK),
        "stop_words": of_values(documents.stop_share_S),
        "symbols": of_values(documents.symbol_share_S),
    }

"""Permutation tests of two sets of documents, by the distances of arXiv:2106.00085.

Labels "sample" and "real" are permuted over whole documents. The tests are exact however words
within a document depend on each other, if documents are exchangeable.
"""

from collections.abc import Callable, Sequence

import numpy as np

from sedd.evaluation.documents import Documents

CELLS = 1 << 22  # entries of an array of labellings at once: 16 MB in float32


Distance = Callable[[np.ndarray], np.ndarray]  # labels [P, S] of 0 and 1 -> [P]


def permutation_test(
    distances: dict[str, Distance],
    is_sample_S: np.ndarray,
    permutations: int,
    seed: int,
    *,
    width: int,
) -> tuple[list[float], list[float]]:
    """Each distance under the true labels, and its p-value (1 + #) / (1 + permutations).

    # counts the random labellings whose distance is at least the observed one: for exchangeable
    documents, p is at most α with probability at most α. Labellings are drawn and tested in
    blocks, so that memory does not grow with their number.

    Args:
        distances: functions of labels [P, S]; the keys of the results' order.
        is_sample_S: the true labels.
        permutations: how many random labellings.
        seed: of the labellings.
        width: the most columns that a distance makes for each labelling, such as distinct words.
    """
    rng = np.random.default_rng(seed)
    rows = max(1, CELLS // max(width, len(is_sample_S)))
    observed = {name: distance(_labels(is_sample_S)) for name, distance in distances.items()}
    at_least = dict.fromkeys(distances, 1)
    for first in range(0, permutations, rows):
        size = min(rows, permutations - first)
        labels_PS = _labels(rng.permuted(np.tile(is_sample_S, (size, 1)), axis=1))
        for name, distance in distances.items():
            # Sums in another order may differ in the last bit of float32.
            at_least[name] += int((distance(labels_PS) >= observed[name] * (1 - 1e-6)).sum())
    return (
        [float(found[0]) for found in observed.values()],
        [count / (1 + permutations) for count in at_least.values()],
    )


def _labels(is_sample: np.ndarray) -> np.ndarray:
    return np.atleast_2d(is_sample).astype(np.float32)


def holm(p: Sequence[float]) -> list[float]:
    """P-values corrected for the number of tests, to compare with a family-wise level (Holm)."""
    order = np.argsort(p)
    steps = np.asarray(p, float)[order] * np.arange(len(p), 0, -1)
    corrected = np.empty(len(p))
    corrected[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return corrected.tolist()


def distances_of(documents: Documents) -> dict[str, Distance]:
    """The test statistics: functions of which documents are samples, for many labellings."""

    def of_counts(distance):
        return lambda labels_PS: distance(*_both(labels_PS, documents.counts_SV))

    return {
        "rank–frequency": of_counts(lambda a, b: _ks(descending(a), descending(b))),
        "words": of_counts(lambda a, b: np.abs(_shares(a) - _shares(b)).sum(1) / 2),
        "type–token": _standardised(documents.types_SG),
        "bigram type–token": _standardised(documents.bigram_types_SG),
        "sentence length": lambda labels: _ks(*_both(labels, documents.sentences_SK)),
        "document length": _ks_of_values(documents.words_S),
        "stop-word runs": lambda labels: _ks(*_both(labels, documents.stop_runs_SK)),
        "stop words": _ks_of_values(documents.stop_share_S),
        "symbols": _ks_of_values(documents.symbol_share_S),
    }


def _both(labels_PS, values_SG):
    """Sums over samples and over reference, exact: the values are counts below 2^24."""
    a_PG = np.ascontiguousarray(labels_PS @ values_SG)  # rows are sorted next
    return a_PG, np.asarray(values_SG.sum(0)) - a_PG


def _shares(a_PG):
    return a_PG / np.maximum(a_PG.sum(1, keepdims=True), 1)


def descending(a_PG: np.ndarray) -> np.ndarray:
    """Each row in descending order."""
    return np.sort(a_PG, axis=1)[:, ::-1]


def _ks(a_PG, b_PG):
    """The largest difference of two cumulative laws, given the counts of their G values."""
    return np.abs(np.cumsum(_shares(a_PG) - _shares(b_PG), axis=1)).max(1)


def _ks_of_values(values_S: np.ndarray) -> Distance:
    """Kolmogorov–Smirnov of one number for each document.

    The difference of the two cumulative laws at the last document of each distinct value, from
    running sums over the documents in ascending order: no table of documents by values.
    """
    order = np.argsort(values_S, kind="stable")
    ordered = values_S[order]
    last = np.append(ordered[1:] != ordered[:-1], True)

    def distance(labels_PS: np.ndarray) -> np.ndarray:
        a_PS = labels_PS[:, order]
        number_a = a_PS.sum(1, keepdims=True)
        below_PS = np.cumsum(a_PS, axis=1)[:, last]  # whole numbers, exact in float32
        total = np.arange(1, len(order) + 1, dtype=np.float32)[last]
        share_a = below_PS / np.maximum(number_a, 1)
        share_b = (total - below_PS) / np.maximum(len(order) - number_a, 1)
        return np.abs(share_a - share_b).max(1)

    return distance


def _standardised(curve_SG) -> Distance:
    """The largest difference of two mean curves in units of its standard error.

    The standard deviation is of all documents, so that it does not depend on the labels.
    """
    there_SG = ~np.isnan(curve_SG)
    enough = there_SG.sum(0) > 1
    there, curve = there_SG[:, enough].astype(np.float32), np.nan_to_num(curve_SG[:, enough])
    deviation = np.nanstd(curve_SG[:, enough], axis=0, ddof=1)

    def distance(labels_PS):
        (na, nb), (a, b) = _both(labels_PS, there), _both(labels_PS, curve.astype(np.float32))
        difference = a / np.maximum(na, 1) - b / np.maximum(nb, 1)
        error = deviation * np.sqrt(1 / np.maximum(na, 1) + 1 / np.maximum(nb, 1))
        usable = (na > 0) & (nb > 0) & (error > 0)
        scaled = np.where(usable, np.abs(difference) / np.where(error > 0, error, 1), 0)
        return scaled.max(1, initial=0)

    return distance

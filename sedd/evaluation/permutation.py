"""Permutation tests of two sets of documents, by the distances of arXiv:2106.00085.

The labels "sample" and "real" are permuted over whole documents. Under the hypothesis that samples
and real documents are exchangeable, the tests are exact, however words within a document depend on
each other. A distance is a function of labels [P, S]: it evaluates P labellings of S documents at
once, as a product of matrices where it can.
"""

from collections.abc import Callable, Sequence

import numpy as np

from sedd.evaluation.documents import Documents

CELLS = 1 << 22  # the most entries of an array for a block of labellings: 16 MB in float32


Distance = Callable[[np.ndarray], np.ndarray]  # labels [P, S], 1 for a sample -> distances [P]


def permutation_test(
    distances: dict[str, Distance],
    is_sample_S: np.ndarray,
    permutations: int,
    seed: int,
    *,
    width: int,
) -> tuple[list[float], list[float]]:
    """Compute each distance under the true labels, and its p-value by random labellings.

    The p-value is (1 + n) / (1 + permutations), where n random labellings have at least the
    observed distance. For exchangeable documents p is at most α with probability at most α.
    Labellings are drawn and tested in blocks, so that memory does not grow with their number.

    Args:
        distances: the distances by name.
        is_sample_S: the true labels.
        permutations: the number of random labellings.
        seed: determines the labellings.
        width: the most columns of an array that a distance makes, such as the distinct words.

    Returns:
        The observed distances and the p-values, in the order of ``distances``.
    """
    rng = np.random.default_rng(seed)
    rows = max(1, CELLS // max(width, len(is_sample_S)))
    observed = {name: distance(_labels(is_sample_S)) for name, distance in distances.items()}
    at_least = dict.fromkeys(distances, 1)
    for first in range(0, permutations, rows):
        size = min(rows, permutations - first)
        labels_PS = _labels(rng.permuted(np.tile(is_sample_S, (size, 1)), axis=1))
        for name, distance in distances.items():
            # Equal distances may differ by rounding: float32 sums depend on their order.
            at_least[name] += int((distance(labels_PS) >= observed[name] * (1 - 1e-6)).sum())
    return (
        [float(found[0]) for found in observed.values()],
        [count / (1 + permutations) for count in at_least.values()],
    )


def _labels(is_sample: np.ndarray) -> np.ndarray:
    """Labels as float32 [P, S], for products of matrices."""
    return np.atleast_2d(is_sample).astype(np.float32)


def holm(p: Sequence[float]) -> list[float]:
    """Correct p-values for the number of tests by Holm's method.

    If the tests with a corrected p-value of at most α are rejected, the probability of any false
    rejection is at most α.
    """
    order = np.argsort(p)
    steps = np.asarray(p, float)[order] * np.arange(len(p), 0, -1)
    corrected = np.empty(len(p))
    corrected[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return corrected.tolist()


def distances_of(documents: Documents) -> dict[str, Distance]:
    """Return the distances that are tested, by the name of the statistic that they compare."""

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
    """Sums of the values over samples and over real documents; exact for counts below 2^24."""
    a_PG = np.ascontiguousarray(labels_PS @ values_SG)  # callers sort and sum along rows
    return a_PG, np.asarray(values_SG.sum(0)) - a_PG


def _shares(a_PG):
    """Counts divided by the sum of their row."""
    return a_PG / np.maximum(a_PG.sum(1, keepdims=True), 1)


def descending(a_PG: np.ndarray) -> np.ndarray:
    """Return each row in descending order."""
    return np.sort(a_PG, axis=1)[:, ::-1]


def _ks(a_PG, b_PG):
    """Kolmogorov–Smirnov distance: the largest difference of two cumulative distributions.

    The arguments are the counts of G ordered values in each distribution.
    """
    return np.abs(np.cumsum(_shares(a_PG) - _shares(b_PG), axis=1)).max(1)


def _ks_of_values(values_S: np.ndarray) -> Distance:
    """Kolmogorov–Smirnov distance of one number per document.

    The documents are sorted by their number. A running sum of the labels then gives both cumulative
    distributions, which are compared at the last document of each distinct value. This needs no
    table of documents by values.
    """
    order = np.argsort(values_S, kind="stable")
    ordered = values_S[order]
    last = np.append(ordered[1:] != ordered[:-1], True)

    def distance(labels_PS: np.ndarray) -> np.ndarray:
        a_PS = labels_PS[:, order]
        number_a = a_PS.sum(1, keepdims=True)
        below_PS = np.cumsum(a_PS, axis=1)[:, last]  # integers, exact in float32
        total = np.arange(1, len(order) + 1, dtype=np.float32)[last]
        share_a = below_PS / np.maximum(number_a, 1)
        share_b = (total - below_PS) / np.maximum(len(order) - number_a, 1)
        return np.abs(share_a - share_b).max(1)

    return distance


def _standardised(curve_SG) -> Distance:
    """The largest difference of two mean curves, in units of its standard error.

    A curve is nan beyond the end of its document, and means are over the documents that reach a
    point. The standard deviation is that of all documents: it does not depend on the labels.
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

"""Values with their standard errors: means and ratios over independent samples."""

from typing import NamedTuple

import numpy as np


class Measured(NamedTuple):
    """A value with its standard error; ``error`` is None if unknown, as for a single sample."""

    value: float
    error: float | None = None


def mean_of(values_S: np.ndarray) -> Measured:
    """Return the mean of S values and its standard error."""
    size = len(values_S)
    error = float(values_S.std(ddof=1) / np.sqrt(size)) if size > 1 else None
    return Measured(float(values_S.mean()), error)


def ratio_of(top_S: np.ndarray, bottom_S: np.ndarray) -> Measured:
    """Return Σ top / Σ bottom over S independent samples, and the standard error of that ratio.

    The two numbers of a sample, such as the nats and the tokens of a text, depend on each other.
    The error of the ratio r is therefore that of a sum of the residuals top - r·bottom (the delta
    method).
    """
    size, total = len(top_S), bottom_S.sum()
    ratio = top_S.sum() / total
    if size < 2:
        return Measured(float(ratio))
    residual_S = top_S - ratio * bottom_S
    error = np.sqrt(size / (size - 1) * (residual_S**2).sum()) / total
    return Measured(float(ratio), float(error))

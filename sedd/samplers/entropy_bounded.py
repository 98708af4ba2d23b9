"""The EB-Sampler: for few calls, with an error of up to gamma nats each; exact at gamma 0.

The entropy-bounded sampler. arXiv:2505.24857, algorithm 1.
"""

import math
from dataclasses import dataclass

import jax.numpy as jnp

from sedd.errors import FieldError
from sedd.samplers.confidence import entropy
from sedd.samplers.reveal import Ranked


@dataclass(frozen=True, kw_only=True)
class EntropyBounded(Ranked):
    """Draw as many positions a call as an error bound of ``gamma`` nats allows.

    Masked positions are sorted by entropy, the lowest first. A call draws the first k of them, for
    the largest k such that the entropies of the first k - 1 sum to at most ``gamma``. That sum
    bounds the mutual information of the k positions, which is the error of drawing them
    independently (a KL divergence). With ``gamma`` 0 the law is the model's own: one position a
    call, and several only if all but one of them are certain. A larger ``gamma`` takes fewer calls.
    """

    gamma: float = 0.1
    """Bound on the error of one call, in nats; 0 is exact."""

    def __post_init__(self):
        if not 0 <= self.gamma < math.inf:
            raise FieldError("gamma", f"must be finite and at least 0, got {self.gamma}")

    def score(self, prediction, rows):
        """Minus the entropy of each row, at most 0."""
        return -jnp.maximum(entropy(prediction.log_probs(rows)), 0.0)

    def count(self, state, falling_BL):
        """The longest run of least entropies whose error bound is at most ``gamma``."""
        # Entropies in ascending order, infinite at positions that are not masked, and for each the
        # sum of the smaller ones.
        entropy_BL = -falling_BL
        before_BL = jnp.cumsum(jnp.pad(entropy_BL[:, :-1], ((0, 0), (1, 0))), axis=1)
        return (before_BL <= self.gamma).sum(1)


make = EntropyBounded

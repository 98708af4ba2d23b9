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
    """As many of the least entropy at a call as their entropies but the largest sum to ``gamma``.

    That sum bounds, in nats, what the positions of one call can know of each other: the error of
    drawing them at once. ``gamma`` 0 draws one at a call, and several only where they are certain:
    exact. Larger ones take fewer calls, as many as the text allows.
    """

    gamma: float = 0.1
    """Bound, in nats, on what the positions of one call may know of each other; 0 is exact."""

    def __post_init__(self):
        if not 0 <= self.gamma < math.inf:
            raise FieldError("gamma", f"must be finite and at least 0, got {self.gamma}")

    def score(self, prediction, rows):
        return -jnp.maximum(entropy(prediction.log_probs(rows)), 0.0)

    def count(self, state, falling_BL):
        entropy_BL = -falling_BL  # infinite where there is nothing to reveal
        before_BL = jnp.cumsum(jnp.pad(entropy_BL[:, :-1], ((0, 0), (1, 0))), axis=1)
        return (before_BL <= self.gamma).sum(1)


make = EntropyBounded

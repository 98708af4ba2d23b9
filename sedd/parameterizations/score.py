"""SEDD's parameterization: the network's output is the log score itself. arXiv:2310.16834, 5.1."""

from dataclasses import dataclass, field

import jax.numpy as jnp

from sedd.arrays import log_expm1, put
from sedd.parameterizations.base import Parameterization


@dataclass(frozen=True, kw_only=True)
class Score(Parameterization):
    """The raw output, 0 at the current token.

    On an absorbing process it is shifted by -log expm1(σ) - log(V - 1), the score of a model that
    finds all tokens equally likely, so that a fresh network starts there.
    """

    normalised = False

    time_independent: bool = field(default=False, init=False)  # a score depends on the time

    def log_score(self, raw, x, sigma):
        if self.process.mask_id is not None:
            shift = log_expm1(sigma) + jnp.log(self.process.num_tokens * 1.0)
            raw = raw - jnp.asarray(shift)[..., None]
        return put(raw, x, jnp.zeros(x.shape))


make = Score

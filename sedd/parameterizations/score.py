"""SEDD's parameterization: the network's output is the log score. arXiv:2310.16834, section 5.1."""

from dataclasses import dataclass, field

import jax.numpy as jnp

from sedd.arrays import along, log_expm1, put
from sedd.parameterizations.base import Parameterization


@dataclass(frozen=True, kw_only=True)
class Score(Parameterization):
    """The log score is the raw output, with 0 at the current token.

    On an absorbing process -log expm1(σ) - log N is added, which is the log score of a uniform
    distribution over the real tokens. A fresh network, whose raw output is 0, therefore starts from
    that distribution at every noise level.
    """

    normalised = False

    time_independent: bool = field(default=False, init=False)  # a score depends on the noise

    def log_score(self, raw, x, sigma):
        if self.process.absorbing:
            shift = log_expm1(sigma) + jnp.log(self.process.num_tokens * 1.0)
            raw = raw - along(shift, x)[..., None]
        return put(raw, x, jnp.zeros(x.shape))


make = Score

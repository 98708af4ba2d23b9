"""SEDD's parameterization: the network's output is the log score. arXiv:2310.16834, section 5.1."""

from dataclasses import dataclass, field

import jax.numpy as jnp

from sedd.arrays import along, log_expm1, put
from sedd.parameterizations.base import Parameterization
from sedd.processes.base import Interpolating


@dataclass(frozen=True, kw_only=True)
class Score(Parameterization):
    """The log score is the raw output, with 0 at the current token.

    The log score of a uniform distribution over the real tokens is added, at every noise level. A
    fresh network, whose raw output is 0, therefore starts from that distribution. At a mask of an
    absorbing process it is -log expm1(σ) - log N, and on a uniform process 0.
    """

    normalised = False

    time_independent: bool = field(default=False, init=False)  # a score depends on the noise

    def log_score(self, raw, x, sigma):
        if self.process.absorbing:
            shift = log_expm1(sigma) + jnp.log(self.process.num_tokens * 1.0)
            raw = raw - along(shift, x)[..., None]
        elif isinstance(self.process, Interpolating) and self.process.mask_id is not None:
            log_token, log_mask = self.process.log_noise(sigma)
            log_token = jnp.logaddexp(-sigma - jnp.log(self.process.num_tokens * 1.0), log_token)
            of_token, of_mask = (along(log_p, x)[..., None] for log_p in (log_token, log_mask))
            is_mask = jnp.arange(self.process.num_states) == self.process.mask_id
            log_own = jnp.where(x[..., None] == self.process.mask_id, of_mask, of_token)
            raw = raw + jnp.where(is_mask, of_mask, of_token) - log_own
        return put(raw, x, jnp.zeros(x.shape))


make = Score

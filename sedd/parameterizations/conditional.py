"""RADD's parameterization: the network's output is log p(x0 | xt). arXiv:2406.03736."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from sedd.arrays import NO_MASS, along, log_expm1, put
from sedd.parameterizations.base import Parameterization


@dataclass(frozen=True, kw_only=True)
class Conditional(Parameterization):
    """The softmax of the raw output over real tokens is c = p(x0 | xt).

    On an absorbing process c does not depend on the time, and the log score at a mask is
    log c - log expm1(σ) (theorem 1 of the paper). The network then needs no time input.

    Raises ``ValueError`` unless the process is absorbing.
    """

    normalised = True

    time_independent: bool = True
    """If False, the network is conditioned on σ too, as in MD4 and MDLM with time conditioning."""

    def __post_init__(self):
        if not self.process.absorbing:
            raise ValueError("it needs an absorbing process; score works on any")

    def log_score(self, raw, x, sigma):
        # 1 / expm1(σ) is the ratio of the probability that a position is visible to that of a mask.
        log_probs = jax.nn.log_softmax(self.masked_logits(raw), -1)
        log_score = log_probs - log_expm1(along(sigma, x))[..., None]
        mask_column = jnp.full((*log_score.shape[:-1], 1), NO_MASS, log_score.dtype)
        return put(jnp.concatenate([log_score, mask_column], -1), x, jnp.zeros(x.shape))


make = Conditional

"""RADD's parameterization: the network's output is log p(x0 | xt). arXiv:2406.03736."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from sedd.arrays import NO_MASS, along, log_expm1, put
from sedd.parameterizations.base import Parameterization


@dataclass(frozen=True, kw_only=True)
class Conditional(Parameterization):
    """The softmax over real tokens is c = p(x0 | xt); the log score is log c - log expm1(σ).

    That is theorem 1 of the paper. ``time_independent=False`` conditions the network on σ as well,
    as MD4 and MDLM can.
    """

    normalised = True

    time_independent: bool = True

    def __post_init__(self):
        if not self.process.absorbing:
            raise ValueError("it needs an absorbing process; score works on any")

    def log_score(self, raw, x, sigma):
        log_probs = jax.nn.log_softmax(self.masked_logits(raw), -1)
        log_score = log_probs - log_expm1(along(sigma, x))[..., None]
        mask_column = jnp.full((*log_score.shape[:-1], 1), NO_MASS, log_score.dtype)
        return put(jnp.concatenate([log_score, mask_column], -1), x, jnp.zeros(x.shape))


make = Conditional

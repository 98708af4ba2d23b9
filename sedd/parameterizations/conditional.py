"""RADD's parameterization: the network gives the conditional of clean tokens. arXiv:2406.03736."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from sedd.arrays import NO_MASS, log_expm1, put
from sedd.parameterizations.base import Parameterization


@dataclass(frozen=True, kw_only=True)
class Conditional(Parameterization):
    """c = softmax over the real tokens; the score is log c - log expm1(σ) (theorem 1).

    ``time_independent=False`` conditions the network on σ all the same, as MD4 and MDLM can.
    """

    normalised = True

    time_independent: bool = True

    def __post_init__(self):
        if self.process.mask_id is None:
            raise ValueError("it needs an absorbing process; score works on any")

    def log_score(self, raw, x, sigma):
        log_probs = jax.nn.log_softmax(self.masked_logits(raw), -1)
        log_score = log_probs - jnp.asarray(log_expm1(sigma))[..., None]
        mask_column = jnp.full((*log_score.shape[:-1], 1), NO_MASS, log_score.dtype)
        return put(jnp.concatenate([log_score, mask_column], -1), x, jnp.zeros(x.shape))


make = Conditional

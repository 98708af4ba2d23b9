"""Mean parameterization: the network predicts the clean token. arXiv:2412.10193, arXiv:2503.04482.

On the absorbing process it is RADD's and MDLM's prediction, on the uniform one that of UDLM and
Duo, on the hybrid one that of GIDD.
"""

from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp

from sedd.arrays import along, at, put
from sedd.errors import FieldError
from sedd.parameterizations.base import Parameterization
from sedd.processes.base import Interpolating


@dataclass(frozen=True, kw_only=True)
class Mean(Parameterization):
    """The softmax of the raw output over real tokens is x_θ, a distribution of the clean token.

    The log score of y is log p_y - log p_x, where p = e^-σ·x_θ + b is the distribution of the noisy
    token if the clean one follows x_θ, and b the noise. With the objective ``score_entropy`` this
    is the bound of UDLM and Duo on the uniform process (arXiv:2412.10193), GIDD's on the hybrid one
    (arXiv:2503.04482), and t-DSE on the absorbing one.

    **x_θ is a leave-one-out prediction**: the best one is p(x0_i | the noisy tokens at all other
    positions), and the noisy token at i itself has no part in it. The posterior p(x0_i | xt), from
    which the last step of a sampler draws, is x_θ·Pr(xt_i | x0_i), normalised; at a mask the two
    are the same. Temperature, top-k and top-p act on x_θ.

    Raises ``ValueError`` unless the process is ``Interpolating``, as absorbing, uniform and hybrid
    are.
    """

    normalised = True

    condition: Literal["sigma", "time"] = "sigma"
    """What a network that depends on the noise level is told: the total noise σ, or GIDD's time, as
    its published models are."""
    time_independent: bool = False
    """If True, the network is not conditioned on σ. On an absorbing process nothing is lost by it;
    on others the network has to infer the noise level from the tokens."""

    def __post_init__(self):
        if not isinstance(self.process, Interpolating):
            kind = type(self.process).__name__.lower()
            raise ValueError(
                f"it needs a process whose noise does not depend on the token, as absorbing, "
                f"uniform and hybrid have, got {kind}; score works on any"
            )
        if self.condition not in ("sigma", "time"):
            raise FieldError("condition", f"must be sigma or time, got {self.condition!r}")

    def condition_of(self, sigma):
        sigma = super().condition_of(sigma)
        if sigma is None or self.condition == "sigma":
            return sigma
        assert isinstance(self.process, Interpolating)
        return self.process.time(sigma)

    def log_score(self, raw, x, sigma):
        sigma = jnp.broadcast_to(along(sigma, x), x.shape)
        assert isinstance(self.process, Interpolating)
        log_token, log_mask = self.process.log_noise(sigma)
        log_kept = self.log_probs(raw) - sigma[..., None]
        log_p = jnp.logaddexp(log_kept, log_token[..., None])
        if self.process.mask_id is not None:
            log_p = jnp.concatenate([log_p, log_mask[..., None]], -1)
        return put(log_p - at(log_p, x)[..., None], x, jnp.zeros(x.shape))


make = Mean

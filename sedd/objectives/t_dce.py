"""RADD's t-denoising cross entropy, which is also MDLM's and MD4's continuous-time bound."""

from dataclasses import dataclass

import jax.numpy as jnp

from sedd.arrays import log_expm1
from sedd.errors import FieldError
from sedd.objectives.base import DenoisingCrossEntropy


@dataclass(frozen=True, kw_only=True)
class TDCE(DenoisingCrossEntropy):
    """The loss -(rate/expm1(σ))·Σ_masked log c(x0), with t uniform in [t_min, 1].

    Here c(x0) is the model's probability of the clean token at a masked position. The mean over
    draws is 1/(1 - t_min) times the integral over t in [t_min, 1], which is the diffusion term of
    the bound. The published code adds a term that does not depend on the parameters.
    arXiv:2406.03736, equation 3.6.

    Args:
        t_min: the smallest time, in (0, 1).
    """

    t_min: float = 1e-3

    by_position = True

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.t_min < 1:
            raise FieldError("t_min", f"must be in (0, 1), got {self.t_min}")

    def corrupt(self, keys_B, u_B, x0_BL, scored_BL):
        t_B = self.t_min + (1 - self.t_min) * u_B
        sigma, rate = self.schedule.at_positions(t_B, x0_BL.shape[1])
        masked_BL = scored_BL & (self.process.corrupt(keys_B, x0_BL, sigma) != x0_BL)
        return self._masked(masked_BL, x0_BL, rate * jnp.exp(-log_expm1(sigma)), sigma)


make = TDCE

"""MDLM's bound with T discrete steps; the limit of many steps is ``t_dce``."""

from dataclasses import dataclass

import jax.numpy as jnp

from sedd.errors import FieldError
from sedd.objectives.base import DenoisingCrossEntropy


@dataclass(frozen=True, kw_only=True)
class MDLM(DenoisingCrossEntropy):
    """The loss -T·((α_s - α_t)/(1 - α_t))·Σ_masked log c(x0), with s = (i-1)/T and t = i/T.

    Here c(x0) is the model's probability of the clean token at a masked position, α = exp(-σ) is
    the probability that a token is not masked, and i is uniform in 1..T. The mean over i is the sum
    over the T steps of the reverse process. arXiv:2406.07524, equation 9.

    Args:
        num_steps: T, at least 1.
    """

    num_steps: int = 1000

    def __post_init__(self):
        super().__post_init__()
        if self.num_steps < 1:
            raise FieldError("num_steps", f"must be at least 1, got {self.num_steps}")

    def corrupt(self, keys_B, u_B, x0_BL, scored_BL):
        step_B = jnp.minimum(jnp.floor(u_B * self.num_steps), self.num_steps - 1)
        sigma_s_B = self.schedule.sigma(step_B / self.num_steps)
        sigma_t_B = self.schedule.sigma((step_B + 1) / self.num_steps)
        masked_BL = scored_BL & (self.process.corrupt(keys_B, x0_BL, sigma_t_B) != x0_BL)
        # (α_s - α_t)/(1 - α_t), without the difference of two numbers that are close to 1.
        revealed_B = jnp.exp(-sigma_s_B) * jnp.expm1(sigma_s_B - sigma_t_B) / jnp.expm1(-sigma_t_B)
        return self._masked(masked_BL, x0_BL, self.num_steps * revealed_B, sigma_t_B)


make = MDLM

"""MDLM's bound with T discrete steps; its limit in continuous time is ``t_dce``."""

from dataclasses import dataclass

import jax.numpy as jnp

from sedd.errors import FieldError
from sedd.objectives.base import DenoisingCrossEntropy


@dataclass(frozen=True, kw_only=True)
class MDLM(DenoisingCrossEntropy):
    """-T·((α_s - α_t)/(1 - α_t))·Σ_masked log c(x0), s = (i-1)/T, t = i/T, i uniform in 1..T.

    α = exp(-σ). The mean over i is the sum over all steps. arXiv:2406.07524, equation 9.
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
        # (α_s - α_t)/(1 - α_t), without a difference of two numbers close to 1
        revealed_B = jnp.exp(-sigma_s_B) * jnp.expm1(sigma_s_B - sigma_t_B) / jnp.expm1(-sigma_t_B)
        return self._masked(masked_BL, x0_BL, self.num_steps * revealed_B, sigma_t_B)


make = MDLM

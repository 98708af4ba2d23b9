"""Denoising score entropy: SEDD's loss on any process; RADD's t-DSE with ``conditional``."""

from dataclasses import dataclass

import jax.numpy as jnp

from sedd.errors import FieldError
from sedd.objectives.base import Corrupted, Objective


@dataclass(frozen=True, kw_only=True)
class ScoreEntropy(Objective):
    """The loss rate(t)·Σ_i SE_i, with t uniform in [t_min, 1]. arXiv:2310.16834, theorem 3.6.

    SE_i is ``Process.score_entropy`` at position i. It compares the model's score with the ratios
    Pr(y | x0) / Pr(xt | x0) of the corruption, and is 0 if they agree. With the parameterization
    ``conditional`` this is RADD's t-DSE, which equals t-DCE at every xt (arXiv:2406.03736, section
    3.3). The mean over draws is 1/(1 - t_min) times the integral over t in [t_min, 1], which is the
    diffusion term of the bound.

    Args:
        t_min: the smallest time, in (0, 1).
    """

    t_min: float = 1e-3

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.t_min < 1:
            raise FieldError("t_min", f"must be in (0, 1), got {self.t_min}")

    def corrupt(self, keys_B, u_B, x0_BL, scored_BL):
        t_B = self.t_min + (1 - self.t_min) * u_B
        sigma_B = self.schedule.sigma(t_B)
        xt_BL = jnp.where(scored_BL, self.process.corrupt(keys_B, x0_BL, sigma_B), x0_BL)
        counts_BL = scored_BL & self.process.can_move(xt_BL)
        weight_BL = jnp.where(counts_BL, self.schedule.rate(t_B)[:, None], 0.0)
        return Corrupted(xt_BL=xt_BL, weight_BL=weight_BL, sigma=sigma_B)

    def row_nats(self, raw_RV, x0_R, xt_R, sigma_R):
        assert sigma_R is not None  # ``corrupt`` returns it
        log_score_RV = self.parameterization.log_score(raw_RV, xt_R, sigma_R)
        return self.process.score_entropy(log_score_RV, xt_R, x0_R, sigma_R)


make = ScoreEntropy

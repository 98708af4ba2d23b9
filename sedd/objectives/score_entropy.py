"""Denoising score entropy: SEDD's loss on any process; RADD's t-DSE with ``conditional``."""

from dataclasses import dataclass
from typing import Literal, get_args

import jax.numpy as jnp

from sedd.arrays import along
from sedd.errors import FieldError
from sedd.objectives.base import Corrupted, Objective
from sedd.processes.hybrid import Hybrid

Weighting = Literal["bound", "clipped", "dynamic"]


@dataclass(frozen=True, kw_only=True)
class ScoreEntropy(Objective):
    """The loss rate(t)·Σ_i SE_i, with t uniform in [t_min, 1]. arXiv:2310.16834, theorem 3.6.

    SE_i is ``Process.score_entropy`` at position i. It compares the model's score with the ratios
    Pr(y | x0) / Pr(xt | x0) of the corruption, and is 0 if they agree. With the parameterization
    ``conditional`` this is RADD's t-DSE, which equals t-DCE at every xt (arXiv:2406.03736, section
    3.3). The mean over draws is 1/(1 - t_min) times the integral over t in [t_min, 1], which is the
    diffusion term of the bound, unless ``weighting`` is another one than bound.

    Args:
        t_min: the smallest time, in (0, 1).
    """

    t_min: float = 1e-3
    weighting: Weighting = "bound"
    """Weights of positions in training on the process hybrid: those of the bound; clipped to at
    most 1; or GIDD's dynamic ones, which need gamma (arXiv:2503.04482). Reported bounds are always
    computed with those of the bound."""

    by_position = True

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.t_min < 1:
            raise FieldError("t_min", f"must be in (0, 1), got {self.t_min}")
        if self.weighting not in get_args(Weighting):
            known = ", ".join(get_args(Weighting))
            raise FieldError("weighting", f"must be one of {known}, got {self.weighting!r}")
        dynamic, process = self.weighting == "dynamic", self.process
        fits = isinstance(process, Hybrid) and not (dynamic and process.gamma is None)
        if self.weighting != "bound" and not fits:
            needed = f"the process hybrid{' with gamma' if dynamic else ''}"
            raise FieldError("weighting", f"{self.weighting} needs {needed}; use bound")

    def corrupt(self, keys_B, u_B, x0_BL, scored_BL):
        t_B = self.t_min + (1 - self.t_min) * u_B
        sigma, rate = self.schedule.at_positions(t_B, x0_BL.shape[1])
        xt_BL = jnp.where(scored_BL, self.process.corrupt(keys_B, x0_BL, sigma), x0_BL)
        counts_BL = scored_BL & self.process.can_move(xt_BL)
        rate = along(rate, x0_BL)
        weight_BL = rate * self._factor(xt_BL, x0_BL, sigma, rate)
        return Corrupted(xt_BL=xt_BL, weight_BL=jnp.where(counts_BL, weight_BL, 0.0), sigma=sigma)

    def _factor(self, xt_BL, x0_BL, sigma, rate):
        """What the weights of the bound are multiplied by to have those of ``weighting``."""
        if self.weighting == "bound":
            return 1.0
        assert isinstance(self.process, Hybrid)
        bound_BL = rate * self.process.bound_weight(xt_BL, x0_BL, sigma)
        if self.weighting == "clipped":
            return jnp.minimum(1.0, 1 / bound_BL)
        return self.process.dynamic_weight(xt_BL, x0_BL, sigma) / bound_BL

    def row_nats(self, raw_RV, x0_R, xt_R, sigma_R):
        assert sigma_R is not None  # ``corrupt`` returns it
        log_score_RV = self.parameterization.log_score(raw_RV, xt_R, sigma_R)
        return self.process.score_entropy(log_score_RV, xt_R, x0_R, sigma_R)


make = ScoreEntropy

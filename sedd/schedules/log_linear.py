"""SEDD's and RADD's schedule: tokens are touched at a constant rate."""

from dataclasses import dataclass

import jax.numpy as jnp

from sedd.errors import FieldError
from sedd.schedules.base import NoiseSchedule


@dataclass(frozen=True, kw_only=True)
class LogLinear(NoiseSchedule):
    """1 - exp(-σ) = (1 - eps)·t: the share of touched tokens grows at a constant rate.

    arXiv:2310.16834.
    """

    eps: float = 1e-3
    """Share of tokens that are untouched at t = 1, in (0, 1); it keeps σ finite there."""

    def __post_init__(self):
        if not 0 < self.eps < 1:
            raise FieldError("eps", f"must be in (0, 1), got {self.eps}")

    def sigma(self, t):
        return -jnp.log1p(-(1 - self.eps) * t)

    def rate(self, t):
        return (1 - self.eps) / (1 - (1 - self.eps) * t)

    def t_of_sigma(self, sigma):
        return -jnp.expm1(-sigma) / (1 - self.eps)


make = LogLinear

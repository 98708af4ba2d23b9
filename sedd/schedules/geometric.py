"""SEDD's schedule for the uniform process: the total noise grows geometrically."""

import math
from dataclasses import dataclass

import jax.numpy as jnp

from sedd.errors import FieldError
from sedd.schedules.base import NoiseSchedule


@dataclass(frozen=True, kw_only=True)
class Geometric(NoiseSchedule):
    """σ = sigma_min^(1-t) · sigma_max^t: log σ is linear in t. arXiv:2310.16834."""

    sigma_min: float = 1e-4
    """Total noise at t = 0, above 0."""
    sigma_max: float = 20.0
    """Total noise at t = 1."""

    def __post_init__(self):
        if not 0 < self.sigma_min < self.sigma_max:
            raise FieldError(
                "sigma_min",
                f"must be above 0 and below sigma_max, {self.sigma_max}, got {self.sigma_min}",
            )

    def sigma(self, t):
        return self.sigma_min * jnp.exp(t * math.log(self.sigma_max / self.sigma_min))

    def rate(self, t):
        return self.sigma(t) * math.log(self.sigma_max / self.sigma_min)

    def t_of_sigma(self, sigma):
        return jnp.log(sigma / self.sigma_min) / math.log(self.sigma_max / self.sigma_min)


make = Geometric

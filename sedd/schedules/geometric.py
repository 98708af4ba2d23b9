"""SEDD's schedule for the uniform process: the total noise grows geometrically."""

import math
from dataclasses import dataclass

import jax.numpy as jnp

from sedd.schedules.base import NoiseSchedule


@dataclass(frozen=True, kw_only=True)
class Geometric(NoiseSchedule):
    """σ = sigma_min^(1-t) · sigma_max^t. arXiv:2310.16834, section 3.3."""

    sigma_min: float = 1e-4
    sigma_max: float = 20.0

    def __post_init__(self):
        if not 0 < self.sigma_min < self.sigma_max:
            raise ValueError(
                "sigma_min and sigma_max must satisfy 0 < sigma_min < sigma_max, got "
                f"{self.sigma_min} and {self.sigma_max}"
            )

    def sigma(self, t):
        return self.sigma_min * jnp.exp(t * math.log(self.sigma_max / self.sigma_min))

    def rate(self, t):
        return self.sigma(t) * math.log(self.sigma_max / self.sigma_min)

    def t_of_sigma(self, sigma):
        return jnp.log(sigma / self.sigma_min) / math.log(self.sigma_max / self.sigma_min)


make = Geometric

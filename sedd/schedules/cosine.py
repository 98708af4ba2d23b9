"""MD4's cosine schedule."""

import math
from dataclasses import dataclass

import jax.numpy as jnp

from sedd.schedules.base import Clamped


@dataclass(frozen=True, kw_only=True)
class Cosine(Clamped):
    """exp(-σ) = 1 - cos(π/2·(1 - t)) before the clamp. arXiv:2406.04329, section 3."""

    def _moved(self, t):
        return jnp.sin(math.pi / 2 * t)

    def _moved_rate(self, t):
        return math.pi / 2 * jnp.sin(math.pi / 2 * (1 - t))  # cos(π/2·t) is negative at t = 1

    def _t_of_moved(self, moved):
        return jnp.arcsin(moved) * 2 / math.pi


make = Cosine

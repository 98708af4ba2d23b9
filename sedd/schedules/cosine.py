"""MD4's cosine schedule: the share of touched tokens is a quarter of a sine wave."""

import math
from dataclasses import dataclass

import jax.numpy as jnp

from sedd.schedules.base import Clamped


@dataclass(frozen=True, kw_only=True)
class Cosine(Clamped):
    """1 - exp(-σ), the share of touched tokens, is clamp + (1 - 2·clamp)·sin(π/2·t).

    Compared with the log-linear schedule, more of the time is spent at high noise.
    arXiv:2406.04329, section 3.
    """

    def _moved(self, t):
        return jnp.sin(math.pi / 2 * t)

    def _moved_rate(self, t):
        # π/2·cos(π/2·t), in a form that float32 does not round below 0 at t = 1.
        return math.pi / 2 * jnp.sin(math.pi / 2 * (1 - t))

    def _t_of_moved(self, moved):
        return jnp.arcsin(moved) * 2 / math.pi


make = Cosine

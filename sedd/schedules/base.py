"""Noise schedules: the total noise σ(t) at time t in [0, 1], and its derivative.

``exp(-σ)`` is the probability that a token has not been touched. Every schedule is finite on all of
[0, 1]: cosine and polynomial, whose noise would be infinite at t = 1, are clamped as MD4 does
(arXiv:2406.04329).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import jax.numpy as jnp

from sedd.errors import FieldError
from sedd.types import Array, Float


@dataclass(frozen=True, kw_only=True)
class NoiseSchedule(ABC):
    """σ(t), increasing in t; every method maps elementwise over arrays of any shape."""

    @abstractmethod
    def sigma(self, t: Float[Array, "*b"]) -> Float[Array, "*b"]:
        """Total noise at times t in [0, 1]."""

    @abstractmethod
    def rate(self, t: Float[Array, "*b"]) -> Float[Array, "*b"]:
        """dσ/dt at times t in [0, 1]; per unit time."""

    @abstractmethod
    def t_of_sigma(self, sigma: Float[Array, "*b"]) -> Float[Array, "*b"]:
        """The time at which the total noise is ``sigma``: the inverse of ``sigma``."""


@dataclass(frozen=True, kw_only=True)
class Clamped(NoiseSchedule):
    """exp(-σ) = 1 - clamp - (1 - 2·clamp)·moved(t), with moved from 0 at t = 0 to 1 at t = 1."""

    clamp: float = 1e-4

    def __post_init__(self):
        if not 0 < self.clamp < 0.5:
            raise FieldError("clamp", f"must be in (0, 0.5), got {self.clamp}")

    @abstractmethod
    def _moved(self, t) -> Array: ...

    @abstractmethod
    def _moved_rate(self, t) -> Array: ...

    @abstractmethod
    def _t_of_moved(self, moved) -> Array: ...

    def _total_moved(self, t):
        return self.clamp + (1 - 2 * self.clamp) * self._moved(t)

    def sigma(self, t):
        return -jnp.log1p(-self._total_moved(t))

    def rate(self, t):
        return (1 - 2 * self.clamp) * self._moved_rate(t) / (1 - self._total_moved(t))

    def t_of_sigma(self, sigma):
        moved = (-jnp.expm1(-sigma) - self.clamp) / (1 - 2 * self.clamp)
        return self._t_of_moved(jnp.clip(moved, 0, 1))

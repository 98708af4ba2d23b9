"""Noise schedules: the total noise σ(t) at time t in [0, 1], and its derivative.

``exp(-σ)`` is the probability that a token has not been touched. Every schedule is finite on all of
[0, 1]: cosine and polynomial, whose noise would be infinite at t = 1, are clamped as MD4 does
(arXiv:2406.04329).
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import jax.numpy as jnp

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
class LogLinear(NoiseSchedule):
    """1 - exp(-σ) = (1 - eps)·t: tokens are touched at a constant rate. arXiv:2310.16834, 3.3."""

    eps: float = 1e-3

    def __post_init__(self):
        if not 0 < self.eps < 1:
            raise ValueError(f"eps must be in (0, 1), got {self.eps}")

    def sigma(self, t):
        return -jnp.log1p(-(1 - self.eps) * t)

    def rate(self, t):
        return (1 - self.eps) / (1 - (1 - self.eps) * t)

    def t_of_sigma(self, sigma):
        return -jnp.expm1(-sigma) / (1 - self.eps)


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


@dataclass(frozen=True, kw_only=True)
class _Clamped(NoiseSchedule):
    """exp(-σ) = 1 - clamp - (1 - 2·clamp)·moved(t), with moved from 0 at t = 0 to 1 at t = 1."""

    clamp: float = 1e-4

    def __post_init__(self):
        if not 0 < self.clamp < 0.5:
            raise ValueError(f"clamp must be in (0, 0.5), got {self.clamp}")

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


@dataclass(frozen=True, kw_only=True)
class Cosine(_Clamped):
    """exp(-σ) = 1 - cos(π/2·(1 - t)) before the clamp. arXiv:2406.04329, section 3."""

    def _moved(self, t):
        return jnp.sin(math.pi / 2 * t)

    def _moved_rate(self, t):
        return math.pi / 2 * jnp.sin(math.pi / 2 * (1 - t))  # cos(π/2·t) is negative at t = 1

    def _t_of_moved(self, moved):
        return jnp.arcsin(moved) * 2 / math.pi


@dataclass(frozen=True, kw_only=True)
class Polynomial(_Clamped):
    """exp(-σ) = 1 - t^power before the clamp. arXiv:2406.04329, section 3."""

    power: float = 2.0

    def __post_init__(self):
        super().__post_init__()
        if self.power < 1:
            raise ValueError(f"power must be at least 1, got {self.power}")

    def _moved(self, t):
        return t**self.power

    def _moved_rate(self, t):
        return self.power * t ** (self.power - 1)

    def _t_of_moved(self, moved):
        return moved ** (1 / self.power)


MAKERS = {
    "log_linear": LogLinear,
    "geometric": Geometric,
    "cosine": Cosine,
    "polynomial": Polynomial,
}

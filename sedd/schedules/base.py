"""Noise schedules: the total noise σ(t) at time t in [0, 1], and its derivative.

exp(-σ(t)) is the probability that the process has not touched a token by time t. A schedule only
relabels the noise level: the process, the network and the objective see σ, and t serves to spread
training and sampling over the noise levels.

σ is finite on all of [0, 1]. The cosine and polynomial schedules, whose noise would be infinite at
t = 1, are clamped as in MD4 (arXiv:2406.04329).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import jax.numpy as jnp

from sedd.errors import FieldError
from sedd.types import Array, Float


@dataclass(frozen=True, kw_only=True)
class NoiseSchedule(ABC):
    """An increasing function σ(t); methods act elementwise on arrays of any shape."""

    @abstractmethod
    def sigma(self, t: Float[Array, "*b"]) -> Float[Array, "*b"]:
        """Total noise σ at times t in [0, 1]."""

    @abstractmethod
    def rate(self, t: Float[Array, "*b"]) -> Float[Array, "*b"]:
        """Noise per unit of time, dσ/dt, at times t in [0, 1]."""

    @abstractmethod
    def t_of_sigma(self, sigma: Float[Array, "*b"]) -> Float[Array, "*b"]:
        """The time at which the total noise is ``sigma``, the inverse function of ``sigma(t)``."""

    @property
    def by_position(self) -> bool:
        """Whether positions of a text differ in their noise (``powers``)."""
        return False

    def powers(self, length: int) -> Float[Array, " L"]:
        """The weight w of each position, which is touched with probability (1 - exp(-σ))^w."""
        return jnp.ones(length)

    def at_positions(
        self, t_B: Float[Array, " B"], length: int
    ) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
        """σ and dσ/dt of the positions of texts at times t: [B] if all are equal, else [B, L]."""
        return self.sigma(t_B), self.rate(t_B)


@dataclass(frozen=True, kw_only=True)
class Clamped(NoiseSchedule):
    """A schedule whose share of touched tokens, 1 - exp(-σ), runs from clamp to 1 - clamp.

    Subclasses implement the unclamped share ``_moved(t)``, which rises from 0 at t = 0 to 1 at
    t = 1, its derivative ``_moved_rate`` and its inverse ``_t_of_moved``. The clamped share is
    clamp + (1 - 2·clamp)·_moved(t). arXiv:2406.04329, section 3.
    """

    clamp: float = 1e-4
    """Share of touched tokens at t = 0, and of untouched ones at t = 1, in (0, 0.5)."""

    def __post_init__(self):
        if not 0 < self.clamp < 0.5:
            raise FieldError("clamp", f"must be in (0, 0.5), got {self.clamp}")

    @abstractmethod
    def _moved(self, t) -> Array:
        """The unclamped share of touched tokens at time t."""

    @abstractmethod
    def _moved_rate(self, t) -> Array:
        """The derivative of ``_moved``."""

    @abstractmethod
    def _t_of_moved(self, moved) -> Array:
        """The inverse of ``_moved``."""

    def _total_moved(self, t):
        """The clamped share, 1 - exp(-σ)."""
        return self.clamp + (1 - 2 * self.clamp) * self._moved(t)

    def sigma(self, t):
        return -jnp.log1p(-self._total_moved(t))

    def rate(self, t):
        return (1 - 2 * self.clamp) * self._moved_rate(t) / (1 - self._total_moved(t))

    def t_of_sigma(self, sigma):
        moved = (-jnp.expm1(-sigma) - self.clamp) / (1 - 2 * self.clamp)
        return self._t_of_moved(jnp.clip(moved, 0, 1))

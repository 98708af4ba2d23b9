"""Rotary positions (arXiv:2104.09864), and their scaling to texts longer than those of training.

Channel k of a head of width K turns together with channel k + K/2, by an angle that is the position
times a frequency. The paper pairs neighbouring channels instead; both are the same model up to a
permutation of the channels of queries and keys. Phases and rotations are float32.

Suffix ``F``: the K/2 frequencies; the others as in ``sedd.types``.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import jax.numpy as jnp
import numpy as np

from sedd.errors import FieldError
from sedd.types import Array, Float, Int

# cos and sin; the batch axis has size 1 if all sequences have the same positions.
Phases = tuple[Float[Array, "#B L 1 F"], Float[Array, "#B L 1 F"]]

BASE = 1e4
Kind = Literal["none", "yarn", "llama3"]


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How frequencies change for texts that are longer than those of the first training.

    A channel turns a number of times within the original length. Channels that turn often keep
    their frequency. The frequency of those that turn rarely is divided by ``factor``: they stay
    within the angles of the first training. In between the two are mixed.

    - ``llama3``: the mixture is linear in the number of turns (Llama 3.1);
    - ``yarn``: it is linear in the number of the channel, and the products of queries and keys are
      multiplied by ``attention_factor`` squared (YaRN, arXiv:2309.00071).

    The defaults of ``low_turns`` and ``high_turns`` are YaRN's; Llama 3.1 has 1 and 4.

    Raises ``FieldError`` if a number is out of its range.
    """

    kind: Kind = "none"
    """none, yarn or llama3."""
    factor: float = 1.0
    """By what the lowest frequencies are divided, at least 1."""
    original_length: int = 8192
    """Tokens in a sequence of the first training."""
    low_turns: float = 1.0
    """Channels that turn less often within the original length are slowed by the whole factor."""
    high_turns: float = 32.0
    """Channels that turn more often within the original length keep their frequency."""
    attention_factor: float | None = None
    """yarn: factor of the rotated queries and keys; by default 0.1·ln(factor) + 1."""
    truncate: bool = True
    """yarn: round the first and last mixed channel to whole channels, outwards."""
    query_growth: float = 0.0
    """Queries at position p are multiplied by 1 + growth·ln(1 + floor(p / original length)), which
    is 1 within the original length, as in Ministral 3."""

    def __post_init__(self):
        if self.kind not in get_args(Kind):
            kinds = ", ".join(get_args(Kind))
            raise FieldError("kind", f"must be one of {kinds}, got {self.kind!r}")
        if self.factor < 1:
            raise FieldError("factor", f"must be at least 1, got {self.factor}")
        if self.original_length < 1:
            raise FieldError("original_length", f"must be at least 1, got {self.original_length}")
        if not 0 < self.low_turns < self.high_turns:
            raise FieldError(
                "low_turns",
                f"must be above 0 and below high_turns, got {self.low_turns} and {self.high_turns}",
            )
        if self.attention_factor is not None and self.attention_factor <= 0:
            raise FieldError("attention_factor", f"must be above 0, got {self.attention_factor}")
        if self.query_growth < 0:
            raise FieldError("query_growth", f"must not be negative, got {self.query_growth}")

    @property
    def amplitude(self) -> float:
        """The factor of rotated queries and keys: 1 but for yarn."""
        if self.kind != "yarn":
            return 1.0
        if self.attention_factor is None:
            return 0.1 * math.log(self.factor) + 1
        return self.attention_factor

    def frequencies(self, head_dim: int, base: float) -> Float[np.ndarray, " F"]:
        """Return the angle per position of each pair of channels, in float64.

        Args:
            head_dim: channels of a head, K.
            base: the frequency of pair k is base^(-2k/K) before scaling.
        """
        frequency_F = float(base) ** (-np.arange(0, head_dim, 2) / head_dim)
        if self.kind == "none":
            return frequency_F
        if self.kind == "llama3":
            turns_F = self.original_length * frequency_F / (2 * math.pi)
            kept_F = (turns_F - self.low_turns) / (self.high_turns - self.low_turns)
        else:
            # The pair that turns n times within the original length, as a real number.
            first, last = (
                head_dim
                * math.log(self.original_length / (2 * math.pi * turns))
                / (2 * math.log(base))
                for turns in (self.high_turns, self.low_turns)
            )
            if self.truncate:
                first, last = math.floor(first), math.ceil(last)
            first, last = max(first, 0), min(last, head_dim - 1)
            last = last if last > first else first + 0.001
            kept_F = 1 - (np.arange(head_dim // 2) - first) / (last - first)
        kept_F = np.clip(kept_F, 0, 1)
        return frequency_F * (kept_F + (1 - kept_F) / self.factor)


def phases(positions_BL: Int[Array, "B L"], frequency_F: Float[Array, " F"]) -> Phases:
    """cos and sin of position · frequency, in float32."""
    phase_BLF = positions_BL.astype(jnp.float32)[:, :, None] * frequency_F[None, None]
    return jnp.cos(phase_BLF)[:, :, None], jnp.sin(phase_BLF)[:, :, None]


def rotary(positions_BL: Int[Array, "B L"], head_dim: int) -> Phases:
    """Phases without scaling, of base 10⁴: the frequency of channel k < K/2 is 10⁴^(-2k/K).

    ``head_dim`` is K.
    """
    k_F = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    return phases(positions_BL, BASE**-k_F)


def scaled_rotary(
    positions_BL: Int[Array, "B L"], head_dim: int, base: float, scaling: RopeScaling
) -> tuple[Phases, Phases]:
    """Phases of the queries and of the keys, with the factors by which both are multiplied."""
    frequency_F = jnp.asarray(scaling.frequencies(head_dim, base), jnp.float32)
    cos, sin = (scaling.amplitude * part for part in phases(positions_BL, frequency_F))
    lengths_BL = (positions_BL // scaling.original_length).astype(jnp.float32)
    grown_BL11 = (1 + scaling.query_growth * jnp.log1p(lengths_BL))[:, :, None, None]
    return (grown_BL11 * cos, grown_BL11 * sin), (cos, sin)


def rotate(x_BLHK: Float[Array, "B L H K"], rotation: Phases) -> Float[Array, "B L H K"]:
    """Rotate queries or keys by phases, in float32; the type is unchanged."""
    cos, sin = rotation
    first, second = jnp.split(x_BLHK.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BLHK.dtype)

"""Temperature, top-k, top-p, guidance and user functions on the conditional of clean tokens.

A ``Reshape`` changes log p(x0_i | x) at masked positions, in this order: guidance, the user's
processor, temperature, top-k, top-p; the result is normalised. Samplers then draw from the changed
conditionals: one that is exact for the model's conditionals is exact for the changed ones.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sedd.arrays import NO_MASS
from sedd.errors import FieldError
from sedd.types import Array, Bool, Float, Int

TINY = float(jnp.finfo(jnp.float32).tiny)  # smaller positive numbers are 0 in float32
EVERY = 2**31 - 1  # top_k of a sequence that keeps every token
INFINITY_BITS = 0x7F800000  # float32 infinity, read as an integer

LogitProcessor = Callable[[Array, Array, Array], Array]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Reshape:
    """How each sequence's conditionals are changed: arrays [B], or scalars for all sequences.

    The numbers are traced, so that requests with different numbers share one compiled program;
    ``logit_processor`` is static. ``Reshape.of`` builds one from a user's values and checks them.
    """

    temperature_B: Float[Array, "*b"]
    """At least 0. Below 1 sharpens, above 1 flattens; 0 takes the most likely token."""
    top_k_B: Int[Array, "*b"]
    """Keeps the k most likely tokens, and those that tie with the last of them."""
    top_p_B: Float[Array, "*b"]
    """Keeps the most likely tokens whose probabilities sum to at least p. arXiv:1904.09751."""
    guidance_B: Float[Array, "*b"]
    """Weight w of classifier-free guidance: c^(1+w) / (c without the given tokens)^w, normalised.
    arXiv:2207.12598."""
    logit_processor: LogitProcessor | None = field(default=None, metadata={"static": True})
    """(log_probs [B, K, N], tokens [B, L], positions [B, K]) -> log_probs [B, K, N], traceable."""

    @classmethod
    def of(
        cls,
        *,
        temperature: float | Sequence[float] = 1.0,
        top_k: int | Sequence[int | None] | None = None,
        top_p: float | Sequence[float | None] | None = None,
        guidance: float | Sequence[float] = 0.0,
        logit_processor: LogitProcessor | None = None,
    ) -> "Reshape":
        """A Reshape of numbers for all sequences, or one each; None turns top-k or top-p off.

        Raises ``FieldError`` on a number out of its range.
        """

        def numbers(name, given, off, wanted, fits) -> Any:
            values = [off if v is None else v for v in np.ravel(given).tolist()]
            for value in values:
                if not fits(value):
                    raise FieldError(name, f"must be {wanted}, got {value}")
            return np.reshape(values, np.shape(given))

        def weight(name, given, off) -> Any:
            wanted = "finite and at least 0"
            return numbers(name, given, off, wanted, lambda value: 0 <= value < math.inf)

        top_k_B = numbers("top_k", top_k, EVERY, "a whole number of at least 1", _counts)
        top_p_B = numbers("top_p", top_p, 1.0, "in (0, 1]", lambda value: 0 < value <= 1)
        return cls(
            temperature_B=weight("temperature", temperature, 1.0).astype(np.float32),
            top_k_B=np.minimum(top_k_B, EVERY).astype(np.int32),
            top_p_B=np.maximum(top_p_B, TINY).astype(np.float32),
            guidance_B=weight("guidance", guidance, 0.0).astype(np.float32),
            logit_processor=logit_processor,
        )

    def guide(
        self, given: Float[Array, "B K N"], hidden: Float[Array, "B K N"]
    ) -> Float[Array, "B K N"]:
        """Combine log conditionals read with the given tokens visible and with them masked."""
        weight_B11 = _column(self.guidance_B)
        guided = jax.nn.log_softmax((1 + weight_B11) * given - weight_B11 * hidden, -1)
        return jnp.where(weight_B11 > 0, guided, given)

    def __call__(
        self,
        log_probs: Float[Array, "B K N"],
        tokens_BL: Int[Array, "B L"],
        positions_BK: Int[Array, "B K"],
        *,
        drawn_jointly_BK: Bool[Array, "B K"] | None = None,
    ) -> Float[Array, "B K N"]:
        """The changed log conditionals, normalised; excluded tokens have -1e6, nan rows stay nan.

        At ``drawn_jointly_BK`` temperature 0 acts as temperature 1: the most likely string under a
        constraint is found from the distributions, not from the most likely tokens.
        """
        if self.logit_processor is not None:
            log_probs = self.logit_processor(log_probs, tokens_BL, positions_BK)
            # The entropy of a row with -inf would be nan.
            log_probs = jnp.maximum(jax.nn.log_softmax(log_probs, -1), NO_MASS)
        temperature_BK1 = jnp.broadcast_to(_column(self.temperature_B), (*log_probs.shape[:-1], 1))
        if drawn_jointly_BK is not None:
            joint_BK1 = drawn_jointly_BK[..., None] & (temperature_BK1 < TINY)
            temperature_BK1 = jnp.where(joint_BK1, 1.0, temperature_BK1)
        shaped = _sharpened(log_probs, temperature_BK1)
        top_k_B11, top_p_B11 = _column(self.top_k_B), _column(self.top_p_B)
        keeps_k = top_k_B11 < log_probs.shape[-1]
        shaped = jax.lax.cond(
            keeps_k.any(),
            lambda rows: jnp.where(keeps_k, _top_k(rows, top_k_B11), rows),
            lambda rows: rows,
            shaped,
        )
        shaped = jax.lax.cond(
            (top_p_B11 < 1).any(),
            lambda rows: jnp.where(top_p_B11 < 1, _top_p(rows, top_p_B11), rows),
            lambda rows: rows,
            shaped,
        )
        return jnp.where(jnp.isnan(log_probs).any(-1, keepdims=True), jnp.nan, shaped)

    def take(self, sequence_R: Int[Array, " R"]) -> "Reshape":
        """The Reshape of a batch whose row r is a row of sequence ``sequence_R[r]``."""
        return jax.tree.map(
            lambda values: jnp.asarray(values)[sequence_R] if jnp.ndim(values) else values, self
        )

    def repeat(self, count: int) -> "Reshape":
        """For a batch in which each sequence stands ``count`` times in a row."""
        return jax.tree.map(
            lambda values: jnp.repeat(values, count, 0) if jnp.ndim(values) else values, self
        )


def _counts(value) -> bool:
    """Whether it is a number of tokens to keep."""
    return value >= 1 and value == int(value)


def _column(values_B):
    """[B] or a scalar as [B, 1, 1], to broadcast against [B, K, N]."""
    return jnp.reshape(jnp.asarray(values_B), (-1, 1, 1))


def _sharpened(log_probs, temperature_BK1):
    """log_probs / temperature, normalised; unchanged bits at 1, the most likely token at 0."""
    zero = temperature_BK1 < TINY
    falling = log_probs - log_probs.max(-1, keepdims=True)  # the largest stays 0, never -inf
    divided = falling / jnp.where(zero, 1.0, temperature_BK1).astype(log_probs.dtype)
    sharpened = jnp.maximum(jax.nn.log_softmax(divided, -1), NO_MASS)
    best = log_probs.argmax(-1, keepdims=True) == jnp.arange(log_probs.shape[-1])[None, None]
    sharpened = jnp.where(zero, jnp.where(best, 0.0, NO_MASS), sharpened)
    return jnp.where(temperature_BK1 == 1, log_probs, sharpened).astype(log_probs.dtype)


def _top_k(log_probs, k_B11):
    return _keep_most_likely(log_probs, lambda kept: kept.sum(-1, keepdims=True) >= k_B11)


def _top_p(log_probs, p_B11):
    probs = jnp.exp(log_probs)
    return _keep_most_likely(
        log_probs, lambda kept: jnp.where(kept, probs, 0).sum(-1, keepdims=True) >= p_B11
    )


def _keep_most_likely(log_probs, enough):
    """The smallest set of most likely tokens that is ``enough``, with ties; normalised.

    Bisects the threshold instead of sorting the vocabulary: 31 passes over each row, and no
    constant k in the program. Surprises -log p are not negative, and float32 numbers of one sign
    are ordered like the integers of the same bits, so the bisection ends at the exact threshold.
    Without a set that is enough every token is kept.
    """
    surprise = jnp.maximum(-log_probs, 0).astype(jnp.float32)
    bits = jax.lax.bitcast_convert_type(surprise, jnp.int32)

    def halve(_, bounds):
        low, high = bounds  # the threshold is at least low, and at most high
        middle = low + (high - low) // 2
        reached = enough(bits <= middle)
        return jnp.where(reached, low, middle + 1), jnp.where(reached, middle, high)

    low = jnp.zeros_like(bits[..., :1])
    threshold, _ = jax.lax.fori_loop(0, 31, halve, (low, jnp.full_like(low, INFINITY_BITS)))
    return jax.nn.log_softmax(jnp.where(bits <= threshold, log_probs, NO_MASS), -1)

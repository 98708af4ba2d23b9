"""Temperature, top-k, top-p, guidance and user functions on the conditional of clean tokens.

A ``Reshape`` changes log p(x0_i | x) at masked positions. It applies guidance, the user's logit
processor, temperature, top-k and top-p in this order, and normalises the result. Samplers draw from
the changed conditionals without knowing of the change. A sampler whose law is exact for given
conditionals is exact for the changed ones.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sedd.arrays import NO_MASS
from sedd.errors import FieldError
from sedd.types import Array, Bool, Float, Int

TINY = float(jnp.finfo(jnp.float32).tiny)  # the smallest normal number; XLA flushes less to 0
EVERY = 2**31 - 1  # the top_k that keeps every token
INFINITY_BITS = 0x7F800000  # the bits of the float32 infinity

LogitProcessor = Callable[[Array, Array, Array], Array]
"""(log_probs [B, K, N], tokens [B, L], positions [B, K]) -> log_probs [B, K, N], traceable."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Reshape:
    """The changes to the conditionals: each field is an array [B], or a scalar for all sequences.

    The numbers are traced, so that requests with different numbers share one compiled program. The
    logit processor is static. ``Reshape.of`` checks a user's numbers and builds a ``Reshape``.
    """

    temperature_B: Float[Array, "*b"]
    """At least 0. Below 1 sharpens, above 1 flattens; 0 takes the most likely token."""
    top_k_B: Int[Array, "*b"]
    """Keep the k most likely tokens, and the tokens that tie with the last of them."""
    top_p_B: Float[Array, "*b"]
    """Keep the smallest set of most likely tokens with a total probability of at least p, in
    (0, 1]. arXiv:1904.09751."""
    guidance_B: Float[Array, "*b"]
    """Weight w >= 0 of classifier-free guidance: c^(1+w) / c'^w, normalised, where c' is the
    conditional without the given tokens. arXiv:2207.12598."""
    logit_processor: LogitProcessor | None = field(default=None, metadata={"static": True})
    """A user's function on the log conditionals, after guidance and before temperature."""

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
        """Build a Reshape. A number applies to all sequences, a list has one for each.

        Args:
            temperature: finite and at least 0.
            top_k: whole number of at least 1; None keeps every token.
            top_p: number in (0, 1]; None keeps every token.
            guidance: finite and at least 0.
            logit_processor: see ``LogitProcessor``.

        Raises:
            FieldError: if a number is out of its range.
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
        """Classifier-free guidance: combine two log conditionals and normalise.

        ``given`` are the log conditionals if the network sees the given tokens, ``hidden`` those if
        the given tokens are masked.
        """
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
        """Apply the processor, temperature, top-k and top-p; guidance has been applied before.

        Args:
            log_probs: normalised log conditionals of K positions of each sequence.
            tokens_BL: current tokens, for the processor.
            positions_BK: the K positions, for the processor.
            drawn_jointly_BK: positions under a constraint. Temperature 0 leaves them unchanged: the
                most likely matching string is found from the distributions, while the string of the
                most likely tokens need not match.

        Returns:
            The changed log conditionals, normalised. Excluded tokens have -1e6. A row with nan is
            nan throughout.
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
        # Each threshold costs 31 passes over the rows: skipped unless a sequence asks for it.
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

    def unsharpened(self) -> "Reshape":
        """The Reshape without temperature, top-k and top-p."""
        return replace(
            self,
            temperature_B=jnp.ones_like(self.temperature_B),
            top_k_B=jnp.full_like(self.top_k_B, EVERY),
            top_p_B=jnp.ones_like(self.top_p_B),
        )

    def take(self, sequence_R: Int[Array, " R"]) -> "Reshape":
        """The Reshape for R rows, where row r belongs to sequence ``sequence_R[r]``."""
        return jax.tree.map(
            lambda values: jnp.asarray(values)[sequence_R] if jnp.ndim(values) else values, self
        )

    def repeat(self, count: int) -> "Reshape":
        """The Reshape for a batch with ``count`` consecutive copies of each sequence."""
        return jax.tree.map(
            lambda values: jnp.repeat(values, count, 0) if jnp.ndim(values) else values, self
        )


def _counts(value) -> bool:
    """Whether ``value`` is a whole number of at least 1."""
    return value >= 1 and value == int(value)


def _column(values_B):
    """Reshape [B] or a scalar to [B, 1, 1], to broadcast against [B, K, N]."""
    return jnp.reshape(jnp.asarray(values_B), (-1, 1, 1))


def _sharpened(log_probs, temperature_BK1):
    """log_probs / temperature, normalised.

    Temperature 1 returns the same bits, and temperature 0 puts all mass on the most likely token.
    """
    zero = temperature_BK1 < TINY
    # With the largest log probability at 0, dividing by a tiny temperature cannot make it -inf.
    falling = log_probs - log_probs.max(-1, keepdims=True)
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
    """Restrict to the smallest set of most likely tokens that is ``enough``, ties included.

    Sorting the vocabulary would be slow, and ``lax.top_k`` needs a constant k. Instead the
    threshold on the surprise -log p is bisected, in 31 passes over each row. Surprises are not
    negative, and float32 numbers of one sign are ordered like the integers with the same bits: the
    bisection runs over these integers and ends at the exact threshold.

    Args:
        log_probs: log probabilities, [..., N].
        enough: maps a boolean set of tokens [..., N] to whether it suffices [..., 1]; it must stay
            true as the set grows. If no set suffices, every token is kept.

    Returns:
        Normalised log probabilities with -1e6 outside of the set.
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

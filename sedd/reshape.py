"""Changes to the conditional of clean tokens that any sampler can draw from.

They act on log p(x0_i | x) at masked positions, in this order: guidance, the user's processor,
temperature, top-k, top-p; the result is normalised again. What is drawn is then no longer the
model's own law: a sampler that is exact for the model is exact for the reshaped conditionals.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from sedd.arrays import NO_MASS
from sedd.types import Array, Float, Int

TINY = float(jnp.finfo(jnp.float32).tiny)  # what is below is 0 in float32

LogitProcessor = Callable[[Array, Array, Array], Array]


@dataclass(frozen=True, kw_only=True)
class Reshape:
    """Options of sampling. A value: another one compiles another program."""

    temperature: float = 1.0
    """Sharpens below 1, flattens above; 0 takes the most likely token."""
    top_k: int | None = None
    """Only the k most likely tokens, and those that tie with the last of them."""
    top_p: float | None = None
    """Only the most likely tokens that together reach this probability. arXiv:1904.09751."""
    guidance: float = 0.0
    """Classifier-free guidance by what is given: c^(1+w) / (c without it)^w. arXiv:2207.12598."""
    logit_processor: LogitProcessor | None = None
    """(log_probs [B, K, N], tokens [B, L], positions [B, K]) -> log_probs [B, K, N], traceable."""

    def __post_init__(self):
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be finite and at least 0, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if not 0 <= self.guidance < math.inf:
            raise ValueError(f"guidance must be finite and at least 0, got {self.guidance}")

    def guide(
        self, given: Float[Array, "*b N"], hidden: Float[Array, "*b N"]
    ) -> Float[Array, "*b N"]:
        """Log conditionals with the given tokens visible and hidden, combined."""
        return jax.nn.log_softmax((1 + self.guidance) * given - self.guidance * hidden, -1)

    def __call__(
        self,
        log_probs: Float[Array, "B K N"],
        tokens_BL: Int[Array, "B L"],
        positions_BK: Int[Array, "B K"],
    ) -> Float[Array, "B K N"]:
        """The reshaped conditional, normalised; tokens left out have -1e6. nan stays nan."""
        if self.logit_processor is not None:
            log_probs = self.logit_processor(log_probs, tokens_BL, positions_BK)
            # -inf excludes a token; the entropy of a row would be nan with it.
            log_probs = jnp.maximum(jax.nn.log_softmax(log_probs, -1), NO_MASS)
        unknown_BK1 = jnp.isnan(log_probs).any(-1, keepdims=True)
        return jnp.where(unknown_BK1, jnp.nan, self._sharpened(log_probs))

    def _sharpened(self, log_probs: Float[Array, "B K N"]) -> Float[Array, "B K N"]:
        if self.temperature < TINY:
            best = log_probs.argmax(-1, keepdims=True)
            chosen = jnp.arange(log_probs.shape[-1])[None, None] == best
            return jnp.where(chosen, 0.0, NO_MASS).astype(log_probs.dtype)
        if self.temperature != 1:
            falling = log_probs - log_probs.max(-1, keepdims=True)  # the best stays 0, not inf
            log_probs = jax.nn.log_softmax(falling / self.temperature, -1)
            log_probs = jnp.maximum(log_probs, NO_MASS)
        if self.top_k is not None and self.top_k < log_probs.shape[-1]:
            log_probs = _keep(log_probs, jax.lax.top_k(log_probs, self.top_k)[0][..., -1:])
        if self.top_p is not None and self.top_p < 1:
            descending = -jnp.sort(-log_probs, axis=-1)
            probs = jnp.exp(descending)
            wanted = jnp.cumsum(probs, -1) - probs < max(
                self.top_p, TINY
            )  # what came before is not enough
            log_probs = _keep(
                log_probs, jnp.where(wanted, descending, jnp.inf).min(-1, keepdims=True)
            )
        return log_probs


def _keep(log_probs, smallest):
    """Only the tokens that are at least as likely as ``smallest``."""
    return jax.nn.log_softmax(jnp.where(log_probs >= smallest, log_probs, NO_MASS), -1)

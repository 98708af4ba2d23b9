"""Draws that are right in float32, keyed so that they depend on a request and a position alone."""

import jax
import jax.numpy as jnp

from sedd.processes.base import at, put
from sedd.types import Array, Bool, Float, Int, Key


def fold(keys_B: Key[Array, "B"], number: Int[Array, "..."] | int) -> Key[Array, "B"]:
    """Each key with a number folded in: one a key, or the same for all."""
    return jax.vmap(jax.random.fold_in)(keys_B, jnp.broadcast_to(number, keys_B.shape))


def categorical(key: Key[Array, ""], log_probs: Float[Array, "*b V"]) -> Int[Array, "*b"]:
    """A draw from each row, with noise that resolves probabilities of 1e-14 in float32.

    JAX's default noise stops at 1e-7: it cuts the tail off a large vocabulary, which acts as a
    hidden temperature (arXiv:2409.02908).
    """
    wide = jnp.promote_types(log_probs.dtype, jnp.float32)
    return jax.random.categorical(key, log_probs.astype(wide), mode="high")


def tokens_at(
    keys_B: Key[Array, "B"], positions_BK: Int[Array, "B K"], log_probs_BKN: Float[Array, "B K N"]
) -> Int[Array, "B K"]:
    """A draw at each position, with the noise of (key, position): the same however often drawn."""
    keys_BK = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(keys_B, positions_BK)
    return jax.vmap(jax.vmap(categorical))(keys_BK, log_probs_BKN)


def random_rank(keys_B: Key[Array, "B"], select_BL: Bool[Array, "B L"]) -> Int[Array, "B L"]:
    """A uniformly random order of the selected positions of each sequence; the others come last.

    A position's place among the selected ones does not depend on how many follow: padding changes
    nothing. Two words of noise each: float32 noise would tie, and ties go to the left.
    """
    length = select_BL.shape[1]
    words_BL2 = jax.vmap(lambda key: jax.random.bits(key, (length, 2), jnp.uint32))(keys_B)
    index_BL = jnp.broadcast_to(jnp.arange(length), select_BL.shape)
    *_, order_BL = jax.lax.sort(
        ((~select_BL).astype(jnp.int32), words_BL2[..., 0], words_BL2[..., 1], index_BL),
        dimension=1,
        num_keys=3,
    )
    return jnp.argsort(order_BL, axis=1)


def leap(key: Key[Array, ""], x: Int[Array, "*b"], probs: Float[Array, "*b V"]) -> Int[Array, "*b"]:
    """A draw from the rows of ``probs``, clipped at 0 and renormalised, in two stages.

    Whether to leave x first, then where to: in a single draw x, which nearly always wins, would
    drown the noise of the others.
    """
    leave_key, token_key = jax.random.split(key)
    probs = jnp.maximum(probs, 0.0)
    away = put(probs, x, jnp.zeros(x.shape, probs.dtype))
    away_total = away.sum(-1)
    leave_probability = away_total / (away_total + at(probs, x))
    leaves = jax.random.bernoulli(leave_key, leave_probability, mode="high")
    return jnp.where(leaves, categorical(token_key, jnp.log(away)), x)

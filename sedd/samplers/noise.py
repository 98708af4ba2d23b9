"""Draws that are right in float32, keyed so that they depend on a request and a position alone."""

import jax
import jax.numpy as jnp

from sedd.arrays import NAN, at, categorical, put
from sedd.types import Array, Bool, Float, Int, Key


def fold(keys_B: Key[Array, " B"], number: Int[Array, "..."] | int) -> Key[Array, " B"]:
    """Each key with a number folded in: one a key, or the same for all."""
    return jax.vmap(jax.random.fold_in)(keys_B, jnp.broadcast_to(number, keys_B.shape))


def tokens_of(keys_B: Key[Array, " B"], log_probs_BLN: Float[Array, "B L N"]) -> Int[Array, "B L"]:
    """A draw at every position."""
    return tokens_at(keys_B, _places(log_probs_BLN[..., 0]), log_probs_BLN)


def tokens_at(
    keys_B: Key[Array, " B"], positions_BK: Int[Array, "B K"], log_probs_BKN: Float[Array, "B K N"]
) -> Int[Array, "B K"]:
    """A draw at each position, with the noise of (key, position): the same however often drawn."""
    return jax.vmap(jax.vmap(categorical))(_at_positions(keys_B, positions_BK), log_probs_BKN)


def random_rank(keys_B: Key[Array, " B"], select_BL: Bool[Array, "B L"]) -> Int[Array, "B L"]:
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


def coins(keys_B: Key[Array, " B"], probability_BL: Float[Array, "B L"]) -> Bool[Array, "B L"]:
    """A coin a position, with its own noise; fine enough for probabilities of 1e-14."""
    keys_BL = _at_positions(keys_B, _places(probability_BL))
    clipped_BL = jnp.clip(probability_BL, 0.0, 1.0)
    return jax.vmap(jax.vmap(lambda key, p: jax.random.bernoulli(key, p, mode="high")))(
        keys_BL, clipped_BL
    )


def leap(
    keys_B: Key[Array, " B"], x_BL: Int[Array, "B L"], probs_BLV: Float[Array, "B L V"]
) -> Int[Array, "B L"]:
    """A draw from the rows of ``probs``, clipped at 0 and renormalised, in two stages.

    Whether to leave x first, then where to: in a single draw x, which nearly always wins, would
    drown the noise of the others. ``NAN`` where the row has nan.
    """
    probs_BLV = jnp.maximum(probs_BLV, 0.0)
    away_BLV = put(probs_BLV, x_BL, jnp.zeros(x_BL.shape, probs_BLV.dtype))
    away_BL = away_BLV.sum(-1)
    leaves_BL = coins(fold(keys_B, 0), away_BL / (away_BL + at(probs_BLV, x_BL)))
    to_BL = tokens_of(fold(keys_B, 1), jnp.log(away_BLV))
    x_BL = jnp.where(leaves_BL, to_BL.astype(x_BL.dtype), x_BL)
    return jnp.where(jnp.isnan(away_BL) | (x_BL == NAN), NAN, x_BL)


def _places(like_BL: Array) -> Int[Array, "B L"]:
    return jnp.broadcast_to(jnp.arange(like_BL.shape[1]), like_BL.shape)


def _at_positions(keys_B: Key[Array, " B"], positions_BK: Int[Array, "B K"]) -> Key[Array, "B K"]:
    return jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(keys_B, positions_BK)

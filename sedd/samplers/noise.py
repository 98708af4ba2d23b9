"""Random draws of samplers, exact in float32; each depends on its request and position alone.

The key of a draw is that of the request with the position folded in, so that a token does not
depend on when it is drawn, nor on which other positions are drawn with it.
"""

import jax
import jax.numpy as jnp

from sedd.arrays import NAN, at, categorical, put
from sedd.networks.rows import Rows
from sedd.types import Array, Bool, Float, Int, Key


def fold(keys_B: Key[Array, " B"], number: Int[Array, "..."] | int) -> Key[Array, " B"]:
    """Each key with a number folded in: one number a key, or the same for all."""
    return jax.vmap(jax.random.fold_in)(keys_B, jnp.broadcast_to(number, keys_B.shape))


def tokens_at(
    keys_B: Key[Array, " B"], rows: Rows, log_probs_RN: Float[Array, "R N"]
) -> Int[Array, " R"]:
    """A token of each row."""
    return jax.vmap(categorical)(_row_keys(keys_B, rows), log_probs_RN)


def random_rank(keys_B: Key[Array, " B"], select_BL: Bool[Array, "B L"]) -> Int[Array, "B L"]:
    """Ranks of a uniformly random order of each sequence's selected positions; the others are last.

    The order of the selected positions does not depend on how many positions follow: padding
    changes nothing. Positions are sorted by two words of noise, since one float32 would tie.
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


def coins(
    keys_B: Key[Array, " B"], rows: Rows, probability_R: Float[Array, " R"]
) -> Bool[Array, " R"]:
    """True with the probability of each row, clipped to [0, 1]; resolves probabilities of 1e-14."""
    return jax.vmap(lambda key, p: jax.random.bernoulli(key, p, mode="high"))(
        _row_keys(keys_B, rows), jnp.clip(probability_R, 0.0, 1.0)
    )


def leap(
    keys_B: Key[Array, " B"], rows: Rows, x_R: Int[Array, " R"], probs_RV: Float[Array, "R V"]
) -> Int[Array, " R"]:
    """A state of each row, by its probabilities clipped at 0 and normalised. ``NAN`` if one is nan.

    Drawn in two stages: whether the row leaves x, then where it goes. In a single draw, x has
    nearly all of the mass, and the float32 noise of the other states would be lost beside it.
    """
    probs_RV = jnp.maximum(probs_RV, 0.0)
    away_RV = put(probs_RV, x_R, jnp.zeros(x_R.shape, probs_RV.dtype))
    away_R = away_RV.sum(-1)
    leaves_R = coins(fold(keys_B, 0), rows, away_R / (away_R + at(probs_RV, x_R)))
    to_R = tokens_at(fold(keys_B, 1), rows, jnp.log(away_RV))
    x_R = jnp.where(leaves_R, to_R.astype(x_R.dtype), x_R)
    return jnp.where(jnp.isnan(away_R) | (x_R == NAN), NAN, x_R)


def _row_keys(keys_B: Key[Array, " B"], rows: Rows) -> Key[Array, " R"]:
    return jax.vmap(jax.random.fold_in)(keys_B[rows.sequence_R], rows.position_R)

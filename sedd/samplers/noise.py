"""Random draws of samplers, with noise that depends only on the request and the position.

The key of a draw is the key of the sequence with the position folded in. The noise of a position
therefore does not depend on the batch, on the padding, on the order of positions or on which other
positions are drawn in the same call.

Where the keys of single positions are replaced (``sedd.types.Keys``), these positions are drawn
with new noise in every round, and all others with the same noise as before. The same holds for the
first of the keys and what a sequence draws as a whole (``whole``). ``zero_order`` searches in this
way.
"""

import jax
import jax.numpy as jnp

from sedd.arrays import NAN, at, categorical, fold, position_keys, put
from sedd.networks.rows import Rows
from sedd.types import Array, Bool, Float, Int, Key, Keys
from sedd.watermark.base import Watermark


def whole(keys_B: Keys) -> Key[Array, " B"]:
    """The keys for what a sequence draws as a whole, such as its order of positions."""
    return keys_B if keys_B.ndim == 1 else keys_B[:, 0]


def tokens_at(
    keys_B: Keys,
    rows: Rows,
    log_probs_RN: Float[Array, "R N"],
    watermark: Watermark | None = None,
) -> Int[Array, " R"]:
    """Draw a token for each row from its log probabilities; ``NAN`` from a row with nan.

    The noise is that of the keys, or that of a watermark which replaces it.
    """
    if watermark is not None and watermark.replaces_noise:
        return watermark.tokens(rows, log_probs_RN)
    return jax.vmap(categorical)(_row_keys(keys_B, rows), log_probs_RN)


def random_rank(
    keys_B: Key[Array, " B"],
    select_BL: Bool[Array, "B L"],
    weight_L: Float[Array, " L"] | None = None,
) -> Int[Array, "B L"]:
    """Rank the selected positions of each sequence in a random order, from 0.

    The order is uniform. With weights the next position is drawn in proportion to the weights of
    those that are left, by a race: each has an exponential time over its weight.

    Positions that are not selected have the last ranks. Each position is sorted by its own noise,
    so that padding does not change the order of the others. The noise is two words of 32 bits,
    because single float32 numbers would tie in long sequences.
    """
    length = select_BL.shape[1]
    words_BL2 = jax.vmap(lambda key: jax.random.bits(key, (length, 2), jnp.uint32))(keys_B)
    index_BL = jnp.broadcast_to(jnp.arange(length), select_BL.shape)
    sorted_by = [(~select_BL).astype(jnp.int32), words_BL2[..., 0], words_BL2[..., 1]]
    if weight_L is not None:
        time_BL = jax.vmap(
            lambda key: jax.random.exponential(jax.random.fold_in(key, 1), (length,))
        )(keys_B)
        sorted_by.insert(1, time_BL / weight_L[None])
    *_, order_BL = jax.lax.sort((*sorted_by, index_BL), dimension=1, num_keys=len(sorted_by))
    return jnp.argsort(order_BL, axis=1)


def coins(keys_B: Keys, rows: Rows, probability_R: Float[Array, " R"]) -> Bool[Array, " R"]:
    """Draw a Bernoulli for each row with its probability, clipped to [0, 1].

    The noise resolves probabilities of 1e-14, where JAX's default stops at 1e-7.
    """
    return jax.vmap(lambda key, p: jax.random.bernoulli(key, p, mode="high"))(
        _row_keys(keys_B, rows), jnp.clip(probability_R, 0.0, 1.0)
    )


def leap(
    keys_B: Keys, rows: Rows, x_R: Int[Array, " R"], probs_RV: Float[Array, "R V"]
) -> Int[Array, " R"]:
    """Draw the next state of each row from probabilities clipped at 0 and normalised.

    The draw has two stages: whether the row leaves x, and then where it goes. In a short step x has
    nearly all of the mass, and one categorical draw in float32 could not resolve the small
    probabilities of the other states beside it.

    Args:
        keys_B: a key for each sequence.
        rows: the positions of the rows.
        x_R: current states.
        probs_RV: unnormalised probabilities of the next state; they may be slightly negative.

    Returns:
        States [R]; ``NAN`` for a row with nan.
    """
    probs_RV = jnp.maximum(probs_RV, 0.0)
    away_RV = put(probs_RV, x_R, jnp.zeros(x_R.shape, probs_RV.dtype))
    away_R = away_RV.sum(-1)
    leaves_R = coins(fold(keys_B, 0), rows, away_R / (away_R + at(probs_RV, x_R)))
    to_R = tokens_at(fold(keys_B, 1), rows, jnp.log(away_RV))
    x_R = jnp.where(leaves_R, to_R.astype(x_R.dtype), x_R)
    return jnp.where(jnp.isnan(away_R) | (x_R == NAN), NAN, x_R)


def _row_keys(keys_B: Keys, rows: Rows) -> Key[Array, " R"]:
    """The key of each row, with its position folded in."""
    return position_keys(keys_B, rows.sequence_R, rows.position_R)

"""Small functions on arrays for every layer: indexing, stable forms, padded sizes, exact draws.

Also the two scans along positions that dynamic programs share: those of automata and of HMMs.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from sedd.types import Array, Float, Int, Key, Keys, Shaped

NO_MASS = -1e6  # log probability of an impossible token: finite, so that 0 · log 0 is 0, not nan
BLOCK = 256  # entries of a block, of which ``categorical`` draws one before it draws an entry
NAN = -1  # the token id drawn from probabilities with nan; callers turn it into an error


def bucket(size: int) -> int:
    """Round a size >= 1 up to one of four sizes an octave: …, 8, 10, 12, 14, 16, 20, 24, 28, 32, …

    Arrays are padded to such sizes so that few shapes are compiled. Padding adds at most a quarter.
    """
    step = 1 << max((size - 1).bit_length() - 3, 0)
    return -(-size // step) * step


def log_expm1(sigma: Float[Array, "..."]) -> Float[Array, "..."]:
    """log(exp(σ) - 1), accurate at σ = 1e-8 and finite where exp(σ) overflows."""
    return sigma + jnp.log(-jnp.expm1(-sigma))


@jax.custom_jvp
def expm1_minus(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """exp(x) - 1 - x, by its Taylor series near 0, where the difference cancels.

    The derivative, exp(x) - 1, cancels as well. Its custom rule uses its own series near 0, and
    elsewhere the exponential that the value computes.
    """
    return jnp.where(jnp.abs(x) < 0.3, x**2 / 2 * _series(x, 3), jnp.exp(x) - 1 - x)


@expm1_minus.defjvp
def _expm1_minus_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    return expm1_minus(x), jnp.where(jnp.abs(x) < 0.3, x * _series(x, 2), jnp.exp(x) - 1) * dx


def _series(x, first: int):
    """1 + x/first·(1 + x/(first + 1)·(…)), exact in float32 for |x| < 0.3."""
    total = 1.0
    for k in range(7, first - 1, -1):
        total = 1 + x / k * total
    return total


def along(values: Float[Array, "..."], x: Shaped[Array, "*b"]) -> Float[Array, "..."]:
    """Append axes of length 1 to ``values`` so that it broadcasts against ``x`` from the left.

    Total noise [B] or [B, L] then broadcasts against tokens [B, L] or logits [B, L, V], and a
    scalar against anything.

    Args:
        values: an array whose axes are the leading axes of ``x``.
        x: the array to broadcast against.
    """
    values = jnp.asarray(values)
    return values.reshape(values.shape + (1,) * (jnp.ndim(x) - values.ndim))


def at(values: Float[Array, "*b V"], index: Int[Array, "*b"]) -> Float[Array, "*b"]:
    """One entry of each row: ``values[i, index[i]]`` for every leading index i."""
    return jnp.take_along_axis(values, index[..., None], -1)[..., 0]


def put(values: Float[Array, "*b V"], index: Int[Array, "*b"], new) -> Float[Array, "*b V"]:
    """``values`` with one entry of each row, at ``index``, replaced by ``new``."""
    column = jnp.arange(values.shape[-1])
    return jnp.where(column == index[..., None], jnp.asarray(new)[..., None], values)


def backward(
    step: Callable[[Array, Any], Array], last: Array, inputs: Any, length: Int[Array, ""] | int
) -> Array:
    """Run ``value = step(value, input)`` from the last position to the first.

    Args:
        step: one position of a recursion.
        last: the value after the last position.
        inputs: a pytree whose leaves have a row for each of L positions.
        length: the number of positions before padding, at which the value does not change.

    Returns:
        The value before each position, and ``last``: L + 1 rows.
    """

    def guarded(value, position):
        own, index = position
        value = jnp.where(index < length, step(value, own), value)
        return value, value

    positions = (inputs, jnp.arange(len(jax.tree.leaves(inputs)[0])))
    _, values = jax.lax.scan(guarded, last, positions, reverse=True)
    return jnp.concatenate([values, last[None]])


def forward(
    step: Callable[[Array, Any], tuple[Array, Any]],
    first: Array,
    inputs: Any,
    length: Int[Array, ""] | int,
) -> Any:
    """Run ``value, output = step(value, input)`` from the first position to the last.

    Arguments are those of ``backward``; ``first`` is the value before the first position.

    Returns:
        The outputs, with a row for each position. Those of padding have no meaning.
    """

    def guarded(value, position):
        own, index = position
        new, output = step(value, own)
        return jnp.where(index < length, new, value), output

    positions = (inputs, jnp.arange(len(jax.tree.leaves(inputs)[0])))
    return jax.lax.scan(guarded, first, positions)[1]


def fold(keys_B: Keys, number: Int[Array, "..."] | int) -> Keys:
    """Fold a number into each key: one number for each sequence, or the same for all."""
    number_B = jnp.broadcast_to(along(jnp.asarray(number), keys_B), keys_B.shape)
    folded = jax.vmap(jax.random.fold_in)(keys_B.reshape(-1), number_B.reshape(-1))
    return folded.reshape(keys_B.shape)


def position_keys(
    keys_B: Keys, sequence_R: Int[Array, " R"], position_R: Int[Array, " R"]
) -> Key[Array, " R"]:
    """The keys with which some positions are drawn: the position is folded into each.

    Args:
        keys_B: keys of sequences, or of their positions (``sedd.types.Keys``).
        sequence_R: the sequence of each position.
        position_R: the positions.
    """
    keys_R = keys_B[sequence_R] if keys_B.ndim == 1 else keys_B[sequence_R, 1 + position_R]
    return jax.vmap(jax.random.fold_in)(keys_R, position_R)


def categorical(key: Key[Array, ""], log_probs: Float[Array, "*b V"]) -> Int[Array, "*b"]:
    """Draw an index from each row, with noise that resolves probabilities of 1e-14 in float32.

    JAX's default noise resolves 1e-7. It cuts off the tail of a large vocabulary, which acts as a
    hidden temperature (arXiv:2409.02908). From a large row a block of ``BLOCK`` entries is drawn
    first, and then an entry of the block. The distribution is the same, and about 1 % of the random
    numbers are needed.

    Args:
        key: one key for all rows.
        log_probs: log probabilities, normalised or not; the last axis is drawn from.

    Returns:
        Indices; -1 (``NAN``) for a row that contains nan.
    """
    log_probs = log_probs.astype(jnp.promote_types(log_probs.dtype, jnp.float32))
    return jnp.where(jnp.isnan(log_probs).any(-1), NAN, _draw(key, log_probs))


def _draw(key, log_probs):
    """``categorical`` for rows without nan."""
    size = log_probs.shape[-1]
    if size <= 2 * BLOCK:
        return jax.random.categorical(key, log_probs, mode="high")
    block_key, entry_key = jax.random.split(key)
    padding = [(0, 0)] * (log_probs.ndim - 1) + [(0, -size % BLOCK)]
    padded = jnp.pad(log_probs, padding, constant_values=-jnp.inf)
    blocks = padded.reshape(*log_probs.shape[:-1], -1, BLOCK)
    total = jax.nn.logsumexp(blocks, axis=-1)
    block = jax.random.categorical(block_key, total, mode="high")
    entries = jnp.take_along_axis(blocks, block[..., None, None], axis=-2)[..., 0, :]
    return block * BLOCK + jax.random.categorical(entry_key, entries, mode="high")

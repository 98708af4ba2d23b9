"""Draws from a distribution that are right in float32."""

import jax
import jax.numpy as jnp

from sedd.types import Array, Float, Int, Key

BLOCK = 256  # tokens that are drawn from together
NAN = -1  # in place of a token that nan probabilities would have given: it ends as an error


def categorical(key: Key[Array, ""], log_probs: Float[Array, "*b V"]) -> Int[Array, "*b"]:
    """A draw from each row, with noise that resolves probabilities of 1e-14 in float32.

    JAX's default noise stops at 1e-7: it cuts the tail off a large vocabulary, which acts as a
    hidden temperature (arXiv:2409.02908). A large row is drawn from in two stages, first a block of
    it and then an entry: the same law from a hundredth of the noise. ``NAN`` from a row with nan.
    """
    log_probs = log_probs.astype(jnp.promote_types(log_probs.dtype, jnp.float32))
    return jnp.where(jnp.isnan(log_probs).any(-1), NAN, _draw(key, log_probs))


def _draw(key, log_probs):
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

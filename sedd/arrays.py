"""Small functions on arrays that every layer uses: indexing, stable forms, shapes, exact draws."""

import jax
import jax.numpy as jnp

from sedd.types import Array, Float, Int, Key, Shaped

NO_MASS = -1e6  # log probability of what cannot be: finite, so that 0 · log 0 and entropies stay 0
BLOCK = 256  # tokens that are drawn from together
NAN = -1  # in place of a token that nan probabilities would have given: it ends as an error


def bucket(size: int) -> int:
    """Round ``size`` up to one of four sizes an octave: 8, 10, 12, 14, 16, 20, 24, 28, 32, …

    Arrays padded to a bucket are at most a quarter larger, and sizes of one bucket share a program.
    """
    step = 1 << max((size - 1).bit_length() - 3, 0)
    return -(-size // step) * step


def log_expm1(sigma: Float[Array, "..."]) -> Float[Array, "..."]:
    """log(exp(σ) - 1), accurate at σ = 1e-8 and finite where exp(σ) overflows."""
    return sigma + jnp.log(-jnp.expm1(-sigma))


@jax.custom_jvp
def expm1_minus(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """exp(x) - 1 - x, by its Taylor series near 0, where the difference cancels."""
    return jnp.where(jnp.abs(x) < 0.3, x**2 / 2 * _series(x, 3), jnp.exp(x) - 1 - x)


@expm1_minus.defjvp
def _expm1_minus_jvp(primals, tangents):
    # exp(x) - 1, in the same terms: an exponential serves both.
    (x,), (dx,) = primals, tangents
    return expm1_minus(x), jnp.where(jnp.abs(x) < 0.3, x * _series(x, 2), jnp.exp(x) - 1) * dx


def _series(x, first: int):
    """1 + x/first·(1 + x/(first + 1)·(…)), exact in float32 for |x| < 0.3."""
    total = 1.0
    for k in range(7, first - 1, -1):
        total = 1 + x / k * total
    return total


def along(values: Float[Array, "..."], x: Shaped[Array, "*b"]) -> Float[Array, "..."]:
    """``values`` with trailing axes of length 1, so that its axes are the leading ones of ``x``.

    A total noise [B] or [B, L] then broadcasts against tokens [B, L], and a scalar against any.
    """
    values = jnp.asarray(values)
    return values.reshape(values.shape + (1,) * (jnp.ndim(x) - values.ndim))


def at(values: Float[Array, "*b V"], index: Int[Array, "*b"]) -> Float[Array, "*b"]:
    """``values[..., index]``, one entry a row."""
    return jnp.take_along_axis(values, index[..., None], -1)[..., 0]


def put(values: Float[Array, "*b V"], index: Int[Array, "*b"], new) -> Float[Array, "*b V"]:
    """``values`` with the entry ``index`` of each row replaced by ``new``."""
    column = jnp.arange(values.shape[-1])
    return jnp.where(column == index[..., None], jnp.asarray(new)[..., None], values)


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

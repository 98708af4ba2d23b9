"""Losses of single rows of the output layer, read out only where they count, a few at a time.

The logits of a batch, [B, L, V], are the largest array of a training step, and on the absorbing
process half of them are never looked at. Here the positions with a weight are gathered, and read
out in chunks whose logits live one after the other; the gradients of a chunk are formed while its
logits are there, so that nothing of it is kept for a backward pass.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from sedd.networks.base import read_out
from sedd.types import Array, Float

CHUNK_BYTES = 2**28  # of float32 logits, at most: accelerators want long products
LEAST_ROWS = 256

# (raw [R, V], leaves [R, …]) -> nats [R]; ``leaves`` is what else a row has: its tokens, its sigma.
RowNats = Callable[[Array, tuple[Array, ...]], Array]


def chunk_rows(num_rows: int, num_states: int) -> tuple[int, ...]:
    """Rows read out together, within the bytes above: long chunks, and short ones for the rest."""
    most = 1 << max((CHUNK_BYTES // (4 * num_states)).bit_length() - 1, 0)
    long = min(num_rows, max(LEAST_ROWS, min(most, num_rows // 16)))
    short = min(num_rows, max(LEAST_ROWS, long) // 4)
    return (long,) if short == long else (long, short)


def row_nats(
    nats_of: RowNats,
    hidden_MD: Float[Array, "M D"],
    head: tuple[Float[Array, "D V"], Float[Array, " V"]],
    weight_M: Float[Array, " M"],
    leaves: tuple[Array, ...],
) -> Float[Array, " M"]:
    """Weighted nats of every row, 0 where the weight is; ``summed_nats`` is differentiable."""
    wide = jnp.promote_types(head[0].dtype, jnp.float32)

    def chunk(index_R, weight_R, hidden_RD, leaves_R, nats_M):
        nats_R = nats_of(read_out(hidden_RD, *head), leaves_R)
        return nats_M.at[index_R].set(_weighted(weight_R, nats_R), mode="drop")

    zeros_M = jnp.zeros(weight_M.shape, wide)
    return _over_chunks(chunk, hidden_MD, weight_M, leaves, head[0].shape[1], zeros_M)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def summed_nats(
    nats_of: RowNats,
    hidden_MD: Float[Array, "M D"],
    head: tuple[Float[Array, "D V"], Float[Array, " V"]],
    weight_M: Float[Array, " M"],
    leaves: tuple[Array, ...],
) -> Float[Array, ""]:
    """The sum of the weighted nats, differentiable in ``hidden_MD`` and ``head``.

    Rows without a weight cost nothing. The number of chunks follows the batch: the result is exact
    whatever the number of rows that count.
    """
    return row_nats(nats_of, hidden_MD, head, weight_M, leaves).sum()


def _forward(nats_of, hidden_MD, head, weight_M, leaves):
    wide = jnp.promote_types(head[0].dtype, jnp.float32)
    narrow = hidden_MD.dtype
    weight_DV = head[0].astype(narrow)
    product = partial(jnp.matmul, preferred_element_type=wide)

    def chunk(index_R, weight_R, hidden_RD, leaves_R, carry):
        total, grad_MD, grad_DV, grad_V = carry

        def nats(raw_RV):
            return _weighted(weight_R, nats_of(raw_RV, leaves_R)).sum()

        more, raw_grad_RV = jax.value_and_grad(nats)(read_out(hidden_RD, *head))
        # In the precision of the network: so are all other products of the backward pass.
        narrow_RV = raw_grad_RV.astype(narrow)
        hidden_grad_RD = product(narrow_RV, weight_DV.T).astype(narrow)
        return (
            total + more,
            grad_MD.at[index_R].set(hidden_grad_RD, mode="drop"),
            grad_DV + product(hidden_RD.T, narrow_RV).astype(grad_DV.dtype),
            # A product too: XLA's sum over rows takes as long as the others on a CPU.
            grad_V + product(jnp.ones_like(weight_R), raw_grad_RV).astype(grad_V.dtype),
        )

    zeros = (jnp.zeros((), wide), jnp.zeros_like(hidden_MD), *map(jnp.zeros_like, head))
    total, *grads = _over_chunks(chunk, hidden_MD, weight_M, leaves, head[0].shape[1], zeros)
    return total, grads


def _backward(nats_of, grads, cotangent):
    hidden_MD, *head = (grad * cotangent.astype(grad.dtype) for grad in grads)
    return hidden_MD, tuple(head), None, None


summed_nats.defvjp(_forward, _backward)


def _over_chunks(chunk, hidden_MD, weight_M, leaves, num_states: int, carry):
    """``chunk(index_R, weight_R, hidden_RD, leaves_R, carry)``, over all rows that count.

    A short chunk may be filled up with rows whose index is M, which ``mode="drop"`` never sets, and
    whose weight is 0.
    """
    num_rows = len(weight_M)
    sizes = chunk_rows(num_rows, num_states)
    counts_M = weight_M > 0
    indices = jnp.nonzero(counts_M, size=num_rows + sizes[-1], fill_value=num_rows)[0]
    begin, left = 0, counts_M.sum()
    for size in sizes:
        num_chunks = -(-left // size) if size == sizes[-1] else left // size

        def one(i, carry, begin=begin, size=size):
            index_R = jax.lax.dynamic_slice_in_dim(indices, begin + i * size, size)
            filled_R = index_R < num_rows
            safe_R = jnp.where(filled_R, index_R, indices[0])
            weight_R = jnp.where(filled_R, weight_M[safe_R], 0.0)
            leaves_R = tuple(leaf[safe_R] for leaf in leaves)
            return chunk(index_R, weight_R, hidden_MD[safe_R], leaves_R, carry)

        carry = jax.lax.fori_loop(0, num_chunks, one, carry)
        begin, left = begin + num_chunks * size, left - num_chunks * size
    return carry


def _weighted(weight_R: Array, nats_R: Array) -> Array:
    """Where the weight is 0 the nats may be anything, infinite included: 0·inf would be nan."""
    counts_R = weight_R > 0
    return jnp.where(counts_R, weight_R * jnp.where(counts_R, nats_R, 0.0), 0.0)

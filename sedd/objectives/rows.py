"""Losses of single rows of the output layer, with their gradients, a chunk of rows at a time.

A row is one position of one sequence. The raw output of a batch, [B, L, V], would be the largest
array of a training step, and on the absorbing process half of its rows have the weight 0. Here the
output layer runs only at rows with a weight, in the chunks of ``sedd.networks.rows``.

The usual backward pass needs the raw output of every chunk again, stored or computed twice.
``summed_nats`` avoids both. Its output is a scalar, so its gradient is known up to one factor, the
cotangent, before the backward pass begins. The forward pass therefore computes the gradients with
respect to the hidden states and the head while a chunk's raw output is in memory, and stores their
sums alone; the backward pass multiplies the sums by the cotangent.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from sedd.networks.base import read_out
from sedd.networks.rows import CHUNK_BYTES, over_chunks
from sedd.types import Array, Float

LEAST_ROWS = 256  # fewest rows of a long chunk: shorter products leave an accelerator idle

# (raw [R, V], leaves) -> nats [R]. The leaves are arrays [R, …], a row's tokens and its σ, and
# behind them the arrays that all rows share.
RowNats = Callable[[Array, tuple[Array, ...]], Array]


def chunk_rows(num_rows: int, num_states: int, copies: int = 1) -> tuple[int, ...]:
    """Return the sizes of chunks in rows: a long one, and a short one for the remainder.

    The short one has a quarter of the rows of a long one. A long chunk has at most a sixteenth of
    the rows and fits into ``CHUNK_BYTES``, but has at least ``LEAST_ROWS`` rows (or all rows of a
    smaller batch), even if these need more memory.

    Args:
        num_rows: rows of the batch.
        num_states: entries of a row, V.
        copies: float32 arrays [chunk, V] that are in memory at the same time.
    """
    most = 1 << max((CHUNK_BYTES // (4 * num_states * copies)).bit_length() - 1, 0)
    long = min(num_rows, max(LEAST_ROWS, min(most, num_rows // 16)))
    short = min(num_rows, max(LEAST_ROWS, long) // 4)
    return (long,) if short == long else (long, short)


def row_nats(
    nats_of: RowNats,
    hidden_MD: Float[Array, "M D"],
    head: tuple[Float[Array, "D V"], Float[Array, " V"]],
    weight_M: Float[Array, " M"],
    leaves: tuple[Array, ...],
    shared: tuple[Array, ...] = (),
) -> Float[Array, " M"]:
    """Return the weighted nats of every row, 0 where the weight is 0; not differentiable.

    Args:
        nats_of: the loss of rows, given their raw output and their leaves.
        hidden_MD: the hidden states of M rows.
        head: the kernel and the bias of the output layer.
        weight_M: the weights, not negative; rows with the weight 0 cost nothing.
        leaves: arrays with one entry a row, for ``nats_of``.
        shared: arrays that are the same for all rows, for ``nats_of``.
    """
    wide = jnp.promote_types(head[0].dtype, jnp.float32)

    def chunk(index_R, weight_R, hidden_RD, leaves_R, nats_M):
        nats_R = nats_of(read_out(hidden_RD, *head), (*leaves_R, *shared))
        return nats_M.at[index_R].set(_weighted(weight_R, nats_R), mode="drop")

    zeros_M = jnp.zeros(weight_M.shape, wide)
    sizes = chunk_rows(len(weight_M), head[0].shape[1], copies=2)  # logits, and terms of the nats
    return _over_chunks(chunk, hidden_MD, weight_M, leaves, sizes, zeros_M)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def summed_nats(
    nats_of: RowNats,
    hidden_MD: Float[Array, "M D"],
    head: tuple[Float[Array, "D V"], Float[Array, " V"]],
    weight_M: Float[Array, " M"],
    leaves: tuple[Array, ...],
    shared: tuple[Array, ...] = (),
) -> Float[Array, ""]:
    """Return the sum of ``row_nats``, differentiable in ``hidden_MD`` and ``head``.

    Only rows with a weight above 0 are computed. The module's docstring explains the gradient.
    """
    return row_nats(nats_of, hidden_MD, head, weight_M, leaves, shared).sum()


def _forward(nats_of, hidden_MD, head, weight_M, leaves, shared):
    """The sum of nats, and as residuals its gradients for a cotangent of 1."""
    wide = jnp.promote_types(head[0].dtype, jnp.float32)
    narrow = hidden_MD.dtype
    weight_DV = head[0].astype(narrow)
    product = partial(jnp.matmul, preferred_element_type=wide)

    def chunk(index_R, weight_R, hidden_RD, leaves_R, carry):
        total, grad_MD, grad_DV, grad_V = carry

        def nats(raw_RV):
            return _weighted(weight_R, nats_of(raw_RV, (*leaves_R, *shared))).sum()

        more, raw_grad_RV = jax.value_and_grad(nats)(read_out(hidden_RD, *head))
        # In the network's precision, like all other products of the backward pass.
        narrow_RV = raw_grad_RV.astype(narrow)
        hidden_grad_RD = product(narrow_RV, weight_DV.T).astype(narrow)
        return (
            total + more,
            grad_MD.at[index_R].set(hidden_grad_RD, mode="drop"),
            grad_DV + product(hidden_RD.T, narrow_RV).astype(grad_DV.dtype),
            # A product, since on a CPU XLA's sum over rows takes as long as the products above.
            grad_V + product(jnp.ones_like(weight_R), raw_grad_RV).astype(grad_V.dtype),
        )

    zeros = (jnp.zeros((), wide), jnp.zeros_like(hidden_MD), *map(jnp.zeros_like, head))
    sizes = chunk_rows(len(weight_M), head[0].shape[1])
    total, *grads = _over_chunks(chunk, hidden_MD, weight_M, leaves, sizes, zeros)
    return total, grads


def _backward(nats_of, grads, cotangent):
    """Scale the gradients by the cotangent; weights, leaves and shared arrays have none."""
    hidden_MD, *head = (grad * cotangent.astype(grad.dtype) for grad in grads)
    return hidden_MD, tuple(head), None, None, None


summed_nats.defvjp(_forward, _backward)


def _over_chunks(chunk, hidden_MD, weight_M, leaves, sizes: tuple[int, ...], carry):
    """Run ``carry = chunk(index_R, weight_R, hidden_RD, leaves_R, carry)`` over rows with a weight.

    Rows that fill up a chunk have the weight 0 and the index M, which ``mode="drop"`` ignores.
    """
    num_rows = len(weight_M)

    def body(index_R, safe_R, carry):
        weight_R = jnp.where(index_R < num_rows, weight_M[safe_R], 0.0)
        leaves_R = tuple(leaf[safe_R] for leaf in leaves)
        return chunk(index_R, weight_R, hidden_MD[safe_R], leaves_R, carry)

    return over_chunks(weight_M > 0, sizes, body, carry)


def _weighted(weight_R: Array, nats_R: Array) -> Array:
    """weight · nats, and 0 where the weight is 0.

    Nats may be infinite there, and 0·∞ is nan. The nats are masked before the product as well:
    otherwise its gradient would be nan.
    """
    counts_R = weight_R > 0
    return jnp.where(counts_R, weight_R * jnp.where(counts_R, nats_R, 0.0), 0.0)

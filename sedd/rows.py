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
LEAST_ROWS = 128

# (raw [R, V], leaves [R, …]) -> nats [R]; ``leaves`` is what else a row has: its tokens, its sigma.
RowNats = Callable[[Array, tuple[Array, ...]], Array]


def chunk_rows(num_rows: int, num_states: int) -> int:
    """Rows read out together: within the bytes above, and few enough to waste little at the end."""
    most = 1 << max((CHUNK_BYTES // (4 * num_states)).bit_length() - 1, 0)
    return min(num_rows, max(LEAST_ROWS, min(most, num_rows // 16)))


def row_nats(
    nats_of: RowNats,
    hidden_MD: Float[Array, "M D"],
    head: tuple[Float[Array, "D V"], Float[Array, " V"]],
    weight_M: Float[Array, " M"],
    leaves: tuple[Array, ...],
) -> Float[Array, " M"]:
    """Weighted nats of every row, 0 where the weight is; ``summed_nats`` is differentiable."""
    rows = _Rows(weight_M, head)

    def chunk(i, nats_M):
        index_R, weight_R, picked = rows.chunk(i, hidden_MD, weight_M, leaves)
        hidden_RD, *leaves_R = picked
        nats_R = nats_of(read_out(hidden_RD, *head), tuple(leaves_R))
        return nats_M.at[index_R].set(_weighted(weight_R, nats_R), mode="drop")

    return jax.lax.fori_loop(0, rows.num_chunks, chunk, jnp.zeros(weight_M.shape, rows.wide))


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
    rows = _Rows(weight_M, head)
    narrow = hidden_MD.dtype
    weight_DV = head[0].astype(narrow)

    def chunk(i, carry):
        total, grad_MD, grad_DV, grad_V = carry
        index_R, weight_R, picked = rows.chunk(i, hidden_MD, weight_M, leaves)
        hidden_RD, *leaves_R = picked

        def nats(raw_RV):
            return _weighted(weight_R, nats_of(raw_RV, tuple(leaves_R))).sum()

        more, raw_grad_RV = jax.value_and_grad(nats)(read_out(hidden_RD, *head))
        # In the precision of the network: so are all other products of the backward pass.
        narrow_RV = raw_grad_RV.astype(narrow)
        product = partial(jnp.matmul, preferred_element_type=rows.wide)
        hidden_grad_RD = product(narrow_RV, weight_DV.T).astype(narrow)
        return (
            total + more,
            grad_MD.at[index_R].set(hidden_grad_RD, mode="drop"),
            grad_DV + product(hidden_RD.T, narrow_RV).astype(grad_DV.dtype),
            # A product too: XLA's sum over rows takes as long as the others on a CPU.
            grad_V + product(jnp.ones_like(weight_R), raw_grad_RV).astype(grad_V.dtype),
        )

    zeros = (jnp.zeros_like(hidden_MD), *jax.tree.map(jnp.zeros_like, head))
    total, *grads = jax.lax.fori_loop(0, rows.num_chunks, chunk, (jnp.zeros((), rows.wide), *zeros))
    return total, grads


def _backward(nats_of, grads, cotangent):
    hidden_MD, *head = (grad * cotangent.astype(grad.dtype) for grad in grads)
    return hidden_MD, tuple(head), None, None


summed_nats.defvjp(_forward, _backward)


class _Rows:
    """The rows that count, in chunks of one size."""

    def __init__(self, weight_M: Array, head: tuple[Array, Array]):
        self.wide = jnp.promote_types(head[0].dtype, jnp.float32)
        self.size = chunk_rows(len(weight_M), head[0].shape[1])
        counts_M = weight_M > 0
        self.num_rows = counts_M.sum()
        self.num_chunks = -(-self.num_rows // self.size)
        padded = -(-len(weight_M) // self.size) * self.size
        # Beyond the rows that count: the index M, which is read as a row that does and never set.
        self.index = jnp.nonzero(counts_M, size=padded, fill_value=len(weight_M))[0]

    def chunk(self, i, hidden_MD, weight_M, leaves):
        """Where chunk ``i`` belongs, its weights (0 for what fills it up), and its rows."""
        index_R = jax.lax.dynamic_slice_in_dim(self.index, i * self.size, self.size)
        filled_R = index_R < len(weight_M)
        safe_R = jnp.where(filled_R, index_R, self.index[0])
        weight_R = jnp.where(filled_R, weight_M[safe_R], 0.0)
        return index_R, weight_R, [leaf[safe_R] for leaf in (hidden_MD, *leaves)]


def _weighted(weight_R: Array, nats_R: Array) -> Array:
    """Where the weight is 0 the nats may be anything, infinite included: 0·inf would be nan."""
    counts_R = weight_R > 0
    return jnp.where(counts_R, weight_R * jnp.where(counts_R, nats_R, 0.0), 0.0)

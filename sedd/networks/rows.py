"""Rows of the output layer, processed in chunks.

A row is one position of one sequence. The raw output of all rows of a batch, [B, L, V], would be
larger than all other arrays of a program: 13 GB at 64 x 1,024 x 50,258. Losses, bounds and samplers
need only one number or one token of each row. They select rows. A loop applies the output layer to
a chunk of selected rows and reduces it to these numbers, and the next chunk uses the same memory.

The shape of a chunk is static, as XLA requires, but the number of chunks is computed while the
program runs: rows that are not selected cost nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from sedd.types import Array, Bool, Int, Shaped

CHUNK_BYTES = 2**28  # limit for all float32 arrays [R, V] of a chunk together
COPIES = 4  # arrays [R, V] that a sampler holds at once: logits, log probabilities, noise, sums


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Rows:
    """Positions of a batch: row r is position ``position_R[r]`` of sequence ``sequence_R[r]``."""

    sequence_R: Int[Array, " R"]
    position_R: Int[Array, " R"]

    @classmethod
    def at(cls, positions_BK: Int[Array, "B K"]) -> "Rows":
        """B·K rows: K positions of sequence 0, then K positions of sequence 1, and so on."""
        batch, count = positions_BK.shape
        return cls(
            sequence_R=jnp.repeat(jnp.arange(batch), count), position_R=positions_BK.reshape(-1)
        )

    def pick(self, values: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
        """The entry of each row in an array [B], or in an array [B, L, …] of positions."""
        if values.ndim == 1:
            return values[self.sequence_R]
        return values[self.sequence_R, self.position_R]


def row_sizes(batch: int, length: int, num_states: int) -> tuple[int, ...]:
    """Numbers of rows in a chunk, in falling order, for ``over_chunks``.

    The largest is a power of 2 that ``CHUNK_BYTES`` allows, or all B·L rows if these fit. Two
    smaller ones, 8·B and B rows, take the rest: a sampler that reveals one position of each
    sequence reads B rows. Every size is a loop of its own in the compiled program, so there are few
    of them.
    """
    most = 1 << max((CHUNK_BYTES // (4 * COPIES * num_states)).bit_length() - 1, 0)
    sizes = {min(size, batch * length, most) for size in (batch, 8 * batch, batch * length)}
    return tuple(sorted(sizes, reverse=True))


def over_chunks(
    select_M: Bool[Array, " M"],
    sizes: tuple[int, ...],
    body: Callable[[Array, Array, Any], Any],
    carry: Any,
) -> Any:
    """Run ``carry = body(index_R, safe_R, carry)`` over all selected indices, in chunks.

    The selected indices are listed in ascending order. Chunks of the first size are taken from the
    list while they can be filled, then chunks of the next size. The last chunk of the smallest size
    may be incomplete. In its unused entries, ``index_R`` is M, which a scatter with ``mode="drop"``
    ignores, and ``safe_R`` repeats a selected index, so that a gather stays in range.

    Args:
        select_M: which of the indices 0..M-1 are selected.
        sizes: numbers of rows in a chunk, falling; see ``row_sizes``.
        body: processes one chunk of indices.
        carry: initial value; a pytree of arrays of fixed shapes.

    Returns:
        The carry after all chunks.
    """
    num_rows = len(select_M)
    indices = jnp.nonzero(select_M, size=num_rows + sizes[-1], fill_value=num_rows)[0]
    begin, left = 0, select_M.sum()
    for size in sizes:
        num_chunks = -(-left // size) if size == sizes[-1] else left // size

        def one(i, carry, begin=begin, size=size):
            index_R = jax.lax.dynamic_slice_in_dim(indices, begin + i * size, size)
            return body(index_R, jnp.where(index_R < num_rows, index_R, indices[0]), carry)

        carry = jax.lax.fori_loop(0, num_chunks, one, carry)
        begin, left = begin + num_chunks * size, left - num_chunks * size
    return carry

"""Rows of the output layer, a chunk at a time.

A row is one position of one sequence. The raw output of all rows of a batch, [B, L, V], is larger
than everything else that a program holds: 13 GB at 64 x 1,024 x 50,258. Losses, bounds and samplers
need one number or one token a row. They select rows, and a loop reads out a chunk of them, reduces
it, and goes on to the next chunk in the same memory. The number of chunks is data, so that rows
that are not selected cost nothing; the shapes of a chunk are static.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from sedd.types import Array, Bool, Int, Shaped

CHUNK_BYTES = 2**28  # of a chunk's arrays [R, V] in float32, at most
COPIES = 4  # such arrays that a sampler holds at once: logits, log probabilities, noise, sums


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Rows:
    """Positions of a batch: row r is position ``position_R[r]`` of sequence ``sequence_R[r]``."""

    sequence_R: Int[Array, " R"]
    position_R: Int[Array, " R"]

    @classmethod
    def at(cls, positions_BK: Int[Array, "B K"]) -> "Rows":
        """The given positions of each sequence, B·K rows, sequence after sequence."""
        batch, count = positions_BK.shape
        return cls(
            sequence_R=jnp.repeat(jnp.arange(batch), count), position_R=positions_BK.reshape(-1)
        )

    def pick(self, values: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
        """The rows' entries of an array [B], or [B, L, …] whose second axis is the position."""
        if values.ndim == 1:
            return values[self.sequence_R]
        return values[self.sequence_R, self.position_R]


def row_sizes(batch: int, length: int, num_states: int) -> tuple[int, ...]:
    """Sizes of chunks, falling: as many rows as the bytes allow, and small ones for the rest.

    The smallest has one row a sequence, which is what a sampler reads that reveals one position of
    each sequence. Each size is a loop of its own in the compiled program, hence a factor of 8.
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
    """Run ``carry = body(index_R, safe_R, carry)`` over all selected indices of 0..M-1, in chunks.

    There are as many chunks of the first of the falling ``sizes`` as can be filled, then of the
    next one, and the last chunk of the last size may be filled up. There ``index_R`` is M, which a
    scatter with ``mode="drop"`` ignores, and ``safe_R`` repeats a selected index to gather from.
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

"""Block diffusion: blocks from left to right, each by masked diffusion. arXiv:2503.09573.

A block is ``block`` consecutive positions, counted from position 0, with a prompt included. The
model of a block is a ``Conditional`` given all earlier blocks, which are clean. Blocks of one
position are an autoregressive model, and one block of the whole length is MDLM.
"""

from dataclasses import dataclass, field

import jax.numpy as jnp

from sedd.errors import FieldError
from sedd.networks.base import EMPTY, Attend
from sedd.parameterizations.base import Inputs
from sedd.parameterizations.conditional import Conditional, one_row_earlier
from sedd.types import Array, Int, Shaped


@dataclass(frozen=True, kw_only=True)
class Block(Conditional):
    """The softmax of the raw output at a mask is p(x_i | the tokens of its and earlier blocks).

    ``inputs`` prepares L rows, for samplers: a row sees its own block and the earlier ones. The
    result is the model's conditional only in the first block that has masks, because the rows of
    later blocks see masks that they were not trained with. ``doubled`` prepares 2L rows, for
    training and likelihoods: all blocks at once, each given the clean tokens of the earlier blocks.

    With ``shift`` the first position of a block is read at the last row of the block before it,
    whose tokens are clean, as Fast-dLLM v2 does (arXiv:2509.26328).

    Raises ``FieldError`` if ``block`` is below 1.
    """

    time_independent: bool = field(default=True, init=False)
    block: int = 16
    """Positions in a block, L'. The last block of a text may be shorter."""

    def __post_init__(self):
        super().__post_init__()
        if self.block < 1:
            raise FieldError("block", f"must be at least 1, got {self.block}")

    def check_length(self, length: int) -> None:
        """Raise FieldError unless blocks divide the length of training rows."""
        if length % self.block:
            raise FieldError(
                "block", f"must divide the length of a row, {length}, got {self.block}"
            )

    def inputs(self, x_BL, attend=None):
        """L rows, of which each sees its own block and the earlier ones.

        Raises ValueError if ``attend`` has another kind than "all": it may give segments, but no
        order. Segments must not be packed documents: blocks are counted from position 0.
        """
        rank_1L = (jnp.arange(x_BL.shape[1]) // self.block)[None]
        segment_BL = _segments(attend)
        ranks = Attend(kind="ranks", rank_q_BL=rank_1L, rank_k_BL=rank_1L, segment_BL=segment_BL)
        read_BL = one_row_earlier(x_BL, attend) if self.shift else None
        return Inputs(tokens_BM=x_BL, attend=ranks, read_BL=read_BL)

    def doubled(
        self,
        xt_BL: Int[Array, "B L"],
        x0_BL: Int[Array, "B L"],
        attend: Attend | None = None,
    ) -> Inputs:
        """2L rows, first of xt and then of x0, with the positions 0..L-1 twice.

        A row of xt sees the rows of xt in its block and the rows of x0 in earlier blocks. A row of
        x0 sees the rows of x0 in its and earlier blocks. Position i is read in the half of xt. With
        ``shift`` it is read one row earlier, and the first position of a block in the half of x0.
        arXiv:2503.09573, section 3.2.

        Args:
            xt_BL: tokens, of which some are masked.
            x0_BL: clean tokens.
            attend: the segment of each position, if there are any.

        Raises:
            ValueError: if ``attend`` has another kind than "all".
        """
        batch, length = x0_BL.shape
        position_1L = jnp.arange(length)[None]
        block_1L = position_1L // self.block
        clean_1L = 2 * block_1L + 1

        def both(noisy_1L, clean_1L):
            return jnp.concatenate([noisy_1L, clean_1L], 1)

        read_BL = jnp.broadcast_to(position_1L, x0_BL.shape)
        if self.shift:
            read_BL = one_row_earlier(x0_BL, attend)
            read_BL = jnp.where(read_BL // self.block < block_1L, read_BL + length, read_BL)
        segment_BL = _segments(attend)
        if segment_BL is not None:
            segment_BL = jnp.concatenate([segment_BL, segment_BL], 1)
        return Inputs(
            tokens_BM=jnp.concatenate([xt_BL, x0_BL], 1),
            positions_BM=jnp.broadcast_to(both(position_1L, position_1L), (batch, 2 * length)),
            attend=Attend(
                kind="ranks",
                rank_q_BL=both(2 * block_1L, clean_1L),
                rank_k_BL=both(jnp.full_like(block_1L, EMPTY), clean_1L),
                group_BL=both(block_1L, jnp.full_like(block_1L, -1)),
                segment_BL=segment_BL,
            ),
            read_BL=read_BL,
        )


def _segments(attend: Attend | None):
    """The segments of ``attend``, which may give no order; None without segments."""
    if attend is None:
        return None
    if attend.kind != "all":
        raise ValueError("a block model has an order by itself: give segments only")
    return attend.segment_BL


def cut(values_BL: Shaped[Array, "B L"], block: int, fill) -> Shaped[Array, "R W"]:
    """Cut rows [B, L] into blocks, [B·⌈L/block⌉, block], the last one of a row padded.

    Args:
        values_BL: values of each position.
        block: positions in a block.
        fill: the value of positions after L.
    """
    padded_BL = jnp.pad(values_BL, ((0, 0), (0, -values_BL.shape[1] % block)), constant_values=fill)
    return padded_BL.reshape(-1, block)


def joined(values_RW: Shaped[Array, "R W"], batch: int, length: int) -> Shaped[Array, "B L"]:
    """Undo ``cut``: [B·⌈L/block⌉, block] to [B, L]."""
    return values_RW.reshape(batch, -1)[:, :length]


make = Block

"""Any-subset models: all conditionals of an order of generation in one pass. arXiv:2504.20456.

The network gets two kinds of rows, the two streams of XLNet (arXiv:1906.08237). A content row has
the token of a position; a query row has the mask, at a position whose token it predicts. The order
of generation gives each position a rank: 0 for the prompt, and 1, 2, … for the generated positions.

- A content row sees itself and the content rows of lower ranks. A content row of the prompt sees
  all content rows of the prompt. The hidden state of a token therefore never changes once it is
  known.
- A query row of rank r sees the content rows of the ranks below r. No row sees a query row.

With the ranks 2r of content rows and 2r - 1 of query rows this is the kind ``ranks`` of ``Attend``.
"""

from dataclasses import dataclass, field

import jax.numpy as jnp

from sedd.networks.base import EMPTY, Attend
from sedd.parameterizations.base import Inputs
from sedd.parameterizations.conditional import Conditional, Normalise
from sedd.types import Array, Int

UNKNOWN = EMPTY // 2
"""The rank of a content row whose token is not known, or that is padding: no query sees it."""


@dataclass(frozen=True, kw_only=True)
class AnySubset(Conditional):
    """The softmax of the raw output at a query row is p(x_i | the tokens of lower ranks).

    The parameters are those of RADD's network. ``in_order`` prepares the pass of both streams, for
    training, for likelihoods and for samplers that know the ranks.

    ``inputs`` serves the other samplers and bounds, which know only which tokens are revealed. It
    takes all revealed tokens as the prompt, so that they see each other. This is another
    conditional than that of ``in_order``, in which generated tokens see only lower ranks: the two
    agree for the first generated position, and later ones have other values.
    """

    time_independent: bool = field(default=True, init=False)
    shift: bool = field(default=False, init=False)
    normalise: Normalise = field(default="real", init=False)

    def inputs(self, x_BL, attend=None):
        """L rows: a revealed token is content of the prompt, a mask a query that sees all of it.

        Raises ValueError if ``attend`` has another kind than "all": it may give segments, but no
        order.
        """
        hidden_BL = x_BL == self.process.mask
        ranks = Attend(
            kind="ranks",
            rank_q_BL=jnp.ones_like(x_BL),
            rank_k_BL=jnp.where(hidden_BL, UNKNOWN, 0),
            segment_BL=_segments(attend),
        )
        return Inputs(tokens_BM=x_BL, attend=ranks)

    def in_order(
        self,
        tokens_BC: Int[Array, "B C"],
        rank_BC: Int[Array, "B C"],
        query_BK: Int[Array, "B K"],
        query_rank_BK: Int[Array, "B K"],
        *,
        positions_BC: Int[Array, "B C"] | None = None,
        attend: Attend | None = None,
    ) -> Inputs:
        """C content rows, then K query rows; ``Inputs.read`` selects the query rows, in order.

        Args:
            tokens_BC: tokens of the content rows.
            rank_BC: ranks of the content rows: 0 for the prompt, ``UNKNOWN`` for rows that no query
                shall see. Content rows of equal rank see each other, as those of the prompt do.
            query_BK: position of each query row; a position may have several, or none.
            query_rank_BK: rank of each query row; it sees the lower ranks. To draft several
                positions after n generated ones (the prompt does not count), give all their queries
                the rank n + 1.
            positions_BC: position of each content row; by default 0..C-1.
            attend: the segment of each content row, [B, C], if there are any. Content row i must
                then be that of position i: leave out ``positions_BC``.

        Raises:
            ValueError: if ``attend`` has another kind than "all".
        """
        batch, content = tokens_BC.shape
        if positions_BC is None:
            positions_BC = jnp.broadcast_to(jnp.arange(content), tokens_BC.shape)
        segment_BM = _segments(attend)
        if segment_BM is not None:
            segment_BM = jnp.broadcast_to(segment_BM, tokens_BC.shape)
            own_BK = jnp.take_along_axis(segment_BM, query_BK, 1)
            segment_BM = jnp.concatenate([segment_BM, own_BK], 1)
        masks_BK = jnp.full(query_BK.shape, self.process.mask, tokens_BC.dtype)
        rows_K = jnp.arange(content, content + query_BK.shape[1])
        return Inputs(
            tokens_BM=jnp.concatenate([tokens_BC, masks_BK], 1),
            positions_BM=jnp.concatenate([positions_BC, query_BK], 1),
            attend=Attend(
                kind="ranks",
                rank_q_BL=jnp.concatenate([2 * rank_BC, 2 * query_rank_BK - 1], 1),
                rank_k_BL=2 * rank_BC,
                segment_BL=segment_BM,
            ),
            read_BL=jnp.broadcast_to(rows_K, (batch, len(rows_K))),
        )


def _segments(attend: Attend | None):
    """The segments of ``attend``, which may give no order; None without segments."""
    if attend is None:
        return None
    if attend.kind != "all":
        raise ValueError("an any-subset model has an order by itself: give segments only")
    return attend.segment_BL


make = AnySubset

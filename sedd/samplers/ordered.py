"""Fixed order of positions: for autoregressive models, to compare orders; exact if steps is unset.

arXiv:2406.03736, section 3.3.
"""

from dataclasses import dataclass

from sedd.samplers.orders import check_order, order_ranks
from sedd.samplers.reveal import Revealing, check_steps, group_of


@dataclass(frozen=True, kw_only=True)
class Ordered(Revealing):
    """Draw positions in a fixed order: forward, backward, random, or a list such as 3,0,2.

    With one position a call the law is the product of the model's conditionals in that order: the
    joint distribution that an any-order model defines for this order. With ``steps`` several
    positions are drawn in one call, independently of each other. Positions that a list leaves out
    follow from left to right. Autoregressive models need the order forward with one position a
    call.
    """

    order: str = "forward"
    """Order of the positions: forward, backward, random, or positions counted from 0 such as 3,0,2.
    Listed positions that a sequence does not have are ignored by sedd.sample, and refused by
    sample.py."""
    steps: int | None = None
    """Network calls over which the positions are spread; by default one position a call."""

    def __post_init__(self):
        check_steps(self.steps)
        check_order(self.order)

    @property
    def left_to_right(self):
        return self.order == "forward" and self.steps is None

    def make_plan(self, keys_B, free_BL):
        """The round in which each position is drawn."""
        rank_BL = order_ranks(self.order, keys_B, free_BL)
        return group_of(rank_BL, free_BL.sum(1), self.steps)

    def choose(self, state, masked_BL, prediction):
        """The positions of the current round."""
        return state.plan == state.round_B[:, None]


make = Ordered

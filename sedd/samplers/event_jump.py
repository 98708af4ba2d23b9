"""Event-jump: τ-leaping in the fewest calls, for time-independent models; exact without steps.

Only the steps in which something is revealed. arXiv:2406.03736, arXiv:2409.02908.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from sedd.samplers.noise import random_rank
from sedd.samplers.reveal import Revealing, check_steps, dense_rank, revealed_share


@dataclass(frozen=True, kw_only=True)
class EventJump(Revealing):
    """Jumps from reveal to reveal: the samples of all ``steps``, and few of their network calls.

    When a position is revealed does not depend on the network. Each position's interval of
    t = 1 - k/steps is drawn first, with its probability under the schedule, and every sequence
    visits the distinct ones that it drew: the same law, and from the same keys the same samples, as
    stepping through all of them. m free positions take n(1 - (1 - 1/n)^m) calls on average over n
    steps that reveal equally, at most m. Positions of one interval do not see each other.

    Without ``steps`` it is first hitting, the limit of infinitely many: one position a call in
    random order, and the model's own law exactly.
    """

    steps: int | None = None
    """Intervals of time; by default first hitting, one position a call."""

    def __post_init__(self):
        check_steps(self.steps)

    def make_plan(self, keys_B, free_BL):
        if self.steps is None:
            return random_rank(keys_B, free_BL)
        return dense_rank(self.intervals(keys_B, free_BL.shape[1]), free_BL)

    def intervals(self, keys_B, length):
        """The interval in 0..steps-1 in which each position is revealed, [B, L]."""
        assert self.steps is not None
        uniform_BL = jax.vmap(lambda key: jax.random.uniform(key, (length,)))(keys_B)
        k_BL = jnp.zeros(uniform_BL.shape, jnp.int32)
        # A position is revealed in interval k if its uniform draw lies between the shares revealed
        # by the interval's ends. The largest k that begins at or below the draw is found bit by
        # bit, from the highest: log2(steps) evaluations of the schedule, and no table of all steps.
        for bit in reversed(range(self.steps.bit_length())):
            later_BL = k_BL + (1 << bit)
            begins_BL = revealed_share(self.schedule, 1 - later_BL / self.steps)
            later = (later_BL < self.steps) & (begins_BL <= uniform_BL)
            k_BL = jnp.where(later, later_BL, k_BL)
        return k_BL

    def choose(self, state, masked_BL, prediction):
        return state.plan == state.round_B[:, None]


make = EventJump

"""Event-jump: τ-leaping in the fewest calls, for time-independent models; exact if steps is unset.

It skips the steps in which nothing is revealed. arXiv:2406.03736, arXiv:2409.02908.
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from sedd.arrays import fold
from sedd.samplers.noise import random_rank, whole
from sedd.samplers.reveal import Revealing, check_steps, dense_rank, revealed_share
from sedd.types import Array, Float


@dataclass(frozen=True, kw_only=True)
class EventJump(Revealing):
    """τ-leaping over ``steps`` intervals, with network calls only where positions are revealed.

    The time at which a position is revealed does not depend on the network. For every position, the
    interval k in which it is revealed (from t = 1 - k/steps down to 1 - (k+1)/steps, k = 0, …,
    steps - 1) is therefore drawn in advance, with its probability under the schedule. Each sequence
    then visits only the intervals that it drew. The samples are the same as if it stepped through
    all intervals. Positions of one interval are drawn independently of each other. Over n intervals
    of equal probability, m free positions take n(1 - (1 - 1/n)^m) network calls on average, at most
    m.

    Without ``steps`` this is first hitting, the limit of infinitely many steps: one position a call
    in random order. Its law is the model's own.

    Under the schedule ``by_position`` every position has its own times, and first hitting reveals
    positions in the orders of this noise.
    """

    steps: int | None = None
    """Intervals of time; by default first hitting, one position a call."""

    def __post_init__(self):
        check_steps(self.steps)

    def make_plan(self, keys_B, free_BL):
        """The rank of each position's interval among those of its sequence: one round each."""
        if self.steps is None:
            by_position = self.schedule.by_position
            powers_L = self.schedule.powers(free_BL.shape[1]) if by_position else None
            return random_rank(keys_B, free_BL, powers_L)
        return dense_rank(self.intervals(keys_B, free_BL.shape[1]), free_BL)

    def resume(self, denoiser, keys_B, x_BL, masked_BL, share_B):
        """The state of sequences of which the share ``share_B`` is revealed.

        The masked positions are revealed in intervals after the time at which this share is
        revealed on average; without ``steps``, one by one.
        """
        state = super().resume(denoiser, keys_B, x_BL, masked_BL, share_B)
        if self.steps is None:
            return state
        k_BL = self.intervals(whole(fold(keys_B, 0)), x_BL.shape[1], share_B[:, None])
        return replace(state, plan=dense_rank(k_BL, masked_BL))

    def intervals(self, keys_B, length, share: Float[Array, "..."] | float = 0.0):
        """Draw the interval in 0..steps-1 in which each position is revealed, [B, L].

        With a ``share`` above 0 they are drawn for positions that are still masked at the time at
        which this share of all positions is revealed on average.
        """
        assert self.steps is not None
        uniform_BL = jax.vmap(lambda key: jax.random.uniform(key, (length,)))(keys_B)
        if self.schedule.by_position:
            # Position i is revealed while λ falls below (1 - u)^(1/w_i), if it is masked with
            # probability λ^w_i. In terms of λ its draw is the one with this share.
            uniform_BL = 1 - (1 - uniform_BL) ** (1 / self.schedule.powers(length))[None]
        uniform_BL = share + (1 - share) * uniform_BL
        k_BL = jnp.zeros(uniform_BL.shape, jnp.int32)
        # A position is revealed in interval k if its uniform draw lies between the shares of
        # positions that are revealed at the beginning and at the end of the interval. The largest k
        # whose interval begins at or below the draw is found bit by bit, from the highest: this
        # takes log2(steps) evaluations of the schedule, and no table of all steps.
        for bit in reversed(range(self.steps.bit_length())):
            later_BL = k_BL + (1 << bit)
            begins_BL = revealed_share(self.schedule, 1 - later_BL / self.steps)
            later = (later_BL < self.steps) & (begins_BL <= uniform_BL)
            k_BL = jnp.where(later, later_BL, k_BL)
        return k_BL

    def choose(self, state, masked_BL, prediction):
        """The positions of the interval that each sequence has reached."""
        return state.plan == state.round_B[:, None]


make = EventJump

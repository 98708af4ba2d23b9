"""Blocks from left to right, each by another sampler: for long texts.

arXiv:2503.09573, arXiv:2502.09992.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import jax
import jax.numpy as jnp

from sedd.errors import FieldError
from sedd.samplers.base import State, SteppedSampler
from sedd.samplers.noise import fold

NEXT_BLOCK = 2**31 - 1  # folded into the keys for the next block; larger than any position


@dataclass(frozen=True, kw_only=True)
class SemiAutoregressive(SteppedSampler):
    """Fill blocks of ``block_length`` free positions from left to right, each by ``inner``.

    The law is a product over blocks. Each factor is the law of the inner sampler for that block,
    given all tokens before it and the given tokens after it, with later blocks masked. It is exact
    if the inner sampler's law is. The sequences of a batch may be in different blocks. A model that
    depends on the noise level is given the noise of the current block only, although later blocks
    are masked entirely: for such a model the law is approximate.
    """

    needs_absorbing: ClassVar[bool] = True

    inner: SteppedSampler
    block_length: int = 32
    """Free positions in a block."""

    def __post_init__(self):
        if self.block_length < 1:
            raise FieldError("block_length", f"must be at least 1, got {self.block_length}")
        if not isinstance(self.inner, SteppedSampler):
            raise FieldError(
                "inner", "must not be best_of_n or particle: they draw whole sequences"
            )
        if hasattr(self.inner, "profile"):
            raise FieldError(
                "inner", "must not be planned: its groups are those of a whole sequence"
            )

    @property
    def caveat(self):
        return self.inner.caveat

    @property
    def width(self):
        return self.inner.width

    def check(self, denoiser):
        super().check(denoiser)
        self.inner.check(denoiser)

    def max_rounds(self, length):
        """The rounds of the inner sampler for every block."""
        blocks = -(-length // self.block_length)
        return blocks * self.inner.max_rounds(min(self.block_length, length))

    def sigma(self, state):
        """The noise of the inner sampler in the current block."""
        return self.inner.sigma(self._block(state))

    def active(self, denoiser, state):
        """Sequences with later blocks, or with rounds left in the current one."""
        block_BL, block_B, _ = state.plan
        later_B = (state.free_BL & (block_BL > block_B[:, None])).any(1)
        return later_B | self.inner.active(denoiser, self._block(state))

    def start(self, denoiser, keys_B, tokens_BL, fixed_BL):
        """Start the inner sampler on the first block of each sequence.

        The plan is a tuple: the block of each position, the current block of each sequence, and the
        plan of the inner sampler.
        """
        free_BL = ~fixed_BL
        block_BL = (jnp.cumsum(free_BL, axis=1) - 1) // self.block_length
        first = self.inner.start(
            denoiser,
            keys_B,
            jnp.where(free_BL, denoiser.mask_id, tokens_BL),
            ~(free_BL & (block_BL == 0)),
        )
        plan = (block_BL, jnp.zeros(len(keys_B), jnp.int32), first.plan)
        return replace(first, free_BL=free_BL, plan=plan)

    def advance(self, denoiser, state):
        """Advance the inner sampler on each sequence's block, and start the next block if done.

        Blocks of different sequences end in different rounds. The inner sampler is therefore
        started anew for the whole batch in every round, and each sequence takes its row of the new
        state if its block is done, and of the running state otherwise.
        """
        block_BL, block_B, _ = state.plan
        active_B = self.active(denoiser, state)
        here = self.inner.advance(denoiser, self._block(state))
        done_B = active_B & ~self.inner.active(denoiser, here)
        block_B = block_B + done_B
        fresh = self.inner.start(
            denoiser,
            fold(state.keys_B, NEXT_BLOCK),
            here.x_BL,
            ~(state.free_BL & (block_BL == block_B[:, None])),
        )
        fresh = replace(fresh, calls_B=here.calls_B, rows_B=here.rows_B, log_prob_B=here.log_prob_B)

        def select(new, old):
            """Rows of ``new`` for sequences whose block is done, of ``old`` for the others."""
            return jnp.where(done_B.reshape(-1, *[1] * (new.ndim - 1)), new, old)

        merged = jax.tree.map(select, fresh, here)
        return replace(merged, free_BL=state.free_BL, plan=(block_BL, block_B, merged.plan))

    def _block(self, state: State) -> State:
        """The state for the inner sampler, in which only the current block is free."""
        block_BL, block_B, plan = state.plan
        here_BL = state.free_BL & (block_BL == block_B[:, None])
        return replace(state, free_BL=here_BL, plan=plan)


make = SemiAutoregressive

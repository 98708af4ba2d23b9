"""Blocks from left to right, each by another sampler: for block models, and for long texts.

arXiv:2503.09573, arXiv:2502.09992.

A block model sees its own block and the earlier ones only. The keys and values of finished blocks
then never change, and are kept in a ``Memory``: a network call computes the rows of the current
block alone. The result is that of a call on the whole text, up to rounding. The rows of a finished
block are written by the first call of the next one, which computes both blocks, so that the memory
costs no call of its own.
"""

import re
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from sedd.arrays import fold
from sedd.denoiser import Denoiser, all_positions
from sedd.errors import FieldError, UserError
from sedd.networks.base import Memory
from sedd.parameterizations.conditional import Conditional
from sedd.samplers.base import State, SteppedSampler
from sedd.types import Array, Bool, Int

NEXT_BLOCK = 2**31 - 1  # folded into the keys for the next block; larger than any position
BLOCK = 32  # free positions in a block if neither the user nor the model says


class Cache(NamedTuple):
    """The clean rows of the blocks so far, all positions before ``written_B``."""

    memory: Memory
    written_B: Int[Array, " B"]


class Progress(NamedTuple):
    """The plan of ``SemiAutoregressive``."""

    block_BL: Int[Array, "B L"]  # the block of each position
    block_B: Int[Array, " B"]  # the current block of each sequence; above all others if it stopped
    inner: Any  # the plan of the inner sampler
    cache: Cache | None


@dataclass(frozen=True, kw_only=True)
class SemiAutoregressive(SteppedSampler):
    """Fill blocks from left to right, each by ``inner``.

    The law is a product over blocks. Each factor is the law of the inner sampler for that block. It
    is exact if the inner sampler's law is. The sequences of a batch may be in different blocks.

    A block model has blocks of its own, counted from the first position, given ones included. A
    block is drawn given all tokens before it and the given tokens in it. Tokens that are given in
    later blocks are not seen. The memory of finished blocks changes only the cost. It is used if
    the network has one and the inner sampler makes one call a round on its current tokens, as all
    do but ``speculative`` and ``remdm``. It is not used under a constraint, which reads later
    blocks too.

    For other models a block has ``block`` free positions, and is drawn given all tokens before it
    and the given tokens after it, with later blocks masked. A model that depends on the noise level
    is given the noise of the current block only, although later blocks are masked entirely: for
    such a model the law is approximate.

    With ``stop`` a sequence ends after the first block in which one of these tokens was drawn. The
    free positions after the token become copies of it, without network calls.
    """

    needs_absorbing: ClassVar[bool] = True

    inner: SteppedSampler
    block: int | None = None
    """Free positions in a block; by default 32. A block model has its own number."""
    stop: int | str | None = None
    """Id of the token that ends a text, or several such as 2,5; by default a text fills its length,
    and an answer to messages ends with the tokens that its chat template names."""
    cache: bool = True
    """Keep the keys and values of a block model's finished blocks. It changes the cost only."""

    def __post_init__(self):
        if self.block is not None and self.block < 1:
            raise FieldError("block", f"must be at least 1, got {self.block}")
        if self.stop is not None and not all(re.fullmatch(r" *\d+ *", i) for i in self._stops()):
            raise FieldError("stop", f"must be ids of tokens such as 2 or 2,5, got {self.stop!r}")
        if not isinstance(self.inner, SteppedSampler):
            raise FieldError("inner", "must not be a search, which draws whole sequences")
        if hasattr(self.inner, "profile"):
            raise FieldError(
                "inner", "must not be planned: its groups are those of a whole sequence"
            )

    def _stops(self) -> list[str]:
        return [] if self.stop is None else str(self.stop).split(",")

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The ids of the tokens that end a text."""
        return tuple(map(int, self._stops()))

    @property
    def by_block(self):
        return True

    @property
    def caveat(self):
        return self.inner.caveat

    @property
    def width(self):
        return self.inner.width

    def refuses(self, watermark):
        """Nothing by itself: each position belongs to one block."""
        return ""

    def check(self, denoiser):
        super().check(denoiser)
        num_tokens = denoiser.process.num_tokens
        if max(self.stop_ids, default=0) >= num_tokens:
            raise FieldError("stop", f"must be below {num_tokens}, got {max(self.stop_ids)}")
        self.inner.check(self.within(denoiser))
        if denoiser.block is not None and self.block not in (None, denoiser.block):
            raise FieldError(
                "block", f"must be that of the model, {denoiser.block}, got {self.block}"
            )
        if denoiser.block is not None and denoiser.guided:
            raise UserError(
                "guidance masks the given tokens, and a block model has no distribution given "
                "masks in earlier blocks"
            )

    def within(self, denoiser):
        """A plain model in place of a block model: any sampler may draw a block."""
        if denoiser.block is None:
            return denoiser
        return replace(denoiser, parameterization=Conditional(process=denoiser.process))

    def size(self, denoiser: Denoiser) -> int:
        """Positions in a block."""
        return denoiser.block or self.block or BLOCK

    def max_rounds(self, denoiser, length):
        """The rounds of the inner sampler for every block."""
        size = min(self.size(denoiser), length)
        return -(-length // size) * self.inner.max_rounds(denoiser, size)

    def sigma(self, state):
        """The noise of the inner sampler in the current block."""
        return self.inner.sigma(self._block(state))

    def active(self, denoiser, state):
        """Sequences with later blocks, or with rounds left in the current one."""
        later_BL = state.plan.block_BL > state.plan.block_B[:, None]
        return (state.free_BL & later_BL).any(1) | self.inner.active(denoiser, self._block(state))

    def finished(self, state: State) -> Bool[Array, "B L"]:
        """The positions before the current block of each sequence, whose tokens are final."""
        return state.plan.block_BL < state.plan.block_B[:, None]

    def start(self, denoiser, keys_B, tokens_BL, fixed_BL):
        """Start the inner sampler on the first block of each sequence that has free positions."""
        free_BL, size = ~fixed_BL, self.size(denoiser)
        if denoiser.block is None:
            block_BL = (jnp.cumsum(free_BL, axis=1) - 1) // size
        else:
            block_BL = all_positions(tokens_BL) // size
        block_B = _next_block(block_BL, free_BL, jnp.full(len(keys_B), -1))
        first = self.inner.start(
            denoiser,
            keys_B,
            jnp.where(free_BL, denoiser.mask_id, tokens_BL),
            ~(free_BL & (block_BL == block_B[:, None])),
        )
        cache = None
        if self._keeps(denoiser):
            batch, length = tokens_BL.shape
            memory = denoiser.network.memory(batch, length)
            cache = Cache(memory, jnp.zeros_like(block_B))
        return replace(first, free_BL=free_BL, plan=Progress(block_BL, block_B, first.plan, cache))

    def advance(self, denoiser, state):
        """Advance the inner sampler on each sequence's block, and start the next block if done.

        Blocks of different sequences end in different rounds. The inner sampler is therefore
        started anew for the whole batch in every round, and each sequence takes its row of the new
        state if its block is done, and of the running state otherwise.
        """
        plan, active_B = state.plan, self.active(denoiser, state)
        calling, cache = denoiser, plan.cache
        if cache is not None:
            calling, cache = self._call(denoiser, state, cache, active_B)
        here = self.inner.advance(calling, self._block(state))
        done_B = active_B & ~self.inner.active(denoiser, here)
        x_BL, stopped_B = self._stopped(state, here.x_BL, done_B)
        next_B = _next_block(plan.block_BL, state.free_BL, plan.block_B)
        next_B = jnp.where(stopped_B, plan.block_BL.shape[1], next_B)
        block_B = jnp.where(done_B, next_B, plan.block_B)
        fresh = self.inner.start(
            denoiser,
            fold(state.keys_B, NEXT_BLOCK),
            x_BL,
            ~(state.free_BL & (plan.block_BL == block_B[:, None])),
        )
        fresh = replace(fresh, calls_B=here.calls_B, rows_B=here.rows_B, log_prob_B=here.log_prob_B)

        def select(new, old):
            """Rows of ``new`` for sequences whose block is done, of ``old`` for the others."""
            return jnp.where(done_B.reshape(-1, *[1] * (new.ndim - 1)), new, old)

        merged = jax.tree.map(select, fresh, here)
        plan = Progress(plan.block_BL, block_B, merged.plan, cache)
        return replace(merged, free_BL=state.free_BL, plan=plan)

    def _block(self, state: State) -> State:
        """The state for the inner sampler, in which only the current block is free."""
        here_BL = state.free_BL & (state.plan.block_BL == state.plan.block_B[:, None])
        return replace(state, free_BL=here_BL, plan=state.plan.inner)

    def _stopped(
        self, state: State, x_BL: Int[Array, "B L"], done_B: Bool[Array, " B"]
    ) -> tuple[Int[Array, "B L"], Bool[Array, " B"]]:
        """Which sequences drew an end in the block that they finish, and their final tokens."""
        if self.stop is None:
            return x_BL, jnp.zeros_like(done_B)
        here_BL = self._block(state).free_BL & done_B[:, None]
        ends_BL = here_BL & jnp.isin(x_BL, jnp.asarray(self.stop_ids, x_BL.dtype))
        end_B1 = jnp.take_along_axis(x_BL, ends_BL.argmax(1)[:, None], 1)
        after_BL = jnp.cumsum(ends_BL, axis=1) > 0
        return jnp.where(after_BL & state.free_BL, end_B1, x_BL), after_BL.any(1)

    def _keeps(self, denoiser: Denoiser) -> bool:
        """Whether the keys and values of finished blocks are kept."""
        useful = denoiser.block is not None and denoiser.network.has_memory and self.cache
        return useful and self.inner.calls_on_tokens and denoiser.constraint is None

    def _call(
        self, denoiser: Denoiser, state: State, cache: Cache, active_B: Bool[Array, " B"]
    ) -> tuple[Denoiser, Cache]:
        """Call the network on the current block of each sequence, and write finished blocks.

        Most calls have the rows of the current block only. If the block before it is not written
        yet in any sequence, its rows come with them. If more than one block is not written, the
        call has rows for all positions: at the start after a prompt, and where whole blocks are
        given between free positions.

        Returns:
            The denoiser with the hidden states of this call, and the cache with finished blocks.
        """
        x_BL, size = state.x_BL, self.size(denoiser)
        start_B = state.plan.block_B * size
        missing_B = jnp.where(active_B, start_B - cache.written_B, 0)
        block_BW = start_B[:, None] + jnp.arange(size)

        def call(*before):
            return denoiser.extend_block(cache.memory, x_BL, block_BW, active_B, *before)

        def call_with(before_BM):
            written_BM = before_BM < cache.written_B[:, None]
            return call(before_BM, ~written_BM & (before_BM < start_B[:, None]))

        anywhere = denoiser.anywhere
        hidden_BLD, memory = jax.lax.switch(
            anywhere(missing_B > 0).astype(jnp.int32) + anywhere(missing_B > size),
            [call, lambda: call_with(block_BW - size), lambda: call_with(all_positions(x_BL))],
        )
        written_B = jnp.where(active_B, start_B, cache.written_B)
        return replace(denoiser, called=(hidden_BLD,)), Cache(memory, written_B)


def _next_block(
    block_BL: Int[Array, "B L"], free_BL: Bool[Array, "B L"], block_B: Int[Array, " B"]
) -> Int[Array, " B"]:
    """The first block after ``block_B`` that has free positions; L if there is none."""
    later_BL = free_BL & (block_BL > block_B[:, None])
    return jnp.where(later_BL, block_BL, block_BL.shape[1]).min(1)


make = SemiAutoregressive

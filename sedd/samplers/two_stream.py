"""Drafts and their verification by an any-subset model, in one row of the batch. arXiv:2504.20456.

``sedd.parameterizations.any_subset`` describes the rows of such a model, and ranks. Here the prompt
are the fixed tokens, with the rank 0, and the tokens drawn have the ranks 1, 2, … A network call
writes the content rows of new tokens to a ``Memory``, and asks queries.

- A draft of the K positions of a window, after n tokens were drawn, is K queries of rank n + 1.
- Their verification writes the K drafts, with the ranks n + 1 to n + K, and asks a query at the
  rank of each. It sees the drafts before its own.

Some of these drafts are then rejected. Nothing has to be taken back: the next verification writes
tokens of the same ranks, or of higher ones, and no query between the two sees these ranks.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sedd.denoiser import Denoiser, all_positions
from sedd.networks.base import Memory
from sedd.parameterizations.any_subset import UNKNOWN
from sedd.samplers.drafters import (
    Computed,
    Drafter,
    Window,
    conditionals_of_drafts,
    first_is_certain,
    with_certain,
)
from sedd.types import Array, Bool, Float, Int


class Content(NamedTuple):
    """Content rows for ``Denoiser.extend``; those of rank ``UNKNOWN`` are not written."""

    tokens_BC: Int[Array, "B C"]
    positions_BC: Int[Array, "B C"]
    rank_BC: Int[Array, "B C"]

    def and_also(self, other: "Content") -> "Content":
        """The rows of both."""
        return Content(*(jnp.concatenate(both, 1) for both in zip(self, other, strict=True)))


class Streams(NamedTuple):
    """The memo of ``TwoStream``.

    Between ``verify`` and ``settle``, ``hidden`` is [B, C, K, D]: the hidden states of a window for
    each of the C numbers of kept drafts in ``TwoStream.prefixes``. ``settle`` chooses one of them.
    """

    memory: Memory
    hidden: Float[Array, "B *c K D"] | None  # from which the next window is drafted
    ready_B: Bool[Array, " B"]  # sequences whose ``hidden`` is filled


@dataclass(frozen=True, kw_only=True)
class TwoStream(Drafter):
    """Drafts and verifies by queries of an any-subset model, with a memory of known tokens.

    The target of a position is the model's conditional in the pass over the order, in which the
    prompt sees itself and drawn tokens see lower ranks only. The likelihood of the drawn tokens is
    therefore that of ``Denoiser.hidden_in_order``. The prompt takes no call of its own: the first
    call of the sequence writes it. Padding, the segment 0, is never written. The memory knows no
    segments, so that a row may hold one text only, in the segment 1.

    Args:
        lookahead: number of positions in a window, K.
        bonus: the verification also drafts the next window in case that all drafts are kept.
        stale: the verification also drafts the next window for each number of kept drafts from 0
            to K - 1, by K queries for each. If all are kept without ``bonus``, the drafts for K - 1
            serve. These drafts do not know the newest token. All rounds but the first are one
            network call, and their first draft is verified as well.
    """

    lookahead: int
    bonus: bool = False
    stale: bool = False

    @property
    def first(self) -> int:
        """The first draft that is verified; one drawn from its target is not."""
        return 1 if self.calls_to_draft and not self.stale else 0

    @property
    def prefixes(self) -> list[int]:
        """The numbers of visible drafts for which the next window is drafted."""
        before = range(self.lookahead) if self.stale else []
        return [*before, *([self.lookahead] if self.bonus else [])]

    @property
    def width(self):
        return 1

    def begin(self, denoiser, x_BL):
        """An empty memory."""
        batch, length = x_BL.shape
        memory = denoiser.network.memory(batch, length)
        hidden = None
        if self.prefixes:
            row_BK = jnp.zeros((batch, self.lookahead), jnp.int32)
            content = Content(row_BK, row_BK, row_BK)
            hidden = zeros(lambda: denoiser.extend(memory, *content, row_BK, row_BK)[0])
        return Streams(memory, hidden, jnp.zeros(batch, bool))

    def draft(self, denoiser, memo, window, draw):
        """Ask K queries at the next rank, or read those of the last verification.

        The call writes the newest token, and in the first round the prompt.
        """
        needs_B = (window.left_B > 0) & ~memo.ready_B
        positions_BK = window.positions
        rank_BK = jnp.broadcast_to(1 + window.known_B[:, None], positions_BK.shape)
        content, queries = newest(window, needs_B), (positions_BK, rank_BK)
        hidden_BKD, memory = extend_if(
            denoiser, memo.memory, window, needs_B, content, queries, with_prompt=True
        )
        if memo.hidden is not None:
            hidden_BKD = jnp.where(needs_B[:, None, None], hidden_BKD, memo.hidden)
        log_probs_BKN = denoiser.log_conditional_in_order(hidden_BKD, window.x_BL, positions_BK)
        tokens_BK = draw(positions_BK, log_probs_BKN)
        calls_B = needs_B.astype(jnp.int32)
        return tokens_BK, Computed(log_probs_BKN, memo._replace(memory=memory), calls_B, calls_B)

    def verify(self, denoiser, drafted, window, tokens_BK):
        """Write the drafts, and ask a query at the rank of each.

        Where drafting need not call the network in each round (``first`` is 0), this call writes
        the newest token too; where drafting never does, also the prompt, in the first round.
        """
        batch, lookahead = tokens_BK.shape
        memo, known_B1 = drafted.memo, window.known_B[:, None]
        certain_B = first_is_certain(self.first, drafted)
        needs_B = window.left_B > certain_B
        positions_BK = window.positions
        rank_BK = 1 + known_B1 + jnp.arange(lookahead)
        content = Content(
            tokens_BK.astype(window.x_BL.dtype),
            positions_BK,
            jnp.where(window.valid & needs_B[:, None], rank_BK, UNKNOWN),
        )
        if self.first == 0:
            content = newest(window, needs_B).and_also(content)
        place, rank = [positions_BK[:, self.first :]], [rank_BK[:, self.first :]]
        for prefix in self.prefixes:
            # Behind a prefix of rejected drafts comes the token that replaces the next one.
            start_B1 = known_B1 + min(prefix + 1, lookahead)
            place.append(window.at_ranks(start_B1 + jnp.arange(lookahead)))
            rank.append(jnp.broadcast_to(1 + known_B1 + prefix, positions_BK.shape))
        queries = jnp.concatenate(place, 1), jnp.concatenate(rank, 1)
        hidden, memory = extend_if(
            denoiser,
            memo.memory,
            window,
            needs_B,
            content,
            queries,
            with_prompt=not self.calls_to_draft,
        )
        num_read = lookahead - self.first
        targets_BKN = conditionals_of_drafts(denoiser, hidden[:, :num_read], window, tokens_BK)
        targets_BKN = with_certain(certain_B, drafted.log_probs_BKN, targets_BKN)
        later = None
        if self.prefixes:
            later = hidden[:, num_read:].reshape(batch, len(self.prefixes), lookahead, -1)
        calls_B = needs_B.astype(jnp.int32)
        return Computed(targets_BKN, Streams(memory, later, needs_B), calls_B, calls_B)

    def settle(self, memo, kept_B):
        """Choose the drafts of the prefix that was kept.

        Without ``stale`` there are only those for the case that all drafts are kept.
        """
        if memo.hidden is None:
            return memo._replace(ready_B=jnp.zeros_like(memo.ready_B))
        index_B = jnp.minimum(kept_B, len(self.prefixes) - 1)
        ready_B = memo.ready_B if self.stale else memo.ready_B & (kept_B == self.lookahead)
        return Streams(memo.memory, memo.hidden[jnp.arange(len(kept_B)), index_B], ready_B)


def extend_if(
    denoiser: Denoiser,
    memory: Memory,
    window: Window,
    needs_B: Bool[Array, " B"],
    content: Content,
    queries: tuple[Int[Array, "B Q"], Int[Array, "B Q"]],
    *,
    with_prompt: bool,
) -> tuple[Float[Array, "B Q D"], Memory]:
    """``Denoiser.extend``, if any sequence needs a call; else zeros and the memory as it is.

    Args:
        denoiser: the model.
        memory: the memory.
        window: the window of the round.
        needs_B: sequences that need the call.
        content: rows to write.
        queries: positions of the queries, and their ranks.
        with_prompt: also write the prompts of the sequences that are in their first round. Such a
            call has L rows more for all sequences, and runs only if there is such a sequence.
    """

    def call(content: Content):
        return denoiser.extend(memory, *content, *queries)

    branches = [lambda: (zeros(lambda: call(content)[0]), memory), lambda: call(content)]
    branch = denoiser.anywhere(needs_B).astype(jnp.int32)
    if with_prompt:
        first_B = needs_B & (window.known_B == 0)
        branches.append(lambda: call(content.and_also(prompt(denoiser, window, first_B))))
        branch += denoiser.anywhere(first_B)
    return jax.lax.switch(branch, branches)


def zeros(function: Callable[[], Array]) -> Array:
    """Zeros of the shape that ``function`` returns."""
    shape = jax.eval_shape(function)
    return jnp.zeros(shape.shape, shape.dtype)


def newest(window: Window, writes_B: Bool[Array, " B"]) -> Content:
    """The content row of the token that was drawn last, if there is one and ``writes_B``."""
    known_B1 = window.known_B[:, None]
    position_B1 = window.at_ranks(jnp.maximum(known_B1 - 1, 0))
    written_B1 = writes_B[:, None] & (known_B1 > 0)
    return Content(
        jnp.take_along_axis(window.x_BL, position_B1, 1),
        position_B1,
        jnp.where(written_B1, known_B1, UNKNOWN),
    )


def prompt(denoiser: Denoiser, window: Window, writes_B: Bool[Array, " B"]) -> Content:
    """A content row for each position, those of given tokens with the rank 0 if ``writes_B``."""
    x_BL = window.x_BL
    free_B1 = (window.known_B + window.left_B)[:, None]
    given_BL = (jnp.argsort(window.order_BL, axis=1) >= free_B1) & (x_BL != denoiser.mask_id)
    if denoiser.attend is not None and denoiser.attend.segment_BL is not None:
        given_BL = given_BL & (denoiser.attend.segment_BL > 0)
    rank_BL = jnp.where(given_BL & writes_B[:, None], 0, UNKNOWN)
    return Content(x_BL, all_positions(x_BL), rank_BL)

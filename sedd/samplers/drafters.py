"""What a speculative sampler asks of a model: drafts of the next tokens, and their verification.

The sampler draws the positions of a sequence in a fixed order. A round looks at the next K of them,
the ``Window``. The *target* of a position is the model's conditional given all positions before it
in the order. A ``Drafter`` provides, for all K positions at once,

- in ``draft``, K tokens, the *drafts*, and the distributions from which they were drawn. These need
  not be the targets: they may be predicted without the other drafts, or by a cheaper model. The
  distribution of a draft may depend on the drafts before it;
- in ``verify``, the targets, where each position sees the drafts before it.

The sampler then accepts or rejects the drafts so that the tokens follow the targets, whatever the
drafts followed. The drafter decides alone how many network calls a round takes, and reports them.

What a drafter knows from earlier rounds is its *memo*, a pytree in the state of the sampler:
predictions that are not used up, or keys and values of a cache. Every leaf has a row for each
sequence, because samplers that wrap another one copy and replace rows. A round is

    tokens, drafted = drafter.draft(denoiser, memo, window, draw)
    verified = drafter.verify(denoiser, drafted, window, tokens)
    kept = how many of the drafts are accepted
    memo = drafter.settle(verified.memo, kept)

and afterwards the kept drafts are visible, and one further token from the target if a draft was
rejected. ``begin`` makes the memo before the first round, without a network call. ``draw`` is the
sampler's: it draws a token from each of some distributions, with the noise of their positions.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from sedd.denoiser import Denoiser
from sedd.networks.rows import Rows
from sedd.types import Array, Bool, Float, Int


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Window:
    """The next K positions of each sequence in its order, with the current tokens.

    A sequence that has fewer than K masks left fills its window with positions of no meaning.
    """

    x_BL: Int[Array, "B L"]
    order_BL: Int[Array, "B L"]  # the position of each rank; the free positions come first
    known_B: Int[Array, " B"]  # free positions that are visible: the rank of the next one
    left_B: Int[Array, " B"]  # free positions that are masked; 0 if the sequence is finished
    size: int = field(metadata={"static": True})  # K

    @property
    def positions(self) -> Int[Array, "B K"]:
        """The positions of the ranks known, known + 1, …"""
        return self.at_ranks(self.known_B[:, None] + jnp.arange(self.size))

    def at_ranks(self, rank_BK: Int[Array, "B K"]) -> Int[Array, "B K"]:
        """The positions of some ranks; ranks beyond the last one stand for the last one."""
        rank_BK = jnp.minimum(rank_BK, self.order_BL.shape[1] - 1)
        return jnp.take_along_axis(self.order_BL, rank_BK, 1)

    @property
    def valid(self) -> Bool[Array, "B K"]:
        """The entries that have a meaning; they come first."""
        return jnp.arange(self.size) < self.left_B[:, None]

    def write(self, tokens_BK: Int[Array, "B K"], count: Int[Array, "..."]) -> Int[Array, "B L"]:
        """The tokens [B, L] after the first ``count`` valid positions are set to ``tokens_BK``.

        ``count`` is one number for each sequence, [B], or the same for all.
        """
        batch, length = self.x_BL.shape
        first_BK = jnp.arange(self.size) < jnp.broadcast_to(count, (batch,))[:, None]
        place_BK = jnp.where(self.valid & first_BK, self.positions, length)
        row_B1 = jnp.arange(batch)[:, None]
        return self.x_BL.at[row_B1, place_BK].set(tokens_BK.astype(self.x_BL.dtype), mode="drop")


class Computed(NamedTuple):
    """The distributions at the positions of a window, and what they cost."""

    log_probs_BKN: Float[Array, "B K N"]  # without meaning where the window is not valid
    memo: Any
    calls_B: Int[Array, " B"]  # network calls of each sequence
    rows_B: Int[Array, " B"]  # rows of the batches of these calls


Draw = Callable[[Int[Array, "B J"], Float[Array, "B J N"]], Int[Array, "B J"]]
"""(positions [B, J], log probabilities [B, J, N]) -> a token for each position, [B, J]."""


class Drafter(ABC):
    """Drafts and verifies the tokens of a window; the module's docstring describes a round.

    A drafter is hashable and holds no arrays, as it is a static part of the compiled program.
    """

    calls_to_draft: ClassVar[bool] = True
    """Whether ``draft`` calls the network in the first round of a sequence."""

    @property
    @abstractmethod
    def width(self) -> int:
        """The largest number of rows that a network call takes for each sequence."""

    @abstractmethod
    def begin(self, denoiser: Denoiser, x_BL: Int[Array, "B L"]) -> Any:
        """The memo of sequences before their first round; it must not call the network."""

    @abstractmethod
    def draft(
        self, denoiser: Denoiser, memo: Any, window: Window, draw: Draw
    ) -> tuple[Int[Array, "B K"], Computed]:
        """The drafts, and the distributions from which ``draw`` drew them.

        Entry j is the distribution of draft j given the tokens of the window and the drafts 0 to
        j - 1. Each entry is drawn once.
        """

    @abstractmethod
    def verify(
        self,
        denoiser: Denoiser,
        drafted: Computed,
        window: Window,
        tokens_BK: Int[Array, "B K"],
    ) -> Computed:
        """The targets, given the drafts.

        Entry j is the conditional of position j given the visible tokens and the drafts 0 to j - 1,
        changed by the denoiser's ``Reshape`` as the drafts' distributions are. If a draft was
        drawn from the target itself, ``verify`` returns the entry of ``drafted`` as it is. The
        sampler then accepts the draft for certain, whatever the rounding errors of a second
        computation would be.

        Args:
            denoiser: the model.
            drafted: the result of ``draft``.
            window: the window.
            tokens_BK: the drafts.
        """

    def settle(self, memo: Any, kept_B: Int[Array, " B"]) -> Any:
        """The memo of the next round, after the first ``kept_B`` drafts were accepted."""
        return memo


class Pending(NamedTuple):
    """The memo of ``ByRows``: hidden states from which the next window is drafted."""

    hidden: tuple[Float[Array, "B L D"], ...]
    ready_B: Bool[Array, " B"]  # sequences whose hidden states are filled


class Prefixes(NamedTuple):
    """The memo of ``ByRows`` between ``verify`` and ``settle``."""

    hidden: tuple[Float[Array, "B C L D"], ...]  # of the contexts of the verification
    ready_B: Bool[Array, " B"]


@dataclass(frozen=True, kw_only=True)
class ByRows(Drafter):
    """Verifies in a wider batch, with one row for each number of visible drafts.

    It works with every time-independent absorbing model. (Any-subset models have ``TwoStream``.)
    The verification is one network call on the *contexts* of each sequence: context c has the
    first c drafts visible, and predicts position c of the window. The drafts are predicted
    together, by one network call on the current tokens (context 0 of a window). The first draft is
    then drawn from its target.

    Args:
        lookahead: number of positions in a window, K.
        bonus: also compute context K. If all drafts are accepted, its tokens are the current ones
            of the next round, which then drafts from its hidden states without a call.
        stale: in all rounds but the first, draft from the hidden states of the last verification:
            of the context with all tokens but the newest, or, if ``bonus`` and all drafts were
            accepted, with all tokens. Such a round is one network call, and its first draft is
            verified as well.
    """

    lookahead: int
    bonus: bool = False
    stale: bool = False

    @property
    def first(self) -> int:
        """The smallest context that is verified."""
        return 1 if self.calls_to_draft and not self.stale else 0

    @property
    def width(self):
        return max(self.lookahead + self.bonus - self.first, 1)

    def begin(self, denoiser, x_BL):
        """No hidden states yet; None if none are ever reused."""
        if not (self.bonus or self.stale):
            return None
        shapes = jax.eval_shape(denoiser.hidden, x_BL)
        return Pending(zeros_like(shapes), jnp.zeros(len(x_BL), bool))

    def draft(self, denoiser, memo, window, draw):
        """Predict the window from the current tokens, or from hidden states of the last round."""
        needs_B = window.left_B > 0
        call = partial(denoiser.hidden, window.x_BL)
        if memo is None:
            hidden = call()
        else:
            needs_B = needs_B & ~memo.ready_B
            hidden = jax.tree.map(
                partial(select, needs_B), call_if(denoiser.anywhere(needs_B), call), memo.hidden
            )
        log_probs_BKN = denoiser.log_conditional_at(hidden, window.x_BL, window.positions)
        calls_B = needs_B.astype(jnp.int32)
        tokens_BK = draw(window.positions, log_probs_BKN)
        return tokens_BK, Computed(log_probs_BKN, memo, calls_B, calls_B)

    def verify(self, denoiser, drafted, window, tokens_BK):
        """Call the network on the contexts, and read one position of each."""
        batch, lookahead = tokens_BK.shape
        contexts = jnp.arange(self.first, lookahead + self.bonus)
        count, num_read = len(contexts), lookahead - self.first
        certain_B = first_is_certain(self.first, drafted)
        needs_B = window.left_B > certain_B
        wide = denoiser.repeat(count)
        x_BCL = jax.vmap(partial(window.write, tokens_BK), out_axes=1)(contexts)
        x_RL = x_BCL.reshape(batch * count, -1)
        rows = Rows(
            sequence_R=(count * jnp.arange(batch)[:, None] + jnp.arange(num_read)[None]).ravel(),
            position_R=window.positions[:, self.first :].ravel(),
        )

        def call():
            hidden = wide.hidden(x_RL)
            read_RN = wide.log_conditional_rows(hidden, x_RL, rows)
            return hidden, read_RN.reshape(batch, num_read, read_RN.shape[-1])

        hidden, targets_BKN = call_if(denoiser.anywhere(needs_B), call)
        targets_BKN = with_certain(certain_B, drafted.log_probs_BKN, targets_BKN)
        memo = None
        if drafted.memo is not None:
            own = tuple(h_RLD.reshape(batch, count, *h_RLD.shape[1:]) for h_RLD in hidden)
            memo = Prefixes(own, needs_B)
        calls_B = needs_B.astype(jnp.int32)
        return Computed(targets_BKN, memo, calls_B, count * calls_B)

    def settle(self, memo, kept_B):
        """Choose the context of the next draft: the last one whose drafts were all accepted.

        Without ``stale`` only context K will do, as all others lack the last token.
        """
        if memo is None:
            return None
        count = memo.hidden[0].shape[1]
        context_B = jnp.minimum(kept_B - self.first, count - 1)
        hidden = tuple(h_BCLD[jnp.arange(len(kept_B)), context_B] for h_BCLD in memo.hidden)
        ready_B = memo.ready_B if self.stale else memo.ready_B & (kept_B == self.lookahead)
        return Pending(hidden, ready_B)


def first_is_certain(first: int, drafted: Computed) -> Bool[Array, " B"]:
    """The sequences whose first draft was drawn from its target, and need not be verified.

    These are all if ``first``, the smallest draft that is ever verified, is not 0. Otherwise they
    are those whose drafts took a network call in this round, on all current tokens.
    """
    return drafted.calls_B > 0 if first == 0 else jnp.ones_like(drafted.calls_B, bool)


def with_certain(
    certain_B: Bool[Array, " B"],
    drafted_BKN: Float[Array, "B K N"],
    verified_BQN: Float[Array, "B Q N"],
) -> Float[Array, "B K N"]:
    """The targets of a window, whose last Q entries were verified: all K, or all but the first.

    The target of a first draft that is certain is the distribution from which it was drawn.
    """
    drafted_B1N = drafted_BKN[:, :1]
    if verified_BQN.shape[1] < drafted_BKN.shape[1]:
        return jnp.concatenate([drafted_B1N, verified_BQN], 1)
    first_B1N = select(certain_B, drafted_B1N, verified_BQN[:, :1])
    return jnp.concatenate([first_B1N, verified_BQN[:, 1:]], 1)


def zeros_like(shapes: Any) -> Any:
    """Zeros of these shapes and types."""
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


def call_if(needed: Bool[Array, ""], function: Callable[[], Any]) -> Any:
    """``function()`` if it is needed, else zeros of the same shapes."""
    shapes = jax.eval_shape(function)
    return jax.lax.cond(needed, function, lambda: zeros_like(shapes))


def select(choose_B: Bool[Array, " B"], yes: Array, no: Array) -> Array:
    """The sequences of ``yes`` where ``choose_B``, and of ``no`` elsewhere."""
    return jnp.where(choose_B.reshape(-1, *[1] * (yes.ndim - 1)), yes, no)


def conditionals_of_drafts(
    denoiser: Denoiser,
    hidden_BQD: Float[Array, "B Q D"],
    window: Window,
    tokens_BK: Int[Array, "B K"],
) -> Float[Array, "B Q N"]:
    """The log conditionals of the last Q positions of a window, from a hidden state for each.

    A logit processor sees the drafts before each position. Guidance is left out.
    """
    batch, count, dim = hidden_BQD.shape
    prefix_Q = jnp.arange(window.size - count, window.size)
    x_BQL = jax.vmap(partial(window.write, tokens_BK), out_axes=1)(prefix_Q)
    targets_R1N = denoiser.repeat(count).log_conditional_in_order(
        hidden_BQD.reshape(batch * count, 1, dim),
        x_BQL.reshape(batch * count, -1),
        window.positions[:, window.size - count :].reshape(batch * count, 1),
    )
    return targets_R1N.reshape(batch, count, -1)

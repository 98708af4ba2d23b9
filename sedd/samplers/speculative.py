"""Several positions a network call, exact: for accelerators that are idle at small batches.

Speculative decoding, arXiv:2302.01318, in a fixed order of positions, arXiv:2504.20456.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import jax.numpy as jnp
from jax.core import Tracer

from sedd.arrays import at, fold
from sedd.denoiser import Denoiser
from sedd.errors import FieldError, UserError, did_you_mean
from sedd.networks.rows import Rows
from sedd.samplers.base import State, SteppedSampler
from sedd.samplers.by_head import ByHead
from sedd.samplers.drafters import ByRows, Drafter, Window
from sedd.samplers.ngram import NGramByRows, NGramTwoStream
from sedd.samplers.noise import coins, tokens_at, whole
from sedd.samplers.orders import check_order, order_ranks
from sedd.samplers.reveal import masked
from sedd.samplers.two_stream import TwoStream
from sedd.types import Array, Bool, Float, Int, Keys
from sedd.watermark.base import Watermark

Draft = Literal["stale", "batch", "self", "ngram", "head"]


class Plan(NamedTuple):
    """The plan of a sequence: its order, and what the drafter knows."""

    order_BL: Int[Array, "B L"]  # the position of each rank; the free positions come first
    memo: Any


@dataclass(frozen=True, kw_only=True)
class Speculative(SteppedSampler):
    """Draft ``lookahead`` positions at once, verify them together, and keep those that hold.

    The law is that of ``ordered`` at one position a call: the product of the model's conditionals
    in the order. A round drafts the next positions, independently of each other unless ``draft`` is
    ngram, and computes the conditional of each given the drafts before it. A draft d with draft
    probability p(d) and conditional q(d) is accepted with probability min(1, q(d) / p(d)). The
    first draft that is rejected is replaced by a draw from max(q - p, 0), normalised, and those
    after it are discarded.

    There are at most as many network calls as free positions. A call computes several rows of a
    batch: the number of calls falls, the work grows. Sequences advance independently of each other.

    For an any-subset model the conditionals are those of the pass over the order, in which the
    fixed tokens are the prompt, and drawn tokens see only those drawn before them. The law is then
    that of the model's likelihood in the order (``sedd.evaluation.ordered``). It differs from the
    law of ``ordered``, which encodes all known tokens anew in each call. Here each sequence is one
    entry of a call's batch. The call computes the rows of newly known tokens and of queries only;
    earlier rows are in a memory.

    With ``draft="head"`` the trunk of a network with a causal head drafts, and the causal head
    verifies in place of a network call (arXiv:2510.03929). The law of the samples is then another
    one, which ``sedd.samplers.by_head`` describes: it follows the head exactly while the hidden
    states of one call are used. The log probability of the drawn tokens is not computed then.
    """

    needs_absorbing: ClassVar[bool] = True
    needs_time_independent: ClassVar[bool] = True
    takes_latent: ClassVar[bool] = False

    draft: Draft = "stale"
    """How a round drafts. stale: from the hidden states of the last verification, which lack the
    newest token; a round is one network call, for at least one token. The first round is as with
    batch. batch: by a call of its own
    on the current tokens, whose first draft is always accepted; a round is two calls, for at least
    two tokens. self: the same for an any-subset model. ngram: from the counts of adjacent tokens in
    the text itself, without a call; a round is one network call, for at least one token. head: from
    the hidden states of a call, which serve ``verifications`` rounds; the causal head verifies
    without a call. Any-subset models take stale, self and ngram; all others take stale, batch and
    ngram, and with a causal head also head."""
    lookahead: int = 4
    """K, the positions that a round drafts. A verification puts K versions of a sequence into the
    batch of a network call, or K - 1 if the draft is batch. If it is head, no network call is made.
    An any-subset model takes the sequence once, with a query for each position to verify, and K²
    more queries for the next drafts if the draft is stale."""
    order: str = "forward"
    """Order of the positions: forward, backward, random, or positions counted from 0 such as 3,0,2.
    Listed positions that a sequence does not have are ignored by sedd.sample, and refused by
    sample.py."""
    bonus: bool = False
    """Also compute a version of the sequence in which all drafts are visible. If all are accepted,
    the next round drafts from it. If the draft is batch or self, this saves the call that drafts;
    if it is stale, the drafts then know the newest token. For an any-subset model this takes K
    more queries. ngram and head take no bonus."""
    coupled: bool = False
    """Draw drafts and verified tokens with the same noise, and accept while they are equal. The
    tokens are those of ordered with the same order and seed, up to rounding errors of the
    network. For an any-subset model they are not those of ordered, but are the same for every
    lookahead and draft. Fewer drafts are accepted, except at temperature 0, where it makes no
    difference."""
    verifications: int = 1
    """If the draft is head: rounds for which the hidden states of one network call are used. Each
    round drafts and verifies the next lookahead positions."""

    def __post_init__(self):
        if self.draft not in get_args(Draft):
            known = get_args(Draft)
            raise FieldError(
                "draft",
                f"must be one of {', '.join(known)}, got {self.draft!r}"
                f"{did_you_mean(str(self.draft), known)}",
            )
        if self.lookahead < 1:
            raise FieldError("lookahead", f"must be at least 1, got {self.lookahead}")
        if self.lookahead == 1 and self.draft != "head":
            raise FieldError("lookahead", "must be at least 2, got 1: a single draft saves no call")
        if self.verifications < 1:
            raise FieldError("verifications", f"must be at least 1, got {self.verifications}")
        if self.verifications > 1 and self.draft != "head":
            raise FieldError(
                "verifications",
                f"is for the draft head only: got {self.verifications} with {self.draft}",
            )
        if self.draft == "ngram" and self.bonus:
            raise FieldError(
                "bonus",
                "does not go with the draft ngram, which drafts without a call; leave it out",
            )
        for name in ("bonus", "coupled"):
            if self.draft == "head" and getattr(self, name):
                raise FieldError(name, "does not go with the draft head; leave it out")
        check_order(self.order)

    def drafter(self, any_subset: bool) -> Drafter:
        """The drafter that ``draft`` names, for an any-subset model or for another one."""
        if self.draft == "head":
            return ByHead(lookahead=self.lookahead, verifications=self.verifications)
        if self.draft == "ngram":
            return (NGramTwoStream if any_subset else NGramByRows)(lookahead=self.lookahead)
        kind = TwoStream if any_subset else ByRows
        return kind(lookahead=self.lookahead, bonus=self.bonus, stale=self.draft == "stale")

    @property
    def width(self):
        """Rows of a network call for each sequence.

        If the draft is stale or ngram, the number depends on the model, which the sampler does not
        know here. It is then that of models that are not any-subset models, the larger one.
        """
        return self.drafter(self.draft == "self").width

    def check(self, denoiser):
        super().check(denoiser)
        if denoiser.constraint is not None:
            raise UserError(
                "sampler 'speculative' takes no constraint: the tokens of a span are drawn "
                "jointly, but a draft is verified by the conditional of its position alone "
                "(ordered draws in the same order under constraints)"
            )
        if denoiser.windows is not None:
            raise UserError(
                "sampler 'speculative' draws no windows by an HMM head: a draft is verified by the "
                "conditional of its position alone; leave out --window"
            )
        if denoiser.any_subset:
            self.check_any_subset(denoiser)
        if self.draft == "self" and not denoiser.any_subset:
            raise UserError(
                "sampler 'speculative' with the draft self needs an any-subset model: use the "
                "draft stale, batch or ngram"
            )
        if self.draft == "head" and not denoiser.network.has_causal_head:
            raise UserError(
                "sampler 'speculative' with the draft head needs a network with a causal head, got "
                f"{type(denoiser.network).__name__}: train one with --network causal_head, or use "
                f"the draft {'self' if denoiser.any_subset else 'stale'}"
            )
        if self.draft == "head" and denoiser.guided:
            raise UserError(
                "sampler 'speculative' takes no guidance with the draft head, which was trained on "
                "the hidden states of all given tokens (use the draft stale)"
            )

    def check_any_subset(self, denoiser: Denoiser) -> None:
        """Raise UserError if this sampler cannot draw from an any-subset model as it is called.

        With such a model it needs another draft than batch, no guidance, and rows of one text each.
        Within a compiled function the texts of a row cannot be counted, and are not checked.
        """
        if self.draft == "batch":
            raise UserError(
                "sampler 'speculative' with the draft batch reads all known tokens anew, which an "
                "any-subset model need not: use the draft stale, self or ngram"
            )
        if denoiser.guided:
            raise UserError(
                "sampler 'speculative' takes no guidance with an any-subset model, whose memory "
                "holds the given tokens (ordered takes it)"
            )
        if self.draft != "head" and not denoiser.network.has_memory:
            raise UserError(
                "sampler 'speculative' needs a network with a memory of rows to draw from an "
                f"any-subset model, got {type(denoiser.network).__name__}: ddit and decoder have "
                "(ordered needs none)"
            )
        segment_BL = None if denoiser.attend is None else denoiser.attend.segment_BL
        if segment_BL is not None and not isinstance(segment_BL, Tracer) and segment_BL.max() > 1:
            raise UserError(
                "sampler 'speculative' draws one text in each row from an any-subset model, in the "
                f"segment 1 with padding in the segment 0: got the segment {segment_BL.max()} "
                "(ordered takes several)"
            )

    def refuses(self, watermark):
        if not watermark.replaces_noise:
            return "it verifies drafts by the conditionals without a watermark"
        if self.coupled:
            return ""
        return "drafts and their replacements have separate noise, unless coupled is set"

    def max_rounds(self, denoiser, length):
        """A round reveals at least one position."""
        return length

    def active(self, denoiser, state):
        """Sequences with masks left."""
        return masked(denoiser, state).any(1)

    def start(self, denoiser, keys_B, tokens_BL, fixed_BL):
        """Mask all free positions; the keys are derived from ``keys_B`` as in ``ordered``."""
        x_BL = jnp.where(fixed_BL, tokens_BL, denoiser.mask_id)
        rank_BL = order_ranks(self.order, whole(fold(keys_B, 0)), ~fixed_BL)
        return State.starting(
            fold(keys_B, 1),
            x_BL=x_BL,
            free_BL=~fixed_BL,
            plan=Plan(
                jnp.argsort(rank_BL, axis=1),
                self.drafter(denoiser.any_subset).begin(denoiser, x_BL),
            ),
            log_prob_B=None if self.draft == "head" else jnp.zeros(len(keys_B)),
        )

    def advance(self, denoiser, state):
        """Draft the window of each sequence, verify it, and reveal what was accepted."""
        drafter, active_B = self.drafter(denoiser.any_subset), self.active(denoiser, state)
        window = self.window(denoiser, state)
        keys_B = fold(state.keys_B, state.round_B)
        draft_keys_B = state.keys_B if self.coupled else fold(keys_B, 0)
        draw = partial(draw_at, draft_keys_B, watermark=denoiser.watermark)
        tokens_BK, drafted = drafter.draft(denoiser, state.plan.memo, window, draw)
        verified = drafter.verify(denoiser, drafted, window, tokens_BK)
        targets_BKN = verified.log_probs_BKN
        if self.coupled:
            own_BK = draw(window.positions, targets_BKN)
            kept_B, tokens_BK = leading(window, tokens_BK == own_BK), own_BK
        else:
            kept_B, tokens_BK = accept(
                keys_B, window, tokens_BK, drafted.log_probs_BKN, targets_BKN
            )
        log_prob_B = state.log_prob_B
        if log_prob_B is not None:
            new_BK = window.valid & (jnp.arange(self.lookahead) <= kept_B[:, None])
            log_prob_B += jnp.where(new_BK, at(targets_BKN, tokens_BK), 0.0).sum(1)
        calls_B, rows_B = drafted.calls_B + verified.calls_B, drafted.rows_B + verified.rows_B
        return replace(
            state.called(calls_B, rows_B).moved(window.write(tokens_BK, kept_B + 1), active_B),
            plan=state.plan._replace(memo=drafter.settle(verified.memo, kept_B)),
            log_prob_B=log_prob_B,
        )

    def window(self, denoiser: Denoiser, state: State) -> Window:
        """The next ``lookahead`` positions of each sequence that are still masked."""
        left_B = masked(denoiser, state).sum(1)
        return Window(
            x_BL=state.x_BL,
            order_BL=state.plan.order_BL,
            known_B=state.free_BL.sum(1) - left_B,
            left_B=left_B,
            size=self.lookahead,
        )


def draw_at(
    keys_B: Keys,
    positions_BK: Int[Array, "B K"],
    log_probs_BKN: Float[Array, "B K N"],
    watermark: Watermark | None = None,
) -> Int[Array, "B K"]:
    """Draw a token for each of some positions, with the noise of the position."""
    log_probs_RN = log_probs_BKN.reshape(-1, log_probs_BKN.shape[-1])
    tokens_R = tokens_at(keys_B, Rows.at(positions_BK), log_probs_RN, watermark)
    return tokens_R.reshape(positions_BK.shape)


def leading(window: Window, agrees_BK: Bool[Array, "B K"]) -> Int[Array, " B"]:
    """How many valid entries agree before the first that does not, [B]."""
    return jnp.cumprod(agrees_BK & window.valid, 1).sum(1)


def accept(
    keys_B: Keys,
    window: Window,
    tokens_BK: Int[Array, "B K"],
    drafted_BKN: Float[Array, "B K N"],
    targets_BKN: Float[Array, "B K N"],
) -> tuple[Int[Array, " B"], Int[Array, "B K"]]:
    """Accept drafts by their coins, and draw a token in the place of the first that is rejected.

    Args:
        keys_B: the keys of this round. ``fold(keys_B, 0)`` drew the drafts and is not used here.
        window: the window.
        tokens_BK: the drafts.
        drafted_BKN: log probabilities from which they were drawn.
        targets_BKN: log probabilities that the tokens are to follow.

    Returns:
        The number of accepted drafts [B], and the tokens [B, K] with the replacement behind them.
        A probability of nan rejects the draft, and the replacement is ``NAN``.
    """
    log_ratio_BK = at(targets_BKN, tokens_BK) - at(drafted_BKN, tokens_BK)
    ratio_R = jnp.exp(jnp.minimum(log_ratio_BK, 0.0)).reshape(-1)
    heads_R = coins(fold(keys_B, 1), Rows.at(window.positions), ratio_R)
    kept_B = leading(window, heads_R.reshape(tokens_BK.shape))
    row_B = jnp.arange(len(kept_B))
    last_B = jnp.minimum(kept_B, window.size - 1)
    rows = Rows(sequence_R=row_B, position_R=window.positions[row_B, last_B])
    rest_BN = residual(drafted_BKN[row_B, last_B], targets_BKN[row_B, last_B])
    replacement_B = tokens_at(fold(keys_B, 2), rows, rest_BN)
    return kept_B, tokens_BK.at[row_B, kept_B].set(replacement_B, mode="drop")


def residual(drafted: Float[Array, "*b N"], target: Float[Array, "*b N"]) -> Float[Array, "*b N"]:
    """The log of max(q - p, 0), for log probabilities p of a draft and q of its target.

    It is the law of the token that replaces a rejected draft, not normalised. If it is 0
    throughout, which only rounding errors bring about, the result is log q.
    """
    rest = jnp.maximum(jnp.exp(target) - jnp.exp(drafted), 0.0)
    nothing = rest.sum(-1, keepdims=True) == 0
    return jnp.where(nothing, target, jnp.log(rest))


make = Speculative

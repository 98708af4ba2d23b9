"""Drafts of the trunk that its causal head verifies: self-speculative decoding, arXiv:2510.03929.

One call of the trunk gives hidden states h. The drafts follow the trunk's conditionals p, each
given the tokens that the trunk saw. The causal head (``sedd.networks.causal_head``) verifies them
on the same h: the target of a position is q(x_σ(j) | h, all tokens before it in the order σ).

The order σ has the given tokens first, then the free positions in the order of the sampler, and
padding and masks that are not to be drawn last.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sedd.denoiser import Denoiser
from sedd.samplers.drafters import (
    Computed,
    Drafter,
    Window,
    call_if,
    conditionals_of_drafts,
    select,
    zeros_like,
)
from sedd.types import Array, Float, Int


class Trunk(NamedTuple):
    """The memo of ``ByHead``: the hidden states of the last call of the trunk."""

    hidden: tuple[Float[Array, "B L D"], ...]
    rounds_B: Int[Array, " B"]  # rounds that ``hidden`` is still to serve


@dataclass(frozen=True, kw_only=True)
class ByHead(Drafter):
    """Drafts from the trunk of a network with a causal head, and verifies by the head.

    **The law is one of its own**, not that of ``ordered``. While the hidden states of one call are
    used, tokens follow the chain of q exactly. With each call of the trunk the chain changes, and
    where this happens depends on the drafts that were rejected. If ``verifications`` is at least
    the number of free positions, the tokens follow the chain of q from a single call.

    The first draft of a round is verified as the others are. There q need not equal p, because the
    head also sees the known tokens in their order, and is trained to predict this position too. A
    round yields at least one token. With a new head q = p: the drafts are kept, and each round
    draws K tokens independently.

    Only calls of the trunk are counted, and no row counts for a verification. It computes the
    causal block, about as much work as 4/3 layers of the trunk, and the output layer at K
    positions.

    In the paper all rounds of one call share a fixed window of positions. Here each round takes the
    next K positions.

    Args:
        lookahead: number of positions in a window, K.
        verifications: rounds for which the hidden states of a call are used.
    """

    lookahead: int
    verifications: int

    @property
    def width(self):
        return 1

    def begin(self, denoiser, x_BL):
        """No hidden states yet."""
        hidden = zeros_like(jax.eval_shape(denoiser.hidden, x_BL))
        return Trunk(hidden, jnp.zeros(len(x_BL), jnp.int32))

    def draft(self, denoiser, memo, window, draw):
        """Predict the window from stored hidden states; call the trunk if these are used up."""
        needs_B = (window.left_B > 0) & (memo.rounds_B == 0)
        new = call_if(denoiser.anywhere(needs_B), partial(denoiser.hidden, window.x_BL))
        hidden = jax.tree.map(partial(select, needs_B), new, memo.hidden)
        log_probs_BKN = denoiser.log_conditional_at(hidden, window.x_BL, window.positions)
        rounds_B = jnp.where(needs_B, self.verifications, memo.rounds_B)
        calls_B = needs_B.astype(jnp.int32)
        tokens_BK = draw(window.positions, log_probs_BKN)
        return tokens_BK, Computed(log_probs_BKN, Trunk(hidden, rounds_B), calls_B, calls_B)

    def verify(self, denoiser, drafted, window, tokens_BK):
        """Apply the causal head once, to all drafts of all sequences."""
        (hidden_BLD,), rounds_B = drafted.memo
        causal_BLD = denoiser.network.causal_hidden(
            denoiser.params,
            hidden_BLD,
            window.write(tokens_BK, jnp.asarray(window.size)),
            order_of_head(denoiser, window),
        )
        read_BKD = jnp.take_along_axis(causal_BLD, window.positions[..., None], 1)
        targets_BKN = conditionals_of_drafts(denoiser, read_BKD, window, tokens_BK)
        memo = Trunk((hidden_BLD,), jnp.maximum(rounds_B - 1, 0))
        none_B = jnp.zeros_like(drafted.calls_B)
        return Computed(targets_BKN, memo, none_B, none_B)


def order_of_head(denoiser: Denoiser, window: Window) -> Int[Array, "B L"]:
    """The order of all positions: given tokens, then free positions, then all others."""
    order_BL = window.order_BL
    free_BL = jnp.arange(order_BL.shape[1]) < (window.known_B + window.left_B)[:, None]
    given_BL = window.x_BL != denoiser.mask_id
    if denoiser.attend is not None and denoiser.attend.segment_BL is not None:
        given_BL = given_BL & (denoiser.attend.segment_BL > 0)
    given_BL = jnp.take_along_axis(given_BL, order_BL, 1)
    place_BL = jnp.where(free_BL, 1, jnp.where(given_BL, 0, 2))
    return jnp.take_along_axis(order_BL, jnp.argsort(place_BL, axis=1, stable=True), 1)

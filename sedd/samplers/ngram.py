"""Drafts from the tokens of the sequence itself, without a network call. arXiv:2504.20456.

The draft of a position follows the bigrams of the sequence: how often each token came right after
the token that now stands to the left of the position. Adjacent visible tokens are counted, whether
they were given or drawn. The drafts before a position in its window count as visible. A draft
therefore has the distribution that it would have if all drafts before it were known tokens, which
is the only case in which it can be accepted.

The counts are not smoothed, and may exclude the right token. The law of the samples is that of the
model all the same: the verification draws a replacement from what the drafts leave out.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from sedd.arrays import NO_MASS
from sedd.denoiser import Denoiser
from sedd.samplers.drafters import ByRows, Computed, Drafter
from sedd.samplers.two_stream import TwoStream
from sedd.types import Array, Bool, Float, Int


@dataclass(frozen=True, kw_only=True)
class NGram(Drafter):
    """Drafts by ``log_frequencies``, one position after the other.

    The ``Reshape`` of the denoiser, with its logit processor, changes these distributions as it
    changes those of the model. Guidance needs a network, and acts on the targets alone.

    A subclass also inherits from the drafter whose verification it uses. All drafts are verified: a
    round is one network call, for at least one token.
    """

    calls_to_draft = False

    def draft(self, denoiser, memo, window, draw):
        """Draw each draft from the frequencies in the tokens and the drafts before it."""

        def one(x_BL, position_B):
            log_probs_B1N = log_frequencies(denoiser, x_BL, position_B)[:, None]
            if denoiser.reshape is not None:
                log_probs_B1N = denoiser.reshape(log_probs_B1N, x_BL, position_B[:, None])
            token_B = draw(position_B[:, None], log_probs_B1N)[:, 0]
            x_BL = x_BL.at[jnp.arange(len(x_BL)), position_B].set(token_B.astype(x_BL.dtype))
            return x_BL, (token_B, log_probs_B1N[:, 0])

        _, (tokens_KB, log_probs_KBN) = jax.lax.scan(one, window.x_BL, window.positions.T)
        none_B = jnp.zeros(len(window.x_BL), jnp.int32)
        return tokens_KB.T, Computed(jnp.moveaxis(log_probs_KBN, 0, 1), memo, none_B, none_B)


@dataclass(frozen=True, kw_only=True)
class NGramByRows(NGram, ByRows):
    """Drafts from counts, and verifies by rows of the batch."""


@dataclass(frozen=True, kw_only=True)
class NGramTwoStream(NGram, TwoStream):
    """Drafts from counts, and verifies by queries of an any-subset model."""


def log_frequencies(
    denoiser: Denoiser, x_BL: Int[Array, "B L"], position_B: Int[Array, " B"]
) -> Float[Array, "B N"]:
    """The log frequencies of tokens at one position of each sequence, by counts in the sequence.

    - If the token to the left is visible, and visible tokens come right after the same token
      elsewhere: their frequencies there.
    - Otherwise the frequencies of all visible tokens of the sequence.
    - If none is visible: the same for each of the N tokens.

    Tokens of other segments than that of the position, padding among them, are not visible.

    Args:
        denoiser: the model, for its mask and its segments.
        x_BL: current tokens.
        position_B: the positions. Their own tokens are masks.

    Returns:
        Log probabilities; -1e6 for tokens that were not counted.
    """
    num_tokens, row_B = denoiser.process.num_tokens, jnp.arange(len(x_BL))
    visible_BL = visible_beside(denoiser, x_BL, position_B)
    left_B = jnp.maximum(position_B - 1, 0)  # for position 0 itself, which is a mask
    has_left_B1 = visible_BL[row_B, left_B][:, None]
    same_BL = visible_BL & has_left_B1 & (x_BL == x_BL[row_B, left_B][:, None])
    follows_BL = visible_BL & jnp.pad(same_BL[:, :-1], ((0, 0), (1, 0)))
    counted_BL = jnp.where(follows_BL.any(1, keepdims=True), follows_BL, visible_BL)
    token_BL = jnp.where(counted_BL, x_BL, num_tokens)
    counts_BN = jnp.zeros((len(x_BL), num_tokens)).at[row_B[:, None], token_BL].add(1, mode="drop")
    total_B1 = counts_BN.sum(1, keepdims=True)
    frequency_BN = jnp.where(total_B1 > 0, counts_BN / jnp.maximum(total_B1, 1), 1 / num_tokens)
    return jnp.maximum(jnp.log(frequency_BN), NO_MASS)


def visible_beside(
    denoiser: Denoiser, x_BL: Int[Array, "B L"], position_B: Int[Array, " B"]
) -> Bool[Array, "B L"]:
    """Which positions have a token, and lie in the segment of the sequence's given position."""
    visible_BL = (x_BL >= 0) & (x_BL < denoiser.process.num_tokens)
    if denoiser.attend is not None and denoiser.attend.segment_BL is not None:
        segment_BL = denoiser.attend.segment_BL
        own_B1 = segment_BL[jnp.arange(len(x_BL)), position_B][:, None]
        visible_BL = visible_BL & (segment_BL == own_B1)
    return visible_BL

"""Surest position first, which helps imperfect models; exact if steps is unset.

arXiv:2502.06768, section 4.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from sedd.errors import FieldError
from sedd.samplers.reveal import Counts, Ranked, check_steps, spread

Score = Literal["entropy", "margin", "max_probability"]


@dataclass(frozen=True, kw_only=True)
class Confidence(Ranked):
    """Draw the position of least entropy first, or of largest margin or largest probability.

    The position is chosen by its whole distribution, before its token is drawn. With one position a
    call the law is the model's own, as it is for every order that does not look at the drawn token.
    With ``steps`` several positions are drawn in one call, independently of each other. At
    temperature 0 positions are chosen by their distributions at temperature 1.
    """

    by: Score = "entropy"
    """Score of a position: least entropy, largest margin between the two most likely tokens, or
    largest probability."""
    steps: int | None = None
    """Network calls over which the positions are spread; by default one position a call."""
    counts: Counts = "late"
    """How many positions each step draws: late and early spread them evenly, with the larger
    numbers last or first; dream takes the numbers of Dream's code."""

    def __post_init__(self):
        check_steps(self.steps, self.counts)
        if self.by not in get_args(Score):
            raise FieldError("by", f"must be one of {', '.join(get_args(Score))}, got {self.by!r}")

    def score(self, prediction, rows):
        """Minus the entropy, the margin, or the largest log probability of each row."""
        _, log_probs_RN = prediction.scored(rows)
        if self.by == "entropy":
            return -entropy(log_probs_RN)
        if self.by == "max_probability":
            return log_probs_RN.max(-1)
        best = jnp.exp(jax.lax.top_k(log_probs_RN, 2)[0])
        return best[..., 0] - best[..., 1]

    def count(self, state, falling_BL):
        """Spread the free positions over ``steps`` calls."""
        masked_B = jnp.isfinite(falling_BL).sum(1)
        return spread(state.plan, masked_B, self.steps, state.round_B, self.counts)


def entropy(log_probs):
    """Entropy of each row of log probabilities, in nats."""
    return -(jnp.exp(log_probs) * log_probs).sum(-1)


make = Confidence

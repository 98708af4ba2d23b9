"""Surest token first: to compare with MaskGIT and LLaDA; biased at any number of steps.

The decoder of both papers: arXiv:2202.04200 and arXiv:2502.09992.
"""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp

from sedd.arrays import at
from sedd.errors import FieldError
from sedd.samplers.reveal import Counts, Ranked, check_steps, spread


@dataclass(frozen=True, kw_only=True)
class TokenConfidence(Ranked):
    """Draw a token at every masked position and keep the most probable ones; biased.

    A token's probability is taken from the distribution it is drawn from. At temperature 0, where
    that is always 1, and with ``unsharpened``, it is taken before temperature, top-k and top-p.

    Which token is kept depends on the tokens that were drawn, so that probable tokens are kept more
    often than the model's law allows. The samples are less diverse than the model at any number of
    steps and with a perfect network: on small examples the total variation distance between the
    law of the samples and the model's is .4 to .6. ``threshold`` keeps all tokens of at least
    that probability instead, or the most probable one if there is none (arXiv:2505.22618).
    """

    redraws: ClassVar[bool] = True
    caveat: ClassVar[str] = (
        "token_confidence is approximate: it prefers likely tokens, so that its law is not the "
        "model's at any number of steps; confidence orders positions without that bias"
    )

    steps: int | None = None
    """Network calls over which the tokens are spread; by default one token a call."""
    counts: Counts = "late"
    """How many tokens each step keeps: late and early (LLaDA, SDAR) spread them evenly, with the
    larger numbers last or first; dream takes the numbers of Dream's code."""
    threshold: float | None = None
    """Keep all tokens of at least this probability, in (0, 1]; excludes steps."""
    unsharpened: bool = False
    """Compare probabilities before temperature, top-k and top-p, as LLaDA does."""

    def __post_init__(self):
        check_steps(self.steps, self.counts)
        if self.threshold is None:
            return
        if not 0 < self.threshold <= 1:
            raise FieldError("threshold", f"must be in (0, 1], got {self.threshold}")
        if self.steps is not None:
            raise FieldError("threshold", "decides how many are kept: give no steps beside it")

    def score(self, prediction, rows):
        """The log probability of the token that is drawn at each row."""
        log_probs_RN, ranking_RN = prediction.scored(rows, unsharpened=self.unsharpened)
        return at(ranking_RN, prediction.tokens(rows, log_probs_RN))

    def count(self, state, falling_BL):
        """Spread the positions over ``steps``, or count probabilities of at least ``threshold``."""
        if self.threshold is None:
            masked_B = jnp.isfinite(falling_BL).sum(1)
            return spread(state.plan, masked_B, self.steps, state.round_B, self.counts)
        return jnp.maximum((falling_BL >= jnp.log(self.threshold)).sum(1), 1)


make = TokenConfidence

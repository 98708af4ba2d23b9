"""Surest token first: to compare with MaskGIT and LLaDA; biased at any number of steps.

Their decoder. arXiv:2202.04200, arXiv:2502.09992.
"""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp

from sedd.arrays import at
from sedd.errors import FieldError
from sedd.samplers.reveal import Ranked, check_steps, group_size


@dataclass(frozen=True, kw_only=True)
class TokenConfidence(Ranked):
    """Draws every masked position and keeps the likeliest tokens. Biased, even one at a call.

    Tokens compete after they are drawn, so likely ones are kept more often than they should be:
    even with a perfect network the law is another one (total variation .4 to .6 on small examples),
    less diverse, at any number of steps. ``threshold`` keeps all tokens of at least that
    probability instead, one at the least (arXiv:2505.22618).
    """

    redraws: ClassVar[bool] = True
    caveat: ClassVar[str] = (
        "token_confidence is approximate: it prefers likely tokens, so that its law is not the "
        "model's at any number of steps; confidence orders positions without that bias"
    )

    steps: int | None = None
    """Network calls over which the tokens are spread; by default one token a call."""
    threshold: float | None = None
    """Keep all tokens of at least this probability, in (0, 1]; excludes steps."""

    def __post_init__(self):
        check_steps(self.steps)
        if self.threshold is None:
            return
        if not 0 < self.threshold <= 1:
            raise FieldError("threshold", f"must be in (0, 1], got {self.threshold}")
        if self.steps is not None:
            raise FieldError("threshold", "decides how many are kept: give no steps beside it")

    def score(self, prediction, rows):
        log_probs_RN = prediction.log_probs(rows)
        return at(log_probs_RN, prediction.tokens(rows, log_probs_RN))

    def count(self, state, falling_BL):
        if self.threshold is None:
            return group_size(state.plan, self.steps, state.round_B)
        return jnp.maximum((falling_BL >= jnp.log(self.threshold)).sum(1), 1)


make = TokenConfidence

"""Autoregressive models: each token given the tokens before it. arXiv:1706.03762, section 3.1."""

from dataclasses import dataclass, field

import jax.numpy as jnp

from sedd.errors import FieldError
from sedd.networks.base import Attend
from sedd.parameterizations.base import Inputs, Parameterization


@dataclass(frozen=True, kw_only=True)
class Autoregressive(Parameterization):
    """The softmax of the raw output at position i is p(x_i | x_<i).

    The input of the network is shifted by one row: row i has the token of position i - 1, and the
    first row has the mask, so that the first token is modelled too. The process serves only for its
    mask: there is no noise level and no score. Sampling must go from left to right, because a mask
    among the tokens before a position is an input that the network was not trained with.

    Raises ``ValueError`` unless the process is absorbing.
    """

    normalised = True
    causal = True

    time_independent: bool = field(default=True, init=False)
    first: int | None = None
    """Id of the token that the first row has instead of the mask: published models begin with a
    token of their vocabulary. A mask among the other inputs then is this token too."""

    def __post_init__(self):
        if not self.process.absorbing:
            raise ValueError("it needs an absorbing process: its mask is the first input")
        if self.first is not None and not 0 <= self.first < self.process.num_tokens:
            raise FieldError(
                "first", f"must be a token, 0 to {self.process.num_tokens - 1}, got {self.first}"
            )

    def inputs(self, x_BL, attend=None):
        """Shift the tokens by one row within each segment, with causal attention.

        The first row of a segment has the mask, or the token ``first``. Raises ValueError if
        ``attend`` has another kind than "all": it may give segments, but no order.
        """
        first_BL = jnp.zeros(x_BL.shape, bool).at[:, 0].set(True)
        segment_BL = None
        if attend is not None:
            if attend.kind != "all":
                raise ValueError("an autoregressive model is causal by itself: give segments only")
            segment_BL = attend.segment_BL
        if segment_BL is not None:
            first_BL = first_BL.at[:, 1:].set(segment_BL[:, 1:] != segment_BL[:, :-1])
        before_BL = jnp.where(first_BL, self.process.mask, jnp.roll(x_BL, 1, axis=1))
        if self.first is not None:
            before_BL = jnp.where(before_BL == self.process.mask, self.first, before_BL)
        return Inputs(tokens_BM=before_BL, attend=Attend(kind="causal", segment_BL=segment_BL))

    def log_score(self, raw, x, sigma):
        """Raises ValueError: the model has no ratios p_t(y) / p_t(x)."""
        raise ValueError("an autoregressive model has no score, only log p(x_i | x_<i)")


make = Autoregressive

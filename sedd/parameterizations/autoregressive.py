"""Autoregression: each token given those before it. arXiv:1706.03762, section 3.1."""

from dataclasses import dataclass, field

import jax.numpy as jnp

from sedd.networks.base import Attend
from sedd.parameterizations.base import Inputs, Parameterization


@dataclass(frozen=True, kw_only=True)
class Autoregressive(Parameterization):
    """The raw output at position i is log p(x_i | x_<i): the network's input is shifted by one.

    The mask is the first input, so that the first token is modelled too; the process has no other
    use here. Such a model has no noise level and no score. A mask among the tokens before a
    position is an input that the network was not trained with.
    """

    normalised = True
    causal = True

    time_independent: bool = field(default=True, init=False)

    def __post_init__(self):
        if not self.process.absorbing:
            raise ValueError("it needs an absorbing process: its mask is the first input")

    def inputs(self, x_BL, attend=None):
        """Row i has the token of position i - 1, or the mask at the start of a segment; causal.

        Raises ValueError unless ``attend`` describes segments alone.
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
        return Inputs(tokens_BM=before_BL, attend=Attend(kind="causal", segment_BL=segment_BL))

    def log_score(self, raw, x, sigma):
        """Raises ValueError: the model has no ratios p_t(y) / p_t(x)."""
        raise ValueError("an autoregressive model has no score, only log p(x_i | x_<i)")


make = Autoregressive

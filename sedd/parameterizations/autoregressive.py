"""Autoregression: each token given those before it. arXiv:1706.03762, section 3.1."""

from dataclasses import dataclass, field

import jax.numpy as jnp

from sedd.networks.base import Attend
from sedd.parameterizations.base import Parameterization


@dataclass(frozen=True, kw_only=True)
class Autoregressive(Parameterization):
    """The raw output at i is read as log p(x_i | x_<i), which the network sees shifted by one.

    The mask stands before the first token, so that the first is modelled as well. It is the only
    use of the process: such a model has no noise level and no score. Tokens after a position
    change nothing there, and a mask before it is one that the network was not trained with.
    """

    normalised = True
    causal = True

    time_independent: bool = field(default=True, init=False)

    def __post_init__(self):
        if self.process.mask_id is None:
            raise ValueError("it needs an absorbing process, with whose mask a sequence begins")

    def inputs(self, x_BL, attend=None):
        """Position i has the token of i - 1, or the mask where its segment begins, and sees j ≤ i.

        Raises ValueError where ``attend`` has an order of its own.
        """
        first_BL = jnp.zeros(x_BL.shape, bool).at[:, 0].set(True)
        segment_BL = None
        if attend is not None:
            if attend.rank_q_BL is not None:
                raise ValueError("an autoregressive model has its own order: give segments only")
            segment_BL = attend.segment_BL
        if segment_BL is not None:
            first_BL = first_BL.at[:, 1:].set(segment_BL[:, 1:] != segment_BL[:, :-1])
        mask_id = self.process.num_tokens
        before_BL = jnp.where(first_BL, mask_id, jnp.roll(x_BL, 1, axis=1))
        rank_BL = jnp.broadcast_to(jnp.arange(x_BL.shape[1]), x_BL.shape)
        return before_BL, Attend(rank_q_BL=rank_BL, rank_k_BL=rank_BL, segment_BL=segment_BL)

    def log_score(self, raw, x, sigma):
        """Raises ValueError: what follows a position has no part in its distribution."""
        raise ValueError("an autoregressive model has no score, only log p(x_i | x_<i)")


make = Autoregressive

"""RADD's parameterization: the network's output is log p(x0 | xt). arXiv:2406.03736."""

from dataclasses import dataclass
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from sedd.arrays import NO_MASS, along, log_expm1, put
from sedd.errors import FieldError
from sedd.networks.base import Attend
from sedd.parameterizations.base import Inputs, Parameterization
from sedd.types import Array, Int

Normalise = Literal["real", "all"]


@dataclass(frozen=True, kw_only=True)
class Conditional(Parameterization):
    """The softmax of the raw output over real tokens is c = p(x0 | xt).

    On an absorbing process c does not depend on the time, and the log score at a mask is
    log c - log expm1(σ) (theorem 1 of the paper). The network then needs no time input.

    Raises ``ValueError`` unless the process is absorbing.
    """

    normalised = True

    time_independent: bool = True
    """If False, the network is conditioned on σ too, as in MD4 and MDLM with time conditioning."""
    shift: bool = False
    """Read position i at row i - 1 of the output, as Dream does (arXiv:2508.15487): the network was
    made from an autoregressive one. The first position has no row before it and reads its own, for
    which such models are not trained: begin texts with a given token."""
    normalise: Normalise = "real"
    """Which entries of the raw output share the mass: the real tokens, or all, as in the published
    samplers of large models. With all, the mask and unused rows of the vocabulary keep the mass
    that the network gives them, and the probabilities of tokens sum to less than 1. This changes
    conditionals and scores. Cross entropies, in training and in the k-DCE bound, are normalised
    over the real tokens in any case."""

    def __post_init__(self):
        if not self.process.absorbing:
            raise ValueError("it needs an absorbing process; score and mean work on any")
        if self.normalise not in get_args(Normalise):
            raise FieldError("normalise", f"must be real or all, got {self.normalise!r}")

    def inputs(self, x_BL, attend=None):
        """The tokens as they are; with ``shift`` each position is read one row earlier.

        The first position of a segment reads its own row.
        """
        read_BL = one_row_earlier(x_BL, attend) if self.shift else None
        return Inputs(tokens_BM=x_BL, attend=attend, read_BL=read_BL)

    def log_probs(self, raw):
        if self.normalise == "real":
            return super().log_probs(raw)
        return self.masked_logits(jax.nn.log_softmax(raw, -1))

    def log_score(self, raw, x, sigma):
        # 1 / expm1(σ) is the ratio of the probability that a position is visible to that of a mask.
        log_probs = self.log_probs(raw)
        log_score = log_probs - log_expm1(along(sigma, x))[..., None]
        mask_column = jnp.full((*log_score.shape[:-1], 1), NO_MASS, log_score.dtype)
        return put(jnp.concatenate([log_score, mask_column], -1), x, jnp.zeros(x.shape))


def one_row_earlier(x_BL: Int[Array, "B L"], attend: Attend | None) -> Int[Array, "B L"]:
    """The row before each position, and its own row at the first position of a segment."""
    row_L = jnp.arange(x_BL.shape[1])
    first_BL = jnp.broadcast_to(row_L == 0, x_BL.shape)
    if attend is not None and attend.segment_BL is not None:
        segment_BL = attend.segment_BL
        first_BL = first_BL.at[:, 1:].set(segment_BL[:, 1:] != segment_BL[:, :-1])
    return jnp.where(first_BL, row_L, row_L - 1)


make = Conditional

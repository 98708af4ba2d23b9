"""The base of parameterizations: raw network output as a log score or a log conditional."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from sedd.arrays import NO_MASS, put
from sedd.networks.base import Attend
from sedd.processes.base import Process
from sedd.types import Array, Float, Int


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Inputs:
    """A network call for tokens [B, L]: M rows of input, and the row at which a position is read.

    M need not be L. A model that reads position i one row earlier, or at a query row of its own,
    differs from others in its ``Inputs`` alone.
    """

    tokens_BM: Int[Array, "B M"]
    positions_BM: Int[Array, "B M"] | None = (
        None  # for the network's position encoding; None: 0..M-1
    )
    attend: Attend | None = None
    read_BL: Int[Array, "B L"] | None = None  # row of position i's distribution; None: row i

    def read(self, hidden_BMD: Float[Array, "B M D"]) -> Float[Array, "B L D"]:
        """The hidden states of the rows at which positions 0..L-1 are read."""
        if self.read_BL is None:
            return hidden_BMD
        return jnp.take_along_axis(hidden_BMD, self.read_BL[..., None], 1)


@dataclass(frozen=True, kw_only=True)
class Parameterization(ABC):
    """Turns raw output [..., V] at tokens x [...] into distributions.

    The axes of ``sigma`` are the leading axes of x: [B] or [B, L] for tokens [B, L]. The network of
    a ``time_independent`` model takes no ``sigma``. Cross entropies train ``normalised``
    parameterizations only: the normaliser of a score would stay untrained.
    """

    process: Process
    time_independent: bool
    normalised: ClassVar[bool]  # whether a constant added to a row of raw output changes nothing
    causal: ClassVar[bool] = (
        False  # whether position i is modelled given the positions before it only
    )

    def inputs(self, x_BL: Int[Array, "B L"], attend: Attend | None = None) -> Inputs:
        """The network call for the tokens x; ``attend`` restricts which positions see which."""
        return Inputs(tokens_BM=x_BL, attend=attend)

    @abstractmethod
    def log_score(
        self, raw: Float[Array, "*b V"], x: Int[Array, "*b"], sigma: Float[Array, "..."]
    ) -> Float[Array, "*b V"]:
        """log p_t(y) / p_t(x) for every y; 0 at y = x."""

    def masked_logits(self, raw: Float[Array, "*b V"]) -> Float[Array, "*b N"]:
        """Unnormalised log probabilities of the clean token at a mask of an absorbing process.

        The shift of a score by a function of σ is the same for all tokens, and cancels when the
        probabilities are normalised.
        """
        return raw[..., : self.process.num_tokens]

    def log_conditional(
        self, raw: Float[Array, "*b V"], x: Int[Array, "*b"]
    ) -> Float[Array, "*b N"]:
        """log p(x0 = y | x), normalised over the real tokens: 0 and -1e6 where x is visible.

        Raises ValueError unless the process is absorbing: else a visible token may be wrong.
        """
        if not self.process.absorbing:
            raise ValueError("the conditional of clean tokens exists on an absorbing process only")
        log_probs = jax.nn.log_softmax(self.masked_logits(raw), -1)
        revealed = put(jnp.full_like(log_probs, NO_MASS), x, jnp.zeros(x.shape))
        return jnp.where((x == self.process.mask_id)[..., None], log_probs, revealed)

"""How the raw output of a network is read: as a log score, or as a log conditional."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from sedd.arrays import NO_MASS, put
from sedd.networks.base import Attend
from sedd.processes.base import Process
from sedd.types import Array, Float, Int


@dataclass(frozen=True, kw_only=True)
class Parameterization(ABC):
    """Reads raw output [..., V] at tokens x [...]; ``sigma`` broadcasts against x.

    ``time_independent`` models never see the time: their network takes no ``sigma``. Cross
    entropies train ``normalised`` ones only: of a score they would leave the normaliser untrained.
    """

    process: Process
    time_independent: bool
    normalised: ClassVar[bool]  # whether adding a constant to a row of raw output changes nothing
    causal: ClassVar[bool] = False  # whether a position's output depends on those before it alone

    def inputs(
        self, x_BL: Int[Array, "B L"], attend: Attend | None = None
    ) -> tuple[Int[Array, "B L"], Attend | None]:
        """What the network is given for the tokens x: tokens, and which positions see which."""
        return x_BL, attend

    @abstractmethod
    def log_score(
        self, raw: Float[Array, "*b V"], x: Int[Array, "*b"], sigma: Float[Array, "..."]
    ) -> Float[Array, "*b V"]:
        """log p_t(y) / p_t(x) for every y; 0 at y = x."""

    def masked_logits(self, raw: Float[Array, "*b V"]) -> Float[Array, "*b N"]:
        """Unnormalised log probabilities of the clean token where x is the mask (absorbing only).

        A score's shift by σ is the same for all tokens: it cancels in the normalisation.
        """
        return raw[..., : self.process.num_tokens]

    def log_conditional(
        self, raw: Float[Array, "*b V"], x: Int[Array, "*b"]
    ) -> Float[Array, "*b N"]:
        """log p(x0 = y | x), normalised over the real tokens; a revealed token is certain.

        Raises ValueError on a process without a mask, where a token may be wrong though visible.
        """
        mask_id = self.process.mask_id
        if mask_id is None:
            raise ValueError("the conditional of clean tokens exists on an absorbing process only")
        log_probs = jax.nn.log_softmax(self.masked_logits(raw), -1)
        revealed = put(jnp.full_like(log_probs, NO_MASS), x, jnp.zeros(x.shape))
        return jnp.where((x == mask_id)[..., None], log_probs, revealed)

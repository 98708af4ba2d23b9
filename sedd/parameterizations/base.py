"""The base of parameterizations: raw network output as a log score or a log conditional.

A parameterization also prepares the network call (``Inputs``). The denoiser and the objectives
therefore do not know whether a model is, for example, autoregressive.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from sedd.arrays import NO_MASS, put
from sedd.networks.base import Attend, Network
from sedd.processes.base import Process
from sedd.types import Array, Float, Int, Key, Params


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Inputs:
    """The arguments of the network call for tokens [B, L].

    The network gets M rows, and M may differ from L. Prediction i is read at row ``read_BL[:, i]``,
    which may be a query row that the model adds. There are L predictions, one for each position,
    except in ``AnySubset.in_order``: there ``read_BL`` is [B, K], with one entry for each query.
    """

    tokens_BM: Int[Array, "B M"]
    positions_BM: Int[Array, "B M"] | None = None  # for the position encoding; None is 0..M-1
    attend: Attend | None = None
    read_BL: Int[Array, "B L"] | None = None  # None reads position i at row i

    def hidden(
        self,
        network: Network,
        params: Params,
        *,
        sigma: Float[Array, "..."] | None = None,
        keys_B: Key[Array, " B"] | None = None,
        latent_BZ: Float[Array, "B Z"] | None = None,
    ) -> Float[Array, "B L D"]:
        """Call the network, and return the hidden states of the predictions.

        Args:
            network: the network.
            params: its parameters.
            sigma: the condition, [B] or [B, L], for a network that has one; see
                ``Parameterization.condition_of``.
            keys_B: one key a sequence, which turn on dropout.
            latent_BZ: a latent of each sequence, for a network that takes one.
        """
        latent = {} if latent_BZ is None else {"latent_BZ": latent_BZ}
        hidden_BMD = network.hidden(
            params,
            self.tokens_BM,
            positions_BL=self.positions_BM,
            attend=self.attend,
            sigma_B=sigma,
            keys_B=keys_B,
            **latent,
        )
        return self.read(hidden_BMD)

    def read(self, hidden_BMD: Float[Array, "B M D"]) -> Float[Array, "B L D"]:
        """Select the hidden states of the predictions: those at rows ``read_BL``, in this order."""
        if self.read_BL is None:
            return hidden_BMD
        return jnp.take_along_axis(hidden_BMD, self.read_BL[..., None], 1)


@dataclass(frozen=True, kw_only=True)
class Parameterization(ABC):
    """Turns raw output [..., V] at tokens x [...] into distributions.

    The axes of ``sigma`` are the leading axes of x: [B] or [B, L] for tokens [B, L].

    If ``time_independent``, the network gets no ``sigma``. If ``causal``, the output at position i
    depends only on the tokens before i.

    If ``normalised``, the raw output is used only through a softmax, so that a constant added to a
    row changes nothing. A log score is not normalised: the constant is part of the score. A cross
    entropy gives no gradient to the constant, so the cross-entropy objectives accept normalised
    parameterizations only.
    """

    process: Process
    time_independent: bool
    normalised: ClassVar[bool]
    causal: ClassVar[bool] = False

    def inputs(self, x_BL: Int[Array, "B L"], attend: Attend | None = None) -> Inputs:
        """Prepare the network call for tokens x; ``attend`` restricts which positions see which."""
        return Inputs(tokens_BM=x_BL, attend=attend)

    def condition_of(self, sigma: Float[Array, "..."] | None) -> Float[Array, "..."] | None:
        """What the network is told at total noise σ: σ, or None if ``time_independent``."""
        return None if self.time_independent else sigma

    @abstractmethod
    def log_score(
        self, raw: Float[Array, "*b V"], x: Int[Array, "*b"], sigma: Float[Array, "..."]
    ) -> Float[Array, "*b V"]:
        """log(p_t(x with y at its position) / p_t(x)) for every state y; 0 at y = x.

        Args:
            raw: raw output at x.
            x: the tokens.
            sigma: total noise, above 0.
        """

    def masked_logits(self, raw: Float[Array, "*b V"]) -> Float[Array, "*b N"]:
        """Unnormalised log probabilities of the clean token at a mask of an absorbing process.

        The result is the raw output of the real tokens. This holds for a log score too: at a mask a
        log score is the log probability plus a function of σ, and normalisation cancels the
        function.
        """
        return raw[..., : self.process.num_tokens]

    def log_probs(self, raw: Float[Array, "*b V"]) -> Float[Array, "*b N"]:
        """Log probabilities of the clean token at a mask, normalised over the real tokens.

        A subclass may normalise them otherwise.
        """
        return jax.nn.log_softmax(self.masked_logits(raw), -1)

    def log_conditional(
        self, raw: Float[Array, "*b V"], x: Int[Array, "*b"]
    ) -> Float[Array, "*b N"]:
        """log p(x0 = y | x) of the real tokens y, at a mask as ``log_probs`` normalises it.

        A visible token is certain: at its position the entry is 0 for this token and -1e6 for the
        others. Raises ValueError unless the process is absorbing, because on other processes a
        visible token may be wrong.
        """
        if not self.process.absorbing:
            raise ValueError("the conditional of clean tokens exists on an absorbing process only")
        log_probs = self.log_probs(raw)
        revealed = put(jnp.full_like(log_probs, NO_MASS), x, jnp.zeros(x.shape))
        return jnp.where((x == self.process.mask_id)[..., None], log_probs, revealed)

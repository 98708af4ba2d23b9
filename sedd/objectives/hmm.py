"""The loss of a hidden Markov model on a masked diffusion model. arXiv:2603.00045."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from sedd.errors import FieldError
from sedd.networks.base import Network, read_out
from sedd.networks.hidden_markov import log_factors, unwindowed, windows
from sedd.networks.rows import over_chunks
from sedd.objectives.base import Corrupted
from sedd.objectives.k_dce import KDCE
from sedd.objectives.rows import chunk_rows, row_nats
from sedd.types import Array, Bool, Float, Int, Params


@dataclass(frozen=True, kw_only=True)
class Hmm(KDCE):
    """The loss -L/M·Σ_windows log p̂(x0 of the masked positions | xt) of the network hmm_head.

    p̂ is the joint distribution of the masked tokens of a window that the head makes of the trunk's
    conditionals. The sequence is cut into windows of ``window`` tokens. The number M of masked
    positions is uniform in 1..L, and the positions are uniform given M, for L scored positions.
    Visible tokens of a window are given. The trunk is fixed.

    The mean is no bound on -log p(x0): every number of masks counts equally, as in
    ``self_speculative``, and p̂ is not how any order of network calls would score the text.
    arXiv:2603.00045.
    """

    trains_hmm_head = True

    packs = False

    window: int = 32
    """Tokens of a window, within which those of one call are drawn jointly."""

    def __post_init__(self):
        super().__post_init__()
        if self.window < 2:
            raise FieldError("window", f"must be at least 2, got {self.window}")

    def nats(self, network, params, corrupted, x0_BL, **kwargs):
        """Return the weighted nats of every position, [B, L].

        The nats of a window are spread evenly over its masked positions.
        """
        return self.both_nats(network, params, corrupted, x0_BL)[0]

    def summed_nats(self, network, params, corrupted, x0_BL, **kwargs):
        """Return the sum of ``nats`` over the batch; differentiable in the head's parameters."""
        return self.nats(network, params, corrupted, x0_BL).sum()

    def both_nats(
        self, network: Network, params: Params, corrupted: Corrupted, x0_BL: Int[Array, "B L"]
    ) -> Float[Array, "2 B L"]:
        """The weighted nats of every position: of tokens drawn jointly, and of each alone.

        The second are those of the trunk's conditionals.
        """
        masked_BL, weight_BL = corrupted.weight_BL > 0, corrupted.weight_BL
        hidden_MD, head, weight_M, leaves = jax.lax.stop_gradient(
            self._rows(network, params, corrupted, x0_BL)
        )
        alone_BL = row_nats(self._nats_of, hidden_MD, head, weight_M, leaves).reshape(x0_BL.shape)
        hmm = network.hmm(params)
        factor_MH: Any = _log_factors(
            self._log_conditional, hmm.emission_HN, hidden_MD, head, weight_M > 0
        )
        known_BLH = hmm.log_factors_of(jnp.asarray(x0_BL))
        factor_BLH = jnp.where(masked_BL[..., None], factor_MH.reshape(known_BLH.shape), known_BLH)
        log_partition = jax.vmap(jax.vmap(hmm.log_partition))
        real_BKW1 = windows(jnp.ones_like(masked_BL), self.window)[..., None]

        def total(factor_BLH):
            factor_BKWH = windows(factor_BLH, self.window)
            return log_partition(jnp.where(real_BKW1, factor_BKWH, 0.0))

        gain_BK = total(known_BLH) - total(factor_BLH)
        masked_BKW = windows(masked_BL, self.window)
        each_BK = gain_BK / jnp.maximum(masked_BKW.sum(-1), 1)
        gain_BL = unwindowed(jnp.where(masked_BKW, each_BK[..., None], 0.0), x0_BL.shape[1])
        return jnp.stack([alone_BL - weight_BL * gain_BL, alone_BL])

    def _log_conditional(self, raw_RV: Float[Array, "R V"]) -> Float[Array, "R N"]:
        """The trunk's log conditionals of masked positions, from its raw output."""
        return jax.nn.log_softmax(self.parameterization.masked_logits(raw_RV), -1)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _log_factors(
    log_conditional,
    emission_HN: Float[Array, "H N"],
    hidden_MD: Float[Array, "M D"],
    head: tuple[Float[Array, "D V"], Float[Array, " V"]],
    select_M: Bool[Array, " M"],
) -> Float[Array, "M H"]:
    """The log factors of the selected rows, in chunks; differentiable in the emissions alone.

    The backward pass computes the conditionals of a chunk again, so that none are stored.
    """
    sizes = chunk_rows(len(hidden_MD), head[0].shape[1], copies=2)

    def chunk(index_R, safe_R, factor_MH):
        log_probs_RN = log_conditional(read_out(hidden_MD[safe_R], *head))
        return factor_MH.at[index_R].set(log_factors(emission_HN, log_probs_RN), mode="drop")

    zeros_MH = jnp.zeros((len(hidden_MD), len(emission_HN)))
    return over_chunks(select_M, sizes, chunk, zeros_MH)


def _forward(log_conditional, emission_HN, hidden_MD, head, select_M):
    factor_MH = _log_factors(log_conditional, emission_HN, hidden_MD, head, select_M)
    return factor_MH, (factor_MH, hidden_MD, head, select_M)


def _backward(log_conditional, kept, cotangent_MH):
    """u = Σ_v B_v c_v, so that the gradient of log u by B_v is c_v / u."""
    factor_MH, hidden_MD, head, select_M = kept
    sizes = chunk_rows(len(hidden_MD), head[0].shape[1], copies=2)

    def chunk(index_R, safe_R, grad_HN):
        probs_RN = jnp.exp(log_conditional(read_out(hidden_MD[safe_R], *head)))
        each_RH = cotangent_MH[safe_R] * jnp.exp(-factor_MH[safe_R])
        each_RH = jnp.where((index_R < len(hidden_MD))[:, None], each_RH, 0.0)
        return grad_HN + each_RH.T @ probs_RN

    zeros_HN = jnp.zeros((factor_MH.shape[1], head[0].shape[1] - 1))
    grad_HN = over_chunks(select_M, sizes, chunk, zeros_HN)
    return grad_HN, None, None, None


_log_factors.defvjp(_forward, _backward)

make = Hmm

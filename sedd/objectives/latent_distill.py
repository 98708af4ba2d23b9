"""Distillation of several calls of a teacher into one call with a latent. arXiv:2410.08709."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from sedd.arrays import fold
from sedd.errors import FieldError
from sedd.networks.base import Network
from sedd.objectives.base import Corrupted
from sedd.objectives.k_dce import KDCE
from sedd.objectives.rows import row_nats, summed_nats
from sedd.objectives.self_distill import drawn_at
from sedd.types import Array, Float, Int, Params


@dataclass(frozen=True, kw_only=True)
class LatentDistill(KDCE):
    """The loss -L/M·log mean_ε Π_masked c(y_i | xt, ε) of the network latent, for texts y.

    The masks are those of ``k_dce``, with M masked positions. The frozen teacher completes xt to y
    in ``calls`` network calls, which reveal a random subset each. With probability ``data`` y is
    the text of the corpus itself. The mean is over ``samples`` latents, which all positions share,
    so that the minimum of the loss is a network whose one call draws from the law of the teacher's
    many calls, as far as a mixture of products can. The gradient is that of each latent's loss,
    weighted by the latent's posterior probability among the samples.

    The loss is no bound on -log p(x0): y is the teacher's text, and L/M times a joint log
    probability of M tokens does not add up to that of a text. arXiv:2410.08709 (Di4C) distils one
    step of the teacher at a time, with a control variate; here all calls are distilled at once.
    """

    packs = False

    trains_latent = True

    calls: int = 8
    """Network calls in which the teacher completes a text."""
    samples: int = 16
    """Latents of each sequence and step, at least 2."""
    data: float = 0.1
    """Probability that the text of the corpus takes the place of the teacher's, in [0, 1]."""

    def __post_init__(self):
        super().__post_init__()
        for name, least in (("calls", 1), ("samples", 2)):
            if getattr(self, name) < least:
                raise FieldError(name, f"must be at least {least}, got {getattr(self, name)}")
        if not 0 <= self.data <= 1:
            raise FieldError("data", f"must be in [0, 1], got {self.data}")

    @property
    def teacher_calls(self) -> int:
        """Those that complete a text."""
        return self.calls

    def corrupt(self, keys_B, u_B, x0_BL, scored_BL):
        corrupted = super().corrupt(fold(keys_B, 0), u_B, x0_BL, scored_BL)
        return replace(corrupted, keys_B=fold(keys_B, 1))

    def taught(self, network: Network, params: Params, corrupted: Corrupted) -> Corrupted:
        """Complete xt by the teacher, with the latent 0: the result has ``drawn_BL``."""
        assert corrupted.keys_B is not None  # ``corrupt`` returns it
        xt_BL, head = corrupted.xt_BL, network.head(params)
        length = xt_BL.shape[1]
        masked_BL = corrupted.weight_BL > 0
        draw_BL = jax.vmap(lambda key: jax.random.permutation(key, length))(
            fold(corrupted.keys_B, 0)
        )
        rank_BL = jnp.argsort(jnp.argsort(jnp.where(masked_BL, draw_BL, length + draw_BL), -1), -1)
        call_BL = rank_BL * self.calls // jnp.maximum(masked_BL.sum(-1, keepdims=True), 1)
        token_keys_B = fold(corrupted.keys_B, 1)

        def reveal(call, x_BL):
            hidden_BLD = self.parameterization.inputs(x_BL).hidden(network, params)
            now_BL = masked_BL & (call_BL == call)
            return drawn_at(now_BL, token_keys_B, x_BL, hidden_BLD, head, self.parameterization)

        return replace(corrupted, drawn_BL=jax.lax.fori_loop(0, self.calls, reveal, xt_BL))

    def nats(self, network, params, corrupted, x0_BL, **kwargs):
        """Return the weighted nats of every position, [B, L].

        Those of a text are spread evenly over its masked positions.
        """
        log_prob_SB, *_ = self._by_latent(network, params, corrupted, x0_BL, **kwargs)
        return _spread(corrupted, -_log_mean(log_prob_SB))

    def summed_nats(self, network, params, corrupted, x0_BL, **kwargs):
        """Return the sum of ``nats`` over the batch; differentiable in ``params``."""
        log_prob_SB, rows = self._by_latent(network, params, corrupted, x0_BL, **kwargs)
        hidden_MD, head, weight_M, leaves = rows
        # The gradient of -log mean exp(l_s) is that of -Σ_s p_s·l_s, for p the softmax of l.
        posterior_SB1 = jax.nn.softmax(log_prob_SB, 0)[..., None]
        weight_M = weight_M * jnp.broadcast_to(
            posterior_SB1, (*log_prob_SB.shape, x0_BL.shape[1])
        ).reshape(-1)
        surrogate: Any = summed_nats(self._nats_of, hidden_MD, head, weight_M, leaves)
        value = _spread(corrupted, -_log_mean(log_prob_SB)).sum()
        return value + surrogate - jax.lax.stop_gradient(surrogate)

    def both_nats(
        self, network: Network, params: Params, corrupted: Corrupted, x0_BL: Int[Array, "B L"]
    ) -> Float[Array, "2 B L"]:
        """The weighted nats of every position: with ``samples`` latents, and with the latent 0.

        The first are those of tokens given a common latent, the second those of each alone.
        """
        joint_BL = self.nats(network, params, corrupted, x0_BL)
        rows = self._rows(network, params, corrupted, x0_BL)
        alone_BL = row_nats(self._nats_of, *rows).reshape(x0_BL.shape)
        return jnp.stack([joint_BL, alone_BL])

    def _by_latent(self, network, params, corrupted, x0_BL, *, keys_B=None):
        """Log probability of the masked tokens for each latent, [S, B], and the rows of the loss.

        The rows are those of ``rows.summed_nats``, of the first latent, then of the second, ….
        """
        assert corrupted.keys_B is not None  # ``corrupt`` returns it
        target_BL = x0_BL
        if corrupted.drawn_BL is not None:
            coin_B = jax.vmap(jax.random.uniform)(fold(corrupted.keys_B, 2)) < self.data
            target_BL = jnp.where(coin_B[:, None], x0_BL, corrupted.drawn_BL)
        shape = (self.samples, network.latents)
        noise_BSZ = jax.vmap(lambda key: jax.random.normal(key, shape))(fold(corrupted.keys_B, 3))
        latent_MZ = jnp.moveaxis(noise_BSZ, 1, 0).reshape(-1, shape[1])
        repeated = replace(
            corrupted,
            xt_BL=jnp.tile(corrupted.xt_BL, (self.samples, 1)),
            weight_BL=jnp.tile(corrupted.weight_BL, (self.samples, 1)),
            keys_B=None,
            drawn_BL=None,
            latent_BZ=latent_MZ,
        )
        keys_M = None if keys_B is None else jnp.tile(keys_B, self.samples)
        target_ML = jnp.tile(target_BL, (self.samples, 1))
        rows = self._rows(network, params, repeated, target_ML, keys_B=keys_M)
        hidden_MD, head, weight_M, leaves = rows
        ones_M = (weight_M > 0).astype(jnp.float32)
        hidden_MD, head = jax.lax.stop_gradient((hidden_MD, head))
        each_M = row_nats(self._nats_of, hidden_MD, head, ones_M, leaves)
        return -each_M.reshape(self.samples, *x0_BL.shape).sum(-1), rows


def _log_mean(log_prob_SB: Float[Array, "S B"]) -> Float[Array, " B"]:
    """The log of the mean over latents."""
    return jax.nn.logsumexp(log_prob_SB, 0) - jnp.log(len(log_prob_SB))


def _spread(corrupted: Corrupted, nats_B: Float[Array, " B"]) -> Float[Array, "B L"]:
    """Spread the nats of each text evenly over its masked positions, with their weights."""
    count_B = (corrupted.weight_BL > 0).sum(-1)
    return corrupted.weight_BL * (nats_B / jnp.maximum(count_B, 1))[:, None]


make = LatentDistill

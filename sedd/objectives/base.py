"""The base of training objectives: a corruption, and a loss in nats for each position."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from sedd.arrays import along
from sedd.networks.base import Network
from sedd.objectives.rows import row_nats, summed_nats
from sedd.parameterizations.base import Parameterization
from sedd.schedules import NoiseSchedule
from sedd.types import Array, Bool, Float, Int, Key, Params


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Corrupted:
    """A corrupted batch, and the weight of each position's loss."""

    xt_BL: Int[Array, "B L"]
    weight_BL: Float[Array, "B L"]
    sigma: Float[Array, "..."] | None = None  # [B] or [B, L]; None if the objective has no time


@dataclass(frozen=True, kw_only=True)
class Objective(ABC):
    """A loss whose mean over its draws is a bound on -log p(x0), or a term of one, in nats.

    Positions that are not scored are conditioned on: never corrupted, and without a loss.
    """

    schedule: NoiseSchedule
    parameterization: Parameterization
    causal: ClassVar[bool] = (
        False  # whether it trains causal parameterizations; it trains no others then
    )

    def __post_init__(self):
        if self.causal and not self.parameterization.causal:
            raise ValueError("it needs the parameterization autoregressive")
        if self.parameterization.causal and not self.causal:
            raise ValueError(
                "it corrupts tokens anywhere, but the parameterization autoregressive sees only "
                "those before a position: train it with the objective autoregressive"
            )

    @property
    def process(self):
        return self.parameterization.process

    @abstractmethod
    def corrupt(
        self,
        keys_B: Key[Array, " B"],
        u_B: Float[Array, " B"],
        x0_BL: Int[Array, "B L"],
        scored_BL: Bool[Array, "B L"],
    ) -> Corrupted:
        """Corrupt x0; ``u_B``, uniform in [0, 1), determines the noise level."""

    @abstractmethod
    def row_nats(
        self,
        raw_RV: Float[Array, "*r V"],
        x0_R: Int[Array, "*r"],
        xt_R: Int[Array, "*r"],
        sigma_R: Float[Array, "*r"] | None,
    ) -> Float[Array, "*r"]:
        """Unweighted nats of single positions, from the raw output there.

        ``sigma_R`` is the total noise that ``corrupt`` returned, or None if it returned none.
        """

    def nats(self, network: Network, params: Params, corrupted: Corrupted, x0_BL, **kwargs):
        """Weighted nats of every position, [B, L]; not differentiable.

        The sum over L is the loss of a sequence. ``keys_B``, one key a sequence, turns dropout on.
        """
        rows = self._rows(network, params, corrupted, x0_BL, **kwargs)
        return row_nats(self._nats_of, *rows).reshape(x0_BL.shape)

    def summed_nats(self, network: Network, params: Params, corrupted: Corrupted, x0_BL, **kwargs):
        """The sum of ``nats`` over the batch; differentiable in ``params``."""
        return summed_nats(self._nats_of, *self._rows(network, params, corrupted, x0_BL, **kwargs))

    def _nats_of(self, raw_RV: Array, leaves: tuple[Array, ...]) -> Array:
        x0_R, xt_R, *sigma = leaves
        return self.row_nats(raw_RV, x0_R, xt_R, sigma[0] if sigma else None)

    def _rows(
        self,
        network: Network,
        params: Params,
        corrupted: Corrupted,
        x0_BL: Int[Array, "B L"],
        *,
        keys_B: Key[Array, " B"] | None = None,
    ):
        """The arguments of ``summed_nats``, with a row for each position of the batch."""
        xt_BL, sigma = corrupted.xt_BL, corrupted.sigma
        inputs = self.parameterization.inputs(xt_BL)
        hidden_BLD = inputs.read(
            network.hidden(
                params,
                inputs.tokens_BM,
                positions_BL=inputs.positions_BM,
                attend=inputs.attend,
                sigma_B=sigma if network.time_conditioned else None,
                keys_B=keys_B,
            )
        )
        leaves = [x0_BL, xt_BL]
        if sigma is not None:
            leaves.append(jnp.broadcast_to(along(sigma, xt_BL), x0_BL.shape))
        return (
            hidden_BLD.reshape(-1, hidden_BLD.shape[-1]),
            network.head(params),
            jnp.ravel(corrupted.weight_BL),
            tuple(jnp.ravel(leaf) for leaf in leaves),
        )


def draw_uniform(
    key: Key[Array, ""], index_B: Int[Array, " B"], total: int, *, stratified: bool
) -> Float[Array, " B"]:
    """One draw in [0, 1) for each example, from its index in the global batch of ``total``.

    Stratified draws are (u + index / total) mod 1 with one u for the batch: they cover the interval
    evenly, and each of them is uniform.
    """
    if not stratified:
        return jax.vmap(lambda i: jax.random.uniform(jax.random.fold_in(key, i)))(index_B)
    return (jax.random.uniform(key) + index_B / total) % 1.0


@dataclass(frozen=True, kw_only=True)
class DenoisingCrossEntropy(Objective):
    """-log p(x0_i | xt) at masked positions, with the weights of the subclass's ``corrupt``."""

    def __post_init__(self):
        super().__post_init__()
        if not self.process.absorbing:
            raise ValueError("it needs an absorbing process; score_entropy works on any")
        if not self.parameterization.normalised:
            raise ValueError(
                "it needs the parameterization conditional: it does not train the normaliser of a "
                "score; score_entropy does"
            )

    def row_nats(self, raw_RV, x0_R, xt_R, sigma_R):
        logits_RN = self.parameterization.masked_logits(raw_RV)
        picked_R = jnp.take_along_axis(logits_RN, x0_R[..., None], -1)[..., 0]
        return jax.nn.logsumexp(logits_RN, -1) - picked_R

    def _masked(self, masked_BL, x0_BL, weight_B, sigma=None) -> Corrupted:
        return Corrupted(
            xt_BL=jnp.where(masked_BL, self.process.mask, x0_BL),
            weight_BL=jnp.where(masked_BL, weight_B[:, None], 0.0),
            sigma=sigma,
        )

    def _require_time_independent(self) -> None:
        if not self.parameterization.time_independent:
            raise ValueError("it has no time: it needs a time-independent conditional network")

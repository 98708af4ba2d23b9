"""What a training objective is: its own corruption, and nats for each position that it scores."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from sedd.networks.base import Attend, Network
from sedd.objectives.rows import row_nats, summed_nats
from sedd.parameterizations.base import Parameterization
from sedd.schedules import NoiseSchedule
from sedd.types import Array, Bool, Float, Int, Key, Params


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Corrupted:
    """A corrupted batch: what the network sees, and the weight of each position's nats."""

    xt_BL: Int[Array, "B L"]
    weight_BL: Float[Array, "B L"]
    sigma_B: Float[Array, " B"] | None = None  # None where the objective knows no time
    attend: Attend | None = None


@dataclass(frozen=True, kw_only=True)
class Objective(ABC):
    """A loss whose mean over draws is (a part of) a bound on -log p(x0), in nats.

    Positions that are not scored are given: they are never corrupted, and the loss is that of the
    scored positions given the rest.
    """

    schedule: NoiseSchedule
    parameterization: Parameterization
    causal: ClassVar[bool] = False  # the kind of parameterization that it trains

    def __post_init__(self):
        if self.causal and not self.parameterization.causal:
            raise ValueError("it needs the parameterization autoregressive")
        if self.parameterization.causal and not self.causal:
            raise ValueError(
                "it corrupts tokens anywhere, and the parameterization autoregressive sees those "
                "before a position alone: the objective autoregressive trains it"
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
        """Corrupt x0 at the noise level that ``u_B``, uniform in [0, 1), stands for."""

    @abstractmethod
    def row_nats(
        self,
        raw_RV: Float[Array, "*r V"],
        x0_R: Int[Array, "*r"],
        xt_R: Int[Array, "*r"],
        sigma_R: Float[Array, "*r"] | None,
    ) -> Float[Array, "*r"]:
        """Unweighted nats of single positions, a pure function of the raw output there.

        ``sigma_R`` is what ``corrupt`` returned: None only where that knows no time.
        """

    def nats(self, network: Network, params: Params, corrupted: Corrupted, x0_BL, **kwargs):
        """Weighted nats of every position, [B, L], unreduced; not differentiable.

        Their sum over L is one example's loss. ``keys_B``, one key an example, turns dropout on.
        """
        rows = self._rows(network, params, corrupted, x0_BL, **kwargs)
        return row_nats(self._nats_of, *rows).reshape(x0_BL.shape)

    def summed_nats(self, network: Network, params: Params, corrupted: Corrupted, x0_BL, **kwargs):
        """The sum of ``nats`` over the batch, differentiable in ``params``."""
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
        """Every position as a row: its hidden state, the head, its weight, tokens and sigma."""
        sigma_B = corrupted.sigma_B
        hidden_BLD = network.hidden(
            params,
            corrupted.xt_BL,
            attend=corrupted.attend,
            sigma_B=sigma_B if network.time_conditioned else None,
            keys_B=keys_B,
        )
        leaves = [x0_BL, corrupted.xt_BL]
        if sigma_B is not None:
            leaves.append(jnp.broadcast_to(sigma_B[:, None], x0_BL.shape))
        return (
            hidden_BLD.reshape(-1, hidden_BLD.shape[-1]),
            network.head(params),
            jnp.ravel(corrupted.weight_BL),
            tuple(jnp.ravel(leaf) for leaf in leaves),
        )


def draw_uniform(
    key: Key[Array, ""], index_B: Int[Array, " B"], total: int, *, stratified: bool
) -> Float[Array, " B"]:
    """One draw in [0, 1) for each example of a global batch of ``total``, by its global index.

    Stratified: (u + index / total) mod 1 with one shared u, so that a batch covers the interval
    evenly while each slot is uniform by itself.
    """
    if not stratified:
        return jax.vmap(lambda i: jax.random.uniform(jax.random.fold_in(key, i)))(index_B)
    return (jax.random.uniform(key) + index_B / total) % 1.0


@dataclass(frozen=True, kw_only=True)
class DenoisingCrossEntropy(Objective):
    """Weighted -log c(x0_i | xt) over masked positions; the weighting names the subclass."""

    def __post_init__(self):
        super().__post_init__()
        if self.process.mask_id is None:
            raise ValueError("it needs an absorbing process; score_entropy works on any")
        if not self.parameterization.normalised:
            raise ValueError(
                "it needs the parameterization conditional: it would leave the normaliser of a "
                "score untrained; score_entropy trains both"
            )

    def row_nats(self, raw_RV, x0_R, xt_R, sigma_R):
        logits_RN = self.parameterization.masked_logits(raw_RV)
        picked_R = jnp.take_along_axis(logits_RN, x0_R[..., None], -1)[..., 0]
        return jax.nn.logsumexp(logits_RN, -1) - picked_R

    def _masked(self, masked_BL, x0_BL, weight_B, sigma_B=None) -> Corrupted:
        return Corrupted(
            xt_BL=jnp.where(masked_BL, self.process.num_tokens, x0_BL),  # the mask's id
            weight_BL=jnp.where(masked_BL, weight_B[:, None], 0.0),
            sigma_B=sigma_B,
        )

    def _require_time_independent(self) -> None:
        if not self.parameterization.time_independent:
            raise ValueError("it has no time: it needs a time-independent conditional network")

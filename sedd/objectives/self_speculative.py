"""The loss of a causal head on a masked diffusion model. arXiv:2510.03929."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from sedd.networks.base import Network
from sedd.objectives.base import Corrupted, DenoisingCrossEntropy
from sedd.objectives.rows import row_nats
from sedd.types import Array, Float, Int, Params


@dataclass(frozen=True, kw_only=True)
class SelfSpeculative(DenoisingCrossEntropy):
    """The loss -L/(L-i)·Σ_(j>i) log q(x0_σ(j) | x0_σ(1), …, x0_σ(j-1)) of the network causal_head.

    The order σ of the positions and the number i of revealed ones, 0 to L-1, are uniform. The trunk
    sees the first i tokens of the order. The causal head also sees x0_σ(i+1), …, x0_σ(j-1), which
    come after them and before the predicted token x0_σ(j). L is the number of scored positions.
    Positions that are not scored are revealed first, and their tokens are always visible. If the
    trunk is not frozen, its own loss is added: the same sum with the trunk's p(x0_σ(j) | x0_σ(1),
    …, x0_σ(i)), which is k_dce.
    arXiv:2510.03929.

    The mean of the causal head's part is no bound on -log p(x0): each number i counts equally, and
    many revealed tokens make the others easy.
    """

    trains_causal_head = True

    packs = False

    def __post_init__(self):
        super().__post_init__()
        self._require_time_independent()

    def corrupt(self, keys_B, u_B, x0_BL, scored_BL):
        length, total_B = x0_BL.shape[1], scored_BL.sum(-1)
        masked_B = jnp.minimum(1 + jnp.floor(u_B * total_B).astype(jnp.int32), total_B)  # L - i
        # A random permutation; float32 uniform draws would tie in long sequences.
        draw_BL = jax.vmap(lambda key: jax.random.permutation(key, length))(keys_B)
        order_BL = jnp.argsort(jnp.where(scored_BL, length + draw_BL, draw_BL), -1)
        rank_BL = jnp.argsort(order_BL, -1)
        masked_BL = rank_BL >= (length - masked_B)[:, None]
        weight_B = total_B / jnp.maximum(masked_B, 1)
        return self._masked(masked_BL, x0_BL, weight_B, rank_BL=rank_BL)

    def nats(self, network, params, corrupted, x0_BL, **kwargs):
        rows = self._rows(network, params, corrupted, x0_BL, **kwargs)
        return row_nats(self._nats_of, *rows).reshape(2, *x0_BL.shape).sum(0)

    def both_nats(
        self, network: Network, params: Params, corrupted: Corrupted, x0_BL: Int[Array, "B L"]
    ) -> Float[Array, "2 B L"]:
        """The weighted nats of every position: of the causal head, and of the trunk alone.

        The second are those of tokens that are drawn independently. Not differentiable.
        """
        hidden_MD, head, weight_M, leaves = self._rows(network, params, corrupted, x0_BL)
        weight_M = jnp.tile(jnp.ravel(corrupted.weight_BL), 2)  # a frozen trunk's too
        return row_nats(self._nats_of, hidden_MD, head, weight_M, leaves).reshape(2, *x0_BL.shape)

    def _rows(self, network, params, corrupted, x0_BL, *, keys_B=None):
        """The rows of the causal head, then those of the trunk, of weight 0 if it is frozen."""
        assert corrupted.rank_BL is not None  # ``corrupt`` returns it
        hidden_MD, head, weight_M, leaves = super()._rows(
            network, params, corrupted, x0_BL, keys_B=None if network.frozen_trunk else keys_B
        )
        causal_BLD = network.causal_hidden(
            params,
            hidden_MD.reshape(*x0_BL.shape, -1),
            x0_BL,
            jnp.argsort(corrupted.rank_BL, -1),
            keys_B=keys_B,
        )
        return (
            jnp.concatenate([causal_BLD.reshape(hidden_MD.shape), hidden_MD]),
            head,
            jnp.concatenate([weight_M, weight_M * (not network.frozen_trunk)]),
            tuple(jnp.tile(leaf, 2) for leaf in leaves),
        )


make = SelfSpeculative

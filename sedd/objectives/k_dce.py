"""RADD's k-denoising cross entropy: any-order autoregression."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from sedd.objectives.base import DenoisingCrossEntropy


@dataclass(frozen=True, kw_only=True)
class KDCE(DenoisingCrossEntropy):
    """The loss -(L/k)·Σ_masked log c(x0), where a uniformly random set of k positions is masked.

    Here c(x0) is the model's probability of the clean token at a masked position, L is the number
    of scored positions, and k is uniform in 1..L. The mean over draws is the NLL of any-order
    autoregression, averaged over all orders of the positions. To predict the j-th token of a random
    order is to predict one of the k = L - j + 1 positions that are still masked. The loss averages
    over these k, and the factor L turns the mean over k into a sum over j. arXiv:2406.03736,
    equation 3.10.
    """

    def __post_init__(self):
        super().__post_init__()
        self._require_time_independent()

    def corrupt(self, keys_B, u_B, x0_BL, scored_BL):
        total_B = scored_BL.sum(-1)
        k_B = jnp.minimum(1 + jnp.floor(u_B * total_B).astype(jnp.int32), total_B)
        # Ranks of a random permutation; float32 uniform draws would tie in long sequences.
        order_BL = jax.vmap(lambda key: jax.random.permutation(key, x0_BL.shape[1]))(keys_B)
        order_BL = jnp.where(scored_BL, order_BL, x0_BL.shape[1])
        rank_BL = jnp.argsort(jnp.argsort(order_BL, -1), -1)
        masked_BL = scored_BL & (rank_BL < k_B[:, None])
        return self._masked(masked_BL, x0_BL, total_B / jnp.maximum(k_B, 1))


make = KDCE

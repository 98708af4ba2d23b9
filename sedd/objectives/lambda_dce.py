"""RADD's λ-denoising cross entropy, whose noise level is the probability of a mask."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from sedd.arrays import fold
from sedd.errors import FieldError
from sedd.objectives.base import Corrupted, DenoisingCrossEntropy
from sedd.objectives.rows import row_nats

LEAST = 2.0**-24  # the smallest step of the uniform draws


@dataclass(frozen=True, kw_only=True)
class LambdaDCE(DenoisingCrossEntropy):
    """The loss -(1/λ)·Σ_masked log c(x0), where λ, uniform in (0, 1], is the probability of a mask.

    Here c(x0) is the model's probability of the clean token at a masked position. The mean over
    draws is the expected NLL over all orders, as for ``k_dce``. The variance diverges
    logarithmically at small λ, where few positions are masked and the weight 1/λ is large.
    arXiv:2406.03736, equation 3.8.

    Two options lower the variance. ``complementary`` costs a second call. With a ``power`` below 1
    the mean is no bound on -log p(x0); validation and ``sedd evaluate`` compute the bound all the
    same.
    """

    power: float = 1.0
    """The weight of a masked position is (2 - power) λ^-power: 1/λ at power 1, for the bound, and 2
    at power 0. A position, masked or not, then has the weight 1 on average over λ."""
    complementary: bool = False
    """Whether each sequence is seen twice, with a mask and with the complement of it. Every token
    is then predicted once, and a step has twice the rows (arXiv:2505.16839)."""

    def __post_init__(self):
        super().__post_init__()
        self._require_time_independent()
        if not 0 <= self.power <= 1:
            raise FieldError("power", f"must be in [0, 1], got {self.power}")

    def corrupt(self, keys_B, u_B, x0_BL, scored_BL):
        lambda_B = 1 - u_B  # in (0, 1], so that the weight 1/λ is finite
        masked_BL = jax.vmap(
            lambda key, p: jax.random.bernoulli(key, p, x0_BL.shape[1:], mode="high")
        )(keys_B, lambda_B)
        corrupted = self._masked(scored_BL & masked_BL, x0_BL, self._weight(lambda_B))
        if not self.complementary:
            return corrupted
        # Positions that are not masked here have the weight of the complement, where they are.
        weight_B = self._weight(jnp.maximum(u_B, LEAST))
        other_BL = jnp.where(scored_BL & ~masked_BL, weight_B[:, None], 0.0)
        return replace(corrupted, weight_BL=(corrupted.weight_BL + other_BL) / 2)

    def _weight(self, share_B):
        return (2 - self.power) * share_B**-self.power

    def rows(self, length):
        return 2 * length if self.complementary else length

    def nats(self, network, params, corrupted, x0_BL, **kwargs):
        if not self.complementary:
            return super().nats(network, params, corrupted, x0_BL, **kwargs)
        rows = self._rows(network, params, corrupted, x0_BL, **kwargs)
        return row_nats(self._nats_of, *rows).reshape(2, *x0_BL.shape).sum(0)

    def _rows(self, network, params, corrupted, x0_BL, *, keys_B=None):
        """The rows of the batch, and behind them those of the complements."""
        if self.complementary:
            corrupted, x0_BL = self._with_complement(corrupted, x0_BL)
            if keys_B is not None:
                others_B = fold(keys_B, 1)
                keys_B = jnp.concatenate([keys_B, others_B])
        return super()._rows(network, params, corrupted, x0_BL, keys_B=keys_B)

    def _with_complement(self, corrupted, x0_BL):
        """Stack the batch and its complements, whose masks are where tokens are seen here."""
        xt_BL, weight_BL, attend = corrupted.xt_BL, corrupted.weight_BL, corrupted.attend
        masked_BL = xt_BL == self.process.mask
        complement_BL = jnp.where((weight_BL > 0) & ~masked_BL, self.process.mask, x0_BL)
        twice = Corrupted(
            xt_BL=jnp.concatenate([xt_BL, complement_BL]),
            weight_BL=jnp.concatenate(
                [jnp.where(masked_BL, weight_BL, 0.0), jnp.where(masked_BL, 0.0, weight_BL)]
            ),
            attend=jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf]), attend),
        )
        return twice, jnp.concatenate([x0_BL, x0_BL])


make = LambdaDCE

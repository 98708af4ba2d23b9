"""RADD's λ-denoising cross entropy, whose noise level is the probability of a mask."""

from dataclasses import dataclass

import jax

from sedd.objectives.base import DenoisingCrossEntropy


@dataclass(frozen=True, kw_only=True)
class LambdaDCE(DenoisingCrossEntropy):
    """The loss -(1/λ)·Σ_masked log c(x0), where λ, uniform in (0, 1], is the probability of a mask.

    Here c(x0) is the model's probability of the clean token at a masked position. The mean over
    draws is the expected NLL over all orders, as for ``k_dce``. The variance diverges
    logarithmically at small λ, where few positions are masked and the weight 1/λ is large.
    arXiv:2406.03736, equation 3.8.
    """

    def __post_init__(self):
        super().__post_init__()
        self._require_time_independent()

    def corrupt(self, keys_B, u_B, x0_BL, scored_BL):
        lambda_B = 1 - u_B  # in (0, 1], so that the weight 1/λ is finite
        masked_BL = jax.vmap(
            lambda key, p: jax.random.bernoulli(key, p, x0_BL.shape[1:], mode="high")
        )(keys_B, lambda_B)
        return self._masked(scored_BL & masked_BL, x0_BL, 1 / lambda_B)


make = LambdaDCE

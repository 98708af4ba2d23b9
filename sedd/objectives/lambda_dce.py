"""RADD's λ-denoising cross entropy: the masking probability itself is the noise level."""

from dataclasses import dataclass

import jax

from sedd.objectives.base import DenoisingCrossEntropy


@dataclass(frozen=True, kw_only=True)
class LambdaDCE(DenoisingCrossEntropy):
    """-(1/λ)·Σ_masked log c(x0) at λ uniform in (0, 1]. arXiv:2406.03736, equation 3.8.

    The mean over draws is the expected NLL over all orders; the variance diverges logarithmically.
    """

    def __post_init__(self):
        super().__post_init__()
        self._require_time_independent()

    def corrupt(self, keys_B, u_B, x0_BL, scored_BL):
        lambda_B = 1 - u_B  # in (0, 1]: the weight 1/λ is finite
        masked_BL = jax.vmap(
            lambda key, p: jax.random.bernoulli(key, p, x0_BL.shape[1:], mode="high")
        )(keys_B, lambda_B)
        return self._masked(scored_BL & masked_BL, x0_BL, 1 / lambda_B)


make = LambdaDCE

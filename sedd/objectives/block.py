"""Block diffusion: the denoising cross entropy of every block, given clean earlier blocks."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from sedd.errors import FieldError
from sedd.objectives.base import DenoisingCrossEntropy
from sedd.parameterizations.block import Block as Parameterization
from sedd.types import Array, Float, Key


@dataclass(frozen=True, kw_only=True)
class Block(DenoisingCrossEntropy):
    """The loss -Σ_b (1/t_b)·Σ_masked log c(x0), with a probability t_b of a mask for each block b.

    Here c(x0) is the model's probability of the clean token at a masked position, given the visible
    tokens of its block and the clean tokens of earlier blocks. One network call of 2L rows has all
    blocks (``doubled`` of the parameterization). The t_b of a row are stratified: the range of
    levels is cut into as many equal intervals as the row has blocks, and each block gets one of
    them, in a random order. All t_b of a row lie at the same place within their intervals, and
    these places are stratified over the rows of a batch. arXiv:2503.09573, equation 8.

    With t_b uniform in (0, 1] the mean over draws is an upper bound on -log p(x0). Other ranges
    (the paper's clipped schedules) lower the variance, and their mean is **not** a bound: it leaves
    out a part of the integral over t. Blocks of one position are an exception, since their mean is
    -log p(x0) at any t_b: ``min_level`` 1 gives the loss of autoregression.

    Raises ``ValueError`` unless the parameterization is ``block``, and ``FieldError`` for levels
    out of their range.
    """

    min_level: float = 0.0
    """Lower end of the probabilities of a mask, in [0, 1]; 0 itself is never drawn."""
    max_level: float = 1.0
    """Upper end of the probabilities of a mask, in (0, 1]."""

    packs = False

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.parameterization, Parameterization):
            name = type(self.parameterization).__name__.lower()
            raise ValueError(
                f"it trains the parameterization block only, got {name}; lambda_dce and k_dce "
                "train conditional"
            )
        if not 0 < self.max_level <= 1:
            raise FieldError("max_level", f"must be in (0, 1], got {self.max_level}")
        if not 0 <= self.min_level <= self.max_level:
            raise FieldError(
                "min_level", f"must be in [0, max_level {self.max_level}], got {self.min_level}"
            )

    @property
    def block(self) -> int:
        """Positions in a block."""
        return self._reading.block

    def rows(self, length):
        return 2 * length

    def levels(
        self, keys_B: Key[Array, " B"], u_B: Float[Array, " B"], length: int
    ) -> Float[Array, "B N"]:
        """The probabilities of a mask that ``corrupt`` draws for each of the N blocks."""
        level_keys_B = jax.vmap(jax.random.split, out_axes=1)(keys_B)[0]
        num_blocks = -(-length // self.block)
        place_BN = jax.vmap(lambda key: jax.random.permutation(key, num_blocks))(level_keys_B)
        u_BN = (place_BN + u_B[:, None]) / num_blocks
        return self.max_level - (self.max_level - self.min_level) * u_BN

    def corrupt(self, keys_B, u_B, x0_BL, scored_BL):
        length = x0_BL.shape[1]
        mask_keys_B = jax.vmap(jax.random.split, out_axes=1)(keys_B)[1]
        block_L = jnp.arange(length) // self.block
        level_BL = self.levels(keys_B, u_B, length)[:, block_L]
        masked_BL = scored_BL & jax.vmap(
            lambda key, p_L: jax.random.bernoulli(key, p_L, mode="high")
        )(mask_keys_B, level_BL)
        return self._masked(masked_BL, x0_BL, 1 / level_BL)

    @property
    def _reading(self) -> Parameterization:
        assert isinstance(self.parameterization, Parameterization)
        return self.parameterization

    def _inputs(self, corrupted, x0_BL):
        return self._reading.doubled(corrupted.xt_BL, x0_BL, corrupted.attend)


make = Block

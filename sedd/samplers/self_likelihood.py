"""The log likelihood of a text under the model that draws it, as a verifier of a search.

It is estimated by the k-denoising cross entropy, arXiv:2406.03736, equation 3.10.
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from sedd.arrays import NAN, at, fold
from sedd.denoiser import Denoiser
from sedd.errors import FieldError, UserError
from sedd.samplers.noise import random_rank
from sedd.types import Array, Bool, Float, Int, Key


@dataclass(frozen=True, kw_only=True)
class SelfLikelihood:
    """Minus the k-DCE of the free tokens in nats per token: a verifier that needs no judge.

    The k-DCE is an upper bound on -log p(free tokens | given tokens). ``draws`` sets of positions
    are masked, each in a network call of its own, which is counted. Set d has k of the F free
    positions at random; the k of all sets are spread evenly over 1..F. The score is
    mean_d (1/k)·Σ_masked log c(x_i). Temperature, top-k, top-p, guidance, processors,
    constraints and watermarks are left out.

    All texts of a request are scored with the same masks. A search can therefore find texts that
    suit these masks: the score of the text that it returns is no unbiased estimate of the text's
    k-DCE. More ``draws`` leave less to find.
    """

    draws: int = 8

    def __post_init__(self):
        if self.draws < 1:
            raise FieldError("draws", f"must be at least 1, got {self.draws}")

    def check(self, denoiser: Denoiser) -> None:
        """Raise UserError unless the model is time-independent, absorbing and no block model."""
        if denoiser.process.absorbing and denoiser.time_independent and denoiser.block is None:
            return
        raise UserError(
            "the verifier self needs a time-independent model of the absorbing process that is no "
            "block model: for another one the self-likelihood is not computed"
        )

    def __call__(
        self,
        denoiser: Denoiser,
        keys_B: Key[Array, " B"],
        tokens_BL: Int[Array, "B L"],
        free_BL: Bool[Array, "B L"],
    ) -> tuple[Float[Array, " B"], Int[Array, " B"]]:
        """Return the scores, and the network calls of each sequence.

        Args:
            denoiser: the model.
            keys_B: a key for each sequence, for its masks.
            tokens_BL: texts without masks at free positions.
            free_BL: the positions to score; the others are conditioned on.
        """
        plain = replace(denoiser, reshape=None, given_BL=None, constraint=None, watermark=None)
        free_B = free_BL.sum(1)
        offset_B = jax.vmap(jax.random.uniform)(fold(keys_B, self.draws))

        def one(draw, total_B):
            level_B = jnp.floor((draw + offset_B) / self.draws * free_B).astype(free_B.dtype)
            k_B = jnp.minimum(level_B + 1, free_B)
            rank_BL = random_rank(fold(keys_B, draw), free_BL)
            masked_BL = free_BL & (rank_BL < k_B[:, None])
            x_BL = jnp.where(masked_BL, denoiser.mask_id, tokens_BL)
            hidden = plain.hidden(x_BL)

            def log_prob(rows):
                return at(plain.log_conditional_rows(hidden, x_BL, rows), rows.pick(tokens_BL))

            log_prob_BL = plain.map_rows(masked_BL, log_prob, jnp.float32)
            return total_B + log_prob_BL.sum(1) / jnp.maximum(k_B, 1)

        total_B = jax.lax.fori_loop(0, self.draws, one, jnp.zeros(len(tokens_BL)))
        unknown_B = ((tokens_BL == NAN) & free_BL).any(1)
        score_B = jnp.where(unknown_B, jnp.nan, total_B / self.draws)
        return score_B, jnp.where(free_B > 0, self.draws, 0)

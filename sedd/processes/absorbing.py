"""The absorbing process: every token jumps to the mask at rate 1 and stays there."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from sedd.arrays import NO_MASS, along, at, expm1_minus, log_expm1, put
from sedd.processes.base import Interpolating


@dataclass(frozen=True, kw_only=True)
class Absorbing(Interpolating):
    """Each position of xt is the mask with probability 1 - exp(-σ), else the token of x0.

    The mask is the last state, with id N. Q(a, mask) = 1 and Q(a, a) = -1 for every token a; the
    mask has rate 0 to everything. arXiv:2310.16834, section 3.3.
    """

    absorbing = True

    @property
    def mask_id(self) -> int:
        """N, the last state."""
        return self.num_tokens

    def transition(self, x, sigma):
        """A token stays with probability e^-σ and else is the mask; the mask stays the mask."""
        sigma = along(sigma, x)
        row = jnp.exp(-sigma)[..., None] * jax.nn.one_hot(x, self.num_states)
        masked = jnp.where(x == self.mask_id, 1.0, -jnp.expm1(-sigma))
        return put(row, jnp.full_like(x, self.mask_id), masked)

    def transition_to(self, x, sigma, dsigma):
        """The mask is reached from every token; a visible token only from itself."""
        dsigma = along(dsigma, x)
        from_tokens = jnp.where(x == self.mask_id, -jnp.expm1(-dsigma), 0.0)
        own = jnp.where(x == self.mask_id, 1.0, jnp.exp(-dsigma))
        column = jnp.broadcast_to(from_tokens[..., None], (*x.shape, self.num_states))
        return put(column, x, own)

    def corrupt(self, keys_B, x0_BL, sigma):
        moved_BL = jax.vmap(
            # The default mode rounds probabilities below 1e-7 to 0 or 1e-7.
            lambda key, p: jax.random.bernoulli(key, p, x0_BL.shape[1:], mode="high")
        )(keys_B, -jnp.expm1(-along(sigma, x0_BL)))
        return jnp.where(moved_BL, self.mask_id, x0_BL)

    def sample_prior(self, keys_B, length, sigma):
        """Masks at every position."""
        return jnp.full((keys_B.shape[0], length), self.mask_id, jnp.int32)

    def prior_kl(self, sigma):
        """KL of x_1 to the prior (1 - a)·mask + a·uniform with a = exp(-σ(1)), which is a·log N.

        At t = 1 a token is still visible with probability a, so that the KL to a prior of masks
        alone would be infinite.
        """
        return jnp.exp(-sigma) * jnp.log(self.num_tokens)

    def can_move(self, x):
        """Only a mask can change; a visible token is certain."""
        return x == self.mask_id

    def reverse_rate(self, log_score, x, sigma):
        """From a mask to token y at the rate e^s_y, since Q(y, mask) = 1; from a token nowhere."""
        mask = jnp.full_like(x, self.mask_id)
        to_tokens = put(jnp.exp(log_score), mask, jnp.zeros(x.shape))
        rate = put(to_tokens, mask, -to_tokens.sum(-1))
        return jnp.where(self.can_move(x)[..., None], rate, 0.0)

    def staggered_score(self, log_score, sigma, dsigma):
        dsigma = along(dsigma, log_score[..., 0])
        score = jnp.exp(log_score)
        grown = score * jnp.exp(dsigma)[..., None]
        # The entry of the mask is e^Δσ·e^s_mask + (1 - e^Δσ)·Σ_y e^s_y over all states y. Its terms
        # with y = mask sum to e^s_mask. They are summed here by hand, because float32 would lose
        # that sum as the difference of two terms of size e^Δσ.
        to_tokens = score[..., : self.mask_id].sum(-1)
        return grown.at[..., self.mask_id].set(
            score[..., self.mask_id] - jnp.expm1(dsigma) * to_tokens
        )

    def score_entropy(self, log_score, x, x0, sigma):
        # Σ_y e^s_y - r·s_x0 + r·(log r - 1) with the true ratio r = 1/expm1(σ), rewritten as
        # Σ_{y ≠ x0} e^s_y + r·(e^δ - 1 - δ) with δ = s_x0 - log r. At small σ the terms of the
        # first form, of size r·log r, cancel to a difference that float32 cannot resolve.
        log_r = -log_expm1(along(sigma, x))
        others = put(put(log_score, x0, -jnp.inf), jnp.full_like(x0, self.mask_id), -jnp.inf)
        entropy = jnp.exp(others).sum(-1) + jnp.exp(log_r) * expm1_minus(at(log_score, x0) - log_r)
        return jnp.where(x == self.mask_id, entropy, 0.0)

    def log_noise(self, sigma):
        return jnp.full_like(sigma, NO_MASS), jnp.log(-jnp.expm1(-sigma))


make = Absorbing

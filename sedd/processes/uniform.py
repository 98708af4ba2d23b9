"""The uniform process: every token jumps to a uniformly drawn token at rate 1."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.scipy.special import xlogy

from sedd.arrays import NO_MASS, along, expm1_minus, log_expm1, put
from sedd.processes.base import Interpolating


@dataclass(frozen=True, kw_only=True)
class Uniform(Interpolating):
    """Each position of xt is uniform on the N tokens with probability 1 - exp(-σ), else it is x0.

    There is no mask, and any token may be wrong. Q(a, b) = 1/N for b ≠ a and Q(a, a) = 1/N - 1.
    arXiv:2310.16834, section 3.3.
    """

    absorbing = False

    @property
    def mask_id(self) -> None:
        """None: there is no mask."""
        return None

    def transition(self, x, sigma):
        """A token stays with probability e^-σ, and else is uniform on all N tokens."""
        sigma = along(sigma, x)
        elsewhere = -jnp.expm1(-sigma) / self.num_tokens
        row = jnp.broadcast_to(elsewhere[..., None], (*x.shape, self.num_tokens))
        return put(row, x, jnp.exp(-sigma) + elsewhere)

    def transition_to(self, x, sigma, dsigma):
        return self.transition(x, dsigma)  # Q is symmetric

    def corrupt(self, keys_B, x0_BL, sigma):
        """Draw which positions are touched, and for these a uniform token."""

        def one(key, x0_L, moved_probability):
            move_key, token_key = jax.random.split(key)
            moved_L = jax.random.bernoulli(move_key, moved_probability, x0_L.shape, mode="high")
            return jnp.where(
                moved_L, jax.random.randint(token_key, x0_L.shape, 0, self.num_tokens), x0_L
            )

        return jax.vmap(one)(keys_B, x0_BL, -jnp.expm1(-along(sigma, x0_BL)))

    def sample_prior(self, keys_B, length, sigma):
        """Uniform tokens at every position."""
        return jax.vmap(lambda key: jax.random.randint(key, (length,), 0, self.num_tokens))(keys_B)

    def prior_kl(self, sigma):
        """KL(P_σ(x0, ·) ‖ uniform), in nats.

        The probability of x0 is (1 + (N - 1)·e^-σ) / N, that of each other token (1 - e^-σ) / N.
        """
        n = self.num_tokens
        decay, moved = jnp.exp(-sigma), -jnp.expm1(-sigma)
        others = moved * (n - 1) / n
        return (1 - others) * jnp.log1p((n - 1) * decay) + xlogy(others, moved)

    def can_move(self, x):
        """Every token may be wrong."""
        return jnp.ones(x.shape, bool)

    def reverse_rate(self, log_score, x, sigma):
        # Q(y, x) = 1/N for every y other than x.
        away = put(jnp.exp(log_score) / self.num_tokens, x, jnp.zeros(x.shape))
        return put(away, x, -away.sum(-1))

    def staggered_score(self, log_score, sigma, dsigma):
        # e^Δσ·e^s - (e^Δσ - 1)·mean(e^s), in terms of e^s - 1. At large σ all ratios e^s are close
        # to 1, and e^Δσ would multiply their rounding error beyond the differences of interest.
        excess = jnp.expm1(log_score)
        grown = jnp.expm1(along(dsigma, log_score[..., 0]))[..., None] * (
            excess - excess.mean(-1, keepdims=True)
        )
        return 1 + excess + grown

    def score_entropy(self, log_score, x, x0, sigma):
        # Σ_y r_y·(e^δ_y - 1 - δ_y) / N over y ≠ x, where r are the true ratios and δ = s - log r.
        # The published form is equal to it, but subtracts large terms from each other: in float32
        # it is 3 % off near the optimum at N = 50257.
        # ``ratio`` is Pr(another token | x0) / Pr(x0 | x0) = expm1(σ) / (expm1(σ) + N), taken from
        # its logarithm: the equal form 1 - N/(expm1(σ) + N) would round to 0 at small σ.
        log_moved = log_expm1(along(sigma, x))
        log_ratio = log_moved - jnp.logaddexp(log_moved, jnp.log(self.num_tokens * 1.0))
        # If x = x0, then r_y is ``ratio`` for every y ≠ x. Otherwise r_y is 1, and 1 / ratio at
        # y = x0. Only two sums run over y, which the compiler fuses into one pass over the scores.
        clean = x == x0
        log_r = jnp.where(clean, log_ratio, 0.0)
        y = jnp.arange(self.num_tokens)
        is_x0 = y == x0[..., None]
        term = expm1_minus(log_score - log_r[..., None])
        others = jnp.where(is_x0 | (y == x[..., None]), 0.0, term).sum(-1)
        score_x0 = jnp.where(is_x0, log_score, 0.0).sum(-1)
        term_x0 = jnp.exp(-log_ratio) * expm1_minus(score_x0 + log_ratio)
        total = jnp.exp(log_r) * others + jnp.where(clean, 0.0, term_x0)
        return total / self.num_tokens

    def log_noise(self, sigma):
        moved = jnp.log(-jnp.expm1(-sigma))
        return moved - jnp.log(self.num_tokens * 1.0), jnp.full_like(sigma, NO_MASS)


make = Uniform

"""Hybrid noise: a touched token becomes the mask or a uniformly drawn token. arXiv:2503.04482."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from sedd.arrays import NO_MASS, along, expm1_minus, log_expm1, put
from sedd.errors import FieldError
from sedd.processes.base import Interpolating

HALVINGS = 40  # of the interval of ``Hybrid._logit``, of about 200: the rest is 2e-10


@dataclass(frozen=True, kw_only=True)
class Hybrid(Interpolating):
    """With probability 1 - exp(-σ) a token is the mask or a uniformly drawn token, else x0.

    Without ``gamma`` a fixed share of this noise is uniform: Q(a, b) = u/N for tokens b and
    Q(a, mask) = 1 - u, with u the option ``uniform``; Q(a, a) is minus the sum of the others. A
    share of 0 is the absorbing process, a share of 1 the uniform one.

    With ``gamma`` the mixture is that of GIDD: at its time τ in [0, 1] the token, the mask and a
    uniform token have the weights 1 - τ, τ and c = B·(τ(1 - τ))^(gamma/2), over their sum 1 + c. B
    is such that a position is uniform noise with probability ``uniform`` at τ = 1/2. The noise
    begins with uniform tokens and ends with masks. τ follows from σ by exp(-σ) = (1 - τ)/(1 + c),
    so that every schedule serves. arXiv:2503.04482.

    The mask is the last state, with id N. A mask is noise like any other: it may become a token.

    Use a schedule with a total noise of at most about 9, such as log_linear and cosine. Float32
    cannot resolve the log scores at the σ of 20 at which the geometric one ends.
    """

    absorbing = False

    uniform: float = 0.1
    """Uniform tokens as a share of the noise, in [0, 1]; with gamma as a share of all positions at
    the middle of the process, in [0, 1)."""
    gamma: float | None = None
    """Exponent of GIDD's mixture, in (0, 2], 1 in the paper; None keeps the mixture constant."""

    def __post_init__(self):
        super().__post_init__()
        end = 1.0 if self.gamma is None else math.nextafter(1.0, 0.0)
        if not 0 <= self.uniform <= end:
            wanted = "[0, 1]" if self.gamma is None else "[0, 1) with gamma"
            raise FieldError("uniform", f"must be a share in {wanted}, got {self.uniform}")
        if self.gamma is not None and not 0 < self.gamma <= 2:
            raise FieldError(
                "gamma",
                "must be in (0, 2]: above 2 the rate of uniform tokens would be negative near the "
                f"end, and no process has this mixture; got {self.gamma}",
            )

    @property
    def mask_id(self) -> int:
        """N, the last state."""
        return self.num_tokens

    def log_noise(self, sigma):
        if self.gamma is None:
            moved = jnp.log(-jnp.expm1(-sigma))
            return moved + _log(self.uniform / self.num_tokens), moved + _log(1 - self.uniform)
        return self._log_noise_at(self._logit(sigma))

    def time(self, sigma):
        return super().time(sigma) if self.gamma is None else jax.nn.sigmoid(self._logit(sigma))

    def _log_noise_at(self, logit):
        """``log_noise`` at GIDD's time τ = sigmoid(logit)."""
        log_c = self._log_c(logit)
        log_total = jnp.logaddexp(0.0, log_c)
        return log_c - log_total - math.log(self.num_tokens), -jax.nn.softplus(-logit) - log_total

    def _log_c(self, logit):
        """log c, the weight of uniform tokens, at GIDD's time τ = sigmoid(logit)."""
        assert self.gamma is not None
        log_b = self.gamma * math.log(2) + _log(self.uniform / (1 - self.uniform))
        # log τ + log(1 - τ)
        return log_b - self.gamma / 2 * (jax.nn.softplus(-logit) + jax.nn.softplus(logit))

    def _logit(self, sigma):
        """log(τ/(1 - τ)) of GIDD's time τ at total noise σ, by bisection.

        σ = -log(1 - τ) + log(1 + c) rises with τ. On the scale of the logit float32 resolves a τ of
        1e-30 as well as a 1 - τ of 1e-9.
        """
        assert self.gamma is not None
        sigma = jnp.maximum(sigma, 1e-30)
        # c >= 0 bounds the logit from above. At the lower end c is below 1e-20·B.
        bounds = jnp.full_like(sigma, -100 / self.gamma - 100), log_expm1(sigma)

        def halve(_, bounds):
            low, high = bounds
            middle = (low + high) / 2
            noise = jax.nn.softplus(middle) + jnp.logaddexp(0.0, self._log_c(middle))
            return jnp.where(noise < sigma, middle, low), jnp.where(noise < sigma, high, middle)

        return jax.lax.fori_loop(0, HALVINGS, halve, bounds)[1]

    def _log_rate(self, sigma):
        """Logarithms of the rates of jumps to each real token and to the mask, per unit of σ.

        A process with P_σ = e^-σ + b jumps to y at the rate b_y + db_y/dσ, whatever the source.
        """
        if self.gamma is None:
            to_token, to_mask = _log(self.uniform / self.num_tokens), _log(1 - self.uniform)
            return jnp.full_like(sigma, to_token), jnp.full_like(sigma, to_mask)
        logit = self._logit(sigma)
        log_token, log_mask = self._log_noise_at(logit)
        half, tau, rest = self.gamma / 2, jax.nn.sigmoid(logit), jax.nn.sigmoid(-logit)
        share = jax.nn.sigmoid(self._log_c(logit))  # c/(1 + c)
        # dσ/dlogit, and the derivative of log(b_y·e^σ): of c/(1 - τ) for a token, of τ/(1 - τ),
        # which is 1, for the mask. Each is a sum of two terms that are not negative if gamma <= 2.
        dsigma = tau * (1 - share * half) + share * half * rest
        growth = tau * (1 - half) + half * rest
        return log_token + jnp.log(growth / dsigma), log_mask - jnp.log(dsigma)

    def _step_noise(self, sigma, dsigma):
        """The noise that a step from σ - Δσ to σ adds, at each real token and at the mask."""
        if self.gamma is None:
            moved = -jnp.expm1(-dsigma)
            return moved * self.uniform / self.num_tokens, moved * (1 - self.uniform)
        now = self.log_noise(sigma)
        before = self.log_noise(jnp.maximum(sigma - dsigma, 0.0))
        return tuple(
            jnp.maximum(jnp.exp(b) - jnp.exp(earlier - dsigma), 0.0)
            for b, earlier in zip(now, before, strict=True)
        )

    def _column(self, x, of_token, of_mask):
        """One of two values at each state x."""
        return jnp.where(x == self.mask_id, of_mask, of_token)

    def _row(self, shape, of_token, of_mask):
        """[*shape, V]: one value at all real tokens, and one at the mask."""
        is_mask = jnp.arange(self.num_states) == self.mask_id
        row = jnp.where(is_mask, of_mask[..., None], of_token[..., None])
        return jnp.broadcast_to(row, (*shape, self.num_states))

    def transition(self, x, sigma):
        """The state stays with probability e^-σ, and else is drawn from the noise."""
        sigma = along(sigma, x)
        of_token, of_mask = map(jnp.exp, self.log_noise(sigma))
        own = jnp.exp(-sigma) + self._column(x, of_token, of_mask)
        return put(self._row(x.shape, of_token, of_mask), x, own)

    def transition_to(self, x, sigma, dsigma):
        """Every state reaches x by noise, and x also by staying."""
        sigma, dsigma = along(sigma, x), along(dsigma, x)
        by_noise = self._column(x, *self._step_noise(sigma, dsigma))
        column = jnp.broadcast_to(by_noise[..., None], (*x.shape, self.num_states))
        return put(column, x, by_noise + jnp.exp(-dsigma))

    def corrupt(self, keys_B, x0_BL, sigma):
        """Draw which positions are touched, which of these are masked, and the other tokens."""
        sigma = along(sigma, x0_BL)

        def one(key, x0_L, moved_probability, mask_share):
            move_key, noise_key = jax.random.split(key)
            moved_L = jax.random.bernoulli(move_key, moved_probability, x0_L.shape, mode="high")
            return jnp.where(moved_L, self._draw_noise(noise_key, x0_L.shape, mask_share), x0_L)

        return jax.vmap(one)(keys_B, x0_BL, -jnp.expm1(-sigma), self._mask_share(sigma))

    def sample_prior(self, keys_B, length, sigma):
        """Noise of time t = 1 at every position."""
        share = self._mask_share(jnp.asarray(sigma))
        return jax.vmap(lambda key: self._draw_noise(key, (length,), share))(keys_B)

    def _mask_share(self, sigma):
        """The share of masks in the noise."""
        log_token, log_mask = self.log_noise(jnp.maximum(sigma, 1e-30))
        return jax.nn.sigmoid(log_mask - log_token - math.log(self.num_tokens))

    def _draw_noise(self, key, shape, mask_share):
        """Masks with a given probability, and uniform tokens elsewhere."""
        mask_key, token_key = jax.random.split(key)
        mask = jax.random.bernoulli(mask_key, mask_share, shape, mode="high")
        tokens = jax.random.randint(token_key, shape, 0, self.num_tokens)
        return jnp.where(mask, self.mask_id, tokens)

    def prior_kl(self, sigma):
        """KL of x_1 to a prior that is the mask as often as x_1 is, and else a uniform token.

        With a = exp(-σ(1)) and the noise b of each token it is (a + b)·log((a + b)/m) +
        (N - 1)·b·log(b/m), where m = b + a/N is the prior of each token.
        """
        log_token, _ = self.log_noise(sigma)
        n = math.log(self.num_tokens)
        log_own, log_prior = jnp.logaddexp(-sigma, log_token), jnp.logaddexp(-sigma - n, log_token)
        others = (self.num_tokens - 1) * jnp.exp(log_token) * (log_token - log_prior)
        return jnp.exp(log_own) * (log_own - log_prior) + others

    def can_move(self, x):
        """Every state may be wrong; without uniform tokens only the mask."""
        return jnp.ones(x.shape, bool) if self.uniform > 0 else x == self.mask_id

    def reverse_rate(self, log_score, x, sigma):
        sigma = along(sigma, x)
        rate_x = jnp.exp(self._column(x, *self._log_rate(sigma)))
        away = put(rate_x[..., None] * jnp.exp(log_score), x, jnp.zeros(x.shape))
        return put(away, x, -away.sum(-1))

    def staggered_score(self, log_score, sigma, dsigma):
        # (e^s - m·Σ e^s)·e^Δσ with the noise m of the step, since P = e^-Δσ + 1·mᵀ.
        sigma, dsigma = along(sigma, log_score[..., 0]), along(dsigma, log_score[..., 0])
        to_token, to_mask = self._step_noise(sigma, dsigma)
        score = jnp.exp(log_score)
        tokens, mask = score[..., : self.mask_id], score[..., self.mask_id]
        total = tokens.sum(-1)
        earlier = tokens - (to_token * (total + mask))[..., None]
        # 1 - m_mask is written as a sum: the difference would cancel where nearly all noise is
        # masks.
        kept = jnp.exp(-dsigma) + self.num_tokens * to_token
        earlier_mask = mask * kept - to_mask * total
        both = jnp.concatenate([earlier, earlier_mask[..., None]], -1)
        return both * jnp.exp(dsigma)[..., None]

    def score_entropy(self, log_score, x, x0, sigma):
        # Σ_y r_y·(e^δ_y - 1 - δ_y) over y ≠ x, times the rate into x, with the true ratios
        # r_y = q(y | x0)/q(x | x0) and δ = s - log r.
        sigma = along(sigma, x)
        noise = self.log_noise(sigma)
        log_q = put(self._row(x.shape, *noise), x0, jnp.logaddexp(-sigma, noise[0]))
        log_r = log_q - self._log_likelihood(x, x0, sigma, noise)[..., None]
        delta, r = log_score - log_r, jnp.exp(log_r)
        # Near the optimum e^s - r·(1 + δ) cancels; far above it e^δ overflows, as where r is 0.
        near = r * expm1_minus(jnp.minimum(delta, 10.0))
        term = jnp.where(delta < 10, near, jnp.exp(log_score) - r * (1 + delta))
        others = jnp.where(jnp.arange(self.num_states) == x[..., None], 0.0, term).sum(-1)
        return jnp.exp(self._column(x, *self._log_rate(sigma))) * others

    def bound_weight(self, x, x0, sigma):
        """u/q of each position, its weight in the score entropy, as GIDD writes the loss.

        u is the rate of jumps into x and q the probability of x given x0. The score entropy of the
        parameterization mean is u/q·(KL(q‖p) + r - log r - 1), where p is the model's distribution
        of the noisy token, and r the ratio of q and p at x. arXiv:2503.04482.
        """
        sigma = along(sigma, x)
        log_rate = self._column(x, *self._log_rate(sigma))
        return jnp.exp(log_rate - self._log_likelihood(x, x0, sigma, self.log_noise(sigma)))

    def dynamic_weight(self, x, x0, sigma):
        """GIDD's training weight: 2 at a mask, 1 at a wrong token, B/N·√((1 - a)/a) at x0.

        a is exp(-σ). ``gamma`` must be set, which gives B. arXiv:2503.04482.
        """
        assert self.gamma is not None
        sigma = along(sigma, x)
        log_b = self.gamma * math.log(2) + _log(self.uniform / (1 - self.uniform))
        clean = jnp.exp(log_b + log_expm1(sigma) / 2) / self.num_tokens
        return jnp.where(x == x0, clean, self._column(x, 1.0, 2.0))

    def _log_likelihood(self, x, x0, sigma, noise):
        """log q(x | x0) at total noise σ, whose ``log_noise`` is given."""
        return jnp.where(x == x0, jnp.logaddexp(-sigma, noise[0]), self._column(x, *noise))


def _log(share: float) -> float:
    """The logarithm, and -1e6 of 0."""
    return math.log(share) if share > 0 else NO_MASS


make = Hybrid

"""The base of forward processes: continuous-time Markov chains that corrupt tokens independently.

A process is given by its rate matrix Q: Q(a, b) is the rate of the jump a → b at one position. At
total noise σ the transition matrix is P_σ = exp(σQ), and its row a is the distribution of the token
that started as a. Everything that depends on Q is a method here, so that objectives, samplers and
bounds work with any process.

Q may change with σ, as for ``hybrid`` with ``gamma``. P_σ is then the product of all changes up to
σ. Methods for a step of the reverse process therefore take the total noise σ at which the step
begins, and the noise Δσ that it undoes. A process with a constant Q needs only one of the two.

Methods take tokens of any shape. The axes of ``sigma`` are the leading axes of the tokens: for
tokens [B, L] it is [B] (one value for each sequence) or [B, L] (one for each position); see
``sedd.arrays.along``.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from sedd.arrays import along
from sedd.errors import FieldError
from sedd.types import Array, Bool, Float, Int, Key


@dataclass(frozen=True, kw_only=True)
class Process(ABC):
    """A forward process over ``num_tokens`` real tokens and, unless ``mask_id`` is None, a mask.

    ``absorbing`` is True if xt is always the clean token or the mask. A visible token is then
    certain, and only masked positions remain to be drawn. Objectives, samplers and bounds that rely
    on this property test ``absorbing``, never ``mask_id``: a process may have a mask and at the
    same time visible tokens that are wrong.

    Raises ``FieldError`` if ``num_tokens`` is below 2.
    """

    absorbing: ClassVar[bool]

    num_tokens: int  # N

    def __post_init__(self):
        if self.num_tokens < 2:
            raise FieldError("num_tokens", f"must be at least 2, got {self.num_tokens}")

    @property
    @abstractmethod
    def mask_id(self) -> int | None:
        """The token id of the mask; None for a process without a mask."""

    @property
    def mask(self) -> int:
        """``mask_id`` as an int; ValueError for a process without a mask."""
        if self.mask_id is None:
            raise ValueError(f"the {type(self).__name__.lower()} process has no mask")
        return self.mask_id

    @property
    def num_states(self) -> int:
        """V: the number of real tokens, plus one if there is a mask."""
        return self.num_tokens + (self.mask_id is not None)

    @abstractmethod
    def transition(self, x: Int[Array, "*b"], sigma: Float[Array, "..."]) -> Float[Array, "*b V"]:
        """Probabilities Pr(y | x) of every state y after total noise ``sigma``: row x of P_σ."""

    @abstractmethod
    def transition_to(
        self, x: Int[Array, "*b"], sigma: Float[Array, "..."], dsigma: Float[Array, "..."]
    ) -> Float[Array, "*b V"]:
        """Likelihoods Pr(x at total noise σ | y at σ - Δσ) of x under every earlier state y.

        They are no distribution over y: the entries need not sum to 1. The posterior of y is
        proportional to its entry times its prior probability.
        """

    @abstractmethod
    def corrupt(
        self, keys_B: Key[Array, " B"], x0_BL: Int[Array, "B L"], sigma: Float[Array, "..."]
    ) -> Int[Array, "B L"]:
        """Draw xt given x0 at total noise ``sigma``, every position independently.

        Args:
            keys_B: a key for each sequence.
            x0_BL: clean tokens.
            sigma: total noise, [B] or [B, L].
        """

    @abstractmethod
    def sample_prior(
        self, keys_B: Key[Array, " B"], length: int, sigma: Float[Array, ""]
    ) -> Int[Array, "B L"]:
        """Draw the tokens of time t = 1, from which sampling starts: a sequence for each key.

        ``sigma`` is the total noise at t = 1.
        """

    @abstractmethod
    def prior_kl(self, sigma: Float[Array, "*b"]) -> Float[Array, "*b"]:
        """KL(q(x_1 | x0) ‖ prior) of one position, in nats.

        ``sigma`` is the total noise at t = 1. The result is the prior term of the likelihood bound.
        """

    @abstractmethod
    def can_move(self, x: Int[Array, "*b"]) -> Bool[Array, "*b"]:
        """Whether the reverse process may still change x; False if x is certainly clean."""

    @abstractmethod
    def reverse_rate(
        self, log_score: Float[Array, "*b V"], x: Int[Array, "*b"], sigma: Float[Array, "..."]
    ) -> Float[Array, "*b V"]:
        """Rates of the reverse process at total noise σ from x to every state y, per unit of σ.

        The rate to y ≠ x is Q(y, x)·p(y)/p(x), the ratio being exp of the log score; the entry at x
        is minus their sum. arXiv:2310.16834, equation 3.
        """

    @abstractmethod
    def staggered_score(
        self,
        log_score: Float[Array, "*b V"],
        sigma: Float[Array, "..."],
        dsigma: Float[Array, "..."],
    ) -> Float[Array, "*b V"]:
        """Undo noise ``dsigma`` in the ratios: (P⁻¹)ᵀ e^s for a score s at σ, P from σ - Δσ to σ.

        If the score is exact, these are the ratios p_(σ-Δσ)(y) / p_σ(x) at the smaller noise.
        arXiv:2310.16834, theorem 4.2.
        """

    @abstractmethod
    def score_entropy(
        self,
        log_score: Float[Array, "*b V"],
        x: Int[Array, "*b"],
        x0: Int[Array, "*b"],
        sigma: Float[Array, "..."],
    ) -> Float[Array, "*b"]:
        """Denoising score entropy of each position, in nats per unit of σ.

        The score entropy at x is Σ_(y≠x) Q(y, x)·(e^s_y - r_y·s_y + r_y·(log r_y - 1)) with the
        ratios r_y = Pr(y | x0) / Pr(x | x0). It is at least 0, and 0 where s = log r. Its integral
        over σ is the diffusion term of the likelihood bound. arXiv:2310.16834, theorem 3.6.

        Args:
            log_score: s, the model's log score at x.
            x: corrupted tokens.
            x0: clean tokens.
            sigma: total noise.
        """

    def tweedie(
        self,
        log_score: Float[Array, "*b V"],
        x: Int[Array, "*b"],
        sigma: Float[Array, "..."],
        dsigma: Float[Array, "..."],
    ) -> Float[Array, "*b V"]:
        """Unnormalised probabilities of the state at total noise σ - Δσ, SEDD's "analytic" step.

        This is Tweedie τ-leaping: the entry of y is the staggered score of y times Pr(x | y), the
        probability that noise Δσ turns y into x. An inexact score may make entries slightly
        negative. arXiv:2310.16834, theorem 4.2.
        """
        earlier = self.staggered_score(log_score, sigma, dsigma)
        return earlier * self.transition_to(x, sigma, dsigma)

    def euler(
        self,
        log_score: Float[Array, "*b V"],
        x: Int[Array, "*b"],
        sigma: Float[Array, "..."],
        dsigma: Float[Array, "..."],
    ) -> Float[Array, "*b V"]:
        """Probabilities of the state after an Euler step of the reverse process; rows sum to 1.

        ``dsigma`` is Δt·rate(t), the noise that the step undoes to first order. The entry at x is
        negative if the step is too long. arXiv:2310.16834, equation 13.
        """
        rate = self.reverse_rate(log_score, x, sigma)
        stay = jax.nn.one_hot(x, self.num_states, dtype=log_score.dtype)
        return stay + along(dsigma, x)[..., None] * rate

    def denoise(
        self, log_score: Float[Array, "*b V"], x: Int[Array, "*b"], sigma: Float[Array, "..."]
    ) -> Float[Array, "*b V"]:
        """Normalised log probabilities of the clean token: a Tweedie step from ``sigma`` to σ = 0.

        The mask has -inf. Entries that the step makes negative count as 1e-30, so that the log
        likelihood of every real token is finite.
        """
        probs = jnp.maximum(self.tweedie(log_score, x, sigma, sigma), 1e-30)
        if self.mask_id is not None:
            probs = probs.at[..., self.mask_id].set(0)
        return jnp.log(probs) - jnp.log(probs.sum(-1, keepdims=True))


class Interpolating(Process):
    """A process that keeps a token, or replaces it by noise that does not depend on the token.

    A token is untouched with probability e^-σ. Otherwise its state is drawn from a distribution
    over states that may change with σ, but is the same for all tokens. Row a of P_σ is therefore
    e^-σ·1[y = a] + b_y(σ). arXiv:2503.04482.
    """

    @abstractmethod
    def log_noise(self, sigma: Float[Array, "*b"]) -> tuple[Float[Array, "*b"], Float[Array, "*b"]]:
        """log b_y(σ) for every real token y, which all have the same, and for the mask.

        It is -1e6 where b_y is 0, and for the mask of a process without one.
        """

    def time(self, sigma: Float[Array, "*b"]) -> Float[Array, "*b"]:
        """GIDD's time of the process at total noise σ, in [0, 1).

        It is the probability 1 - e^-σ of a touched token, unless the mixture of the noise changes
        with the time.
        """
        return -jnp.expm1(-sigma)

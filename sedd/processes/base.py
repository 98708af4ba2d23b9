"""The base of forward processes: continuous-time Markov chains that corrupt tokens independently.

Q(a, b) is the rate of the jump a → b at one position, and P_σ = exp(σQ) is the transition matrix.
Methods take tokens of any shape. The axes of ``sigma`` are the leading axes of the tokens: tokens
[B, L] go with a total noise [B], one a sequence, or [B, L], one a position (``sedd.arrays.along``).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from sedd.arrays import along
from sedd.errors import FieldError
from sedd.types import Array, Float, Int, Key


@dataclass(frozen=True, kw_only=True)
class Process(ABC):
    """A forward process over ``num_tokens`` real tokens, and a mask where ``mask_id`` is an id.

    ``absorbing`` states that xt is the clean token or the mask: a visible token is certain, and the
    masked positions are all that is left to draw. Objectives, samplers and bounds that rely on this
    ask ``absorbing``, never ``mask_id``: a process may have a mask and wrong visible tokens too.
    """

    absorbing: ClassVar[bool]

    num_tokens: int  # N

    def __post_init__(self):
        if self.num_tokens < 2:
            raise FieldError("num_tokens", f"must be at least 2, got {self.num_tokens}")

    @property
    @abstractmethod
    def mask_id(self) -> int | None:
        """The token id of the mask, or ``None`` without one."""

    @property
    def mask(self) -> int:
        """``mask_id`` where there is one; ValueError on a process without a mask."""
        if self.mask_id is None:
            raise ValueError(f"the {type(self).__name__.lower()} process has no mask")
        return self.mask_id

    @property
    def num_states(self) -> int:
        """V: the number of real tokens, plus one if there is a mask."""
        return self.num_tokens + (self.mask_id is not None)

    @abstractmethod
    def transition(self, x: Int[Array, "*b"], sigma: Float[Array, "..."]) -> Float[Array, "*b V"]:
        """Pr(y | x) for every state y: the row x of P_σ."""

    @abstractmethod
    def transition_to(
        self, x: Int[Array, "*b"], sigma: Float[Array, "..."]
    ) -> Float[Array, "*b V"]:
        """Pr(x | y) for every state y: the column x of P_σ, used in posteriors."""

    @abstractmethod
    def corrupt(
        self, keys_B: Key[Array, " B"], x0_BL: Int[Array, "B L"], sigma: Float[Array, "..."]
    ) -> Int[Array, "B L"]:
        """Draw xt given x0 at total noise ``sigma``; one key a sequence."""

    @abstractmethod
    def sample_prior(self, keys_B: Key[Array, " B"], length: int) -> Int[Array, "B L"]:
        """Draw the tokens that sampling starts from; one key a sequence."""

    @abstractmethod
    def prior_kl(self, sigma: Float[Array, "*b"]) -> Float[Array, "*b"]:
        """KL(q(x_1 | x0) ‖ prior) of one token, in nats, at the total noise σ(1)."""

    @abstractmethod
    def can_move(self, x: Int[Array, "*b"]) -> Array:
        """Where the reverse process may change x; False where x is certainly the clean token."""

    @abstractmethod
    def reverse_rate(
        self, log_score: Float[Array, "*b V"], x: Int[Array, "*b"]
    ) -> Float[Array, "*b V"]:
        """Rates of the reverse process from x to every state; the rate at x makes the sum 0."""

    @abstractmethod
    def staggered_score(
        self, log_score: Float[Array, "*b V"], dsigma: Float[Array, "..."]
    ) -> Float[Array, "*b V"]:
        """(P_Δσ⁻¹)ᵀ e^s: the ratios at total noise σ - Δσ, if the score at σ is exact.

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
        """Denoising score entropy of each position, in nats per unit of σ; 0 at the true ratios.

        The loss of the ratio of y to x has the weight Q(y, x). arXiv:2310.16834, equation 5.
        """

    def tweedie(
        self,
        log_score: Float[Array, "*b V"],
        x: Int[Array, "*b"],
        dsigma: Float[Array, "..."],
    ) -> Float[Array, "*b V"]:
        """Unnormalised probabilities of Tweedie τ-leaping, SEDD's "analytic" step.

        Entries may be slightly negative if the score is inexact. arXiv:2310.16834, theorem 4.2.
        """
        return self.staggered_score(log_score, dsigma) * self.transition_to(x, dsigma)

    def euler(
        self, log_score: Float[Array, "*b V"], x: Int[Array, "*b"], dsigma: Float[Array, "..."]
    ) -> Float[Array, "*b V"]:
        """Probabilities of an Euler step of the reverse process, Δσ = Δt·rate(t); rows sum to 1.

        The entry at x is negative if the step is too long.
        """
        rate = self.reverse_rate(log_score, x)
        stay = jax.nn.one_hot(x, self.num_states, dtype=log_score.dtype)
        return stay + along(dsigma, x)[..., None] * rate

    def denoise(
        self, log_score: Float[Array, "*b V"], x: Int[Array, "*b"], sigma: Float[Array, "..."]
    ) -> Float[Array, "*b V"]:
        """Log probabilities of the clean token: a Tweedie step from ``sigma`` to σ = 0.

        Normalised, with -inf at the mask. An entry that the step makes negative counts as 1e-30, so
        that likelihoods under it stay finite.
        """
        probs = jnp.maximum(self.tweedie(log_score, x, sigma), 1e-30)
        if self.mask_id is not None:
            probs = probs.at[..., self.mask_id].set(0)
        return jnp.log(probs) - jnp.log(probs.sum(-1, keepdims=True))

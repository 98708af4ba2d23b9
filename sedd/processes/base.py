"""What a forward process is: a continuous-time Markov chain that corrupts each token independently.

The rate matrix of one position is Q, with Q(a, b) the rate of the jump a → b, and P_σ = exp(σQ) its
transition matrix. Methods work on tokens of any shape; ``sigma`` broadcasts against them.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from sedd.types import Array, Float, Int, Key


@dataclass(frozen=True, kw_only=True)
class Process(ABC):
    """A forward process over ``num_tokens`` real tokens."""

    num_tokens: int  # N

    def __post_init__(self):
        if self.num_tokens < 2:
            raise ValueError(f"num_tokens must be at least 2, got {self.num_tokens}")

    @property
    @abstractmethod
    def mask_id(self) -> int | None:
        """The id of the mask, or ``None`` where the process has none."""

    @property
    def num_states(self) -> int:
        """V: the real tokens, and the mask where there is one."""
        return self.num_tokens + (self.mask_id is not None)

    @abstractmethod
    def transition(self, x: Int[Array, "*b"], sigma: Float[Array, "..."]) -> Float[Array, "*b V"]:
        """Pr(y | x) for every y: the row x of P_σ."""

    @abstractmethod
    def transition_to(
        self, x: Int[Array, "*b"], sigma: Float[Array, "..."]
    ) -> Float[Array, "*b V"]:
        """Pr(x | y) for every y: the column x of P_σ, which a posterior needs."""

    @abstractmethod
    def corrupt(
        self, keys_B: Key[Array, " B"], x0_BL: Int[Array, "B L"], sigma_B: Float[Array, " B"]
    ) -> Int[Array, "B L"]:
        """A draw of xt given x0 at total noise σ; one key an example."""

    @abstractmethod
    def sample_prior(self, keys_B: Key[Array, " B"], length: int) -> Int[Array, "B L"]:
        """Where sampling starts from."""

    @abstractmethod
    def prior_kl(self, sigma: Float[Array, "*b"]) -> Float[Array, "*b"]:
        """KL(q(x_1 | x0) ‖ prior) of one token, in nats, at the last total noise σ(1)."""

    @abstractmethod
    def can_move(self, x: Int[Array, "*b"]) -> Array:
        """Where the reverse process may change a token; False where x is certainly clean."""

    @abstractmethod
    def reverse_rate(
        self, log_score: Float[Array, "*b V"], x: Int[Array, "*b"]
    ) -> Float[Array, "*b V"]:
        """Rates of the reverse process out of x, with the diagonal that makes each row sum to 0."""

    @abstractmethod
    def staggered_score(
        self, log_score: Float[Array, "*b V"], dsigma: Float[Array, "..."]
    ) -> Float[Array, "*b V"]:
        """(P_Δσ⁻¹)ᵀ e^s, the score Δσ earlier if it were exact. arXiv:2310.16834, theorem 4.2."""

    @abstractmethod
    def score_entropy(
        self,
        log_score: Float[Array, "*b V"],
        x: Int[Array, "*b"],
        x0: Int[Array, "*b"],
        sigma: Float[Array, "..."],
    ) -> Float[Array, "*b"]:
        """Denoising score entropy of each position, in nats per unit of σ; 0 at the true ratios.

        arXiv:2310.16834, equation 5, with x → y weighted by Q(y, x).
        """

    def tweedie(
        self,
        log_score: Float[Array, "*b V"],
        x: Int[Array, "*b"],
        dsigma: Float[Array, "..."],
    ) -> Float[Array, "*b V"]:
        """Tweedie τ-leaping (SEDD's "analytic" step) as unnormalised probabilities.

        Entries may be slightly negative where the score is inexact. arXiv:2310.16834, theorem 4.2.
        """
        return self.staggered_score(log_score, dsigma) * self.transition_to(x, dsigma)

    def euler(
        self, log_score: Float[Array, "*b V"], x: Int[Array, "*b"], dsigma: Float[Array, "..."]
    ) -> Float[Array, "*b V"]:
        """An Euler step of the reverse process, Δσ = Δt·rate(t): rows sum to 1.

        The entry at x can be negative when the step is long.
        """
        rate = self.reverse_rate(log_score, x)
        stay = jax.nn.one_hot(x, self.num_states, dtype=log_score.dtype)
        return stay + jnp.asarray(dsigma)[..., None] * rate

    def denoise(
        self, log_score: Float[Array, "*b V"], x: Int[Array, "*b"], sigma: Float[Array, "..."]
    ) -> Float[Array, "*b V"]:
        """The log probabilities of clean tokens: the last Tweedie step, all the way to σ = 0.

        The mask has none. Normalised; an entry that the step makes negative counts as 1e-30, so
        that a likelihood under it stays finite.
        """
        probs = jnp.maximum(self.tweedie(log_score, x, sigma), 1e-30)
        if self.mask_id is not None:
            probs = probs.at[..., self.mask_id].set(0)
        return jnp.log(probs) - jnp.log(probs.sum(-1, keepdims=True))

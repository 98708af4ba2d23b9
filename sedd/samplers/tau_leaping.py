"""The loop of the τ-leaping samplers, which work on any process. arXiv:2310.16834, section 4."""

from abc import abstractmethod
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from sedd.errors import FieldError
from sedd.processes.base import Process
from sedd.samplers.base import State, SteppedSampler
from sedd.samplers.noise import fold, leap, tokens_of
from sedd.types import Array, Float, Int

T_MIN = 1e-5  # where the steps on the score end and the denoising call begins


@dataclass(frozen=True, kw_only=True)
class TauLeaping(SteppedSampler):
    """All positions leap at once over ``steps`` equal intervals of time, from t = 1 to 1e-5.

    One denoising call follows, so that no mask survives: steps + 1 network calls for every
    sequence. The law tends to the model's own as the steps grow; its distance halves as they
    double.
    """

    steps: int = 128
    """Intervals of time, with one network call each; one more call denoises."""

    def __post_init__(self):
        if self.steps < 1:
            raise FieldError("steps", f"must be at least 1, got {self.steps}")

    @abstractmethod
    def step_probs(
        self,
        process: Process,
        log_score: Float[Array, "*b V"],
        x: Int[Array, "*b"],
        t: Float[Array, "..."],
        s: Float[Array, "..."],
    ) -> Float[Array, "*b V"]:
        """Probabilities of the state at time s given x at t > s: unnormalised, maybe negative."""

    def time(self, step):
        """The time at which a step begins; the last one begins at 1e-5."""
        done = jnp.minimum(step / self.steps, 1.0)
        return (1 - done) + done * T_MIN

    def times(self):
        return jnp.append(self.time(jnp.arange(self.steps + 1)), 0.0)

    def sigma(self, state):
        return self.schedule.sigma(self.time(state.round_B))

    def max_rounds(self, length):
        return self.steps + 1

    def active(self, denoiser, state):
        return (state.round_B <= self.steps) & state.free_BL.any(1)

    def start(self, denoiser, keys_B, tokens_BL, fixed_BL):
        prior_BL = denoiser.process.sample_prior(fold(keys_B, 0), tokens_BL.shape[1])
        zero_B = jnp.zeros(len(keys_B), jnp.int32)
        return State(
            x_BL=jnp.where(fixed_BL, tokens_BL, prior_BL),
            free_BL=~fixed_BL,
            keys_B=keys_B,
            calls_B=zero_B,
            round_B=zero_B,
            plan=None,
        )

    def advance(self, denoiser, state):
        process, x_BL, sigma_B = denoiser.process, state.x_BL, self.sigma(state)
        log_score_BLV = denoiser.log_score(x_BL, sigma_B)
        t_B, s_B = self.time(state.round_B), self.time(state.round_B + 1)
        probs_BLV = self.step_probs(process, log_score_BLV, x_BL, t_B[:, None], s_B[:, None])
        keys_B = fold(state.keys_B, state.round_B + 1)
        moved_BL = leap(keys_B, x_BL, probs_BLV)

        def denoised():
            log_probs_BLV = process.denoise(log_score_BLV, x_BL, sigma_B[:, None])
            clean_BL = tokens_of(fold(keys_B, 2), log_probs_BLV).astype(x_BL.dtype)
            return jnp.where(process.can_move(x_BL), clean_BL, x_BL)

        last_B = state.round_B >= self.steps
        moved_BL = jnp.where(
            last_B[:, None], jax.lax.cond(last_B.any(), denoised, lambda: x_BL), moved_BL
        )

        def read(positions_BK):
            places_BK1 = positions_BK[..., None]
            log_probs_BKV = process.denoise(
                jnp.take_along_axis(log_score_BLV, places_BK1, 1),
                jnp.take_along_axis(x_BL, positions_BK, 1),
                sigma_B[:, None],
            )
            return log_probs_BKV[..., : process.num_tokens]

        # What leaves the mask takes the constraint's token, where there is a constraint.
        leaves_BL = moved_BL != x_BL
        moved_BL = denoiser.propose(fold(keys_B, 3), x_BL, leaves_BL, read, moved_BL)
        moved_BL = jnp.where(leaves_BL, moved_BL, x_BL)
        active_B = self.active(denoiser, state)
        return state.moved(moved_BL, active_B, active_B)

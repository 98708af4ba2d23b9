"""The base of τ-leaping samplers, which work on any process. arXiv:2310.16834, section 4.

τ-leaping integrates the reverse process in steps of time. In each step the network is called once,
and the next states of all positions are drawn independently, given the tokens before the step.
Subclasses give the probabilities of a position's next state (``step_probs``): Euler's or Tweedie's.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from sedd.arrays import fold
from sedd.errors import FieldError
from sedd.networks.rows import Rows
from sedd.processes.base import Process
from sedd.samplers.base import State, SteppedSampler
from sedd.samplers.noise import leap, tokens_at, whole
from sedd.types import Array, Float, Int

T_MIN = 1e-5  # time at which the last step ends; at t = 0 scores can be infinite


@dataclass(frozen=True, kw_only=True)
class TauLeaping(SteppedSampler):
    """Move all positions at once in each of ``steps`` equal intervals of time, from t = 1 to 1e-5.

    One more call then draws clean tokens by ``Process.denoise``, so that no mask is left. A
    sequence takes ``steps`` + 1 network calls. The law tends to the model's own as ``steps``
    grows: doubling ``steps`` halves the error.
    """

    calls_on_tokens: ClassVar[bool] = True

    steps: int = 128
    """Intervals of time, with one network call each; one more call draws clean tokens."""

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
        """Unnormalised probabilities of every state at time s, given x at time t > s.

        Args:
            process: the forward process.
            log_score: log scores of the rows, at time t.
            x: current states of the rows.
            t: time of each row.
            s: diffusion time to which the step leads, below t.

        Entries may be negative if the score is inexact or the step too long; they count as 0.
        """

    def refuses(self, watermark):
        return "a position is drawn anew in every step"

    def time(self, step):
        """The diffusion time at which a step begins; ``T_MIN`` from step ``steps`` on."""
        done = jnp.minimum(step / self.steps, 1.0)
        return (1 - done) + done * T_MIN

    def times(self):
        """The times of all steps, and 0 for the clean tokens."""
        return jnp.append(self.time(jnp.arange(self.steps + 1)), 0.0)

    def sigma(self, state):
        return self.schedule.sigma(self.time(state.round_B))

    def max_rounds(self, denoiser, length):
        return self.steps + 1

    def active(self, denoiser, state):
        """Sequences with free positions, for ``steps`` + 1 rounds."""
        return (state.round_B <= self.steps) & state.free_BL.any(1)

    def start(self, denoiser, keys_B, tokens_BL, fixed_BL):
        """Tokens of the prior at free positions."""
        prior_BL = denoiser.process.sample_prior(
            whole(fold(keys_B, 0)), tokens_BL.shape[1], self.schedule.sigma(jnp.float32(1.0))
        )
        return State.starting(
            keys_B,
            x_BL=jnp.where(fixed_BL, tokens_BL, prior_BL),
            free_BL=~fixed_BL,
            plan=None,
        )

    def advance(self, denoiser, state):
        """Move every free position by one step, or in the last round draw its clean token.

        The sequences of a batch may be in different rounds. The last round is therefore not a
        separate program: each chunk of rows computes the step, and also the clean tokens if one of
        its rows is in its last round.
        """
        process, x_BL, sigma_B = denoiser.process, state.x_BL, self.sigma(state)
        t_B, s_B = self.time(state.round_B), self.time(state.round_B + 1)
        active_B, last_B = self.active(denoiser, state), state.round_B >= self.steps
        keys_B = fold(state.keys_B, state.round_B + 1)
        hidden = denoiser.hidden(x_BL, sigma_B)

        def clean(rows, log_score_RV):
            """Log probabilities of the clean tokens of some rows."""
            return process.denoise(log_score_RV, rows.pick(x_BL), rows.pick(sigma_B))

        def move(rows):
            """The next states of some rows."""
            x_R, last_R = rows.pick(x_BL), rows.pick(last_B)
            log_score_RV = denoiser.log_score_rows(hidden, x_BL, sigma_B, rows)
            probs_RV = self.step_probs(process, log_score_RV, x_R, rows.pick(t_B), rows.pick(s_B))
            leapt_R = leap(keys_B, rows, x_R, probs_RV)

            def denoised():
                drawn_R = tokens_at(fold(keys_B, 2), rows, clean(rows, log_score_RV))
                return drawn_R.astype(x_R.dtype)

            return jnp.where(last_R, jax.lax.cond(last_R.any(), denoised, lambda: leapt_R), leapt_R)

        movable_BL = state.free_BL & active_B[:, None] & process.can_move(x_BL)
        moved_BL = denoiser.map_rows(movable_BL, move, x_BL.dtype)
        moved_BL = jnp.where(movable_BL, moved_BL, x_BL)

        def read(positions_BK):
            rows = Rows.at(positions_BK)
            log_probs_RV = clean(rows, denoiser.log_score_rows(hidden, x_BL, sigma_B, rows))
            return log_probs_RV[:, : process.num_tokens].reshape(*positions_BK.shape, -1)

        # A position that is drawn jointly with others leaves the mask when its own step does, but
        # takes the token of the joint proposal.
        leaves_BL = moved_BL != x_BL
        moved_BL = denoiser.propose(fold(keys_B, 3), x_BL, leaves_BL, read, moved_BL, hidden)
        moved_BL = jnp.where(leaves_BL, moved_BL, x_BL)
        return state.called(active_B).moved(moved_BL, active_B)

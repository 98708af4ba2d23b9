"""Remasking (ReMDM): for imperfect models, whose early mistakes it may mask and draw again.

arXiv:2503.00307.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal, get_args

import jax
import jax.numpy as jnp

from sedd.arrays import at, fold
from sedd.denoiser import Denoiser, all_positions
from sedd.errors import FieldError
from sedd.networks.rows import Rows
from sedd.samplers.base import State, SteppedSampler
from sedd.samplers.noise import coins
from sedd.samplers.reveal import Prediction, masked, revealed_share
from sedd.types import Array

Strategy = Literal["cap", "rescale", "loop", "confidence"]


@dataclass(frozen=True, kw_only=True)
class ReMDM(SteppedSampler):
    """Reveal masked tokens and mask revealed ones again, so that early mistakes can be redrawn.

    Time falls from 1 to 0 in ``steps`` equal intervals. In each of them a revealed token is masked
    with probability ς, and a mask is revealed with probability (a' - (1 - ς)a)/(1 - a). Here a and
    a' are the scheduled shares of revealed positions at the start and the end of the interval. The
    expected share then follows the schedule for every ς up to ς_max = min(1, (1 - a')/a). With ς =
    0 the law is that of event_jump. The ``strategy`` sets ς:

    - cap: min(eta, ς_max);
    - rescale: eta·ς_max;
    - loop: from time 1 down to ``t_on`` the share rises linearly to ``alpha_on`` with ς = 0; it
      stays there until ``t_off`` with ς = min(eta, ς_max); then it rises linearly to 1 with ς = 0;
    - confidence: eta·ς_max·softmax(-ψ) over the revealed positions, where ψ is the probability that
      the token had when it was drawn. The share then follows the schedule only roughly.

    Steps in which nothing is revealed take no network call: a sequence takes at most ``steps``.
    """

    needs_absorbing: ClassVar[bool] = True

    steps: int = 128
    """Intervals of time. Intervals in which nothing is revealed take no network call."""
    strategy: Strategy = "cap"
    """Rule for the probability ς that a token is masked again."""
    eta: float = 0.02
    """Remasking strength in [0, 1]: the largest ς under cap and loop, else a factor of ς_max."""
    t_on: float = 0.55
    """Strategy loop: the time, falling from 1 to 0, at which remasking begins; in (0, 1)."""
    t_off: float = 0.05
    """Strategy loop: the time at which remasking ends, at most t_on."""
    alpha_on: float = 0.9
    """Strategy loop: the share of revealed positions between t_on and t_off, in (0, 1)."""

    def __post_init__(self):
        if self.steps < 1:
            raise FieldError("steps", f"must be at least 1, got {self.steps}")
        if self.strategy not in get_args(Strategy):
            known = ", ".join(get_args(Strategy))
            raise FieldError("strategy", f"must be one of {known}, got {self.strategy!r}")
        if not 0 <= self.eta <= 1:
            raise FieldError("eta", f"must be in [0, 1], got {self.eta}")
        if not 0 < self.t_on < 1:
            raise FieldError("t_on", f"must be in (0, 1), got {self.t_on}")
        if not 0 < self.t_off <= self.t_on:
            raise FieldError(
                "t_off", f"must be above 0 and at most the time t_on, {self.t_on}, got {self.t_off}"
            )
        if not 0 < self.alpha_on < 1:
            raise FieldError("alpha_on", f"must be in (0, 1), got {self.alpha_on}")

    def share(self, step):
        """Expected share of positions that are revealed when step number ``step`` begins.

        ``step`` is an array of any shape, counted from 0; the result has its shape.
        """
        t = 1 - jnp.minimum(step / self.steps, 1.0)
        if self.strategy != "loop":
            return revealed_share(self.schedule, t)
        rising = self.alpha_on * (1 - t) / (1 - self.t_on)
        finishing = 1 - (1 - self.alpha_on) * t / self.t_off
        return jnp.where(t > self.t_on, rising, jnp.where(t < self.t_off, finishing, self.alpha_on))

    def remask_probability(self, step, psi):
        """The probability ς that a revealed token is masked again.

        Args:
            step: number of the step, [B, 1].
            psi: probability of each token when it was drawn, [B, L]; infinite at masks.
        """
        before, after = self.share(step), self.share(step + 1)
        limit = jnp.minimum(1.0, (1 - after) / jnp.maximum(before, 1e-30))
        if self.strategy == "rescale":
            return self.eta * limit
        if self.strategy == "confidence":
            anything = jnp.isfinite(psi).any(-1, keepdims=True)
            weight = jax.nn.softmax(jnp.where(anything, -psi, 0.0), axis=-1)
            return jnp.where(anything, self.eta * limit * weight, 0.0)
        capped = jnp.minimum(self.eta, limit)
        if self.strategy == "cap":
            return capped
        return jnp.where((before == self.alpha_on) & (after == self.alpha_on), capped, 0.0)

    def reveal_probability(self, step, remask):
        """The probability that a masked position is revealed in a step.

        Args:
            step: number of the step, [B, 1].
            remask: ς, from ``remask_probability``, [B, 1] or [B, L].
        """
        before, after = self.share(step), self.share(step + 1)
        return (after - (1 - remask) * before) / (1 - before)

    def sigma(self, state):
        # The noise at which the schedule has the expected share of visible tokens of this step.
        last, first = (jnp.exp(-self.schedule.sigma(jnp.asarray(t, float))) for t in (0, 1))
        return -jnp.log(first + self.share(state.round_B) * (last - first))

    def max_rounds(self, denoiser, length):
        return self.steps

    def active(self, denoiser, state):
        return (state.round_B < self.steps) & state.free_BL.any(1)

    def start(self, denoiser, keys_B, tokens_BL, fixed_BL):
        """All free positions masked; the plan is ψ of each token, infinite at masks."""
        return State.starting(
            keys_B,
            x_BL=jnp.where(fixed_BL, tokens_BL, denoiser.mask_id),
            free_BL=~fixed_BL,
            plan=jnp.full(tokens_BL.shape, jnp.inf),  # ψ
        )

    def advance(self, denoiser, state):
        """Run each sequence to its own next step that reveals a position, and make that step.

        Which positions are revealed or masked in a step depends on coins, and on probabilities that
        earlier calls have computed, but not on the next network output. An inner loop therefore
        draws the flips step by step. Steps that only mask are applied without a network call, and
        each sequence stops at its first step that reveals something. One network call then serves
        these steps of all sequences, which may be at different times.
        """
        nowhere_BL = jnp.zeros(state.x_BL.shape, bool)

        def seeking(carry):
            state, reveals_BL, _ = carry
            return self.active(denoiser, state) & ~reveals_BL.any(1)

        def step(carry):
            state, reveals_BL, remasks_BL = carry
            seeks_B = seeking(carry)
            found_BL, masks_BL = self.flips(denoiser, state)
            quiet_B = seeks_B & ~found_BL.any(1)
            state = self.masked_again(denoiser, state, masks_BL & quiet_B[:, None])
            state = replace(state, round_B=state.round_B + quiet_B)
            return (
                state,
                jnp.where(seeks_B[:, None], found_BL, reveals_BL),
                jnp.where(seeks_B[:, None], masks_BL, remasks_BL),
            )

        state, reveals_BL, remasks_BL = jax.lax.while_loop(
            lambda carry: seeking(carry).any(), step, (state, nowhere_BL, nowhere_BL)
        )
        called_B = reveals_BL.any(1)
        keys_B = fold(fold(state.keys_B, state.round_B), 2)
        prediction = Prediction(
            denoiser=denoiser,
            hidden=denoiser.hidden(state.x_BL, self.sigma(state)),
            x_BL=state.x_BL,
            keys_B=keys_B,
        ).proposing(keys_B, reveals_BL)
        drawn_BL = prediction.draw(reveals_BL)
        psi_BL = state.plan
        if self.strategy == "confidence":

            def log_probability(rows):
                return at(prediction.log_probs(rows), rows.pick(drawn_BL))

            log_psi_BL = denoiser.map_rows(reveals_BL, log_probability, psi_BL.dtype)
            psi_BL = jnp.where(reveals_BL, jnp.exp(log_psi_BL), psi_BL)
        state = self.masked_again(denoiser, state, remasks_BL & called_B[:, None])
        return replace(
            state.called(called_B),
            x_BL=jnp.where(reveals_BL, drawn_BL, state.x_BL),
            round_B=state.round_B + called_B,
            plan=jnp.where(reveals_BL, psi_BL, state.plan),
        )

    def flips(self, denoiser: Denoiser, state: State) -> tuple[Array, Array]:
        """Draw the flips of the next step of each sequence.

        Returns the masked positions that are revealed and the tokens that are masked, both [B, L].
        """
        masked_BL, step_B1 = masked(denoiser, state), state.round_B[:, None]
        remask = self.remask_probability(step_B1, state.plan)
        # Under ``confidence`` ς depends on a drawn token, which a masked position does not have.
        of_mask = 0.0 if self.strategy == "confidence" else remask
        reveal = self.reveal_probability(step_B1, of_mask)
        reveal_keys_B, remask_keys_B = (
            fold(fold(state.keys_B, state.round_B), i) for i in range(2)
        )
        rows = Rows.at(all_positions(state.x_BL))

        def flip(keys_B, probability):
            probability_BL = jnp.broadcast_to(probability, masked_BL.shape)
            return coins(keys_B, rows, probability_BL.reshape(-1)).reshape(masked_BL.shape)

        return (
            masked_BL & flip(reveal_keys_B, reveal),
            state.free_BL & ~masked_BL & flip(remask_keys_B, remask),
        )

    def masked_again(self, denoiser: Denoiser, state: State, where_BL: Array) -> State:
        """Mask the tokens at ``where_BL`` and forget their probabilities."""
        return replace(
            state,
            x_BL=jnp.where(where_BL, denoiser.mask_id, state.x_BL),
            plan=jnp.where(where_BL, jnp.inf, state.plan),
        )


make = ReMDM

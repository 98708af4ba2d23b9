"""Particles steered by a verifier: for samples tilted towards high scores, not only the best.

Sequential Monte Carlo. arXiv:2501.06848, section 3.
"""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sedd.denoiser import Denoiser
from sedd.errors import FieldError
from sedd.samplers.base import Sampler, Samples, State, SteppedSampler, fill, record
from sedd.samplers.noise import fold
from sedd.samplers.reveal import Prediction, masked
from sedd.samplers.verifier import Verifier, verify
from sedd.types import Array, Bool, Float, Int, Key


class Crowd(NamedTuple):
    """The particles of all requests between two rounds; row b·P + p is particle p of request b."""

    state: State  # of the inner sampler, with a row a particle
    frames: Int[Array, "T R L"] | None  # trace of each particle; None unless asked for
    log_weight_BP: Float[Array, "B P"]  # since the request was last resampled
    value_BP: Float[Array, "B P"]  # tilt·score at the last scoring; 0 before the first
    tick: Int[Array, ""]  # rounds so far


@dataclass(frozen=True, kw_only=True)
class Particle(Sampler):
    """Draw from p(x)·exp(tilt·score(x)), normalised, in the limit of many ``particles``.

    Here p is the law of ``inner``, and score is the verifier's.

    Each request has ``particles`` sequences that are drawn side by side. Every ``resample_every``
    rounds, each of them is completed by one draw of all its masked positions, and the completion is
    scored. If tilt·score has risen by d since the last scoring, the particle's weight is multiplied
    by exp(d). If the normalised weights w of a request have become uneven (1/Σw² is below
    ``particles``/2, which never happens with 2 particles), particles are resampled in proportion to
    their weights. At the end one particle is drawn by its weight. With 1 particle the law is p; it
    approaches the tilted law as ``particles`` grows.

    The network calls of all particles and of their completions are counted.
    """

    inner: SteppedSampler
    verifier: Verifier
    """Scores tokens; ``text_verifier`` makes one from a function on texts."""
    particles: int = 8
    """Sequences drawn side by side for each one that is returned."""
    tilt: float = 1.0
    """Weight of the score in exp(tilt·score): 0 ignores the score, below 0 avoids high scores."""
    resample_every: int = 8
    """Rounds of the inner sampler from one scoring to the next."""

    def __post_init__(self):
        for name in ("particles", "resample_every"):
            if getattr(self, name) < 1:
                raise FieldError(name, f"must be at least 1, got {getattr(self, name)}")
        if not math.isfinite(self.tilt):
            raise FieldError("tilt", f"must be finite, got {self.tilt}")
        if not isinstance(self.inner, SteppedSampler):
            raise FieldError(
                "inner", "must not be best_of_n or particle: they draw whole sequences"
            )

    @property
    def caveat(self):
        return self.inner.caveat

    @property
    def by_block(self):
        return self.inner.by_block

    @property
    def width(self):
        return self.particles * self.inner.width

    def refuses(self, watermark):
        return "copies of a particle would stay equal" if watermark.replaces_noise else ""

    def check(self, denoiser):
        super().check(denoiser)
        self.inner.check(denoiser)

    def __call__(self, denoiser, keys_B, tokens_BL, fixed_BL, *, trace=False):
        """Run the rounds of the inner sampler, with a scoring and resampling in some of them.

        The loop ends early if a score is nan, which is how a verifier signals a failure.
        """
        self.check(denoiser)
        batch, count, length = len(keys_B), self.particles, tokens_BL.shape[1]
        denoiser = denoiser.repeat(count)
        slot_keys = fold(jnp.repeat(keys_B, count), jnp.tile(jnp.arange(count), batch))
        own_keys_B = fold(keys_B, count)  # of a request's resampling
        state = self.inner.start(
            denoiser,
            fold(slot_keys, 0),
            jnp.repeat(tokens_BL, count, 0),
            jnp.repeat(fixed_BL, count, 0),
        )
        frames = None
        if trace:
            rounds = self.inner.max_rounds(denoiser, length)
            frames = jnp.zeros((rounds + 1, *state.x_BL.shape), state.x_BL.dtype)
            frames = frames.at[0].set(state.x_BL)
        nothing = jnp.zeros((batch, count))
        weigh = partial(self._weigh, denoiser, slot_keys, own_keys_B)

        def one_round(crowd):
            state = self.inner.advance(denoiser, crowd.state)
            tick = crowd.tick + 1
            frames = record(crowd.frames, tick, state.x_BL)
            active_R = self.inner.active(denoiser, state)
            due = (tick % self.resample_every == 0) & denoiser.anywhere(active_R)
            crowd = crowd._replace(state=state, frames=frames, tick=tick)
            return jax.lax.cond(due, weigh, lambda crowd: crowd, crowd)

        crowd = jax.lax.while_loop(
            lambda crowd: (
                denoiser.anywhere(self.inner.active(denoiser, crowd.state))
                & ~denoiser.anywhere(~jnp.isfinite(crowd.value_BP))
            ),
            one_round,
            Crowd(state, frames, nothing, nothing, jnp.zeros((), jnp.int32)),
        )
        return self._choose(denoiser, own_keys_B, crowd, trace)

    def _weigh(
        self,
        denoiser: Denoiser,
        slot_keys: Key[Array, " R"],
        own_keys_B: Key[Array, " B"],
        crowd: Crowd,
    ) -> Crowd:
        """Complete and score the particles, update their weights, and resample uneven requests.

        ``slot_keys`` has a key a particle for completions and for the noise of copies;
        ``own_keys_B`` has a key a request for resampling. Both are folded with the round.
        """
        state, frames, log_weight, value, tick = crowd
        batch, count = log_weight.shape
        # A request that is done keeps its particles while others go on.
        due_B = self.inner.active(denoiser, state).reshape(batch, count).any(1)
        guess, called = self.complete(denoiser, state, fold(fold(slot_keys, 1), tick))
        new_value = self.tilt * verify(self.verifier, denoiser, guess).reshape(batch, count)
        new_value = jnp.where(due_B[:, None], new_value, value)
        log_weight, value = log_weight + new_value - value, new_value
        ancestor, uneven_B = resample(fold(own_keys_B, tick), log_weight, due_B)
        take = (ancestor + count * jnp.arange(batch)[:, None]).ravel()
        state = state.called(called)
        # A call counts whether or not its particle survives.
        counts = {"calls_B": state.calls_B, "rows_B": state.rows_B}
        state = jax.tree.map(lambda rows: rows[take], state)
        # Copies of one particle continue with different keys, or they would stay equal.
        fresh = fold(fold(slot_keys, 2), tick)
        keys = jnp.where(jnp.repeat(uneven_B, count), fresh, state.keys_B)
        state = replace(state, keys_B=keys, **counts)
        frames = None if frames is None else frames[:, take]
        log_weight = jnp.where(uneven_B[:, None], 0.0, log_weight)
        return Crowd(state, frames, log_weight, jnp.take_along_axis(value, ancestor, 1), tick)

    def _choose(
        self, denoiser: Denoiser, own_keys_B: Key[Array, " B"], crowd: Crowd, trace: bool
    ) -> Samples:
        """Score the finished particles and draw one of each request by its weight."""
        state, frames, log_weight, value, rounds = crowd
        batch, count = log_weight.shape
        score = verify(self.verifier, denoiser, state.x_BL).reshape(batch, count)
        score = jnp.where(jnp.isfinite(value).all(), score, jnp.nan)
        log_weight = log_weight + self.tilt * score - value
        last_keys_B = fold(own_keys_B, 0)
        chosen_B = jax.vmap(jax.random.categorical)(last_keys_B, log_weight)
        row_B = chosen_B + count * jnp.arange(batch)

        def of_all(count_R):
            return (count_R * denoiser.calls_each).reshape(batch, count).sum(1)

        return Samples(
            tokens_BL=state.x_BL[row_B],
            calls_B=of_all(state.calls_B),
            rows_B=of_all(state.rows_B),
            trace_TBL=None if frames is None else fill(frames[:, row_B], rounds),
            rounds=rounds,
            times_T=self.inner.times() if trace else None,
            score_B=score[jnp.arange(batch), chosen_B],
            log_prob_B=None if state.log_prob_B is None else state.log_prob_B[row_B],
        )

    def complete(self, denoiser: Denoiser, state: State, keys_B: Key[Array, " B"]):
        """Draw all masked positions of each sequence at once, as a guess at its final tokens.

        Returns the completed tokens [B, L] and the network calls [B]: 1 for a sequence with masks.
        On a process that is not absorbing the guess is the noisy tokens themselves, with 0 calls.
        """
        if not denoiser.process.absorbing:
            return state.x_BL, jnp.zeros(state.calls_B.shape, jnp.int32)
        masked_BL = masked(denoiser, state)
        prediction = Prediction(
            denoiser=denoiser,
            hidden=denoiser.hidden(state.x_BL, self.inner.sigma(state)),
            x_BL=state.x_BL,
            keys_B=keys_B,
        ).proposing(keys_B, masked_BL)
        drawn_BL = prediction.draw(masked_BL)
        return jnp.where(masked_BL, drawn_BL, state.x_BL), masked_BL.any(1).astype(jnp.int32)


def resample(
    keys_B: Key[Array, " B"], log_weight_BP: Float[Array, "B P"], due_B: Bool[Array, " B"]
) -> tuple[Int[Array, "B P"], Bool[Array, " B"]]:
    """Systematic resampling of the requests that are due and have uneven weights.

    The effective number of particles, 1 / Σ w² of the normalised weights w, is P for equal weights
    and 1 if one particle has all of the weight. A request is resampled if this number is below P/2.
    Systematic resampling takes the ancestors at the P points (p + u) / P of the cumulative weights,
    with one uniform u for all: the number of copies of a particle is P·w rounded down or up.

    Args:
        keys_B: a key for each request.
        log_weight_BP: unnormalised log weights of the P particles of each request.
        due_B: requests that may be resampled.

    Returns:
        The ancestor of each particle, itself without resampling; and which requests were resampled.
    """
    count = log_weight_BP.shape[1]
    weight_BP = jax.nn.softmax(log_weight_BP, axis=1)
    uneven_B = due_B & (1 / (weight_BP**2).sum(1) < count / 2)
    offset_B = jax.vmap(jax.random.uniform)(keys_B)
    points_BP = (jnp.arange(count)[None] + offset_B[:, None]) / count
    ancestor_BP = jax.vmap(jnp.searchsorted)(jnp.cumsum(weight_BP, 1), points_BP)
    ancestor_BP = jnp.minimum(ancestor_BP, count - 1)  # a cumulative sum may end below 1
    own_BP = jnp.broadcast_to(jnp.arange(count), ancestor_BP.shape)
    return jnp.where(uneven_B[:, None], ancestor_BP, own_BP), uneven_B


make = Particle

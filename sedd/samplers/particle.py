"""Particles steered by a verifier: for samples tilted towards high scores, not only the best.

Sequential Monte Carlo. arXiv:2501.06848, section 3. Its sweeps are particle independent
Metropolis-Hastings (Andrieu, Doucet, Holenstein, 2010).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sedd.arrays import fold
from sedd.denoiser import Denoiser
from sedd.errors import FieldError
from sedd.samplers.base import Samples, State, SteppedSampler, fill, record
from sedd.samplers.reveal import complete
from sedd.samplers.search import AGAIN, Search, added, either, nothing_like, summed, take
from sedd.samplers.verifier import Scores
from sedd.types import Array, Bool, Float, Int, Key


class Crowd(NamedTuple):
    """The particles of all requests between two rounds; row b·P + p is particle p of request b."""

    state: State  # of the inner sampler, with a row a particle
    frames: Int[Array, "T R L"] | None  # trace of each particle; None unless asked for
    log_weight_BP: Float[Array, "B P"]  # since the request was last resampled
    value_BP: Float[Array, "B P"]  # tilt·score at the last scoring; 0 before the first
    log_partition_B: Float[Array, " B"]  # of the weights before the request was last resampled
    own_calls_B: Int[Array, " B"]  # network calls of the verifier
    scorings_B: Int[Array, " B"]  # how often the particles of the request were scored
    tick: Int[Array, ""]  # rounds so far


@dataclass(frozen=True, kw_only=True)
class Particle(Search):
    """Draw from p(x)·exp(tilt·score(x)), normalised, in the limit of many ``particles``.

    Here p is the law of ``inner``, and score is that of the one verifier.

    Each request has ``particles`` sequences that are drawn side by side. Every ``resample_every``
    rounds, each of them is completed by one draw of all its masked positions, and the completion is
    scored. If tilt·score has risen by d since the last scoring, the particle's weight is multiplied
    by exp(d). If the normalised weights w of a request have become uneven (1/Σw² is below
    ``particles``/2, which never happens with 2 particles), particles are resampled in proportion to
    their weights. At the end one particle is drawn by its weight. With 1 particle the law is p; it
    approaches the tilted law as ``particles`` grows.

    The product of the mean weights, Z, estimates the mean of exp(tilt·score) under p without bias;
    its logarithm is returned as ``log_partition``. With ``sweeps`` above 1 all of this is repeated
    with new noise, and the result of a sweep replaces the current one with probability
    min(1, Z'/Z). The law then tends to the tilted one as ``sweeps`` grows, with any number of
    particles.

    The network calls of all particles and of their completions are counted, in all sweeps.
    """

    inner: SteppedSampler
    particles: int = 8
    """Sequences drawn side by side for each one that is returned."""
    tilt: float = 1.0
    """Weight of the score in exp(tilt·score): 0 ignores the score, below 0 avoids high scores."""
    resample_every: int = 8
    """Rounds of the inner sampler from one scoring to the next."""
    sweeps: int = 1
    """How often all particles are drawn. The law tends to the tilted one as this number grows."""

    def __post_init__(self):
        super().__post_init__()
        for name in ("particles", "resample_every", "sweeps"):
            if getattr(self, name) < 1:
                raise FieldError(name, f"must be at least 1, got {getattr(self, name)}")
        if not math.isfinite(self.tilt):
            raise FieldError("tilt", f"must be finite, got {self.tilt}")
        self.check_one_verifier()

    @property
    def candidates(self):
        return self.particles

    def refuses(self, watermark):
        return "copies of a particle would stay equal" if watermark.replaces_noise else ""

    def __call__(self, denoiser, keys_B, tokens_BL, fixed_BL, *, trace=False):
        """Run all sweeps. The loop ends early if a score is nan."""
        self.check(denoiser)
        wide, fixed_RL = denoiser.repeat(self.particles), jnp.repeat(fixed_BL, self.particles, 0)
        tokens_RL = jnp.repeat(tokens_BL, self.particles, 0)
        # In every sweep the score is the same function of the text: that of the request's keys.
        score = partial(self.scores, wide, keys_B, fixed_RL=fixed_RL)

        def sweep(sweep_keys_B):
            return self._sweep(wide, sweep_keys_B, tokens_RL, fixed_RL, score, trace)

        if self.sweeps == 1:
            return sweep(keys_B)

        def one_sweep(carry):
            kept, index = carry
            sweep_keys_B = jnp.where(index == 0, keys_B, fold(fold(keys_B, AGAIN), index))
            new = sweep(sweep_keys_B)
            uniform_B = jax.vmap(jax.random.uniform)(fold(sweep_keys_B, self.particles + 1))
            rise_B = new.log_partition_B - kept.log_partition_B
            accepted_B = (jnp.log(uniform_B) < rise_B) | jnp.isnan(rise_B)
            return added(either(accepted_B, new, kept), new, kept), index + 1

        def goes_on(carry):
            kept, index = carry
            return (index < self.sweeps) & ~denoiser.anywhere(jnp.isnan(kept.score_B))

        nothing = nothing_like(lambda: sweep(keys_B))
        nothing = replace(nothing, log_partition_B=jnp.full(len(keys_B), -jnp.inf))
        kept, _ = jax.lax.while_loop(goes_on, one_sweep, (nothing, jnp.zeros((), jnp.int32)))
        return kept

    def _sweep(
        self,
        denoiser: Denoiser,
        keys_B: Key[Array, " B"],
        tokens_RL: Int[Array, "R L"],
        fixed_RL: Bool[Array, "R L"],
        score: Callable[[Array], Scores],
        trace: bool,
    ) -> Samples:
        """Run the rounds of the inner sampler, with a scoring and resampling in some of them.

        The loop ends early if a score is nan, which is how a verifier signals a failure. ``score``
        gives the scores of the particles' texts.
        """
        batch, count, length = len(keys_B), self.particles, tokens_RL.shape[1]
        slot_keys = fold(jnp.repeat(keys_B, count), jnp.tile(jnp.arange(count), batch))
        state = self.inner.start(
            denoiser,
            fold(slot_keys, 0),
            tokens_RL,
            fixed_RL,
        )
        frames = None
        if trace:
            rounds = self.inner.max_rounds(denoiser, length)
            frames = jnp.zeros((rounds + 1, *state.x_BL.shape), state.x_BL.dtype)
            frames = frames.at[0].set(state.x_BL)
        nothing, none_B = jnp.zeros((batch, count)), jnp.zeros(batch, jnp.int32)
        weigh = partial(self._weigh, denoiser, slot_keys, keys_B, score)

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
            Crowd(
                *(state, frames, nothing, nothing, jnp.zeros(batch)),
                *(none_B, none_B, jnp.zeros((), jnp.int32)),
            ),
        )
        return self._choose(denoiser, keys_B, score, crowd, trace)

    def _weigh(
        self,
        denoiser: Denoiser,
        slot_keys: Key[Array, " R"],
        keys_B: Key[Array, " B"],
        score: Callable[[Array], Scores],
        crowd: Crowd,
    ) -> Crowd:
        """Complete and score the particles, update their weights, and resample uneven requests.

        ``slot_keys`` has a key a particle for completions and for the noise of copies; ``keys_B``
        has a key a request for resampling. Both are folded with the round.
        """
        state, tick = crowd.state, crowd.tick
        log_weight, value = crowd.log_weight_BP, crowd.value_BP
        batch, count = log_weight.shape
        # A request that is done keeps its particles while others go on.
        due_B = self.inner.active(denoiser, state).reshape(batch, count).any(1)
        guess, called = complete(
            denoiser, state, fold(fold(slot_keys, 1), tick), self.inner.sigma(state)
        )
        scores = score(guess)
        score_BP = scores.score_RE.reshape(batch, count)
        new_value = jnp.where(due_B[:, None], self.tilt * score_BP, value)
        log_weight, value = log_weight + new_value - value, new_value
        ancestor, uneven_B = resample(fold(fold(keys_B, count), tick), log_weight, due_B)
        take_R = (ancestor + count * jnp.arange(batch)[:, None]).ravel()
        state = state.called(called)
        # A call counts whether or not its particle survives.
        counts = {"calls_B": state.calls_B, "rows_B": state.rows_B}
        state = jax.tree.map(lambda rows: rows[take_R], state)
        # Copies of one particle continue with different keys, or they would stay equal.
        fresh = fold(fold(slot_keys, 2), tick)
        keys = jnp.where(jnp.repeat(uneven_B, count), fresh, state.keys_B)
        return Crowd(
            state=replace(state, keys_B=keys, **counts),
            frames=None if crowd.frames is None else crowd.frames[:, take_R],
            log_weight_BP=jnp.where(uneven_B[:, None], 0.0, log_weight),
            value_BP=jnp.take_along_axis(value, ancestor, 1),
            log_partition_B=crowd.log_partition_B
            + jnp.where(uneven_B, log_mean_exp(log_weight), 0.0),
            own_calls_B=crowd.own_calls_B + jnp.where(due_B, summed(scores.calls_R, batch), 0),
            scorings_B=crowd.scorings_B + due_B,
            tick=tick,
        )

    def _choose(
        self,
        denoiser: Denoiser,
        keys_B: Key[Array, " B"],
        score: Callable[[Array], Scores],
        crowd: Crowd,
        trace: bool,
    ) -> Samples:
        """Score the finished particles and draw one of each request by its weight."""
        state, value = crowd.state, crowd.value_BP
        batch, count = value.shape
        scores = score(state.x_BL)
        score_BP = scores.score_RE.reshape(batch, count)
        score_BP = jnp.where(jnp.isfinite(value).all(), score_BP, jnp.nan)
        log_weight = crowd.log_weight_BP + self.tilt * score_BP - value
        chosen_B = jax.vmap(jax.random.categorical)(fold(fold(keys_B, count), 0), log_weight)
        own_calls_B = crowd.own_calls_B + summed(scores.calls_R, batch)
        particles = Samples(
            tokens_BL=state.x_BL,
            calls_B=state.calls_B,
            rows_B=state.rows_B,
            trace_TBL=None if crowd.frames is None else fill(crowd.frames, crowd.tick),
            rounds=crowd.tick,
            times_T=self.inner.times() if trace else None,
            log_prob_B=state.log_prob_B,
        )
        return replace(
            take(particles, chosen_B + count * jnp.arange(batch)),
            calls_B=summed(state.calls_B * denoiser.calls_each, batch) + own_calls_B,
            rows_B=summed(state.rows_B * denoiser.calls_each, batch) + own_calls_B,
            score_B=score_BP[jnp.arange(batch), chosen_B],
            verifier_calls_B=count * (crowd.scorings_B + 1),
            log_partition_B=crowd.log_partition_B + log_mean_exp(log_weight),
        )


def log_mean_exp(log_weight_BP: Float[Array, "B P"]) -> Float[Array, " B"]:
    """The logarithms of the mean weights."""
    return jax.nn.logsumexp(log_weight_BP, axis=1) - math.log(log_weight_BP.shape[1])


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

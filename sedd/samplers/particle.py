"""Particles steered by a verifier: for samples tilted towards a score, not only its best.

Sequential Monte Carlo. arXiv:2501.06848, section 3.
"""

import math
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from sedd.denoiser import Denoiser
from sedd.errors import FieldError
from sedd.samplers.base import Sampler, Samples, State, SteppedSampler, fill, record
from sedd.samplers.noise import fold
from sedd.samplers.reveal import Prediction, masked
from sedd.samplers.verifier import Verifier, verify
from sedd.types import Array, Bool, Float, Int, Key


@dataclass(frozen=True, kw_only=True)
class Particle(Sampler):
    """Samples of p(x)·exp(tilt·score(x)), p being ``inner``'s law, as ``particles`` grow.

    That many sequences a request are drawn side by side. Every ``resample_every`` rounds each is
    completed by one draw of its masked positions, scored, and weighted by how much tilt·score rose
    since; where the weights have become uneven (their effective number is below half, which 2 never
    reach), sequences are copied in proportion. One is drawn from the last weights. With finitely
    many particles the law lies between p and the tilted one: 1 particle draws from p.

    Calls are those of all particles and of their completions.
    """

    inner: SteppedSampler
    verifier: Verifier
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
            raise FieldError("inner", "must be a sampler that goes step by step, not a search")

    @property
    def caveat(self):
        return self.inner.caveat

    @property
    def width(self):
        return self.particles

    def check(self, denoiser):
        super().check(denoiser)
        self.inner.check(denoiser)

    def __call__(self, denoiser, keys_B, tokens_BL, fixed_BL, *, trace=False):
        self.check(denoiser)
        batch, count, length = len(keys_B), self.particles, tokens_BL.shape[1]
        crowd = denoiser.repeat(count)
        slot_keys = fold(jnp.repeat(keys_B, count), jnp.tile(jnp.arange(count), batch))
        own_keys_B = fold(keys_B, count)  # of a request's resampling
        state = self.inner.start(
            crowd,
            fold(slot_keys, 0),
            jnp.repeat(tokens_BL, count, 0),
            jnp.repeat(fixed_BL, count, 0),
        )
        frames = None
        if trace:
            rounds = self.inner.max_rounds(length)
            frames = jnp.zeros((rounds + 1, *state.x_BL.shape), state.x_BL.dtype)
            frames = frames.at[0].set(state.x_BL)
        nothing = jnp.zeros((batch, count))

        def weigh(args):
            """Weigh by the rise of tilt·score since the last scoring, and copy rows by weight."""
            state, frames, log_weight, value, tick = args
            # A request that is done keeps its particles while others go on.
            due_B = self.inner.active(crowd, state).reshape(batch, count).any(1)
            guess, called = self.complete(crowd, state, fold(fold(slot_keys, 1), tick))
            new_value = self.tilt * verify(self.verifier, crowd, guess).reshape(batch, count)
            new_value = jnp.where(due_B[:, None], new_value, value)
            log_weight, value = log_weight + new_value - value, new_value
            ancestor, uneven_B = resample(fold(own_keys_B, tick), log_weight, due_B)
            take = (ancestor + count * jnp.arange(batch)[:, None]).ravel()
            state = replace(state, calls_B=state.calls_B + called)
            calls_B = state.calls_B  # a call counts whether or not its particle survives
            state = jax.tree.map(lambda rows: rows[take], state)
            # Copies of one row continue with different keys.
            fresh = fold(fold(slot_keys, 2), tick)
            keys = jnp.where(jnp.repeat(uneven_B, count), fresh, state.keys_B)
            state = replace(state, keys_B=keys, calls_B=calls_B)
            frames = None if frames is None else frames[:, take]
            log_weight = jnp.where(uneven_B[:, None], 0.0, log_weight)
            return state, frames, log_weight, jnp.take_along_axis(value, ancestor, 1), tick

        def one_round(carry):
            state, frames, log_weight, value, tick = carry
            state = self.inner.advance(crowd, state)
            tick = tick + 1
            frames = record(frames, tick, state.x_BL)
            due = (tick % self.resample_every == 0) & self.inner.active(crowd, state).any()
            return jax.lax.cond(
                due, weigh, lambda args: args, (state, frames, log_weight, value, tick)
            )

        state, frames, log_weight, value, rounds = jax.lax.while_loop(
            # A verifier that failed makes every value nan: stop.
            lambda carry: self.inner.active(crowd, carry[0]).any() & jnp.isfinite(carry[3]).all(),
            one_round,
            (state, frames, nothing, nothing, jnp.zeros((), jnp.int32)),
        )
        score = verify(self.verifier, crowd, state.x_BL).reshape(batch, count)
        score = jnp.where(jnp.isfinite(value).all(), score, jnp.nan)
        log_weight = log_weight + self.tilt * score - value
        last_keys_B = fold(own_keys_B, 0)
        chosen_B = jax.vmap(jax.random.categorical)(last_keys_B, log_weight)
        row_B = chosen_B + count * jnp.arange(batch)
        return Samples(
            tokens_BL=state.x_BL[row_B],
            calls_B=(state.calls_B * crowd.calls_each).reshape(batch, count).sum(1),
            trace_TBL=None if frames is None else fill(frames[:, row_B], rounds),
            rounds=rounds,
            times_T=self.inner.times() if trace else None,
            score_B=score[jnp.arange(batch), chosen_B],
        )

    def complete(self, denoiser: Denoiser, state: State, keys_B: Key[Array, " B"]):
        """Each sequence with its masks drawn at once, and the network calls that this took.

        On a process that is not absorbing, the noisy tokens themselves, without a call.
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
    """Systematic resampling where due and the effective number of particles is below half.

    The ancestor of each particle, and which requests were resampled.
    """
    count = log_weight_BP.shape[1]
    weight_BP = jax.nn.softmax(log_weight_BP, axis=1)
    uneven_B = due_B & (1 / (weight_BP**2).sum(1) < count / 2)
    offset_B = jax.vmap(jax.random.uniform)(keys_B)
    points_BP = (jnp.arange(count)[None] + offset_B[:, None]) / count
    ancestor_BP = jax.vmap(jnp.searchsorted)(jnp.cumsum(weight_BP, 1), points_BP)
    ancestor_BP = jnp.minimum(ancestor_BP, count - 1)  # sums may stop short of 1
    own_BP = jnp.broadcast_to(jnp.arange(count), ancestor_BP.shape)
    return jnp.where(uneven_B[:, None], ancestor_BP, own_BP), uneven_B


make = Particle

"""What a sampler is, and the loop that the τ-leaping ones share."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from sedd.denoiser import Denoiser
from sedd.processes.base import Process, at, put
from sedd.schedules import NoiseSchedule
from sedd.types import Array, Bool, Float, Int, Key

T_MIN = 1e-5  # where the steps of a sampler on the score end and the denoising call begins


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Samples:
    """What a sampler returns."""

    tokens_BL: Int[Array, "B L"]
    calls_B: Int[Array, "B"]  # network calls that each sequence needed
    trace_TBL: Int[Array, "T B L"] | None = None  # the state at first and after every event
    times_T: Float[Array, "T"] | None = None  # diffusion times of the trace's frames, 1 to 0


@dataclass(frozen=True, kw_only=True)
class Sampler(ABC):
    """Draws sequences from a denoiser; one jit, static shapes, randomness by request.

    A sampler is a value: its options are fields, and ``schedule`` comes from the model.
    """

    schedule: NoiseSchedule

    @abstractmethod
    def __call__(
        self,
        denoiser: Denoiser,
        keys_B: Key[Array, "B"],
        tokens_BL: Int[Array, "B L"],
        fixed_BL: Bool[Array, "B L"],
        *,
        trace: bool = False,
    ) -> Samples:
        """One sequence a key. Where ``fixed_BL`` the token is that of ``tokens_BL`` throughout.

        On a uniform process the score reads given tokens as noisy ones: the rest does not tend to
        the true conditional, however many steps there are. On an absorbing process it does.

        The law of each sampler is stated in its docstring.
        """


@dataclass(frozen=True, kw_only=True)
class TauLeaping(Sampler):
    """All positions leap at once over ``steps`` equal intervals of time, from t = 1 to 1e-5.

    One denoising call follows, so that no mask survives: steps + 1 network calls for every
    sequence. The law tends to the model's own as the steps grow; its distance halves as they
    double.
    """

    steps: int = 128

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")

    @abstractmethod
    def step_probs(
        self,
        process: Process,
        log_score: Float[Array, "*b V"],
        x: Int[Array, "*b"],
        t: Float[Array, ""],
        s: Float[Array, ""],
    ) -> Float[Array, "*b V"]:
        """Probabilities of the state at time s given x at t > s: unnormalised, maybe negative."""

    def __call__(self, denoiser, keys_B, tokens_BL, fixed_BL, *, trace=False):
        process = denoiser.process
        batch, length = tokens_BL.shape
        times = jnp.linspace(1.0, T_MIN, self.steps + 1)
        prior_keys_B, step_keys_B, last_keys_B = jax.vmap(
            lambda key: jax.random.split(key, 3), out_axes=1
        )(keys_B)
        start_BL = jnp.where(fixed_BL, tokens_BL, process.sample_prior(prior_keys_B, length))

        def step(x_BL, k):
            t, s = times[k], times[k + 1]
            sigma_B = jnp.full(batch, self.schedule.sigma(t))
            log_score_BLV = denoiser.log_score(x_BL, sigma_B)
            probs_BLV = self.step_probs(process, log_score_BLV, x_BL, t, s)
            moved_BL = jax.vmap(leap)(
                jax.vmap(jax.random.fold_in, (0, None))(step_keys_B, k), x_BL, probs_BLV
            )
            x_BL = jnp.where(fixed_BL, x_BL, moved_BL)
            return x_BL, (x_BL if trace else None)

        x_BL, trace_TBL = jax.lax.scan(step, start_BL, jnp.arange(self.steps))
        sigma_B = jnp.full(batch, self.schedule.sigma(times[-1]))
        log_probs_BLV = process.denoise(denoiser.log_score(x_BL, sigma_B), x_BL, sigma_B[:, None])
        clean_BL = jax.vmap(categorical)(last_keys_B, log_probs_BLV)
        clean_BL = jnp.where(fixed_BL | ~process.can_move(x_BL), x_BL, clean_BL)
        samples = Samples(tokens_BL=clean_BL, calls_B=jnp.full(batch, self.steps + 1))
        if trace_TBL is None:
            return samples
        return replace(
            samples,
            trace_TBL=jnp.concatenate([start_BL[None], trace_TBL, clean_BL[None]]),
            times_T=jnp.append(times, 0.0),
        )


def categorical(key: Key[Array, ""], log_probs: Float[Array, "*b V"]) -> Int[Array, "*b"]:
    """A draw from each row, with noise that resolves probabilities of 1e-14 in float32.

    JAX's default noise stops at 1e-7: it cuts the tail off a large vocabulary, which acts as a
    hidden temperature (arXiv:2409.02908).
    """
    return jax.random.categorical(key, log_probs.astype(jnp.float32), mode="high")


def leap(key: Key[Array, ""], x: Int[Array, "*b"], probs: Float[Array, "*b V"]) -> Int[Array, "*b"]:
    """A draw from the rows of ``probs``, clipped at 0 and renormalised, in two stages.

    Whether to leave x first, then where to: in a single draw x, which nearly always wins, would
    drown the noise of the others.
    """
    leave_key, token_key = jax.random.split(key)
    probs = jnp.maximum(probs, 0.0)
    away = put(probs, x, jnp.zeros(x.shape, probs.dtype))
    away_total = away.sum(-1)
    leave_probability = away_total / (away_total + at(probs, x))
    leaves = jax.random.bernoulli(leave_key, leave_probability, mode="high")
    return jnp.where(leaves, categorical(token_key, jnp.log(away)), x)

"""Self-correction against its enumerated steps; at random positions it is a Gibbs sampler."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from oracle import L, N, f32, i32, keys

from sedd.configuration.build import build_sampler
from sedd.errors import FieldError, UserError
from sedd.networks.rows import Rows
from sedd.reshape import Reshape
from sedd.samplers.base import Sampler, Samples
from sedd.samplers.self_correct import SelfCorrect
from sedd.samplers.tweedie import Tweedie
from sedd.schedules import LogLinear

SCHEDULE, SIGMA = LogLinear(), oracle.SCHEDULES["log_linear"][0]
CLEAN = oracle.all_states(N)
DRAWS = 4_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Given(Sampler):
    """Returns the tokens that it is given, as if it had drawn them in 5 calls."""

    def __call__(self, denoiser, keys_B, tokens_BL, fixed_BL, *, trace=False):
        five_B = jnp.full(len(tokens_BL), 5)
        return Samples(tokens_BL=tokens_BL, calls_B=five_B, rows_B=five_B)


GIVEN = Given(schedule=SCHEDULE)


@functools.cache
def world(kind="hybrid"):
    return oracle.Oracle(kind, seed=3)


@functools.cache
def denoiser(kind="hybrid"):
    return oracle.mean_denoiser(world(kind).process, world(kind).joint)


@functools.cache
def prediction(t, kind="hybrid"):
    """[81, L, N] in float64: x_θ of every clean text at the noise of time t, from the library."""
    model, x_BL = denoiser(kind), i32(CLEAN)
    hidden = model.hidden(x_BL, jnp.full(len(CLEAN), SIGMA(t)))
    rows = Rows.at(jnp.broadcast_to(jnp.arange(L), x_BL.shape))
    log_probs = model.log_mean_rows(hidden, x_BL, rows)
    return np.exp(np.asarray(log_probs, np.float64)).reshape(len(CLEAN), L, N)


def gibbs(t, free=range(L)):
    """[81, 81]: one step at a random position of ``free``."""
    kernel, to = np.zeros((len(CLEAN), len(CLEAN))), oracle.neighbours(CLEAN, N)
    for i in free:
        np.add.at(kernel, (np.arange(len(CLEAN))[:, None], to[:, i]), prediction(t)[:, i])
    return kernel / len(list(free))


def sampler(**options):
    return SelfCorrect(**{"schedule": SCHEDULE, "inner": GIVEN, **options})


@functools.partial(jax.jit, static_argnames="sampler", compiler_options=oracle.QUICKLY)
def run(sampler, denoiser, keys_B, tokens_BL, fixed_BL):
    return sampler(denoiser, keys_B, tokens_BL, fixed_BL)


def draw(sampler, tokens_BL, fixed=(False,) * L, seed=0):
    tokens_BL = i32(tokens_BL)
    fixed_BL = jnp.broadcast_to(jnp.asarray(fixed), tokens_BL.shape)
    return run(sampler, denoiser(), keys(seed, len(tokens_BL)), tokens_BL, fixed_BL)


def counts_of(samples):
    return np.bincount(oracle.state_index(samples.tokens_BL, N), minlength=len(CLEAN))


# ---------------------------------------------------------------- random positions


def test_gibbs_leaves_the_joint_as_it_is():
    """As t falls, at any number of steps: each row of the kernel's powers tends to this law."""
    joint = world().joint.ravel()
    distances = []
    for t in (0.3, 0.01, 1e-3, 1e-4):
        stationary = joint @ np.linalg.matrix_power(gibbs(t), 4096)
        distances.append(oracle.total_variation(stationary, joint))
    print("\ntotal variation of the stationary law at t = .3, .01, .001, 1e-4", *distances)
    assert distances[1] < 0.03
    assert distances[2] < 0.005
    assert distances[3] < 5e-4
    assert distances[0] > 0.05  # the control: at a high noise level it is another law


def test_gibbs_repairs_few_steps_of_tweedie():
    """The draws have the law of the inner sampler times the kernel to the power of the steps."""
    inner, steps = Tweedie(schedule=SCHEDULE, steps=3), 16
    law = oracle.tau_leaping_law(world(), oracle.SCHEDULES["log_linear"], 3, "tweedie")
    start = law.reshape([N + 1] * L)[(slice(0, N),) * L].ravel()
    after = start @ np.linalg.matrix_power(gibbs(1e-3), steps)
    options = {"positions": "random", "correction_temperature": 1.0, "steps": steps, "t": 1e-3}
    samples = draw(sampler(inner=inner, **options), np.zeros((DRAWS, L)))
    assert oracle.chi_square_p(counts_of(samples), after) > 1e-4
    assert oracle.chi_square_p(counts_of(samples), start) < 1e-4
    np.testing.assert_array_equal(samples.calls_B, 3 + 1 + steps)
    joint = world().joint.ravel()
    before, now = (oracle.total_variation(p, joint) for p in (start, after))
    print(f"\ntotal variation to the joint: {before:.4f} before, {now:.4f} after {steps} steps")
    assert now < 0.02 < 0.1 < before


@pytest.mark.nightly
def test_gibbs_given_some_tokens():
    """Given positions stay, and the free ones tend to their conditional."""
    fixed = np.array([False, True, False, True])
    tokens = np.array([0, 2, 1, 0])
    options = {"positions": "random", "correction_temperature": 1.0, "steps": 40, "t": 1e-3}
    samples = draw(sampler(**options), np.tile(tokens, (DRAWS, 1)), fixed)
    law = np.where((CLEAN[:, fixed] == tokens[fixed]).all(1), world().joint.ravel(), 0)
    assert oracle.chi_square_p(counts_of(samples), law / law.sum()) > 1e-4


# ---------------------------------------------------------------- the likeliest position


def likeliest_step(text, temperature, t=0.01):
    """[81]: the law after one step, over all draws of all positions."""
    x_theta = prediction(t)[oracle.state_index(text, N)]
    sharp = x_theta ** (1 / temperature)
    sharp /= sharp.sum(-1, keepdims=True)
    law = np.zeros(len(CLEAN))
    for drawn in itertools.product(range(N), repeat=L):
        drawn = np.array(drawn)
        chance = sharp[np.arange(L), drawn].prod()
        best = np.where(drawn != text, x_theta[np.arange(L), drawn], -1)
        after = np.where((np.arange(L) == best.argmax()) & (best.max() >= 0), drawn, text)
        law[oracle.state_index(after, N)] += chance
    return law


def test_the_likeliest_change_is_made():
    text = np.array([2, 0, 1, 1])
    samples = draw(sampler(steps=1, correction_temperature=0.7), np.tile(text, (DRAWS, 1)))
    counts = counts_of(samples)
    assert oracle.chi_square_p(counts, likeliest_step(text, 0.7)) > 1e-4
    assert oracle.chi_square_p(counts, likeliest_step(text, 1.5)) < 1e-4  # the control


def test_it_stops_where_nothing_improves():
    """At temperature 0 each step is a function of the text; the calls end by ``patience``."""
    patience = 3
    options = {"correction_temperature": 0.0, "patience": patience, "steps": 50}
    samples = draw(sampler(**options), CLEAN)
    for text, got, calls in zip(CLEAN, samples.tokens_BL, samples.calls_B, strict=True):
        text, most, waited, rounds = text.copy(), -1, 0, 0
        while waited < patience:
            x_theta = prediction(0.01)[oracle.state_index(text, N)]
            best = x_theta.argmax(-1)
            agrees = int((best == text).sum())
            most, waited = max(agrees, most), 0 if agrees > most else waited + 1
            change = np.where(best != text, x_theta.max(-1), -1)
            if change.max() >= 0:
                text[change.argmax()] = best[change.argmax()]
            rounds += 1
        np.testing.assert_array_equal(got, text)
        assert calls == 5 + rounds
    # A fixed point of the steps: every token is the most likely one given the others.
    finals = np.unique(np.asarray(samples.tokens_BL), axis=0)
    assert len(finals) < len(CLEAN) / 3


# ---------------------------------------------------------------- temperature, mistakes


@pytest.mark.nightly
def test_temperature_acts_on_the_leave_one_out_prediction():
    """At temperature .5 the log score is that of x_θ squared; also at visible tokens."""
    x_BL, sigma_B = i32(world().states[::5]), jnp.full(len(world().states[::5]), 0.8)
    warm = dataclasses.replace(denoiser(), reshape=Reshape.of(temperature=0.5))
    hidden = denoiser().hidden(x_BL, sigma_B)
    rows = Rows.at(jnp.broadcast_to(jnp.arange(L), x_BL.shape))
    log_x_RN = denoiser().log_mean_rows(hidden, x_BL, rows)
    raw_RV = jnp.pad(2 * log_x_RN, ((0, 0), (0, 1)))
    wanted = denoiser().parameterization.log_score(raw_RV, rows.pick(x_BL), f32(0.8))
    got = warm.log_score(x_BL, sigma_B).reshape(wanted.shape)
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)
    Tweedie(schedule=SCHEDULE).check(warm)


def test_mistakes_are_named():
    inner = Tweedie(schedule=SCHEDULE)
    for model, said in (
        (world("absorbing").conditional_denoiser(), "this model has conditional on absorbing"),
        (world("uniform").score_denoiser(), "this model has score on uniform"),
    ):
        with pytest.raises(UserError, match=said):
            sampler(inner=inner).check(model)
    for options, said in (
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"patience": 0}, "patience must be at least 1, got 0"),
        ({"correction_temperature": -1.0}, "correction_temperature must be finite and at least 0"),
        ({"t": 1.0}, r"t must be in \(0, 1\), got 1.0"),
    ):
        with pytest.raises(FieldError, match=said):
            sampler(**options)
    guided = dataclasses.replace(
        denoiser(), reshape=Reshape.of(guidance=1.0), given_BL=jnp.ones((1, L), bool)
    )
    with pytest.raises(UserError, match="guidance and logit processors act"):
        sampler().check(guided)
    cold = dataclasses.replace(world("uniform").score_denoiser(), reshape=Reshape.of(top_p=0.5))
    with pytest.raises(
        UserError, match=r"temperature, top-k, .*the first three go with the parameterization mean"
    ):
        inner.check(cold)


def test_the_default_inner_sampler():
    built = build_sampler("self_correct", SCHEDULE)
    assert isinstance(built.inner, Tweedie)

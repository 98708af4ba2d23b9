"""τ-leaping samplers against their own finite-step laws, enumerated over all V^L states."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from oracle import L, N, f32, i32, keys
from tiers import daily

from sedd.samplers.euler import Euler
from sedd.samplers.tweedie import Tweedie
from sedd.schedules import Geometric, LogLinear

RULES = {"euler": Euler, "tweedie": Tweedie}
NOISE = {"log_linear": LogLinear(), "geometric": Geometric()}
# Float32 cannot hold the log scores of hybrid noise at the σ of 20 at which geometric noise ends.
CASES = [
    (kind, noise, rule)
    for kind in oracle.PROCESSES
    for noise in (["log_linear"] if kind == "hybrid" else NOISE)
    for rule in RULES
]
every = pytest.mark.parametrize(("kind", "noise", "rule"), CASES)
DRAWS = 5_000
EACH_DAY = [("absorbing", "geometric", "tweedie"), ("uniform", "geometric", "euler")]


@functools.cache
def world(kind):
    return oracle.Oracle(kind, seed=3)


@functools.cache
def exact_law(kind, noise, rule, steps, fixed=None):
    return oracle.tau_leaping_law(world(kind), oracle.SCHEDULES[noise], steps, rule, fixed=fixed)


@functools.partial(jax.jit, static_argnames=("sampler", "trace"))
def compiled(sampler, denoiser, keys_B, tokens_BL, fixed_BL, trace):
    return sampler(denoiser, keys_B, tokens_BL, fixed_BL, trace=trace)


def sample(sampler, denoiser, keys_B, tokens_BL, fixed_BL, trace=True):
    """One compilation for each sampler and kind: all tests share a batch size and the trace."""
    return compiled(sampler, denoiser, keys_B, tokens_BL, fixed_BL, trace=trace)


def draw(sampler, denoiser, count, *, seed=0, fixed=None, trace=True):
    fixed = np.full(L, -1) if fixed is None else np.asarray(fixed)
    tokens_BL = i32(np.broadcast_to(np.maximum(fixed, 0), (count, L)))
    fixed_BL = jnp.asarray(np.broadcast_to(fixed >= 0, (count, L)))
    return sample(sampler, denoiser, keys(seed, count), tokens_BL, fixed_BL, trace=trace)


def counts_of(tokens_BL, size):
    return np.bincount(oracle.state_index(tokens_BL, size), minlength=size**L)


def step_probs(kind, noise, rule, t, s):
    """(the library's, the formula's) probabilities of one leap from every state."""
    here, (sigma, rate) = world(kind), oracle.SCHEDULES[noise]
    log_score = here.log_score(sigma(t))
    sampler = RULES[rule](schedule=NOISE[noise])
    got = sampler.step_probs(here.process, f32(log_score), i32(here.states), f32(t), f32(s))
    if rule == "euler":
        exact = oracle.euler_probs(np.exp(log_score), here.states, kind, (t - s) * rate(t))
    else:
        exact = oracle.tweedie_probs(np.exp(log_score), here.states, kind, sigma(t) - sigma(s))
    return (oracle.clip_normalise(np.asarray(p, np.float64)) for p in (got, exact))


@every
@pytest.mark.parametrize(
    ("t", "s"), [(1.0, 1e-5), (1.0, 0.5), (1.0, 0.875), (0.5, 0.375), (1e-3, 1e-5)]
)
def test_one_step_has_the_exact_probabilities(kind, noise, rule, t, s):
    """In a single step from t = 1 too, where e^Δσ is 4e8 under geometric noise."""
    got, exact = step_probs(kind, noise, rule, t, s)
    np.testing.assert_allclose(got, exact, atol=2e-4)


@pytest.mark.parametrize(("kind", "noise", "rule"), daily(CASES, EACH_DAY))
def test_draws_follow_the_enumerated_law(kind, noise, rule):
    sampler = RULES[rule](schedule=NOISE[noise], steps=8)
    tokens_BL = draw(sampler, world(kind).score_denoiser(), DRAWS, seed=11).tokens_BL
    counts = counts_of(tokens_BL, world(kind).V)
    assert oracle.chi_square_p(counts, exact_law(kind, noise, rule, 8)) > 1e-4
    # Controls: twice the steps, and the joint itself, are laws that it does not follow.
    assert oracle.chi_square_p(counts, exact_law(kind, noise, rule, 16)) < 1e-4
    assert oracle.chi_square_p(counts, world(kind).clean_law()) < 1e-4


def test_few_steps_from_late_noise():
    """Δσ near 20: a float32 form that cancels reveals everything at once, or nothing.

    Not so on a uniform process: there e^Δσ multiplies the rounding of the network's own output.
    """
    sampler = Tweedie(schedule=Geometric(), steps=2)
    tokens_BL = draw(sampler, world("absorbing").score_denoiser(), DRAWS, seed=12).tokens_BL
    law = exact_law("absorbing", "geometric", "tweedie", 2)
    assert oracle.chi_square_p(counts_of(tokens_BL, N + 1), law) > 1e-4


def test_euler_and_tweedie_are_one_law_under_absorbing_log_linear():
    """For any score; under geometric noise they are not."""
    laws = [exact_law("absorbing", "log_linear", rule, 8) for rule in RULES]
    np.testing.assert_allclose(*laws, atol=1e-12)
    laws = [exact_law("absorbing", "geometric", rule, 8) for rule in RULES]
    assert oracle.total_variation(*laws) > 0.05


@every
def test_the_error_halves_as_the_steps_double(kind, noise, rule):
    """The theorem about the laws that the draws and the steps above were held against."""
    joint = world(kind).clean_law()
    distance = np.array(
        [
            oracle.total_variation(exact_law(kind, noise, rule, n), joint)
            for n in (8, 16, 32, 64, 128)
        ]
    )
    print(f"\n{kind:10}{noise:11}{rule:8}", *(f"{d:.4f}" for d in distance))
    ratios = distance[:-1] / distance[1:]
    assert ((ratios[1:] > 1.7) & (ratios[1:] < 2.4)).all()


@pytest.mark.nightly
@pytest.mark.slow
def test_many_steps_draw_from_the_joint():
    sampler = Tweedie(schedule=LogLinear(), steps=128)
    oracle_world = world("absorbing")
    tokens_BL = draw(sampler, oracle_world.conditional_denoiser(), 1500, seed=5).tokens_BL
    counts = counts_of(tokens_BL, oracle_world.V)
    assert oracle.chi_square_p(counts, oracle_world.clean_law()) > 1e-4


# ---------------------------------------------------------------- infilling

FIXED = (-1, 2, -1, 0)


@pytest.mark.parametrize(("kind", "noise", "rule"), daily(CASES, EACH_DAY))
def test_clamped_draws_follow_their_enumerated_law(kind, noise, rule):
    """The law of clamped leaps: the product kernel with the clamped positions held."""
    sampler = RULES[rule](schedule=NOISE[noise], steps=8)
    samples = draw(sampler, world(kind).score_denoiser(), DRAWS, seed=6, fixed=FIXED)
    tokens_BL = np.asarray(samples.tokens_BL)
    held = np.asarray(FIXED) >= 0
    frames_TBL = np.asarray(samples.trace_TBL)
    assert (frames_TBL[..., held] == np.asarray(FIXED)[held]).all()
    counts = counts_of(tokens_BL, world(kind).V)
    assert oracle.chi_square_p(counts, exact_law(kind, noise, rule, 8, FIXED)) > 1e-4
    assert oracle.chi_square_p(counts, exact_law(kind, noise, rule, 8)) < 1e-4


def conditional_joint(kind):
    here = world(kind)
    held = np.asarray(FIXED) >= 0
    agrees = (here.states[:, held] == np.asarray(FIXED)[held]).all(-1)
    law = np.where(agrees, here.clean_law(), 0)
    return law / law.sum()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("noise", NOISE)
def test_infilling_tends_to_the_conditional_joint_on_an_absorbing_process(noise, rule):
    truth = conditional_joint("absorbing")
    distance = [
        oracle.total_variation(exact_law("absorbing", noise, rule, n, FIXED), truth)
        for n in (32, 64, 128)
    ]
    print(f"\nclamped {noise:11}{rule:8}", *(f"{d:.4f}" for d in distance))
    assert distance[2] < 0.02
    assert all(1.7 < a / b < 2.4 for a, b in itertools.pairwise(distance))


def test_infilling_on_a_uniform_process_is_only_approximate():
    """The score reads clamped tokens as noisy ones: the limit is another law."""
    truth = conditional_joint("uniform")
    distance = [
        oracle.total_variation(exact_law("uniform", "geometric", "tweedie", n, FIXED), truth)
        for n in (64, 128)
    ]
    print("\nclamped uniform", *(f"{d:.4f}" for d in distance))
    assert distance[0] / distance[1] < 1.5  # it would be 2


# ---------------------------------------------------------------- what comes back


@pytest.mark.parametrize(
    ("kind", "rule"),
    daily(
        itertools.product(oracle.PROCESSES, RULES),
        [("absorbing", "tweedie")],
    ),
)
def test_calls_and_trace(kind, rule):
    sampler = RULES[rule](schedule=LogLinear(), steps=8)
    samples = draw(sampler, world(kind).score_denoiser(), DRAWS)
    np.testing.assert_array_equal(samples.calls_B, 9)
    frames_TBL = np.asarray(samples.trace_TBL)
    assert frames_TBL.shape == (10, DRAWS, L)
    np.testing.assert_array_equal(frames_TBL[-1], samples.tokens_BL)
    if kind == "absorbing":
        assert (frames_TBL[0] == N).all()
        revealed = frames_TBL != N
        assert (revealed[1:] | ~revealed[:-1]).all()  # once revealed, always revealed
        same = np.where(revealed[:-1], frames_TBL[1:] == frames_TBL[:-1], True)
        assert same.all()


@pytest.mark.nightly
def test_the_trace_changes_no_draw():
    sampler = Tweedie(schedule=LogLinear(), steps=8)
    plain, traced = (
        draw(sampler, world("absorbing").score_denoiser(), DRAWS, trace=t) for t in (False, True)
    )
    assert plain.trace_TBL is None
    np.testing.assert_array_equal(plain.tokens_BL, traced.tokens_BL)


@pytest.mark.nightly
@pytest.mark.parametrize("kind", oracle.PROCESSES)
def test_a_draw_belongs_to_its_key(kind):
    """Not to its place in the batch, nor to the other requests."""
    sampler = Tweedie(schedule=LogLinear(), steps=8)
    tokens_BL, free_BL = jnp.zeros((DRAWS, L), jnp.int32), jnp.zeros((DRAWS, L), bool)
    order = np.random.default_rng(0).permutation(DRAWS)
    denoiser = world(kind).score_denoiser()
    a, b = (
        sample(sampler, denoiser, k, tokens_BL, free_BL).tokens_BL
        for k in (keys(1, DRAWS), keys(1, DRAWS)[order])
    )
    assert len(np.unique(a, axis=0)) > 5
    np.testing.assert_array_equal(a[order], b)


@pytest.mark.nightly
@pytest.mark.parametrize("rule", RULES)
def test_the_clamp_differs_by_request(rule):
    sampler = RULES[rule](schedule=LogLinear(), steps=8)
    tokens_BL = i32(np.random.default_rng(0).integers(0, N, (DRAWS, L)))
    fixed_BL = jnp.asarray(np.random.default_rng(1).random((DRAWS, L)) < 0.5)
    for kind in oracle.PROCESSES:
        samples = sample(sampler, world(kind).score_denoiser(), keys(2, DRAWS), tokens_BL, fixed_BL)
        np.testing.assert_array_equal(
            np.asarray(samples.tokens_BL)[fixed_BL], np.asarray(tokens_BL)[fixed_BL]
        )


@pytest.mark.parametrize("make", RULES.values())
def test_mistakes_are_named(make):
    with pytest.raises(ValueError, match=r"steps .*got 0"):
        make(schedule=LogLinear(), steps=0)

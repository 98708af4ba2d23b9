"""BestOfN and Particle against their exact laws; draws are held against a law by χ² at 1e-4."""

import functools
import itertools

import jax.numpy as jnp
import jaxtyping
import numpy as np
import oracle
import pytest
from oracle import NOTHING_FIXED, L, N, f32
from tiers import nightly

from sedd.errors import UserError
from sedd.samplers.best_of_n import BestOfN
from sedd.samplers.confidence import Confidence
from sedd.samplers.entropy_bounded import EntropyBounded
from sedd.samplers.event_jump import EventJump
from sedd.samplers.ordered import Ordered
from sedd.samplers.particle import Particle, resample
from sedd.samplers.semi_autoregressive import SemiAutoregressive
from sedd.samplers.tweedie import Tweedie
from sedd.schedules import LogLinear

DRAWS = 8_000
NOISE = LogLinear()
FORWARD = Ordered(schedule=NOISE)
TILT = 2.0
NEVER = 100  # more rounds than there are


@functools.cache
def world(kind="absorbing"):
    return oracle.Oracle(kind, seed=3)


@functools.cache
def joint(fixed=NOTHING_FIXED):
    """[N^L]"""
    clean = (world().states < N).all(1)
    return oracle.conditional_joint(world(), fixed)[clean]


CLEAN = oracle.all_states(N)
DISTINCT = np.random.default_rng(0).permutation(np.linspace(-1, 1, N**L)).astype(np.float32)
ZEROS = (CLEAN == 0).sum(1).astype(np.float32)


def distinct(tokens_RL, real_RL):
    assert np.asarray(real_RL).all()
    return DISTINCT[oracle.state_index(tokens_RL, N)]


def zeros(tokens_RL, real_RL):
    return ZEROS[oracle.state_index(tokens_RL, N)]


def first_zero(tokens_RL, real_RL):
    return (np.asarray(tokens_RL)[:, 0] == 0).astype(np.float32)


def equal(tokens_RL, real_RL):
    return np.ones(len(tokens_RL), np.float32)


def missing(tokens_RL, real_RL):
    return np.full(len(tokens_RL), np.nan, np.float32)


def best_of(verifier, n, inner=FORWARD):
    return BestOfN(schedule=NOISE, inner=inner, verifier=verifier, n=n)


def particle(verifier, particles, inner=FORWARD, resample_every=1, tilt=TILT, sweeps=1):
    return Particle(
        sweeps=sweeps,
        schedule=NOISE,
        inner=inner,
        verifier=verifier,
        particles=particles,
        tilt=tilt,
        resample_every=resample_every,
    )


def draw(sampler, *, fixed=NOTHING_FIXED, count=DRAWS, kind="absorbing", trace=True):
    here = world(kind)
    denoiser = here.conditional_denoiser() if kind == "absorbing" else here.score_denoiser()
    return oracle.draw(sampler, denoiser, count, seed=1, fixed=fixed, trace=trace)


def counts_of(samples):
    """[N^L]; draws with a mask left are an error."""
    tokens_BL = np.asarray(samples.tokens_BL)
    assert (tokens_BL < N).all()
    return oracle.counts_of(tokens_BL, N)


# ---------------------------------------------------------------- the best of n


def best_law(score, n):
    """F(x)^n - F(x-)^n, shared among those of one score by their own probability."""
    p, law = joint(), np.zeros(N**L)
    for value in np.unique(score):
        here, below = score == value, p[score < value].sum()
        law[here] = ((below + p[here].sum()) ** n - below**n) * p[here] / p[here].sum()
    return law


@pytest.mark.parametrize(("verifier", "score"), [nightly(distinct, DISTINCT), (zeros, ZEROS)])
@pytest.mark.parametrize("n", [nightly(1), 4])
def test_best_of_n_draws_follow_their_law(verifier, score, n):
    samples = draw(best_of(verifier, n))
    counts = counts_of(samples)
    assert oracle.chi_square_p(counts, best_law(score, n)) > 1e-4
    assert oracle.chi_square_p(counts, best_law(score, n + 1)) < 1e-4  # control
    np.testing.assert_array_equal(samples.score_B, verifier(samples.tokens_BL, True))
    np.testing.assert_array_equal(samples.calls_B, n * L)
    np.testing.assert_array_equal(samples.trace_TBL[-1], samples.tokens_BL)


def test_the_best_of_one_is_the_inner_law():
    np.testing.assert_allclose(best_law(DISTINCT, 1), joint(), atol=1e-12)


@pytest.mark.nightly
def test_ties_go_to_the_first_drawn():
    first, chosen = (draw(best_of(equal, n)).tokens_BL for n in (1, 4))
    np.testing.assert_array_equal(first, chosen)
    assert (np.asarray(draw(best_of(distinct, 4)).tokens_BL) != first).any()


# ---------------------------------------------------------------- exact laws of few particles


def tilted(score, fixed=NOTHING_FIXED, tilt=TILT):
    law = joint(fixed) * np.exp(tilt * score.astype(float))
    return law / law.sum()


def importance_law(score, particles):
    """[N^L]: one of so many independent draws, by weight."""
    p, weight = joint(), np.exp(TILT * score.astype(float))
    others, other_p = np.zeros(1), np.ones(1)
    for _ in range(particles - 1):
        others = (others[:, None] + weight).ravel()
        other_p = (other_p[:, None] * p).ravel()
    share = weight[:, None] / (weight[:, None] + others)
    return particles * p * (share @ other_p)


def systematic(weight):
    """(probability, ancestors) of systematic resampling, the offset integrated out."""
    count, edges = len(weight), np.cumsum(weight)
    cuts = np.unique([0, 1, *((count * edges) % 1)])
    for low, high in itertools.pairwise(cuts):
        points = (np.arange(count) + (low + high) / 2) / count
        yield high - low, np.minimum(np.searchsorted(edges, points), count - 1)


TWO_FREE = (-1, 2, -1, 0)


def smc_law(score, particles, tilt):
    """[N^L]: TWO_FREE from left to right; weighed and maybe resampled after the first of them."""
    p = joint(TWO_FREE).reshape([N] * L)[:, 2, :, 0]
    value = tilt * score.astype(float).reshape([N] * L)[:, 2, :, 0]
    first, second = p.sum(1), p / p.sum(1, keepdims=True)
    law = np.zeros([N] * L)
    crowd = list(itertools.product(range(N), repeat=particles))
    ends = np.array(crowd)
    for a, guess in itertools.product(map(list, crowd), map(list, crowd)):
        chance = first[a].prod() * second[a, guess].prod()
        guessed = value[a, guess]
        weight = np.exp(guessed) / np.exp(guessed).sum()
        uneven = 1 / (weight**2).sum() < particles / 2
        for share, parent in systematic(weight) if uneven else [(1.0, np.arange(particles))]:
            survivors = np.array(a)[parent]
            final = np.exp(value[survivors, ends] - uneven * guessed[parent])
            chosen = final / final.sum(1, keepdims=True)
            own = chance * share * second[survivors, ends].prod(1)
            for i, survivor in enumerate(survivors):
                np.add.at(law[survivor, 2, :, 0], ends[:, i], own * chosen[:, i])
    return law.ravel()


@pytest.mark.nightly
@pytest.mark.parametrize("verifier", [distinct, zeros])
def test_one_particle_draws_from_the_inner_law(verifier):
    counts = counts_of(draw(particle(verifier, 1)))
    assert oracle.chi_square_p(counts, joint()) > 1e-4


def test_particles_that_are_never_resampled_are_importance_samples():
    counts = counts_of(draw(particle(distinct, 3, resample_every=NEVER)))
    law = importance_law(DISTINCT, 3)
    assert law.sum() == pytest.approx(1)
    assert oracle.chi_square_p(counts, law) > 1e-4
    # Controls: what it tends to, what it starts from, and fewer particles.
    for wrong in (tilted(DISTINCT), joint(), importance_law(DISTINCT, 2)):
        assert oracle.chi_square_p(counts, wrong) < 1e-4


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("verifier", "score", "tilt"), [(zeros, ZEROS, 4.0), (distinct, DISTINCT, 6.0)]
)
def test_particles_resampled_on_the_way_follow_their_law(verifier, score, tilt):
    """A tilt under which a third and a half of the requests are resampled."""
    counts = counts_of(draw(particle(verifier, 3, tilt=tilt), fixed=TWO_FREE))
    law = smc_law(score, 3, tilt)
    assert law.sum() == pytest.approx(1)
    assert oracle.chi_square_p(counts, law) > 1e-4
    for wrong in (tilted(score, TWO_FREE, tilt), joint(TWO_FREE)):
        assert oracle.chi_square_p(counts, wrong) < 1e-4


@pytest.mark.nightly
@pytest.mark.parametrize("resample_every", [1, NEVER])
def test_the_law_tends_to_the_tilted_one(resample_every):
    """Each fall is over 3σ: one of D draws moves the distance by 1/D at most, so σ < 1/(2√D)."""
    count = 4000
    distance = []
    for m in (1, 4, 16):
        sampler = particle(distinct, m, resample_every=resample_every)
        law = counts_of(draw(sampler, count=count, trace=False)) / count
        distance.append(oracle.total_variation(law, tilted(DISTINCT)))
    print(f"\nresampled every {resample_every}:", *(f"{d:.3f}" for d in distance))
    assert (-np.diff(distance) > 3 * 2**0.5 / (2 * count**0.5)).all()


# ---------------------------------------------------------------- sweeps

SWEPT = 20_000


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("particles", "sweeps", "tilt"), [(2, 16, TILT), (3, 16, TILT), (1, 48, TILT)]
)
def test_sweeps_reach_the_tilted_law(particles, sweeps, tilt):
    """With 3 particles a fifth of the requests are resampled on the way.

    The control, one sweep, is ``test_particles_alone_do_not_reach_the_tilted_law``.
    """
    sampler = particle(distinct, particles, tilt=tilt, sweeps=sweeps)
    samples = draw(sampler, fixed=TWO_FREE, count=SWEPT, trace=False)
    counts, law = counts_of(samples), tilted(DISTINCT, TWO_FREE, tilt)
    np.testing.assert_array_equal(samples.score_B, distinct(samples.tokens_BL, True))
    np.testing.assert_array_equal(samples.calls_B, sweeps * particles * (2 + 1))
    np.testing.assert_array_equal(samples.verifier_calls_B, sweeps * particles * 2)
    assert oracle.total_variation(counts / SWEPT, law) < 0.02
    assert oracle.chi_square_p(counts, law) > 1e-4


@pytest.mark.nightly
def test_sweeps_on_all_positions():
    count = 200_000
    counts = counts_of(draw(particle(distinct, 2, sweeps=24), count=count, trace=False))
    assert oracle.total_variation(counts / count, tilted(DISTINCT)) < 0.02


@pytest.mark.parametrize(("particles", "tilt"), [(3, 2.0), nightly(1, 1.0)])
def test_the_partition_is_unbiased(particles, tilt):
    """The mean of its exponential is that of exp(tilt·score) under p, within 4σ of the draws."""
    samples = draw(particle(distinct, particles, tilt=tilt), trace=False)
    partition_B = np.exp(np.asarray(samples.log_partition_B, float))
    expected = joint() @ np.exp(tilt * DISTINCT.astype(float))
    error = partition_B.std() / DRAWS**0.5
    assert error < 0.05 * expected
    assert abs(partition_B.mean() - expected) < 4 * error


# ---------------------------------------------------------------- inner samplers


def leaps(kind):
    return oracle.tau_leaping_law(world(kind), oracle.SCHEDULES["log_linear"], 3, "tweedie")


INNER = {
    "confidence": (Confidence(schedule=NOISE), "absorbing"),
    "first_hitting": (EventJump(schedule=NOISE), "absorbing"),
    "blocks": (
        SemiAutoregressive(schedule=NOISE, inner=EventJump(schedule=NOISE), block=2),
        "absorbing",
    ),
    "tweedie": (Tweedie(schedule=NOISE, steps=3), "absorbing"),
    "tweedie_uniform": (Tweedie(schedule=NOISE, steps=3), "uniform"),
}


@functools.cache
def inner_law(name):
    if not name.startswith("tweedie"):
        return joint()
    kind = INNER[name][1]
    return leaps(kind)[(world(kind).states < N).all(1)]


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["first_hitting", "tweedie", "tweedie_uniform"])
def test_equal_scores_leave_the_inner_law(name):
    inner, kind = INNER[name]
    samples = draw(particle(equal, 3, inner), kind=kind)
    assert oracle.chi_square_p(counts_of(samples), inner_law(name)) > 1e-4
    np.testing.assert_array_equal(samples.score_B, 1)


@pytest.mark.parametrize(
    "name", ["confidence", nightly("blocks"), nightly("tweedie"), nightly("tweedie_uniform")]
)
def test_a_score_steers_every_inner_sampler(name):
    """The mean score rises by more than 6σ of a mean of as many draws."""
    inner, kind = INNER[name]
    samples = draw(particle(zeros, 3, inner), kind=kind)
    p = inner_law(name)
    mean = p @ ZEROS
    sigma = (p @ (ZEROS - mean) ** 2 / DRAWS) ** 0.5
    assert np.asarray(samples.score_B).mean() > mean + 6 * sigma
    np.testing.assert_array_equal(samples.score_B, zeros(samples.tokens_BL, None))
    frames_TBL = np.asarray(samples.trace_TBL)
    np.testing.assert_array_equal(frames_TBL[-1], samples.tokens_BL)
    if kind == "absorbing":  # the frames are those of one line of descent
        shown = frames_TBL[:-1] < N
        assert (frames_TBL[1:] == frames_TBL[:-1])[shown].all()


@pytest.mark.nightly
def test_clamped_tokens_stay_and_condition_the_rest():
    samples = draw(particle(zeros, 16), fixed=TWO_FREE)
    held = np.asarray(TWO_FREE) >= 0
    assert (np.asarray(samples.trace_TBL)[..., held] == np.asarray(TWO_FREE)[held]).all()
    law = counts_of(samples) / DRAWS
    assert oracle.total_variation(law, tilted(ZEROS, TWO_FREE)) < 0.5 * oracle.total_variation(
        law, joint(TWO_FREE)
    )


# ---------------------------------------------------------------- resampling

UNEVEN = np.array([0.55, 0.02, 0.3, 0.13, 0.0, 0.0])


def test_systematic_resampling_is_unbiased():
    """E[copies of i] = P·w_i within 4σ of the mean, and never off by a whole copy."""
    keys_B = oracle.keys(0, DRAWS)
    log_weight = jnp.broadcast_to(f32(np.log(np.maximum(UNEVEN, 1e-30))), (DRAWS, 6))
    ancestor_BP, uneven_B = resample(keys_B, log_weight, jnp.ones(DRAWS, bool))
    assert np.asarray(uneven_B).all()
    copies_BP = (np.asarray(ancestor_BP)[:, None] == np.arange(6)[:, None]).sum(-1)
    expected = 6 * UNEVEN
    assert (np.abs(copies_BP - expected) < 1).all()
    assert (np.abs(copies_BP.mean(0) - expected) <= 4 * copies_BP.std(0) / DRAWS**0.5).all()


@pytest.mark.parametrize(
    ("weight", "uneven"), [([1, 1, 1, 1, 1, 0, 0, 0], False), ([1.1, 1, 1, 1, 0, 0, 0, 0], True)]
)
def test_only_uneven_weights_are_resampled(weight, uneven):
    """Where the effective number, 1/Σw², is below half of the particles: of 5 no, of 3.99 yes."""
    log_weight = f32(np.log(np.maximum(weight, 1e-30)))[None]
    ancestor_BP, uneven_B = resample(oracle.keys(3, 1), log_weight, jnp.ones(1, bool))
    assert bool(uneven_B[0]) == uneven
    assert not resample(oracle.keys(3, 1), log_weight, jnp.zeros(1, bool))[1]
    assert (np.asarray(ancestor_BP[0]) == np.arange(8)).all() == (not uneven)


# ---------------------------------------------------------------- what comes back


@pytest.mark.nightly
@pytest.mark.parametrize(("resample_every", "completions"), [(1, [2, 1, 0, 0]), (2, [1, 0, 0, 0])])
def test_calls_are_those_of_all_particles_and_of_their_completions(resample_every, completions):
    """A request of m masks takes m rounds and is completed where it is due with masks left."""
    rng = np.random.default_rng(0)
    fixed = np.where(np.arange(L) < rng.integers(1, L + 1, (DRAWS, 1)), rng.integers(0, N), -1)
    samples = draw(particle(zeros, 3, resample_every=resample_every), fixed=fixed)
    masks_B = (fixed < 0).sum(1)
    expected = masks_B + np.array(completions[::-1])[masks_B]
    np.testing.assert_array_equal(samples.calls_B, 3 * expected)


@pytest.mark.nightly
def test_calls_are_counted_whether_or_not_their_particle_survives():
    """The first token, 0 or 1, decides whether two calls are enough; 0 is worth copying.

    Of three particles, weighed after the second round, z have drawn a 0. Where z is 1 the others
    become copies of it: 2·3 calls, and the completions of those two. Otherwise none is copied, and
    each of the others takes 4 calls and a completion.
    """
    first_L = world().states[:, 0]
    table = np.zeros((len(first_L), L, N + 1))
    table[first_L == N, 0, 2] = table[first_L == 0, :, 1:] = -1e30
    sampler = particle(first_zero, 3, EntropyBounded(schedule=NOISE, gamma=0.0), 2, tilt=20.0)
    samples = oracle.draw(sampler, oracle.table_denoiser(table, N), DRAWS, seed=1)
    calls, counts = np.unique(samples.calls_B, return_counts=True)
    np.testing.assert_array_equal(calls, [6, 8, 9, 15])  # z = 3, 1, 2, 0
    assert oracle.chi_square_p(counts, [1 / 8, 3 / 8, 3 / 8, 1 / 8]) > 1e-4


@pytest.mark.nightly
@pytest.mark.parametrize("kind", ["absorbing", "uniform"])
def test_calls_around_tweedie(kind):
    """A completion at every round but the last, of what has masks; there are none without masks."""
    samples = draw(particle(equal, 3, Tweedie(schedule=NOISE, steps=3)), kind=kind)
    calls_B = np.asarray(samples.calls_B)
    if kind == "uniform":
        np.testing.assert_array_equal(calls_B, 3 * 4)
        return
    # At time t a position is masked with probability t; 4σ of the mean of the draws.
    left = 1 - (1 - np.linspace(1, 1e-5, 4)[1:]) ** L
    assert abs(calls_B.mean() - 3 * (4 + left.sum())) < 4 * calls_B.std() / DRAWS**0.5


@pytest.mark.parametrize("make", [nightly(best_of), particle])
def test_a_draw_belongs_to_its_key(make):
    order = np.random.default_rng(0).permutation(DRAWS)
    denoiser = world().conditional_denoiser()
    free = jnp.zeros((DRAWS, L), bool)
    keys_B, tokens_BL = oracle.keys(1, DRAWS), jnp.zeros((DRAWS, L), jnp.int32)
    # The program of the partition's test.
    run = functools.partial(oracle.sample, make(distinct, 3), denoiser)
    a, b = (run(k, tokens_BL, free, trace=False).tokens_BL for k in (keys_B, keys_B[order]))
    assert len(np.unique(a, axis=0)) > 5
    np.testing.assert_array_equal(a[order], b)


@pytest.mark.nightly
def test_a_request_that_is_done_is_left_alone():
    """It comes out the same beside requests with more to draw, round by round or not."""
    short = np.tile([-1, -1, 2, 0], (DRAWS, 1))
    mixed = short.copy()
    mixed[DRAWS // 2 :] = -1
    sampler = particle(distinct, 4, resample_every=2)
    alone, beside = (np.asarray(draw(sampler, fixed=f).tokens_BL) for f in (short, mixed))
    np.testing.assert_array_equal(alone[: DRAWS // 2], beside[: DRAWS // 2])


def forbids_zero(tokens_RL, real_RL):
    """Scores -inf, which is not a score, where the first token is 0."""
    return np.where(tokens_RL[:, 0] == 0, -np.inf, 1.0)


@pytest.mark.parametrize(
    "wrap", [nightly(lambda: particle(forbids_zero, 2)), lambda: best_of(forbids_zero, 2)]
)
def test_one_score_that_is_not_finite_fails_them_all(wrap):
    """Even where the sequences that are returned are not the ones that have it."""
    assert np.isnan(draw(wrap()).score_B).all()


def test_a_verifier_that_fails_ends_the_search():
    stopped = draw(particle(missing, 3))
    assert np.isnan(stopped.score_B).all()
    assert int(stopped.rounds) == 1


@pytest.mark.nightly
def test_a_verifier_that_fails_ends_its_sweeps():
    stopped, swept = (draw(particle(missing, 3, sweeps=n), trace=False) for n in (1, 4))
    assert np.isnan(swept.score_B).all()
    np.testing.assert_array_equal(swept.calls_B, stopped.calls_B)


def test_width():
    assert FORWARD.width == 1
    assert particle(zeros, 3).width == 3
    assert best_of(zeros, 4).width == 4


@pytest.mark.parametrize("wrap", [functools.partial(m, equal, 2) for m in (best_of, particle)])
def test_a_model_that_the_inner_sampler_cannot_use(wrap):
    uniform = world("uniform").score_denoiser()
    timed = world().score_denoiser()
    wrap(Tweedie(schedule=NOISE)).check(uniform)
    with pytest.raises(UserError, match="'event_jump' needs a model of the absorbing process"):
        wrap(EventJump(schedule=NOISE)).check(uniform)
    with pytest.raises(UserError, match="'event_jump' needs a time-independent model"):
        wrap(EventJump(schedule=NOISE)).check(timed)


def test_blocks_need_a_mask_whatever_is_inside():
    inner = Tweedie(schedule=NOISE)
    sampler = SemiAutoregressive(schedule=NOISE, inner=inner)
    sampler.check(world().score_denoiser())
    with pytest.raises(UserError, match="'semi_autoregressive' needs a model of the absorbing"):
        sampler.check(world("uniform").score_denoiser())
    sampler = SemiAutoregressive(schedule=NOISE, inner=EventJump(schedule=NOISE))
    with pytest.raises(UserError, match="'event_jump' needs a time-independent model"):
        sampler.check(world().score_denoiser())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: best_of(zeros, 0), "n must be at least 1, got 0"),
        (lambda: particle(zeros, 0), "particles must be at least 1, got 0"),
        (lambda: particle(zeros, 2, sweeps=0), "sweeps must be at least 1, got 0"),
        (lambda: particle(zeros, 2, resample_every=0), "resample_every must be .* got 0"),
        (lambda: particle(zeros, 2, tilt=np.inf), "tilt must be finite, got inf"),
        (lambda: particle(zeros, 2, best_of(zeros, 2)), "must not be a search"),
        (
            lambda: SemiAutoregressive(schedule=NOISE, inner=best_of(zeros, 2)),
            "which draws whole sequences",
        ),
        (lambda: SemiAutoregressive(schedule=NOISE, inner=FORWARD, block=0), "got 0"),
    ],
)
def test_mistakes_are_named(make, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # users have no such checks
    with pytest.raises(ValueError, match=message):
        make()

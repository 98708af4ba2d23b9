"""Zero-order search: the law of a neighbour, of the chain, and of greedy search at both ends."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from oracle import NOTHING_FIXED, L, N, i32, keys
from test_searches import (
    DISTINCT,
    NOISE,
    TWO_FREE,
    ZEROS,
    best_law,
    counts_of,
    distinct,
    draw,
    equal,
    joint,
    leaps,
    missing,
    particle,
    tilted,
    world,
    zeros,
)
from tiers import daily, nightly

from sedd.arrays import fold
from sedd.errors import FieldError
from sedd.samplers.confidence import Confidence
from sedd.samplers.event_jump import EventJump
from sedd.samplers.ordered import Ordered
from sedd.samplers.remdm import ReMDM
from sedd.samplers.semi_autoregressive import SemiAutoregressive
from sedd.samplers.speculative import Speculative
from sedd.samplers.token_confidence import TokenConfidence
from sedd.samplers.tweedie import Tweedie
from sedd.samplers.zero_order import ZeroOrder, keys_of

DRAWS = 8_000
JUMP = EventJump(schedule=NOISE)
INNER = {  # of every way to draw noise: once a position, in every round, as a whole
    "event_jump": (JUMP, "absorbing"),
    "confidence": (Confidence(schedule=NOISE), "absorbing"),
    "token_confidence": (TokenConfidence(schedule=NOISE), "absorbing"),
    "blocks": (SemiAutoregressive(schedule=NOISE, inner=JUMP, block=2), "absorbing"),
    "speculative": (Speculative(schedule=NOISE, lookahead=2, order="random"), "absorbing"),
    "remdm": (ReMDM(schedule=NOISE, steps=4, eta=0.3), "absorbing"),
    "tweedie": (Tweedie(schedule=NOISE, steps=3), "absorbing"),
    "tweedie_uniform": (Tweedie(schedule=NOISE, steps=3), "uniform"),
}


def zero_order(verifier, rho, neighbours=2, rounds=3, tilt=None, inner=JUMP):
    return ZeroOrder(
        schedule=NOISE,
        inner=inner,
        verifier=verifier,
        rho=rho,
        neighbours=neighbours,
        rounds=rounds,
        tilt=tilt,
    )


@functools.partial(jax.jit, static_argnames=("sampler", "tick"), compiler_options=oracle.QUICKLY)
def neighbours(sampler, denoiser, keys_B, tokens_BL, fixed_BL, tick):
    """The first pivots and their neighbours, [B, K, L], drawn from the noise of a round."""
    batch, count = len(keys_B), sampler.neighbours
    tick = jnp.asarray(tick)
    none_BP = jnp.zeros((batch, 1 + tokens_BL.shape[1]), jnp.int32)
    version_RP = sampler.versions(fold(keys_B, 7), none_BP, tick)
    version_BKP = version_RP.reshape(batch, count, -1)
    version_RP = jnp.concatenate([none_BP[:, None], version_BKP], 1).reshape(
        batch * (1 + count), -1
    )
    wide, keys_R = denoiser.repeat(1 + count), jnp.repeat(keys_B, 1 + count)
    tokens_RL, fixed_RL = (jnp.repeat(rows, 1 + count, 0) for rows in (tokens_BL, fixed_BL))
    drawn = sampler.inner(wide, keys_of(keys_R, version_RP), tokens_RL, fixed_RL)
    plain = sampler.inner(denoiser, keys_B, tokens_BL, fixed_BL)
    return drawn.tokens_BL.reshape(batch, 1 + count, -1), plain.tokens_BL


def drawn_neighbours(name, rho, *, tick=1, fixed=NOTHING_FIXED, count=DRAWS):
    inner, kind = INNER[name]
    here = world(kind)
    denoiser = here.conditional_denoiser() if kind == "absorbing" else here.score_denoiser()
    fixed = np.broadcast_to(np.asarray(fixed), (count, L))
    sampler = zero_order(equal, rho, inner=inner)
    tokens_BL, fixed_BL = i32(np.maximum(fixed, 0)), jnp.asarray(fixed >= 0)
    return map(np.asarray, neighbours(sampler, denoiser, keys(3, count), tokens_BL, fixed_BL, tick))


def law_of(name):
    """The law of the inner sampler; None where it is not enumerated."""
    if name in ("token_confidence", "remdm"):
        return None
    if name.startswith("tweedie"):
        return leaps(INNER[name][1])[(world(INNER[name][1]).states < N).all(1)]
    return joint()


# ---------------------------------------------------------------- neighbours


@pytest.mark.parametrize("name", daily(INNER, ["event_jump"]))
def test_a_neighbour_follows_the_inner_law_and_is_near(name):
    """The pivot is what the sampler draws without versions; neighbours share most of its tokens."""
    tokens_BJL, plain_BL = drawn_neighbours(name, 0.3)
    np.testing.assert_array_equal(tokens_BJL[:, 0], plain_BL)
    law = law_of(name)
    for column in range(1, 3):
        counts = oracle.counts_of(tokens_BJL[:, column], N)
        if law is None:  # against draws of the same size, with independent keys
            other = oracle.counts_of(np.roll(plain_BL, 1, 0), N)
            assert two_samples_p(counts, other) > 1e-4
        else:
            assert oracle.chi_square_p(counts, law) > 1e-4
    differ = (tokens_BJL[:, 1:] != plain_BL[:, None]).mean()
    by_chance = (tokens_BJL[:, 1:] != np.roll(plain_BL, 1, 0)[:, None]).mean()
    assert differ < 0.75 * by_chance


def two_samples_p(counts_a, counts_b):
    """p-value of two samples of one law; cells with fewer than 10 in both are merged."""
    both = counts_a + counts_b
    rare = both < 10
    table = np.array([[*c[~rare], c[rare].sum()] for c in (counts_a, counts_b)])
    return oracle.stats.chi2_contingency(table[:, table.sum(0) > 0]).pvalue


def test_only_positions_of_new_versions_are_drawn_anew():
    """All positions in one call, so that no position sees another one's token."""
    together = Ordered(schedule=NOISE, steps=1)
    version_BP = np.zeros((DRAWS, 1 + L), np.int32)
    version_BP[:, 1 + 2] = 5
    denoiser = world().conditional_denoiser()
    nothing = (i32(np.zeros((DRAWS, L))), jnp.zeros((DRAWS, L), bool))
    before = oracle.sample(together, denoiser, keys(0, DRAWS), *nothing, trace=False)
    versions = keys_of(keys(0, DRAWS), i32(version_BP))
    after = oracle.sample(together, denoiser, versions, *nothing, trace=False)
    changed_L = np.asarray(before.tokens_BL != after.tokens_BL).mean(0)
    assert (changed_L[[0, 1, 3]] == 0).all()
    marginal = joint().reshape([N] * L).sum((0, 1, 3))
    expected = 1 - (marginal**2).sum()  # of two independent draws
    assert abs(changed_L[2] - expected) < 4 * (expected * (1 - expected) / DRAWS) ** 0.5


@pytest.mark.nightly
@pytest.mark.parametrize("rho", [0.0, 1.0])
def test_the_share_of_new_noise(rho):
    """At rho 0 neighbours are the pivot; at 1 all are independent of each other."""
    tokens_BJL, plain_BL = drawn_neighbours("event_jump", rho)
    if rho == 0:
        assert (tokens_BJL == plain_BL[:, None]).all()
        return
    pairs = [(0, 1), (1, 2)]
    p = joint()
    for a, b in pairs:
        index_a, index_b = (oracle.state_index(tokens_BJL[:, j], N) for j in (a, b))
        equal_share, expected = (index_a == index_b).mean(), (p**2).sum()
        assert abs(equal_share - expected) < 4 * (expected * (1 - expected) / DRAWS) ** 0.5


# ---------------------------------------------------------------- the greedy search


def test_rho_0_returns_the_pivot():
    here = world().conditional_denoiser()
    pivot = oracle.draw(JUMP, here, 200, seed=1, trace=False)
    found = oracle.draw(zero_order(distinct, 0.0), here, 200, seed=1, trace=True)
    np.testing.assert_array_equal(found.tokens_BL, pivot.tokens_BL)
    np.testing.assert_array_equal(found.score_B, distinct(found.tokens_BL, True))
    np.testing.assert_array_equal(found.trace_TBL[-1], found.tokens_BL)
    np.testing.assert_array_equal(found.calls_B, 2 * 3 * L)
    np.testing.assert_array_equal(found.verifier_calls_B, 2 * 3)


@pytest.mark.parametrize(("verifier", "score"), [(distinct, DISTINCT), nightly(zeros, ZEROS)])
def test_rho_1_is_random_search(verifier, score):
    counts = counts_of(draw(zero_order(verifier, 1.0), trace=False))
    assert oracle.chi_square_p(counts, best_law(score, 6)) > 1e-4
    assert oracle.chi_square_p(counts, best_law(score, 5)) < 1e-4  # control


def test_greedy_search_never_loses():
    """More rounds continue the same search: no score falls, and the mean rises."""
    scores = [
        np.asarray(draw(zero_order(distinct, 0.3, rounds=rounds), trace=False).score_B)
        for rounds in (1, 4)
    ]
    assert (scores[1] >= scores[0]).all()
    assert scores[1].mean() > scores[0].mean() + 0.1


# ---------------------------------------------------------------- the Markov chain

CHAINS = 20_000
TILT = 2.0


@pytest.mark.nightly
def test_particles_alone_do_not_reach_the_tilted_law():
    """The control of the next test, and of the sweeps of particle."""
    counts = counts_of(draw_chains(particle(distinct, 2, JUMP)))
    assert oracle.total_variation(counts / CHAINS, tilted(DISTINCT, TWO_FREE)) > 0.1


@pytest.mark.parametrize(
    ("rho", "neighbours", "name"),
    [
        (0.4, 2, "event_jump"),
        nightly(0.4, 1, "event_jump"),
        nightly(1.0, 2, "event_jump"),
        nightly(0.2, 4, "event_jump"),
        nightly(0.4, 2, "tweedie"),
    ],
)
def test_the_chain_reaches_the_tilted_law(rho, neighbours, name):
    inner = INNER[name][0]
    sampler = zero_order(distinct, rho, neighbours, rounds=24, tilt=TILT, inner=inner)
    counts = counts_of(draw_chains(sampler))
    law = tilted(DISTINCT, TWO_FREE)
    if name == "tweedie":
        law = leaps_of_two()
    assert oracle.total_variation(counts / CHAINS, law) < 0.02
    assert oracle.chi_square_p(counts, law) > 1e-4


def leaps_of_two():
    """The law of three Tweedie steps on the two free positions, tilted."""
    here = world()
    law = oracle.tau_leaping_law(
        here, oracle.SCHEDULES["log_linear"], 3, "tweedie", fixed=np.asarray(TWO_FREE)
    )
    law = law[(here.states < N).all(1)] * np.exp(TILT * DISTINCT.astype(float))
    return law / law.sum()


def draw_chains(sampler):
    model, options = world().conditional_denoiser(), {"seed": 1, "fixed": TWO_FREE, "trace": False}
    return oracle.draw(sampler, model, CHAINS, sample=oracle.sample_long, **options)


@pytest.mark.nightly
def test_the_chain_on_all_positions():
    count = 200_000
    sampler = zero_order(distinct, 0.4, 2, rounds=32, tilt=TILT)
    counts = counts_of(draw(sampler, count=count, trace=False))
    assert oracle.total_variation(counts / count, tilted(DISTINCT)) < 0.02
    alone = counts_of(draw(particle(distinct, 2, JUMP), count=count, trace=False))
    assert oracle.total_variation(alone / count, tilted(DISTINCT)) > 0.1


# ---------------------------------------------------------------- failures and mistakes


@pytest.mark.parametrize("tilt", [nightly(None), 1.0])
def test_a_verifier_that_fails_ends_the_search(tilt):
    found = draw(zero_order(missing, 0.5, tilt=tilt), count=50, trace=False)
    assert np.isnan(found.score_B).all()
    np.testing.assert_array_equal(found.calls_B, 2 * L)  # one round


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rho": 1.5}, r"rho must be in \[0, 1\], got 1.5"),
        ({"rho": 0.1, "neighbours": 0}, "neighbours must be at least 1, got 0"),
        ({"rho": 0.1, "rounds": 0}, "rounds must be at least 1, got 0"),
        ({"rho": 0.1, "rounds": 2**30}, r"rounds times neighbours must be below 2\*\*31"),
        ({"rho": 0.1, "tilt": np.inf}, "tilt must be finite, got inf"),
        ({"rho": 0.1, "inner": zero_order(zeros, 0.1)}, "inner must not be a search"),
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises(FieldError, match=message):
        zero_order(zeros, **options)


def test_an_ensemble_has_no_tilted_law():
    both = (zeros, distinct)
    zero_order(both, 0.1)
    for make in (lambda: zero_order(both, 0.1, tilt=1.0), lambda: particle(both, 2)):
        with pytest.raises(
            FieldError, match="verifier must be one where the law is tilted, got an"
        ):
            make()

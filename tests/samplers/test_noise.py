"""The noise of draws: tails of large vocabularies, and leaps of tiny probability."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from oracle import i32
from scipy import stats
from tiers import nightly

from sedd.arrays import categorical
from sedd.denoiser import Denoiser
from sedd.networks.rows import Rows
from sedd.parameterizations.conditional import Conditional
from sedd.processes.absorbing import Absorbing
from sedd.samplers.event_jump import EventJump
from sedd.samplers.noise import coins, leap, random_rank, tokens_at
from sedd.schedules import LogLinear

VOCABULARY = 50_257


def leap_row(key, x_L, probs_LV):
    """`leap` of one sequence."""
    return leap(key[None], Rows.at(jnp.arange(len(x_L))[None]), x_L, probs_LV)


def each_position(batch, length, first=0):
    """The rows of all positions, from ``first`` on."""
    return Rows.at(jnp.broadcast_to(jnp.arange(first, first + length), (batch, length)))


def test_the_tail_of_a_zipf_distribution_has_its_mass():
    probs = 1 / np.arange(1, VOCABULARY + 1) ** 1.2
    probs /= probs.sum()
    tail = probs[10_000:].sum()
    log_probs = jnp.asarray(np.log(probs), jnp.float32)
    draw = jax.jit(lambda key: categorical(key, jnp.broadcast_to(log_probs, (250, VOCABULARY))))
    drawn = np.concatenate([draw(key) for key in oracle.keys(0, 5)])
    assert stats.binomtest(int((drawn >= 10_000).sum()), drawn.size, tail).pvalue > 1e-4
    assert stats.binomtest(int((drawn == 0).sum()), drawn.size, probs[0]).pvalue > 1e-4


def rare(draw, count=2**22, repeats=4, scale=1e-6):
    """How often a token of probability `scale` is drawn in count·repeats draws, by `draw`."""
    log_probs = jnp.log(jnp.array([scale, 1.0], jnp.float32))

    def one(key):
        return (draw(key, jnp.broadcast_to(log_probs, (count, 2))) == 0).sum()

    run = jax.jit(one, compiler_options=oracle.THOROUGHLY)
    return int(sum(run(key) for key in oracle.keys(1, repeats))), count * repeats


def test_unlikely_tokens_are_drawn_as_often_as_they_should():
    """Gumbel noise that stops short would never, or too often, pick a token of 1e-6."""
    drawn, total = rare(categorical)
    assert stats.binomtest(drawn, total, 1e-6).pvalue > 1e-4


def test_control_the_default_noise_is_coarser():
    """Its 2^23 values collide in a million draws, and their step is the 1e-7 that cuts the tail.

    To see a tail cut off takes 1e9 draws: this looks at the noise itself.
    """
    distinct = [
        len(np.unique(jax.random.gumbel(jax.random.key(2), (2**20,), mode=mode))) / 2**20
        for mode in ("low", "high")
    ]
    print("\ndistinct values among 2^20 draws, low and high:", distinct)
    assert distinct[0] < 0.95 < distinct[1]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_categorical_casts_first(dtype):
    log_probs = jnp.log(jnp.array([0.7, 0.2, 0.1])).astype(dtype)
    drawn = categorical(jax.random.key(3), jnp.broadcast_to(log_probs, (40_000, 3)))
    law = np.exp(np.asarray(log_probs, np.float64))
    assert oracle.chi_square_p(np.bincount(drawn, minlength=3), law) > 1e-4


def test_leap_has_its_law():
    probs = np.array([0.1, 0.5, 0.15, 0.25])
    x = i32(np.full(40_000, 1))
    drawn = leap_row(jax.random.key(4), x, jnp.broadcast_to(oracle.f32(probs), (40_000, 4)))
    counts = np.bincount(drawn, minlength=4)
    assert oracle.chi_square_p(counts, probs) > 1e-4
    assert oracle.chi_square_p(counts, np.roll(probs, 1)) < 1e-4


def test_leap_clips_and_renormalises():
    probs = oracle.f32([0.6, -0.3, 0.2, 1.2])
    x = i32(np.full(40_000, 3))
    drawn = leap_row(jax.random.key(5), x, jnp.broadcast_to(probs, (40_000, 4)))
    law = np.array([0.6, 0, 0.2, 1.2]) / 2
    assert oracle.chi_square_p(np.bincount(drawn, minlength=4), law) > 1e-4


def test_leap_leaves_even_where_the_own_entry_is_clipped_to_nothing():
    probs = oracle.f32([3.0, 1.0, -2.0])
    drawn = leap_row(
        jax.random.key(6), i32(np.full(10_000, 2)), jnp.broadcast_to(probs, (10_000, 3))
    )
    law = np.array([0.75, 0.25, 0.0])
    assert oracle.chi_square_p(np.bincount(drawn, minlength=3), law) > 1e-4


def test_leap_stays_where_there_is_nowhere_to_go():
    probs = oracle.f32([[0, 1, 0], [0, 0, 0]])
    np.testing.assert_array_equal(leap_row(jax.random.key(7), i32([1, 2]), probs), [1, 2])


@pytest.mark.parametrize(("leave", "repeats"), [(1e-3, 1), nightly(1e-6, 8)])
def test_leap_at_tiny_probabilities_of_leaving(leave, repeats):
    """The rare destinations keep their proportions and x its share."""
    count = 2**20
    away = np.array([0.6, 0.3, 0.1])
    probs = oracle.f32([*(leave * away), 1 - leave])
    run = jax.jit(
        lambda key: jnp.bincount(
            leap_row(key, jnp.full(count, 3), jnp.broadcast_to(probs, (count, 4))), length=4
        ),
        compiler_options=oracle.THOROUGHLY,
    )
    counts = np.sum([run(key) for key in oracle.keys(8, repeats)], 0)
    assert stats.binomtest(int(counts[:3].sum()), count * repeats, leave).pvalue > 1e-4
    if counts[:3].sum() > 100:
        assert oracle.chi_square_p(counts[:3], away) > 1e-4


# ---------------------------------------------------------------- tails of many steps


def zipf(exponent=1.2):
    probs = 1 / np.arange(1, VOCABULARY + 1) ** exponent
    return probs / probs.sum()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unigram(oracle.ConstantNetwork):
    """One hidden channel, 1 everywhere, read out by the log probabilities [V]."""

    def hidden(self, params, tokens_BL, **kwargs):
        return jnp.ones((*tokens_BL.shape, 1))

    def head(self, params):
        return params[None], jnp.zeros(self.num_states)


@pytest.mark.nightly
def test_many_steps_do_not_cut_the_tail():
    """1024 draws over 1024 steps: ranks above 10,000, and the first, have their mass."""
    probs = zipf()
    denoiser = Denoiser(
        params=oracle.f32(np.log([*probs, 1e-30])),
        network=Unigram(num_states=VOCABULARY + 1, time_conditioned=False),
        parameterization=Conditional(process=Absorbing(num_tokens=VOCABULARY)),
    )
    sampler = EventJump(schedule=LogLinear(), steps=1024)
    shape = (32, 8)  # few positions: their output layer is most of the time
    tokens_BL, fixed_BL = jnp.zeros(shape, jnp.int32), jnp.zeros(shape, bool)
    draw = jax.jit(lambda keys_B: sampler(denoiser, keys_B, tokens_BL, fixed_BL).tokens_BL)
    drawn = np.concatenate([draw(oracle.keys(seed, 32)) for seed in range(9, 13)])
    tail, expected = int((drawn >= 10_000).sum()), probs[10_000:].sum()
    print(f"\nrank > 10,000: {tail} of {drawn.size}, {expected * drawn.size:.1f} expected")
    assert stats.binomtest(tail, drawn.size, expected).pvalue > 1e-4
    assert stats.binomtest(int((drawn == 0).sum()), drawn.size, probs[0]).pvalue > 1e-4


@pytest.mark.nightly
def test_control_one_stage_float32_has_no_tail():
    """In one draw the mask, of probability 1 - 1/1024, competes with tokens of c/1024.

    The default noise ends at 15.94 = -log(-log(1 - 2^-23)). To win with it, a token of rank 10,000
    needs the mask's noise below -3.6, which has probability exp(-exp(3.6)) = 1e-16; the true share
    of the tail is 4e-5 a step.
    """
    largest = jax.jit(
        lambda key, mode: jax.random.gumbel(key, (2**22,), mode=mode).max(),
        static_argnames="mode",
        compiler_options=oracle.THOROUGHLY,
    )
    most = max(float(largest(key, "low")) for key in oracle.keys(17, 2))
    end = -np.log(-np.log1p(-(2.0**-23)))
    assert most <= end + 1e-3
    tail = zipf()[10_000:]
    mask_below = end + np.log(tail[0] / 1024) - np.log1p(-1 / 1024)
    all_the_tail_at_once = len(tail) * np.exp(-np.exp(-mask_below))
    assert all_the_tail_at_once < 1e-6 * tail.sum() / 1024
    # The noise that is used goes far enough: rank 10,000 need not wait for an unlikely mask.
    high = max(float(largest(key, "high")) for key in oracle.keys(17, 8))
    print(f"\nlargest noise: {most:.2f} low, {high:.2f} high; the mask below {mask_below:.2f}")
    assert high > end


# ---------------------------------------------------------------- noise is a request's own


def leaves(keys_B, rows, probability_R):
    """Whether `leap` leaves token 1 for token 0."""
    probs_RV = jnp.stack([probability_R, 1 - probability_R], -1)
    return leap(keys_B, rows, jnp.ones(probability_R.shape, jnp.int32), probs_RV) == 0


@pytest.mark.parametrize("decide", [leaves, coins])
def test_a_coin_does_not_depend_on_how_many_follow(decide):
    """The probability from which each position's coin falls, by bisection, with 9 and with 12."""
    keys_B = oracle.keys(18, 4)

    @functools.partial(jax.jit, compiler_options=oracle.QUICKLY)
    def thresholds(below_BL):
        def halve(_, bounds):
            below_BL, above_BL = bounds
            middle_BL = (below_BL + above_BL) / 2
            rows = each_position(*middle_BL.shape)
            falls_BL = decide(keys_B, rows, middle_BL.reshape(-1)).reshape(middle_BL.shape)
            return (
                jnp.where(falls_BL, below_BL, middle_BL),
                jnp.where(falls_BL, middle_BL, above_BL),
            )

        return jax.lax.fori_loop(0, 30, halve, (below_BL, jnp.ones_like(below_BL)))[1]

    short_BL, long_BL = thresholds(jnp.zeros((4, 9))), thresholds(jnp.zeros((4, 12)))
    np.testing.assert_array_equal(short_BL, long_BL[:, :9])


def test_the_noise_of_tokens_and_orders_does_not_depend_on_how_many_follow():
    keys_B = oracle.keys(19, 4)
    log_probs_BLN = jax.random.normal(jax.random.key(0), (4, 12, 5))
    at_some, rank = (jax.jit(f, compiler_options=oracle.QUICKLY) for f in (tokens_at, random_rank))
    drawn_R = at_some(keys_B, each_position(4, 12), log_probs_BLN.reshape(-1, 5))
    some_R = at_some(keys_B, each_position(4, 6, first=3), log_probs_BLN[:, 3:9].reshape(-1, 5))
    np.testing.assert_array_equal(drawn_R.reshape(4, 12)[:, 3:9], some_R.reshape(4, 6))
    select_BL = np.random.default_rng(0).random((4, 12)) < 0.7
    select_BL[:, 9:] = False
    rank_BL = np.asarray(rank(keys_B, jnp.asarray(select_BL)))
    short_BL = np.asarray(rank(keys_B, jnp.asarray(select_BL[:, :9])))
    np.testing.assert_array_equal(rank_BL[select_BL], short_BL[select_BL[:, :9]])

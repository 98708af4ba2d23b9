"""The noise of draws: tails of large vocabularies, and leaps of tiny probability."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from oracle import i32
from scipy import stats

from sedd.samplers.noise import categorical, leap

VOCABULARY = 50_257


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

    return int(sum(jax.jit(one)(key) for key in oracle.keys(1, repeats))), count * repeats


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
    drawn = leap(jax.random.key(4), x, jnp.broadcast_to(oracle.f32(probs), (40_000, 4)))
    counts = np.bincount(drawn, minlength=4)
    assert oracle.chi_square_p(counts, probs) > 1e-4
    assert oracle.chi_square_p(counts, np.roll(probs, 1)) < 1e-4


def test_leap_clips_and_renormalises():
    probs = oracle.f32([0.6, -0.3, 0.2, 1.2])
    x = i32(np.full(40_000, 3))
    drawn = leap(jax.random.key(5), x, jnp.broadcast_to(probs, (40_000, 4)))
    law = np.array([0.6, 0, 0.2, 1.2]) / 2
    assert oracle.chi_square_p(np.bincount(drawn, minlength=4), law) > 1e-4


def test_leap_leaves_even_where_the_own_entry_is_clipped_to_nothing():
    probs = oracle.f32([3.0, 1.0, -2.0])
    drawn = leap(jax.random.key(6), i32(np.full(10_000, 2)), jnp.broadcast_to(probs, (10_000, 3)))
    law = np.array([0.75, 0.25, 0.0])
    assert oracle.chi_square_p(np.bincount(drawn, minlength=3), law) > 1e-4


def test_leap_stays_where_there_is_nowhere_to_go():
    probs = oracle.f32([[0, 1, 0], [0, 0, 0]])
    np.testing.assert_array_equal(leap(jax.random.key(7), i32([1, 2]), probs), [1, 2])


@pytest.mark.parametrize(("leave", "repeats"), [(1e-3, 1), (1e-6, 8)])
def test_leap_at_tiny_probabilities_of_leaving(leave, repeats):
    """The rare destinations keep their proportions and x its share."""
    count = 2**20
    away = np.array([0.6, 0.3, 0.1])
    probs = oracle.f32([*(leave * away), 1 - leave])
    run = jax.jit(
        lambda key: jnp.bincount(
            leap(key, jnp.full(count, 3), jnp.broadcast_to(probs, (count, 4))), length=4
        )
    )
    counts = np.sum([run(key) for key in oracle.keys(8, repeats)], 0)
    assert stats.binomtest(int(counts[:3].sum()), count * repeats, leave).pvalue > 1e-4
    if counts[:3].sum() > 100:
        assert oracle.chi_square_p(counts[:3], away) > 1e-4

"""Ensembles of verifiers, and the likelihood of a text under the model itself."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from oracle import NOTHING_FIXED, L, N, i32, keys
from scipy import stats
from test_searches import DISTINCT, NOISE, TWO_FREE, ZEROS, best_of, distinct, draw, world, zeros

from sedd.errors import FieldError, UserError
from sedd.samplers.best_of_n import BestOfN
from sedd.samplers.event_jump import EventJump
from sedd.samplers.search import VERIFIER, preference
from sedd.samplers.self_likelihood import SelfLikelihood
from sedd.samplers.tweedie import Tweedie
from sedd.samplers.verifier import as_verifiers, verify

# ---------------------------------------------------------------- ensembles


def test_the_mean_rank():
    score_BCE = np.random.default_rng(0).integers(0, 4, (5, 7, 3)).astype(np.float32)
    value_BC = preference(jnp.asarray(score_BCE))
    expected = stats.rankdata(score_BCE, axis=1).mean(-1)
    np.testing.assert_allclose(value_BC, expected - 0.5, rtol=1e-6)
    np.testing.assert_array_equal(preference(jnp.asarray(score_BCE[..., :1])), score_BCE[..., 0])


def test_an_ensemble_picks_the_best_mean_rank():
    """Of the same candidates that a single verifier sees."""
    seen = []

    def watching(tokens_RL, real_RL):
        seen.append(np.array(tokens_RL))
        return zeros(tokens_RL, real_RL)

    found = draw(best_of((watching, distinct), 4), count=300, trace=False)
    (tokens_RL,) = seen
    index_BC = oracle.state_index(tokens_RL, N).reshape(300, 4)
    ranks = sum(stats.rankdata(score[index_BC], axis=1) for score in (ZEROS, DISTINCT))
    index_B = index_BC[np.arange(300), ranks.argmax(1)]
    np.testing.assert_array_equal(oracle.state_index(found.tokens_BL, N), index_B)
    np.testing.assert_array_equal(found.score_B, np.stack([ZEROS, DISTINCT], 1)[index_B])
    np.testing.assert_array_equal(found.verifier_calls_B, 2 * 4)
    only_distinct = index_BC[np.arange(300), DISTINCT[index_BC].argmax(1)]
    assert (index_B != only_distinct).any()  # control


# ---------------------------------------------------------------- the model itself


def exact_k_dce(table, x, free):
    """Σ over k and all sets of k free positions of their mean -log c, by enumeration."""
    log_c = table[..., :N] - np.log(np.exp(table[..., :N]).sum(-1, keepdims=True))
    total, free = 0.0, np.flatnonzero(free)
    for k in range(1, len(free) + 1):
        means = []
        for chosen in map(list, itertools.combinations(free, k)):
            masked = x.copy()
            masked[chosen] = N
            row = log_c[oracle.state_index(masked, N + 1)]
            means.append(-row[chosen, x[chosen]].mean())
        total += np.mean(means) / len(free)
    return total


@functools.partial(jax.jit, static_argnums=0, compiler_options=oracle.QUICKLY)
def self_scores(draws, denoiser, keys_B, tokens_BL, free_BL):
    return verify(SelfLikelihood(draws=draws), denoiser, keys_B, tokens_BL, free_BL)


@pytest.mark.parametrize("fixed", [NOTHING_FIXED, TWO_FREE])
def test_the_self_likelihood_is_the_k_dce(fixed):
    """On conditionals of no joint. Each mean is within 4σ of the exact sum over all masks."""
    table, count = oracle.random_table(seed=1), 4000
    denoiser = oracle.table_denoiser(table, N)
    fixed = np.asarray(fixed)
    rng = np.random.default_rng(0)
    for _ in range(2):
        x = np.where(fixed >= 0, fixed, rng.integers(0, N, L))
        free_BL = np.broadcast_to(fixed < 0, (count, L))
        scores = self_scores(3, denoiser, keys(0, count), i32(np.tile(x, (count, 1))), free_BL)
        score_B = np.asarray(scores.score_RE)[:, 0]
        expected = -exact_k_dce(table, x, fixed < 0)
        assert abs(score_B.mean() - expected) < 4 * score_B.std() / count**0.5
        assert score_B.std() > 0.05
        np.testing.assert_array_equal(scores.calls_R, 3)


def test_texts_of_one_request_are_scored_with_the_same_masks():
    """The score is a function of the text: equal candidates have equal scores."""
    table = oracle.random_table(seed=1)
    jump = EventJump(schedule=NOISE)
    sampler = BestOfN(schedule=NOISE, inner=jump, verifier=SelfLikelihood(draws=2), n=8)
    found = oracle.draw(sampler, oracle.table_denoiser(table, N), 500, trace=False)
    scores = self_scores(
        2,
        oracle.table_denoiser(table, N),
        jax.vmap(lambda key: jax.random.fold_in(key, VERIFIER))(keys(0, 500)),
        found.tokens_BL,
        np.ones((500, L), bool),
    )
    np.testing.assert_allclose(found.score_B, scores.score_RE[:, 0], rtol=1e-6)
    np.testing.assert_array_equal(found.calls_B, 8 * (L + 2))
    np.testing.assert_array_equal(found.rows_B, found.calls_B)
    np.testing.assert_array_equal(found.verifier_calls_B, 8)


def test_models_without_a_k_dce_are_refused():
    sampler = BestOfN(
        schedule=NOISE, inner=Tweedie(schedule=NOISE, steps=2), verifier=SelfLikelihood(), n=2
    )
    for kind in oracle.PROCESSES:
        with pytest.raises(UserError, match="the verifier self needs a time-independent model"):
            sampler.check(world(kind).score_denoiser())
    sampler.check(world().conditional_denoiser())


def test_names_of_verifiers():
    assert as_verifiers("self", None) == SelfLikelihood()
    assert as_verifiers(["self:3"], None) == SelfLikelihood(draws=3)
    assert as_verifiers(["self", "self:2"], None) == (SelfLikelihood(), SelfLikelihood(draws=2))
    for wrong in ("own", "self:", "self:x", [], [["self"]], 3):
        with pytest.raises(FieldError, match="verifier must be"):
            as_verifiers(wrong, None)
    with pytest.raises(FieldError, match="draws must be at least 1, got 0"):
        as_verifiers("self:0", None)

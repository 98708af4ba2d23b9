"""Search over paths: its law without selection, what it selects, and what it counts."""

import jax.numpy as jnp
import jaxtyping
import numpy as np
import oracle
import pytest
from oracle import L, N
from test_searches import (
    DISTINCT,
    NOISE,
    TWO_FREE,
    counts_of,
    distinct,
    draw,
    equal,
    joint,
    missing,
    world,
    zeros,
)
from tiers import nightly

from sedd.errors import FieldError
from sedd.samplers.confidence import Confidence
from sedd.samplers.event_jump import EventJump
from sedd.samplers.ordered import Ordered
from sedd.samplers.search_paths import SearchPaths
from sedd.samplers.tweedie import Tweedie

JUMP = EventJump(schedule=NOISE)


def search_paths(verifier, inner=JUMP, paths=2, branches=2, **shares):
    return SearchPaths(
        schedule=NOISE, inner=inner, verifier=verifier, paths=paths, branches=branches, **shares
    )


HALVES = {"begin": 0.5, "remask": 0.25, "reveal": 0.5}  # 2, 3 and 4 of 4 positions are revealed


def test_the_stages():
    assert search_paths(zeros, **HALVES).shares == (0.5, 0.75, 1.0)
    assert search_paths(zeros, begin=0.2, remask=0.5, reveal=0.6).shares[:3] == (0.2, 0.6, 0.7)
    assert search_paths(zeros, begin=0.3, remask=0.1, reveal=0.2).shares[-1] == 1.0


@pytest.mark.parametrize(
    ("inner", "paths"),
    [(JUMP, 1), nightly(JUMP, 2), nightly(Ordered(schedule=NOISE), 2)],
)
def test_equal_scores_leave_an_exact_law(inner, paths):
    """Masking at random positions and drawing them again leaves the joint as it is."""
    counts = counts_of(draw(search_paths(equal, inner, paths, **HALVES), trace=False))
    assert oracle.chi_square_p(counts, joint()) > 1e-4


def test_event_jump_goes_on_from_the_time_of_the_share():
    """Resumed at half of the time, the masked positions are revealed in the later intervals."""
    jump = EventJump(schedule=NOISE, steps=8)
    share_B = jnp.full(2000, 0.5)
    k_BL = jump.intervals(oracle.keys(0, 2000), L, share_B[:, None])
    counts = np.bincount(np.ravel(k_BL), minlength=8)
    assert (counts[:4] == 0).all()
    assert oracle.chi_square_p(counts[4:], np.full(4, 0.25)) > 1e-4


def test_given_tokens_condition_the_rest():
    counts = counts_of(draw(search_paths(equal, **HALVES), fixed=TWO_FREE, trace=False))
    assert oracle.chi_square_p(counts, joint(TWO_FREE)) > 1e-4
    assert oracle.chi_square_p(counts, joint()) < 1e-4  # control


@pytest.mark.nightly
def test_what_is_searched_traced_and_counted():
    """Scores above those of as many whole draws, at fewer calls; the trace is a line of descent."""
    sampler = search_paths(distinct, **HALVES)
    found = draw(sampler, count=4000)
    np.testing.assert_array_equal(found.score_B, distinct(found.tokens_BL, True))
    np.testing.assert_array_equal(found.verifier_calls_B, 3 * 4)
    p = joint()
    best_of_4 = DISTINCT @ best_law_of_4(p)
    assert np.asarray(found.score_B).mean() > best_of_4 + 0.05
    frames_TBL = np.asarray(found.trace_TBL)[: int(found.rounds) + 1]
    np.testing.assert_array_equal(frames_TBL[-1], found.tokens_BL)
    assert (frames_TBL[0] == N).all()
    # A frame differs from the one before in masks that were drawn, or, once a stage, in tokens that
    # were masked again.
    shown = frames_TBL < N
    changed = (frames_TBL[1:] != frames_TBL[:-1]) & shown[1:] & shown[:-1]
    assert not changed.any()
    # Each of 4 branches reveals 2 positions in the first stage and is completed by one more call.
    # With 2 revealed, each is masked again with probability 1/2, until 3 are revealed; with 3, each
    # with probability 1/3, until 4 are, and the last stage completes nothing.
    expected = 4 * (2 + 1) + 4 * (1 + 2 * 0.5 + 1) + 4 * (1 + 3 / 3)
    calls_B = np.asarray(found.calls_B)
    assert abs(calls_B.mean() - expected) < 4 * calls_B.std() / 4000**0.5


def best_law_of_4(p):
    order = np.argsort(DISTINCT)
    law, above = np.zeros(len(p)), np.cumsum(p[order])
    law[order] = above**4 - (above - p[order]) ** 4
    return law


def test_a_verifier_that_fails_ends_the_search():
    found = draw(search_paths(missing, **HALVES), count=50, trace=False)
    assert np.isnan(found.score_B).all()
    np.testing.assert_array_equal(found.calls_B, 4 * 3)  # one stage


def test_one_path_of_a_whole_share_is_one_draw():
    """With nothing masked again a single branch is the inner sampler, completions aside."""
    sampler = search_paths(
        equal, Confidence(schedule=NOISE), 1, 1, begin=0.5, remask=0.0, reveal=0.5
    )
    found = draw(sampler, trace=False)
    assert oracle.chi_square_p(counts_of(found), joint()) > 1e-4
    np.testing.assert_array_equal(found.calls_B, L + 1)
    assert jnp.all(found.verifier_calls_B == 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"paths": 0}, "paths must be at least 1, got 0"),
        ({"branches": 0}, "branches must be at least 1, got 0"),
        ({"begin": 0.0}, r"begin must be in \(0, 1\), got 0.0"),
        ({"remask": 1.0}, r"remask must be in \[0, 1\), got 1.0"),
        ({"remask": 0.5, "reveal": 0.5}, r"reveal must be above remask, 0.5, by at least 0.001"),
        ({"inner": Tweedie(schedule=NOISE)}, "inner must reveal masked positions once"),
        ({"inner": search_paths(zeros)}, "inner must not be a search"),
    ],
)
def test_mistakes_are_named(options, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # users have no such checks
    with pytest.raises(FieldError, match=message):
        search_paths(zeros, **options)


def test_width():
    assert search_paths(zeros, paths=3, branches=4).width == 12
    search_paths(zeros).check(world().conditional_denoiser())

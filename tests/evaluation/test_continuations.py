"""Scores of continuations against the enumerated law of a small transformer."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from tiers import nightly

from sedd.denoiser import Denoiser
from sedd.errors import FieldError
from sedd.evaluation.continuations import number_of, score_continuations
from sedd.networks.ddit import DDiT
from sedd.parameterizations.any_subset import AnySubset
from sedd.parameterizations.autoregressive import Autoregressive
from sedd.parameterizations.block import Block
from sedd.parameterizations.conditional import Conditional
from sedd.processes.absorbing import Absorbing
from sedd.schedules import LogLinear

N = 5
PROCESS = Absorbing(num_tokens=N)
READINGS = {
    "conditional": Conditional(process=PROCESS, time_independent=True),
    "autoregressive": Autoregressive(process=PROCESS),
    "any_subset": AnySubset(process=PROCESS),
    "block": Block(process=PROCESS, block=4),
}
rng = np.random.default_rng(0)
# Rows of 9 tokens are padded to 10.
PAIRS = [
    (rng.integers(0, N, context).tolist(), rng.integers(0, N, size).tolist())
    for context, size in [(6, 3), (7, 3), (8, 1), (5, 4), (9, 1), (0, 3), (7, 2), (6, 3), (8, 2)]
]


@functools.cache
def denoiser_of(reading):
    """A transformer of random weights, which is sure enough of its tokens to be wrong."""
    network = DDiT(
        num_states=N + 1,
        hidden_dim=16,
        num_layers=1,
        num_heads=2,
        condition_dim=8,
        dropout=0.0,
        time_conditioned=False,
    )
    leaves, treedef = jax.tree.flatten(jax.jit(network.init)(jax.random.key(0)))
    noise = np.random.default_rng(1)
    leaves = [leaf + 0.4 * noise.standard_normal(leaf.shape).astype("float32") for leaf in leaves]
    return Denoiser(
        params=treedef.unflatten(leaves), network=network, parameterization=READINGS[reading]
    )


@jax.jit
def log_conditional(denoiser, x_BL):
    return denoiser.log_conditional(x_BL)


def conditionals(denoiser, pair, masks):
    """[K, n, N]: the law of each token of the continuation where those of a mask [K, n] are masked.

    The rows are not padded.
    """
    context, continuation = pair
    count, masks = len(masks), np.resize(masks, (16, masks.shape[1]))  # one program a length
    tail_KN = np.where(masks, PROCESS.mask, np.array(continuation))
    x_KL = np.concatenate([np.tile(np.array(context, int), (len(masks), 1)), tail_KN], 1)
    return np.asarray(log_conditional(denoiser, x_KL.astype(np.int32)))[:count, len(context) :]


def expected_bound(denoiser, pair):
    """The mean over all orders of the continuation's NLL, from every subset of masks."""
    size = len(pair[1])
    masks = np.array(list(itertools.product([False, True], repeat=size)))[1:]
    log_c = conditionals(denoiser, pair, masks)
    nats = -np.take_along_axis(log_c, np.array(pair[1])[None, :, None], -1)[..., 0]
    count = masks.sum(1)
    weight = 1 / (count * np.array([math.comb(size, k) for k in count]))
    return float((weight * (nats * masks).sum(1)).sum())


def left_to_right(denoiser, pair):
    """The NLL from left to right, and whether each token is the likeliest one."""
    size = len(pair[1])
    masks = np.arange(size)[None, :] >= np.arange(size)[:, None]
    each = conditionals(denoiser, pair, masks)[np.arange(size), np.arange(size)]
    return -each[np.arange(size), pair[1]].sum(), bool((each.argmax(-1) == pair[1]).all())


def score(reading="conditional", pairs=PAIRS, seed=0, batch_size=4, **options):
    return score_continuations(
        denoiser_of(reading),
        LogLinear(),
        jax.random.key(seed),
        pairs,
        batch_size=batch_size,
        **options,
    )


def test_bounds_are_the_enumerated_law():
    bounds = np.array([expected_bound(denoiser_of("conditional"), pair) for pair in PAIRS])
    single = np.array([len(continuation) == 1 for _, continuation in PAIRS])
    runs = [score(draws=16, seed=seed) for seed in range(16)]
    for got in runs:
        np.testing.assert_array_equal(got.exact_S, single)
        np.testing.assert_array_equal(got.error_S == 0, single)
        np.testing.assert_allclose(got.nats_S[single], bounds[single], rtol=1e-5)
    # An error comes from four replicates, and has a heavy tail: those of all seeds are combined.
    nats_KS = np.array([got.nats_S for got in runs])[:, ~single]
    error_KS = np.array([got.error_S for got in runs])[:, ~single]
    error_S = np.sqrt((error_KS**2).mean(0) / len(runs))
    assert (np.abs(nats_KS.mean(0) - bounds[~single]) < 4 * error_S).all()
    assert (error_S < 0.1).all()  # a large error would prove anything
    # The stated errors are those of the scores: χ² of 15 degrees of freedom for each pair.
    ratio_S = nats_KS.var(0, ddof=1) / (error_KS**2).mean(0)
    assert ((ratio_S > 0.2) & (ratio_S < 3)).all()


def test_scores_do_not_depend_on_the_batches_but_on_the_seed():
    here = score(draws=16)
    order = np.random.default_rng(2).permutation(len(PAIRS))
    there = score(draws=16, pairs=[PAIRS[i] for i in order], batch_size=3)
    for name in ("nats_S", "error_S", "greedy_S", "exact_S"):
        got, want = getattr(there, name), getattr(here, name)[order]
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5, err_msg=name)
    other = score(draws=16, seed=1)
    assert (other.nats_S != here.nats_S)[~here.exact_S].all()
    np.testing.assert_allclose(other.nats_S[here.exact_S], here.nats_S[here.exact_S], rtol=1e-6)


@pytest.mark.parametrize("likelihood", ["ordered", nightly("bound")])
def test_greedy_decoding_is_from_left_to_right(likelihood):
    denoiser = denoiser_of("conditional")
    # The likeliest continuation of a context, found token by token, and others.
    context, found = PAIRS[1][0], []
    for _ in range(3):
        row = conditionals(denoiser, (context + found, [0]), np.array([[True]]))
        found.append(int(row[0, 0].argmax()))
    pairs = [*PAIRS, (context, found), (context, [*found[:2], (found[2] + 1) % N])]
    got = score(draws=4, pairs=pairs, likelihood=likelihood)
    # At each step the rest of the continuation is masked: the length is known.
    exact, greedy = zip(*(left_to_right(denoiser, pair) for pair in pairs), strict=True)
    np.testing.assert_array_equal(got.greedy_S, greedy)
    assert 0 < sum(greedy) < len(greedy)
    if likelihood == "ordered":
        np.testing.assert_allclose(got.nats_S, exact, rtol=1e-5)
        assert got.exact_S.all()
        assert not got.error_S.any()


@pytest.mark.nightly
def test_an_autoregressive_model_is_scored_exactly():
    denoiser = denoiser_of("autoregressive")
    got = score("autoregressive", draws=4)
    # Its conditionals see the tokens before a position only, also if all others are masked.
    exact, greedy = zip(*(left_to_right(denoiser, pair) for pair in PAIRS), strict=True)
    np.testing.assert_allclose(got.nats_S, exact, rtol=1e-5)
    np.testing.assert_array_equal(got.greedy_S, greedy)
    assert got.exact_S.all()
    assert not got.error_S.any()


@pytest.mark.nightly
def test_an_any_subset_model():
    """Its order takes one pass, and the bound reads all visible tokens anew in each call."""
    runs = [score("any_subset", PAIRS[:2], draws=16, seed=seed) for seed in range(16)]
    bounds = [expected_bound(denoiser_of("any_subset"), pair) for pair in PAIRS[:2]]
    error_S = np.sqrt(np.mean([got.error_S**2 for got in runs], 0) / len(runs))
    assert (np.abs(np.mean([got.nats_S for got in runs], 0) - bounds) < 4 * error_S).all()
    assert (error_S < 0.1).all()
    one_by_one = [
        float(score("any_subset", pairs=[pair], likelihood="ordered").nats_S[0])
        for pair in PAIRS[:2]
    ]
    together = score("any_subset", likelihood="ordered").nats_S
    np.testing.assert_allclose(together[:2], one_by_one, rtol=1e-5)


@pytest.mark.nightly
def test_a_block_model():
    """Its bound is that of each block, given the context and the earlier blocks."""
    denoiser, pairs = denoiser_of("block"), [PAIRS[3], PAIRS[1]]
    bounds = []
    for context, continuation in pairs:
        places = np.arange(len(context), len(context) + len(continuation)) // 4
        ends = np.flatnonzero(np.diff(places, append=-1)) + 1
        starts = np.append(0, ends[:-1])
        parts = [
            (context + continuation[:start], continuation[start:end])
            for start, end in zip(starts, ends, strict=True)
        ]
        assert len(parts) == 2
        bounds.append(sum(expected_bound(denoiser, part) for part in parts))
    runs = [score("block", pairs, draws=16, seed=seed) for seed in range(16)]
    error_S = np.sqrt(np.mean([got.error_S**2 for got in runs], 0) / len(runs))
    assert (np.abs(np.mean([got.nats_S for got in runs], 0) - bounds) < 4 * error_S).all()
    assert (error_S < 0.1).all()


def test_a_time_dependent_model_has_a_bound_but_no_greedy_decoding():
    here = oracle.Oracle("absorbing", seed=3)
    pairs = [([0, 2], [1, 1]), ([1], [0, 2, 0]), ([0, 0, 2], [1])]
    got = score_continuations(
        here.score_denoiser(), LogLinear(), jax.random.key(0), pairs, draws=256
    )
    joint = here.joint
    exact = [
        np.log(joint[tuple(context)].sum()) - np.log(joint[tuple(context + continuation)])
        for context, continuation in pairs
    ]
    # With exact scores the bound is tight, up to what is left of t below 1e-3.
    assert (np.abs(got.nats_S - exact) < 4 * got.error_S + 0.01).all()
    assert not got.exact_S.any()
    assert not got.greedy_S.any()


def test_mistakes():
    with pytest.raises(FieldError, match="draws must be a positive multiple of 4, got 3"):
        score(draws=3)
    with pytest.raises(FieldError, match="batch_size must be at least 1, got 0"):
        score(batch_size=0)
    with pytest.raises(FieldError, match="an autoregressive model is scored exactly"):
        score("autoregressive", likelihood="ordered")
    with pytest.raises(ValueError, match="no tokens"):
        score(pairs=[([1, 2], [])])
    uniform = oracle.Oracle("uniform").score_denoiser()
    with pytest.raises(FieldError, match="needs a time-independent absorbing model"):
        score_continuations(
            uniform, LogLinear(), jax.random.key(0), PAIRS[:1], likelihood="ordered"
        )


def test_the_number_of_a_pair_is_of_both_parts():
    numbers = {number_of(*pair) for pair in PAIRS}
    assert len(numbers) == len(PAIRS)
    assert number_of([1], [2, 3]) != number_of([1, 2], [3])
    assert 0 <= min(numbers) <= max(numbers) < 2**32


def test_no_pairs():
    assert len(score(pairs=[]).nats_S) == 0


def test_control_padding_that_is_seen_changes_scores():
    """Without segments the padded rows of the first test would have other scores."""
    denoiser = denoiser_of("conditional")
    row = np.zeros((1, 10), np.int32)
    alone = log_conditional(denoiser, jnp.asarray(np.where(np.arange(9) < 6, 0, N)[None]))
    padded = log_conditional(
        denoiser, jnp.asarray(np.where((np.arange(10) >= 6) & (np.arange(10) < 9), N, row))
    )
    assert np.abs(alone[0, 6:9] - padded[0, 6:9]).max() > 1e-2

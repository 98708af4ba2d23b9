"""The diagnosis of predictions against enumeration: 3 tokens, 4 positions, all texts and masks."""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from oracle import L, N, f32, i32
from scipy import special
from tiers import nightly

from sedd.errors import FieldError, UserError
from sedd.evaluation.diagnosis import FIGURES, LEAST_TEXTS, NUMBER_OF, measure_predictions
from sedd.evaluation.diagnosis_draws import READINGS, distance_bins, nearest_revealed, readings
from sedd.parameterizations.block import Block
from sedd.processes.absorbing import Absorbing

WORLD = oracle.Oracle("absorbing", seed=3)
CLEAN = oracle.all_states(N)
MASKS = np.array(list(itertools.product([False, True], repeat=L)))
COUNTS = np.array([5, 11, 3])
UNIGRAM = (COUNTS + 0.5) / (COUNTS + 0.5).sum()
RATES = (0.3, 0.8)
ROWS = 1296  # all texts with all masks
ONE = np.ones((1, L))  # segment
D = len(distance_bins(L))  # 1, 2, 3, none


def table_of(joint):
    """The raw output whose conditionals are those of a joint [N, N, N, N]."""
    world = oracle.Oracle("absorbing")
    world.joint = joint + 1e-12  # no context is impossible
    logits = np.log(np.maximum(world.conditional(), 1e-30))
    return np.concatenate([logits, np.zeros((*logits.shape[:2], 1))], -1)


TABLES = {"consistent": table_of(WORLD.joint), "random": oracle.random_table(seed=5, scale=1.5)}


def denoiser_of(name):
    if name == "score":  # the same conditionals, by a network that depends on the noise level
        return WORLD.score_denoiser()
    return oracle.table_denoiser(TABLES[name], N)


@functools.cache
def conditionals(name):
    """[V^L, L, N]: the prediction at every position of every state."""
    logits = TABLES["consistent" if name == "score" else name][..., :N]
    return special.softmax(logits, axis=-1)


def by_hand(name, x0_L, masked_L):
    """The sums [D, K] of one text and one mask; the pair TV of all pairs, each exactly."""
    c, sums = conditionals(name), np.zeros((D, len(READINGS)))

    def p_at(x_L, i):
        return c[oracle.state_index(x_L, N + 1), i]

    xt_L = np.where(masked_L, N, x0_L)
    revealed = np.flatnonzero(~masked_L)
    distance_L = [min((abs(i - j) for j in revealed), default=L) for i in range(L)]
    for i in np.flatnonzero(masked_L):
        p = p_at(xt_L, i)
        sums[distance_L[i] - 1, :6] += [
            1,
            -(p * np.log(p)).sum(),
            -np.log(p[x0_L[i]]),
            p.argmax() == x0_L[i],
            (p * np.log(p / UNIGRAM)).sum(),
            p.argmax() == UNIGRAM.argmax(),
        ]
        if i + 1 < L and masked_L[i + 1]:
            q, dependence = p_at(xt_L, i + 1), 0.0
            for a in range(N):
                given_L = np.where(np.arange(L) == i, a, xt_L)
                dependence += p[a] * oracle.total_variation(p_at(given_L, i + 1), q)
            nearer = min(distance_L[i], distance_L[i + 1])
            sums[nearer - 1, 6:] += [1, oracle.total_variation(p, q), 1, dependence]
    return sums


@functools.cache
def enumerated(name):
    """[N^L, 2^L, D, K]."""
    return np.array([[by_hand(name, x, mask) for mask in MASKS] for x in CLEAN])


def truth(name, figure, rate=None, bin=None):
    """A mean over texts of the joint and masks of a rate, or of all rates alike."""
    weights_M = np.zeros(len(MASKS))
    for r in RATES if rate is None else [rate]:
        weights_M += r ** MASKS.sum(1) * (1 - r) ** (~MASKS).sum(1)
    sums_DK = np.einsum("x,m,xmdk->dk", WORLD.joint.ravel(), weights_M, enumerated(name))
    sums_K = sums_DK.sum(0) if bin is None else sums_DK[bin]
    divisor = NUMBER_OF.get(figure, "count")
    return sums_K[READINGS.index(figure)] / sums_K[READINGS.index(divisor)]


@functools.partial(jax.jit, compiler_options=oracle.QUICKLY)
def readings_of(denoiser, keys_B, x0_BL, masked_BL, segment_BL):
    sigma_B = jnp.full(len(x0_BL), 0.7)
    unigram_N = f32(np.log(UNIGRAM))
    return readings(denoiser, keys_B, x0_BL, masked_BL, segment_BL, sigma_B, unigram_N)


def read(denoiser, x0_BL, masked_BL, segment_BL=ONE, *, seed=0):
    """The readings [B, D, K] of at most ``ROWS`` texts, by one program for each kind of model."""
    size = len(masked_BL)
    rows = np.resize(np.arange(size), ROWS)
    arrays = (np.broadcast_to(each, (size, L))[rows] for each in (x0_BL, masked_BL, segment_BL))
    x0_BL, masked_BL, segment_BL = arrays
    given = (i32(x0_BL), jnp.asarray(masked_BL, bool), i32(segment_BL))
    found = readings_of(denoiser, oracle.keys(seed, ROWS), *given)
    return np.asarray(found, np.float64)[:size]


def drawn(count, seed=0):
    rng = np.random.default_rng(seed)
    return CLEAN[rng.choice(len(CLEAN), count, p=WORLD.joint.ravel())].astype(np.int32)


@functools.cache
def measured(name):
    """The diagnosis of 4,000 texts, two masks of each rate."""
    x0_SL = drawn(4000)
    batches = [(rows, np.ones(rows.shape, bool)) for rows in np.split(x0_SL, 4)]
    return measure_predictions(
        *(denoiser_of(name), jax.random.key(1), batches),
        **{"length": L, "counts_N": COUNTS, "rates": RATES, "draws": 9},
    )


# ---------------------------------------------------------------- distances


@pytest.mark.parametrize(
    ("revealed", "segments", "distances"),
    [
        ("..x....", "1111111", "2101234"),
        ("x.....x", "1111111", "0123210"),
        (".......", "1111111", "7777777"),
        ("x...x..", "1111222", "0123012"),  # across the border of segments nothing is near
        ("...x...", "1112223", "7770127"),
        ("x..x...", "1110000", "0127777"),
        ("xxxxxxx", "1121133", "0000000"),
        ("x..x..x", "1112222", "0120110"),
    ],
)
def test_the_distance_to_the_nearest_revealed_token(revealed, segments, distances):
    """``x`` is revealed; 7, the length, stands for no revealed token in the segment."""
    if revealed == "x..x...":  # padding is never revealed
        revealed = "x......"
    found = nearest_revealed(
        jnp.array([[c == "x" for c in revealed]]), i32([[int(c) for c in segments]])
    )
    assert "".join(map(str, np.asarray(found)[0])) == distances


def test_bins_of_distances():
    assert distance_bins(1) == [(1, 1), (0, 0)]
    assert distance_bins(2) == [(1, 1), (0, 0)]
    assert distance_bins(4) == [(1, 1), (2, 2), (3, 3), (0, 0)]
    assert distance_bins(64) == [
        *((1, 1), (2, 2), (3, 4), (5, 8), (9, 16), (17, 32)),
        (33, 63),
        (0, 0),
    ]
    assert distance_bins(66)[-3:] == [(33, 64), (65, 65), (0, 0)]


# ---------------------------------------------------------------- readings


@pytest.mark.parametrize("name", ["random", nightly("score")])
def test_every_text_and_mask_is_read_as_by_hand(name):
    shape = (len(CLEAN), len(MASKS), L)
    x0_BL = np.broadcast_to(CLEAN[:, None], shape).reshape(-1, L)
    masked_BL = np.broadcast_to(MASKS, shape).reshape(-1, L)
    found = read(denoiser_of(name), x0_BL, masked_BL)
    expected = enumerated(name).reshape(ROWS, D, -1)
    np.testing.assert_allclose(found[..., :-2], expected[..., :-2], rtol=1e-5, atol=2e-5)
    # The drawn pair stands for all pairs of its text, whatever its distance.
    np.testing.assert_array_equal(found[..., -2].sum(1), expected[..., -2].sum(1))


def test_the_pair_is_drawn_among_all_pairs_and_its_first_token_from_the_prediction():
    """Of a random table the mean over draws is that over pairs and tokens, for single masks."""
    for mask, x0_L in (([1, 1, 1, 0], [0, 1, 2, 1]), ([1, 1, 1, 1], [0, 0, 2, 1])):
        masked_L, x0_L = np.array(mask, bool), np.array(x0_L)
        many_BL = np.tile(masked_L, (ROWS, 1))
        each = [read(denoiser_of("random"), x0_L, many_BL, seed=seed) for seed in range(5)]
        found = np.concatenate(each)[..., -2:]
        expected = by_hand("random", x0_L, masked_L)[..., -2:]
        error = found.std(0, ddof=1) / math.sqrt(len(found))
        assert (abs(found.mean(0) - expected) <= 4 * error + 1e-6).all()
        assert (error < 0.05 * np.maximum(expected, 0.1)).all()


def test_an_independent_world_has_no_dependent_pairs():
    rng = np.random.default_rng(0)
    each = special.softmax(rng.normal(size=(L, N)), axis=-1)
    joint = np.einsum("a,b,c,d->abcd", *each)
    found = read(oracle.table_denoiser(table_of(joint), N), np.zeros(L), MASKS)
    assert abs(found[..., -1]).max() < 1e-6
    apart = sum(oracle.total_variation(each[i], each[i + 1]) for i in range(L - 1))
    np.testing.assert_allclose(found[-1].sum(0)[READINGS.index("neighbour_tv")], apart, rtol=1e-5)
    entropy = -(each * np.log(each)).sum()
    np.testing.assert_allclose(found[-1].sum(0)[READINGS.index("entropy")], entropy, rtol=1e-5)


def test_a_token_and_its_copy():
    """x₁ = x₂ uniform: the joint and the product differ by 1 - 1/N, the predictions not at all."""
    joint = np.einsum("ab,c,d->abcd", np.eye(N) / N, *np.full((2, N), 1 / N))
    masked_BL = np.array([[1, 1, 0, 0], [0, 1, 1, 0], [1, 1, 1, 1]], bool)
    sums_BK = read(oracle.table_denoiser(table_of(joint), N), np.zeros(L), masked_BL).sum(1)
    np.testing.assert_allclose(sums_BK[:2, -1], [1 - 1 / N, 0], atol=1e-6)
    assert sums_BK[2, -1] == pytest.approx(3 * (1 - 1 / N), abs=1e-5) or sums_BK[2, -1] < 1e-5
    neighbours = sums_BK[:, READINGS.index("neighbour_tv")]
    # In the second text x₁ is given, so that x₂ is known and x₃ uniform.
    np.testing.assert_allclose(neighbours, [0, 1 - 1 / N, 0], atol=1e-6)


def test_given_tokens_are_near_and_other_segments_are_not():
    masked_BL = np.array([[0, 1, 1, 0], [0, 1, 1, 1]])
    segment_BL = np.array([[1, 1, 1, 1], [1, 1, 2, 2]])
    found = read(denoiser_of("random"), np.zeros(L), masked_BL, segment_BL)
    count_BD = found[..., READINGS.index("count")]
    assert count_BD.tolist() == [[2, 0, 0, 0], [1, 0, 0, 2]]
    pairs_BD = found[..., READINGS.index("neighbours")]
    assert pairs_BD.tolist() == [[1, 0, 0, 0], [0, 0, 0, 1]]  # none across the border


# ---------------------------------------------------------------- means and their errors


@pytest.mark.parametrize("name", ["random", nightly("score")])
def test_means_are_those_of_all_texts_and_masks(name):
    found = measured(name)
    assert (found.num_sequences, found.repeats) == (4000, 2)
    for rate, bin in itertools.product((None, *RATES), (None, *range(D))):
        distance = None if bin is None else distance_bins(L)[bin][0]
        for figure in FIGURES:
            mean = found.mean(figure, rate=rate, distance=distance)
            if bin == 2 and figure in NUMBER_OF:  # two are never so far from a token
                assert math.isnan(mean.value)
                continue
            assert mean.error is not None
            exact = truth(name, figure, rate, bin)
            assert abs(mean.value - exact) < 4 * mean.error + 1e-5, (figure, rate, bin)
            assert mean.error < 0.1


def test_errors_cover_the_truth():
    """Of 100 runs of 40 texts, for each figure: two errors cover it about 95 times."""
    found = measured("random")
    parts = [dataclasses.replace(found, sums_SRDK=part) for part in np.split(found.sums_SRDK, 100)]
    for figure, (rate, bin) in itertools.product(FIGURES, [(None, None), (0.3, 0), (0.8, 1)]):
        exact = truth("random", figure, rate, bin)
        distance = None if bin is None else bin + 1
        runs = [part.mean(figure, rate=rate, distance=distance) for part in parts]
        known = [run for run in runs if run.error is not None]
        covered = np.mean([abs(run.value - exact) < 2 * run.error for run in known])
        # 100 runs of a probability of .93 have a standard deviation of .026.
        assert 0.85 < covered <= 1, (figure, rate, bin, covered)
        spread = np.std([run.value for run in known])
        assert 0.75 < np.mean([run.error for run in known]) / spread < 1.25


def test_few_texts_have_no_error():
    found = measured("random")
    some = dataclasses.replace(found, sums_SRDK=found.sums_SRDK[: LEAST_TEXTS - 1])
    value, error = some.mean("entropy")
    assert error is None
    assert value > 0
    none = dataclasses.replace(found, sums_SRDK=found.sums_SRDK * 0)
    assert math.isnan(none.mean("entropy").value)
    assert none.distances == []


def test_without_context():
    found = measured("random")
    alone = found.without_context()
    share = COUNTS / COUNTS.sum()
    assert alone["entropy"] == pytest.approx(-(UNIGRAM * np.log(UNIGRAM)).sum())
    assert alone["nats"] == pytest.approx(-(share * np.log(UNIGRAM)).sum())
    assert alone["accuracy"] == pytest.approx(share[1])
    assert found.commonest == 1
    assert not found.trained


# ---------------------------------------------------------------- rows and mistakes


def diagnosed(denoiser, x0_SL, scored_SL, *segment, **options):
    given = {"length": L, "counts_N": COUNTS, "rates": (0.5,), "draws": 2, **options}
    return measure_predictions(denoiser, jax.random.key(0), [(x0_SL, scored_SL, *segment)], **given)


def test_what_is_not_scored_is_given_or_padding():
    """Positions 0 and 1 of each text are scored; the others are given, or padding."""
    x0_SL, scored_SL = drawn(64), np.tile([True, True, False, False], (64, 1))
    given = diagnosed(denoiser_of("random"), x0_SL, scored_SL)
    padded = diagnosed(denoiser_of("random"), x0_SL, scored_SL, padded=True)
    assert given.count() == padded.count() > 0
    assert (given.count(distance=0), given.count(distance=3)) == (0, 0)
    both = given.count(distance=2)  # both are masked; given ones are at distances 1 and 2
    assert both > 0
    assert padded.count(distance=0) == 2 * both
    assert padded.distances == [(1, 1), (0, 0)]


def test_the_draws_of_a_text_do_not_depend_on_its_batch():
    x0_SL, scored_SL = drawn(64), np.ones((64, L), bool)
    parts = [(x0_SL[:41], scored_SL[:41]), (x0_SL[41:], scored_SL[41:])]
    options = {"length": L, "counts_N": COUNTS, "rates": (0.5,), "draws": 2}
    split = measure_predictions(denoiser_of("random"), jax.random.key(0), parts, **options)
    whole = diagnosed(denoiser_of("random"), x0_SL, scored_SL)
    np.testing.assert_allclose(split.sums_SRDK, whole.sums_SRDK, atol=1e-5)


def test_models_without_predictions_of_masked_tokens():
    x0_SL, scored_SL = drawn(2), np.ones((2, L), bool)
    block = dataclasses.replace(
        denoiser_of("random"), parameterization=Block(process=Absorbing(num_tokens=N), block=2)
    )
    for denoiser, message in (
        (WORLD.autoregressive_denoiser(), "an autoregressive model predicts no masked tokens"),
        (oracle.Oracle("uniform").score_denoiser(), "need an absorbing process, .* is uniform"),
        (block, "a block model has predictions only where all earlier blocks are clean"),
    ):
        with pytest.raises(UserError, match=message):
            diagnosed(denoiser, x0_SL, scored_SL)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rates": (0.5, 1.0)}, "rates must be between 0 and 1, exclusive, got 1.0"),
        ({"rates": (0.0,)}, "rates must be between 0 and 1, exclusive, got 0.0"),
        ({"rates": (0.5, 0.5), "draws": 4}, "rates must be one or more distinct numbers"),
        ({"rates": ()}, "rates must be one or more distinct numbers"),
        ({"rates": (0.5, 0.7), "draws": 3}, "draws must be at least 4, two network calls for each"),
    ],
)
def test_mistakes(options, message):
    with pytest.raises(FieldError, match=message):
        diagnosed(denoiser_of("random"), drawn(2), np.ones((2, L), bool), **options)


def test_figures_that_there_are_not():
    found = measured("random")
    for options, message in (
        ({"figure": "entropie"}, "figure must be one of entropy, nats, .* got 'entropie'"),
        ({"figure": "nats", "rate": 0.4}, "rate must be one of 0.3, 0.8, got 0.4"),
        ({"figure": "nats", "distance": 4}, "distance must be from 0 to 3, got 4"),
        ({"figure": "nats", "distance": -1}, "distance must be from 0 to 3, got -1"),
    ):
        with pytest.raises(FieldError, match=message):
            found.mean(**options)

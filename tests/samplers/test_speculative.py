"""Speculative sampling against its own law, enumerated over drafts, coins and replacements.

The tables are random, so that the conditionals belong to no joint distribution: a draft that is
verified in a wrong context changes the law. Draws are held against a law by χ² at 1e-4.
"""

import dataclasses
import functools
import itertools
from collections import defaultdict
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from oracle import NOTHING_FIXED, L, N, f32, i32
from tiers import daily, nightly

from sedd.errors import FieldError, UserError
from sedd.networks.base import Attend
from sedd.reshape import Reshape
from sedd.samplers.best_of_n import BestOfN
from sedd.samplers.drafters import ByRows, Window
from sedd.samplers.ngram import NGramByRows
from sedd.samplers.ordered import Ordered
from sedd.samplers.particle import Particle
from sedd.samplers.semi_autoregressive import SemiAutoregressive
from sedd.samplers.speculative import Speculative, residual
from sedd.schedules import LogLinear

DRAWS = 20_000
LOG_LINEAR = LogLinear()
GIVEN = (-1, 2, -1, -1)
V = N + 1


def speculative(draft: Any = "batch", **options):
    return Speculative(schedule=LOG_LINEAR, draft=draft, **options)


@functools.cache
def conditional(seed):
    """[V^L, L, N]: p(x_i | x) of a random table."""
    raw = oracle.random_table(seed=seed, scale=1.5)[..., :N]
    probs = np.exp(raw)
    return probs / probs.sum(-1, keepdims=True)


def denoiser(seed):
    return oracle.table_denoiser(oracle.random_table(seed=seed, scale=1.5), N)


def index(x):
    return int(oracle.state_index(np.array(x), V))


def put(x, positions, tokens):
    """A sequence with other tokens at some positions."""
    x = list(x)
    for position, token in zip(positions, tokens, strict=True):
        x[position] = token
    return tuple(x)


def start_of(fixed):
    return tuple(N if token < 0 else token for token in fixed)


def orders_of(order, fixed):
    """Every order of the free positions that ``order`` may stand for."""
    free = [i for i in range(L) if fixed[i] < 0]
    return list(itertools.permutations(free)) if order == "random" else [tuple(free)]


def product_law(cond, fixed, order="forward"):
    """[V^L]: the product of the conditionals in the order, or its mean over random orders."""
    law, orders = np.zeros(V**L), orders_of(order, fixed)
    for positions in orders:
        for tokens in itertools.product(range(N), repeat=len(positions)):
            x, p = start_of(fixed), 1 / len(orders)
            for position, token in zip(positions, tokens, strict=True):
                p *= cond[index(x), position, token]
                x = put(x, [position], [token])
            law[index(x)] += p
    return law


def frequencies(x, place):
    """[N]: how often each token follows the left neighbour of ``place``, or how often it occurs."""
    x = np.asarray(x)
    counts = [0] * N
    if place > 0 and x[place - 1] < N:
        for left, token in itertools.pairwise(x):
            if left == x[place - 1] and token < N:
                counts[token] += 1
    if sum(counts) == 0:
        counts = [sum(x == token) for token in range(N)]
    if sum(counts) == 0:
        counts = [1] * N
    return np.array(counts) / sum(counts)


# ------------------------------------------------------- the chain, propagated in float64


def round_of(cond, sampler, positions, x, seen, unseen=0):
    """One round of a sequence: (probability, tokens, context of the next draft, calls, rows).

    A draft of ngram has the frequencies of the tokens and drafts before it, the others have the
    table's conditionals in one context. ``seen`` is the context from which the round drafts without
    a call, or None. ``unseen`` drafts are left out of the contexts of the verification, for a
    control.
    """
    k, stale, bonus = sampler.lookahead, sampler.draft == "stale", sampler.bonus
    counts = sampler.draft == "ngram"
    left = [i for i in positions if x[i] == N]
    window = left[:k]
    fresh = seen is None and not counts  # the drafts take a call, and the first is certain
    verifies = len(left) > (fresh or sampler.draft == "batch")
    contexts = list(range(0 if stale or counts else 1, k + bonus))
    source = x if seen is None else seen
    calls, rows = fresh + verifies, fresh + verifies * len(contexts)
    for drafts in itertools.product(range(N), repeat=len(window)):
        if counts:
            p = [frequencies(put(x, window[:j], drafts[:j]), i) for j, i in enumerate(window)]
        else:
            p = [cond[index(source), i] for i in window]
        if any(p[j][draft] == 0 for j, draft in enumerate(drafts)):
            continue
        known = [max(j - unseen, 0) for j in range(len(window))]
        q = [cond[index(put(x, window[:c], drafts[:c])), window[j]] for j, c in enumerate(known)]
        weight = np.prod([p[j][drafts[j]] for j in range(len(window))])
        for kept in range(len(window) + 1):
            last = max([c for c in contexts if c <= kept], default=None)
            usable = verifies and (stale or kept == k == last)
            seen_next = put(x, window[:last], drafts[:last]) if usable else None
            accepted = put(x, window[:kept], drafts[:kept])
            if kept == len(window):
                yield weight, accepted, seen_next, calls, rows
                continue
            ratio = min(1, q[kept][drafts[kept]] / p[kept][drafts[kept]])
            if ratio < 1:
                rest = np.maximum(q[kept] - p[kept], 0)
                for token in np.flatnonzero(rest):
                    chance = weight * (1 - ratio) * rest[token] / rest.sum()
                    end = put(accepted, [window[kept]], [token])
                    yield chance, end, seen_next, calls, rows
            weight *= ratio


def propagate(cond, sampler, fixed, **wrong):
    """The law [V^L] of the sampler, and the joint law of its calls and rows."""
    law, work, orders = np.zeros(V**L), defaultdict(float), orders_of(sampler.order, fixed)
    for positions in orders:
        states = {(start_of(fixed), None, 0, 0): 1 / len(orders)}
        while states:
            after = defaultdict(float)
            for (x, seen, calls, rows), weight in states.items():
                if N not in [x[i] for i in positions]:
                    law[index(x)] += weight
                    work[calls, rows] += weight
                    continue
                for p, end, seen_next, c, r in round_of(cond, sampler, positions, x, seen, **wrong):
                    after[end, seen_next, calls + c, rows + r] += weight * p
            states = after
    return law, work


EVERY = [
    speculative(draft=draft, lookahead=k, bonus=bonus, order=order)
    for draft in ("batch", "stale", "ngram")
    for k in (2, 3, 4)
    for bonus in (False, True)
    for order in ("forward", "random")
    if not (draft == "ngram" and bonus)
]


@pytest.mark.parametrize("fixed", [nightly(NOTHING_FIXED), GIVEN], ids=["free", "given"])
def test_the_rule_of_acceptance_gives_the_product_of_the_conditionals(fixed):
    """And calls never exceed positions; some save calls."""
    free = sum(token < 0 for token in fixed)
    for sampler in EVERY:
        law, work = propagate(conditional(0), sampler, fixed)
        target = product_law(conditional(0), fixed, sampler.order)
        assert oracle.total_variation(law, target) < 1e-12
        calls = [calls for calls, _ in work]
        assert max(calls) <= free
        if sampler.lookahead > 2:
            assert min(calls) < free


def test_control_a_verification_that_misses_a_draft_has_another_law():
    sampler = speculative(lookahead=3)
    law, _ = propagate(conditional(0), sampler, NOTHING_FIXED, unseen=1)
    assert law.sum() == pytest.approx(1)
    assert oracle.total_variation(law, product_law(conditional(0), NOTHING_FIXED)) > 0.05


# ------------------------------------------------------- the library's distributions


@functools.partial(jax.jit, static_argnames="drafter", compiler_options=oracle.QUICKLY)
def two_rounds(drafter, denoiser, first, tokens_SK, kept_S, second):
    """What a drafter computes in a round and, after some drafts were kept, in the next one.

    ``second`` is the next window; the memo makes the difference between it and a first round.
    """
    memo = drafter.begin(denoiser, first.x_BL)
    tokens_SK, drafted = drafter.draft(denoiser, memo, first, lambda *_: tokens_SK)
    verified = drafter.verify(denoiser, drafted, first, tokens_SK)
    memo = drafter.settle(verified.memo, kept_S)
    _, again = drafter.draft(denoiser, memo, second, lambda *_: tokens_SK)
    return drafted, verified, again


@pytest.mark.parametrize(
    "drafter",
    [
        nightly(ByRows(lookahead=3, bonus=False, stale=False)),
        nightly(ByRows(lookahead=2, bonus=True, stale=False)),
        ByRows(lookahead=2, bonus=False, stale=True),
        nightly(ByRows(lookahead=3, bonus=True, stale=True)),
    ],
    ids=str,
)
def test_a_drafter_reads_the_contexts_that_it_should(drafter):
    """In 600 random states: drafts, targets, the next drafts, calls and rows."""
    cond, rng, k = conditional(1), np.random.default_rng(0), drafter.lookahead
    count = 600
    sampler = speculative(
        draft="stale" if drafter.stale else "batch", lookahead=k, bonus=drafter.bonus
    )
    contexts = list(range(drafter.first, k + drafter.bonus))
    first, second, cases = [], [], []
    for _ in range(count):
        order = rng.permutation(L)
        known = rng.integers(0, L)
        x = put((N,) * L, order[:known], rng.integers(0, N, known))
        window = order[known : known + k]
        drafts, kept = rng.integers(0, N, k), rng.integers(0, len(window) + 1)
        after = put(x, window[: kept + 1], rng.integers(0, N, len(window[: kept + 1])))
        after = put(after, window[:kept], drafts[:kept])
        start = min(known + kept + 1, L)
        if sampler.draft == "batch" and drafter.bonus and kept == k:
            after, start = put(x, window, drafts), known + k
        first.append((x, order, known))
        second.append((after, order, start))
        cases.append((x, window, drafts, kept, after, order[start : start + k]))

    def window_of(rows):
        x_BL, order_BL, known_B = map(i32, zip(*rows, strict=True))
        return Window(x_BL=x_BL, order_BL=order_BL, known_B=known_B, left_B=L - known_B, size=k)

    drafts_SK = i32([case[2] for case in cases])
    kept_S = i32([case[3] for case in cases])
    drafted, verified, again = two_rounds(
        drafter, denoiser(1), window_of(first), drafts_SK, kept_S, window_of(second)
    )
    for s, (x, window, drafts, kept, after, later) in enumerate(cases):
        verifies = len(window) > 1
        last = max([c for c in contexts if c <= kept], default=None)
        reuses = verifies and (drafter.stale or kept == k == last)
        source = put(x, window[:last], drafts[:last]) if reuses else after
        for j, position in enumerate(window):
            close(drafted.log_probs_BKN[s, j], cond[index(x), position])
            context = put(x, window[:j], drafts[:j])
            close(verified.log_probs_BKN[s, j], cond[index(context), position])
        for j, position in enumerate(later):
            close(again.log_probs_BKN[s, j], cond[index(source), position])
        assert (int(drafted.calls_B[s]), int(drafted.rows_B[s])) == (1, 1)
        assert int(verified.calls_B[s]) == verifies
        assert int(verified.rows_B[s]) == verifies * len(contexts)
        assert int(again.calls_B[s]) == int(again.rows_B[s]) == (len(later) > 0 and not reuses)


@functools.partial(jax.jit, compiler_options=oracle.QUICKLY)
def drafts_by_counts(model, window, tokens_SK):
    """``NGramByRows.draft`` of given drafts, and the position of each call of ``draw``."""
    drafter = NGramByRows(lookahead=tokens_SK.shape[1])
    entry_S1 = jnp.zeros((len(tokens_SK), 1), jnp.int32)

    def draw(positions_S1, log_probs_S1N):
        assert log_probs_S1N.shape[:2] == positions_S1.shape == entry_S1.shape
        own_SK = window.positions == positions_S1
        return jnp.where(own_SK, tokens_SK, 0).sum(1, keepdims=True)

    return drafter.draft(model, drafter.begin(model, window.x_BL), window, draw)


def test_drafts_by_counts_are_those_of_plain_python():
    """In texts with gaps, padding and two segments; each draft counts those before it."""
    rng, length, k, count = np.random.default_rng(2), 12, 4, 400
    rows, segments, cases = [], [], []
    for case in range(count):
        order, real = rng.permutation(length), rng.integers(5, length + 1)
        order = np.concatenate([order[order < real], order[order >= real]])
        known = rng.integers(0, real - 3)  # at least the 4 positions of a window are masked
        x = rng.integers(0, N, length)
        x[order[known:real]] = N
        segment = (np.arange(length) < real).astype(int)
        if case % 4 == 0:  # a second text, in place of the padding
            segment[real:] = 2
        rows.append((x, order, known, real - known))
        segments.append(segment)
        cases.append((x, order[known:real][:k], rng.integers(0, N, k), real))
    x_BL, order_BL, known_B, left_B = map(i32, zip(*rows, strict=True))
    window = Window(x_BL=x_BL, order_BL=order_BL, known_B=known_B, left_B=left_B, size=k)
    drafts_SK = i32([case[2] for case in cases])
    model = dataclasses.replace(denoiser(0), attend=Attend(segment_BL=i32(segments)))
    plain = drafts_by_counts(model, window, drafts_SK)
    hot = dataclasses.replace(model, reshape=Reshape.of(temperature=[1.4] * count))
    for temperature, (tokens_SK, drafted) in (
        (1, plain),
        (1.4, drafts_by_counts(hot, window, drafts_SK)),
    ):
        assert not drafted.calls_B.any()
        assert not drafted.rows_B.any()
        for s, (x, places, drafts, real) in enumerate(cases):
            for j, place in enumerate(places):
                before = np.array(put(x, places[:j], drafts[:j]))[:real]
                expected = frequencies(before, place) ** (1 / temperature)
                close(drafted.log_probs_BKN[s, j], expected / expected.sum())
                assert tokens_SK[s, j] == drafts[j]
    bigrams = [frequencies(x[:real], places[0]) for x, places, _, real in cases]
    assert 0.1 < np.mean([0 in probs for probs in bigrams]) < 0.9  # both sharp and flat ones


def close(log_probs, probs):
    np.testing.assert_allclose(np.exp(log_probs), probs, atol=1e-6)


def test_the_law_of_a_replacement():
    rng = np.random.default_rng(0)
    p, q = rng.dirichlet(np.ones(5), (2, 100))
    rest = np.maximum(q - p, 0)
    close(
        jax.nn.log_softmax(residual(f32(np.log(p)), f32(np.log(q)))), rest / rest.sum(-1)[:, None]
    )
    close(residual(f32(np.log(q)), f32(np.log(q))), q)  # nothing is left
    broken = f32([np.nan, -1.0])
    whole = f32(np.log([0.5, 0.5]))
    assert np.isnan(residual(broken, whole)).any()
    assert np.isnan(residual(whole, broken)).any()


# ------------------------------------------------------- draws

DRAWN = {
    "batch": speculative(lookahead=3, order="random"),
    "bonus": speculative(lookahead=2, bonus=True),
    "stale": speculative(lookahead=2, draft="stale", order="random"),
    "long": speculative(lookahead=6),
    "stale bonus": speculative(lookahead=3, draft="stale", bonus=True),
    "ngram": speculative(lookahead=3, draft="ngram", order="random"),
    "ngram forward": speculative(lookahead=2, draft="ngram"),
}
CASES = [(0, NOTHING_FIXED), (0, GIVEN), (2, NOTHING_FIXED)]


def within_three_sigma(values_B, work, entry):
    """Whether the mean of the draws is that of the enumerated ``work``."""
    number, weight = np.array([key[entry] for key in work]), np.array(list(work.values()))
    mean = weight @ number
    spread = np.sqrt(weight @ (number - mean) ** 2 / len(values_B))
    return abs(np.mean(values_B) - mean) <= 3 * spread + 1e-5


@pytest.mark.parametrize("name", daily(DRAWN, ["stale"]))
def test_draws_follow_the_law(name):
    """And take the calls and rows of the chain; the log probability is that of the law."""
    sampler = DRAWN[name]
    for seed, fixed in CASES:
        samples = oracle.draw(sampler, denoiser(seed), DRAWS, seed=3, fixed=fixed, trace=False)
        counts = oracle.counts_of(samples.tokens_BL, V)
        law, work = propagate(conditional(seed), sampler, fixed)
        assert oracle.chi_square_p(counts, law) > 1e-4
        free = sum(token < 0 for token in fixed)
        assert samples.calls_B.max() <= free
        assert within_three_sigma(samples.calls_B, work, 0)
        assert within_three_sigma(samples.rows_B, work, 1)
        if sampler.order == "forward":
            log_law = np.log(law[oracle.state_index(samples.tokens_BL, V)])
            np.testing.assert_allclose(samples.log_prob_B, log_law, atol=1e-5)
    other = product_law(conditional(0), NOTHING_FIXED, sampler.order)
    assert oracle.chi_square_p(counts, other) < 1e-4  # control: the last table was another


def test_reshaped_and_guided_conditionals():
    """Temperature, top-p and guidance change drafts and targets; guidance doubles the calls."""
    cond, states = conditional(0), oracle.all_states(V)
    hidden = oracle.state_index(np.where(np.array(GIVEN) >= 0, N, states), V)
    cond = cond**2.5 / cond[hidden] ** 1.5
    cond = cond ** (1 / 1.3)
    cond /= cond.sum(-1, keepdims=True)
    rising = np.sort(cond)[..., ::-1]
    last = (rising.cumsum(-1) < 0.8).sum(-1, keepdims=True)
    cond = np.where(cond >= np.take_along_axis(rising, last, -1), cond, 1e-300)
    cond /= cond.sum(-1, keepdims=True)
    assert (cond < 1e-9).any()
    given_BL = jnp.broadcast_to(jnp.asarray(GIVEN) >= 0, (DRAWS, L))
    changed = dataclasses.replace(
        denoiser(0),
        reshape=Reshape.of(guidance=1.5, temperature=1.3, top_p=0.8),
        given_BL=given_BL,
    )
    sampler = speculative(lookahead=3)
    samples = oracle.draw(sampler, changed, DRAWS, fixed=GIVEN, trace=False)
    law, work = propagate(cond, sampler, GIVEN)
    law[law < 1e-12] = 0  # tokens that top-p excludes
    assert oracle.chi_square_p(oracle.counts_of(samples.tokens_BL, V), law) > 1e-4
    assert within_three_sigma(samples.calls_B / 2, work, 0)
    assert within_three_sigma(samples.rows_B / 2, work, 1)


@pytest.mark.nightly
@pytest.mark.parametrize(
    "options",
    [
        {"lookahead": 3, "order": "random"},
        {"lookahead": 2, "order": "2,0", "draft": "stale", "bonus": True},
        {"lookahead": 3, "draft": "ngram"},
        {"lookahead": 4, "bonus": True},
    ],
)
def test_coupled_draws_are_those_of_ordered(options):
    """Token for token, at temperature 0 too."""
    coupled = speculative(coupled=True, **options)
    one_by_one = Ordered(schedule=LOG_LINEAR, order=coupled.order)
    hot, cold = (jnp.full(2000, temperature) for temperature in (1.0, 0.0))
    reshape, saved = Reshape.of(), []
    for fixed, temperature_B in ((NOTHING_FIXED, hot), (GIVEN, hot), (NOTHING_FIXED, cold)):
        changed = dataclasses.replace(
            denoiser(0), reshape=dataclasses.replace(reshape, temperature_B=temperature_B)
        )
        ours, theirs = (
            oracle.draw(sampler, changed, 2000, seed=5, fixed=fixed, trace=False)
            for sampler in (coupled, one_by_one)
        )
        np.testing.assert_array_equal(ours.tokens_BL, theirs.tokens_BL)
        np.testing.assert_array_equal(theirs.rows_B, theirs.calls_B)
        saved.append(theirs.calls_B.mean() - ours.calls_B.mean())
    assert min(saved) >= 0 < saved[0]
    texts = len(np.unique(ours.tokens_BL, axis=0))  # at temperature 0
    assert (1 < texts <= 24) if coupled.order == "random" else texts == 1


# ------------------------------------------------------- within other samplers, and refusals


def first_tokens(tokens_RL, real_RL):
    """A verifier."""
    return np.asarray(tokens_RL)[:, 0].astype(np.float32)


@pytest.mark.nightly
def test_within_blocks_and_searches():
    """The law of the blocks is the product of conditionals; searches count rows as well."""
    inner = speculative(lookahead=2, draft="stale")
    blocks = SemiAutoregressive(schedule=LOG_LINEAR, inner=inner, block=2)
    samples = oracle.draw(blocks, denoiser(0), DRAWS, trace=False)
    law = product_law(conditional(0), NOTHING_FIXED)
    assert oracle.chi_square_p(oracle.counts_of(samples.tokens_BL, V), law) > 1e-4
    log_law = np.log(law[oracle.state_index(samples.tokens_BL, V)])
    np.testing.assert_allclose(samples.log_prob_B, log_law, atol=1e-5)
    search = {"schedule": LOG_LINEAR, "inner": inner, "verifier": first_tokens}
    for sampler in (
        BestOfN(**search, n=2),
        Particle(**search, particles=2, tilt=0.0, resample_every=1),
    ):
        found = oracle.draw(sampler, denoiser(0), 200, trace=False)
        assert sampler.width == 2 * inner.width == 4
        assert (found.rows_B > found.calls_B).all()
        log_law = np.log(law[oracle.state_index(found.tokens_BL, V)])
        np.testing.assert_allclose(found.log_prob_B, log_law, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"draft": "bacth"},
            "draft must be one of stale, batch, self, ngram, head, got 'bacth'; did you mean 'ba",
        ),
        ({"lookahead": 0}, "lookahead must be at least 1, got 0"),
        ({"lookahead": 0, "bonus": True}, "lookahead must be at least 1, got 0"),
        (
            {"lookahead": 1, "draft": "batch", "bonus": True},
            "lookahead must be at least 2, got 1: a single draft saves no call",
        ),
        ({"draft": "ngram", "bonus": True}, "bonus does not go with the draft ngram, which drafts"),
        ({"order": "0,0"}, "order must be forward, .* such as 3,0,2, got '0,0'"),
        ({"order": "sideways"}, "order must be forward, .* such as 3,0,2, got 'sideways'"),
    ],
)
def test_options_that_are_refused(options, message):
    sampler = speculative()
    for name, value in options.items():  # past the check of types that the tests install
        object.__setattr__(sampler, name, value)
    with pytest.raises(FieldError, match=message):
        sampler.__post_init__()


def test_models_that_are_refused():
    exact = oracle.Oracle("absorbing")
    sampler = speculative()
    for refused, message in (
        (exact.score_denoiser(), "'speculative' needs a time-independent model"),
        (exact.autoregressive_denoiser(), "'speculative' cannot draw from an autoregressive model"),
        (oracle.Oracle("uniform").score_denoiser(), "'speculative' needs a model of the absorbing"),
    ):
        with pytest.raises(UserError, match=message):
            sampler.check(refused)

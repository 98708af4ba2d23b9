"""Speculative sampling from any-subset models: the law, the memory, and the batch.

The table gives a query its raw output by all tokens that it sees. It is random, so that its
conditionals belong to no joint distribution, and a query that sees too much or too little changes
the law. The DDiT's content rows have states of their own, which its one-pass likelihood checks.
"""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from oracle import NOTHING_FIXED, L, N, f32, i32, keys
from tiers import nightly

from sedd.denoiser import Denoiser
from sedd.errors import FieldError, UserError
from sedd.evaluation.ordered import ordered_nats
from sedd.networks.base import EMPTY, Attend, Memory
from sedd.networks.ddit import DDiT
from sedd.parameterizations.any_subset import AnySubset
from sedd.processes.absorbing import Absorbing
from sedd.reshape import Reshape
from sedd.samplers.drafters import Window
from sedd.samplers.semi_autoregressive import SemiAutoregressive
from sedd.samplers.speculative import Speculative
from sedd.samplers.two_stream import TwoStream
from sedd.schedules import LogLinear

DRAWS = 20_000
LOG_LINEAR = LogLinear()
GIVEN = (-1, 2, -1, -1)
V = N + 1
READING = AnySubset(process=Absorbing(num_tokens=N))


def speculative(**options: Any):
    return Speculative(schedule=LOG_LINEAR, **options)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SeenTable(oracle.TableNetwork):
    """The table's row of the tokens that a query sees, the others masked. Slots keep the tokens."""

    has_memory = True

    def memory(self, batch, slots):
        keys = jnp.zeros((batch, 1, slots, 1, 1))
        return Memory(keys=keys, values=keys, rank_BS=jnp.full((batch, slots), EMPTY, jnp.int32))

    def extend(self, params, tokens_BM, memory, *, positions_BM, rank_BM, write_BM):
        row_B1 = jnp.arange(len(tokens_BM))[:, None]
        slot_BM = jnp.where(write_BM, positions_BM, memory.rank_BS.shape[1])
        tokens_BS = memory.keys[:, 0, :, 0, 0].at[row_B1, slot_BM].set(tokens_BM, mode="drop")
        rank_BS = memory.rank_BS.at[row_B1, slot_BM].set(rank_BM, mode="drop")
        keys = tokens_BS[:, None, :, None, None]
        seen_BMS = rank_BS[:, None] <= rank_BM[:, :, None]
        mask = self.num_states - 1
        x_BMS = jnp.where(seen_BMS, tokens_BS[:, None].astype(jnp.int32), mask)
        index_BM = jax.vmap(self._index, 1, 1)(x_BMS)
        raw_BMV = params["table"][index_BM, positions_BM]
        return raw_BMV, Memory(keys=keys, values=keys, rank_BS=rank_BS)


def table(seed):
    model = oracle.table_denoiser(oracle.random_table(seed=seed, scale=1.5), N)
    network = SeenTable(num_states=V, time_conditioned=False)
    return dataclasses.replace(model, network=network, parameterization=READING)


def conditional(seed, temperature=1.0):
    """[V^L, L, N]: p(x_i | x) of the table."""
    probs = np.exp(oracle.random_table(seed=seed, scale=1.5)[..., :N] / temperature)
    return probs / probs.sum(-1, keepdims=True)


def law_of(seed, fixed, order, temperature=1.0):
    """[V^L]: ``product_law`` of the table."""
    return product_law(conditional(seed, temperature), fixed, order)


def product_law(cond, fixed, order):
    """[V^L]: the product of the conditionals, or its mean over random orders."""
    free = [i for i in range(L) if fixed[i] < 0]
    orders = list(itertools.permutations(free)) if order == "random" else [tuple(free)]
    law = np.zeros(V**L)
    for positions in orders:
        for tokens in itertools.product(range(N), repeat=len(free)):
            x = np.where(np.array(fixed) < 0, N, fixed)
            p = 1 / len(orders)
            for position, token in zip(positions, tokens, strict=True):
                p *= cond[int(oracle.state_index(x, V)), position, token]
                x[position] = token
            law[int(oracle.state_index(x, V))] += p
    return law


@pytest.mark.parametrize(
    "options",
    [
        {"draft": "self", "lookahead": 3, "order": "random"},
        nightly({"draft": "self", "lookahead": 2, "bonus": True}),
        nightly({"draft": "stale", "lookahead": 2, "order": "random"}),
        nightly({"draft": "stale", "lookahead": 3, "bonus": True}),
        nightly({"draft": "ngram", "lookahead": 3, "order": "random"}),
        nightly({"draft": "ngram", "lookahead": 2}),
    ],
    ids=lambda options: " ".join(map(str, options.values())),
)
def test_draws_follow_the_product_of_the_conditionals(options):
    """And the log probability is that of the law; calls are bounded, and some are saved."""
    sampler = speculative(**options)
    for seed, fixed in ((0, NOTHING_FIXED), (0, GIVEN), (1, NOTHING_FIXED)):
        samples = oracle.draw(sampler, table(seed), DRAWS, seed=3, fixed=fixed, trace=False)
        law = law_of(seed, fixed, sampler.order)
        counts = oracle.counts_of(samples.tokens_BL, V)
        assert oracle.chi_square_p(counts, law) > 1e-4
        free = sum(token < 0 for token in fixed)
        assert samples.calls_B.max() <= free
        assert free < L or samples.calls_B.min() < L
        np.testing.assert_array_equal(samples.rows_B, samples.calls_B)
        if sampler.order == "forward":
            log_law = np.log(law[oracle.state_index(samples.tokens_BL, V)])
            np.testing.assert_allclose(samples.log_prob_B, log_law, atol=1e-5)
    other = law_of(0, NOTHING_FIXED, sampler.order)
    assert oracle.chi_square_p(counts, other) < 1e-4  # control: the last table was another


@functools.partial(jax.jit, static_argnames="drafter", compiler_options=oracle.QUICKLY)
def two_rounds(drafter, denoiser, first, tokens_SK, kept_S, second):
    """The distributions of the first round, and of the next one after some drafts were kept."""
    memo = drafter.begin(denoiser, first.x_BL)
    tokens_SK, drafted = drafter.draft(denoiser, memo, first, lambda *_: tokens_SK)
    verified = drafter.verify(denoiser, drafted, first, tokens_SK)
    memo = drafter.settle(verified.memo, kept_S)
    _, again = drafter.draft(denoiser, memo, second, lambda *_: tokens_SK)
    return drafted, verified, again


@pytest.mark.parametrize(
    "drafter",
    [
        nightly(TwoStream(lookahead=2, bonus=True, stale=False)),
        nightly(TwoStream(lookahead=2, bonus=False, stale=True)),
        TwoStream(lookahead=3, bonus=True, stale=True),
    ],
    ids=str,
)
def test_a_drafter_asks_for_the_positions_that_it_should(drafter):
    """Wrong drafts would leave the law as it is, and cost calls."""
    cond, rng, k = conditional(0), np.random.default_rng(0), drafter.lookahead
    cases, first, second = [], [], []
    for _ in range(300):
        order, free = rng.permutation(L), int(rng.integers(1, L + 1))
        x, drafts = np.full(L, N), rng.integers(0, N, k)
        x[order[free:]] = rng.integers(0, N, L - free)
        window = order[:free][:k]
        kept = int(rng.integers(0, len(window) + 1))
        after = x.copy()
        after[window] = drafts[: len(window)]
        after[window[kept:]] = N
        after[window[kept : kept + 1]] = rng.integers(0, N)
        start = min(kept + 1, k, free)
        first.append((x, order, 0, free))
        second.append((after, order, start, free - start))
        cases.append((x, window, drafts, kept, after, order[start:free][:k]))
    windows = [
        Window(size=k, **dict(zip(("x_BL", "order_BL", "known_B", "left_B"), columns, strict=True)))
        for columns in (map(i32, zip(*rows, strict=True)) for rows in (first, second))
    ]
    drafts_SK, kept_S = i32([case[2] for case in cases]), i32([case[3] for case in cases])
    drafted, verified, again = two_rounds(
        drafter, table(0), windows[0], drafts_SK, kept_S, windows[1]
    )
    for s, (x, window, drafts, kept, after, later) in enumerate(cases):

        def check(computed, entry, seen, place, s=s):
            expected = cond[int(oracle.state_index(seen, V)), place]
            np.testing.assert_allclose(
                np.exp(computed.log_probs_BKN[s, entry]), expected, atol=1e-5
            )

        def prefix(count, x=x, window=window, drafts=drafts):
            seen = x.copy()
            seen[window[:count]] = drafts[: len(window[:count])]
            return seen

        for j, place in enumerate(window):
            check(drafted, j, x, place)
            check(verified, j, prefix(j), place)
        ready = drafter.stale or kept == k
        count = min(kept, k - 1 + drafter.bonus)
        for j, place in enumerate(later):
            check(again, j, prefix(count) if ready else after, place)
        assert int(again.calls_B[s]) == (len(later) > 0 and not ready)


@pytest.mark.nightly
def test_reshaped_draws_within_blocks():
    """Blocks start the sampler anew in different rounds, with the blocks before as the prompt."""
    inner = speculative(draft="self", lookahead=2)
    blocks = SemiAutoregressive(schedule=LOG_LINEAR, inner=inner, block=3)
    hot = dataclasses.replace(table(0), reshape=Reshape.of(temperature=1.4))
    samples = oracle.draw(blocks, hot, DRAWS, trace=False)
    law = law_of(0, NOTHING_FIXED, "forward", 1.4)
    assert oracle.chi_square_p(oracle.counts_of(samples.tokens_BL, V), law) > 1e-4


def by_neighbours(log_probs_BKN, tokens_BL, positions_BK):
    """A logit processor: the number of visible tokens, the one to the left, and the position."""
    visible_B1 = (tokens_BL < N).sum(1, keepdims=True)
    left_BK = jnp.take_along_axis(tokens_BL, jnp.maximum(positions_BK - 1, 0), 1)
    favoured_BK = (visible_B1 + left_BK + positions_BK) % N
    favoured_BKN = favoured_BK[..., None] == jnp.arange(N)[None, None]
    banned_BKN = (positions_BK % N)[..., None] == jnp.arange(N)[None, None]
    return jnp.where(banned_BKN, -jnp.inf, log_probs_BKN + jnp.where(favoured_BKN, 1.5, 0.0))


@pytest.mark.parametrize("draft", ["self", nightly("stale"), nightly("ngram")])
def test_a_logit_processor_changes_drafts_and_targets(draft):
    """It sees the drafts before each position: the law is that of the processed conditionals."""
    states, place_SL = oracle.all_states(V), np.tile(np.arange(L), (V**L, 1))
    cond = np.log(conditional(0))
    cond = np.exp(np.asarray(by_neighbours(f32(cond), i32(states), i32(place_SL)), np.float64))
    cond /= cond.sum(-1, keepdims=True)
    processed = dataclasses.replace(table(0), reshape=Reshape.of(logit_processor=by_neighbours))
    sampler = speculative(draft=draft, lookahead=3)
    for fixed in (NOTHING_FIXED, GIVEN):
        samples = oracle.draw(sampler, processed, DRAWS, seed=4, fixed=fixed, trace=False)
        counts = oracle.counts_of(samples.tokens_BL, V)
        law = product_law(cond, fixed, "forward")
        assert oracle.chi_square_p(counts, law) > 1e-4
        free_L = np.array(fixed) < 0
        drawn = np.asarray(samples.tokens_BL)[:, free_L]
        assert (drawn != np.arange(L)[free_L] % N).all()  # banned tokens
    assert oracle.chi_square_p(counts, law_of(0, GIVEN, "forward")) < 1e-4  # control


# ------------------------------------------------------- a network with content states

B, LENGTH = 4, 8
ORDER = (5, 0, 3)
NETWORK = DDiT(
    num_states=V, time_conditioned=False, hidden_dim=16, num_layers=2, num_heads=2, dropout=0.0
)
RNG = np.random.default_rng(0)
TOKENS_BL = i32(RNG.integers(0, N, (B, LENGTH)))
FIXED_BL = np.zeros((B, LENGTH), bool)
FIXED_BL[1, :3] = FIXED_BL[2, [1, 6]] = FIXED_BL[3] = True
FIXED_BL[3, 4] = False  # one free position
REAL_BL = np.ones((B, LENGTH), bool)
REAL_BL[1, 7:] = REAL_BL[2, 5:] = False


@functools.cache
def ddit():
    shapes = jax.eval_shape(NETWORK.init, jax.random.key(0))
    params = jax.tree.map(lambda x: 0.5 * RNG.standard_normal(x.shape, np.float32), shapes)
    return Denoiser(
        params=params,
        network=NETWORK,
        parameterization=READING,
        attend=Attend(segment_BL=i32(REAL_BL)),
        reshape=Reshape.of(temperature=[1.0] * B),
    )


TRACES = []


@functools.partial(jax.jit, static_argnums=0, compiler_options=oracle.QUICKLY)
def run(sampler, denoiser, keys_B, tokens_BL, fixed_BL):
    TRACES.append(sampler)
    return sampler(denoiser, keys_B, tokens_BL, fixed_BL)


likelihood = jax.jit(ordered_nats, compiler_options=oracle.QUICKLY)


def order_of(fixed):
    """The positions as ``ORDER`` lists them, then the others."""
    return [*ORDER, *(i for i in range(fixed.shape[-1]) if i not in ORDER)]


@pytest.mark.parametrize("draft", ["self", nightly("stale"), nightly("ngram")])
def test_the_memory_gives_the_likelihood_of_one_pass(draft):
    """With prompts, padding and a listed order. Requests of one shape share a program."""
    order = ",".join(map(str, ORDER))
    sampler = speculative(draft=draft, lookahead=3, order=order, bonus=draft != "ngram")
    fixed_BL = FIXED_BL | ~REAL_BL
    free_B = (~fixed_BL).sum(1)
    for shift in range(3):
        order = np.roll(np.arange(B), shift)
        model = dataclasses.replace(ddit(), attend=Attend(segment_BL=i32(REAL_BL[order])))
        fixed, given = jnp.asarray(fixed_BL[order]), TOKENS_BL[order][fixed_BL[order]]
        samples = run(sampler, model, keys(shift, B), TOKENS_BL[order], fixed)
        order_BL = jnp.broadcast_to(jnp.asarray(order_of(fixed)), fixed.shape)
        nats_B = likelihood(
            dataclasses.replace(model, reshape=None), order_BL, samples.tokens_BL, ~fixed
        )
        np.testing.assert_allclose(samples.log_prob_B, -nats_B, atol=1e-4)
        np.testing.assert_array_equal(samples.tokens_BL[fixed], given)
        assert (samples.calls_B <= free_B[order]).all()
    assert TRACES.count(sampler) == 1


@pytest.mark.nightly
@pytest.mark.parametrize("draft", ["self", "ngram"])
def test_greedy_tokens_are_the_most_likely_and_a_request_alone_draws_the_same(draft):
    """Each token has the largest conditional of the full pass, which no other token has."""
    fixed_BL = jnp.asarray(FIXED_BL | ~REAL_BL)
    cold = dataclasses.replace(ddit(), reshape=Reshape.of(temperature=[0.0] * B))
    sampler = speculative(draft=draft, lookahead=2)
    greedy = run(sampler, cold, keys(0, B), TOKENS_BL, fixed_BL)
    free_BL = ~np.asarray(fixed_BL)
    rank_BL = np.where(free_BL, np.cumsum(free_BL, 1), 0)
    place_BL = i32(np.tile(np.arange(LENGTH), (B, 1)))
    hidden = cold.hidden_in_order(greedy.tokens_BL, i32(rank_BL), place_BL, i32(rank_BL))
    model = dataclasses.replace(cold, reshape=None)
    best_BL = model.log_conditional_in_order(hidden, greedy.tokens_BL, place_BL).argmax(-1)
    np.testing.assert_array_equal(np.asarray(greedy.tokens_BL)[free_BL], best_BL[free_BL])
    b, size = 2, int(REAL_BL[2].sum())
    for hot in (False, True):
        together = run(sampler, ddit(), keys(0, B), TOKENS_BL, fixed_BL) if hot else greedy
        alone = run(
            sampler,
            dataclasses.replace(ddit(), attend=None, reshape=Reshape.of(temperature=[float(hot)])),
            keys(0, B)[b : b + 1],
            TOKENS_BL[b : b + 1, :size],
            fixed_BL[b : b + 1, :size],
        )
        np.testing.assert_array_equal(alone.tokens_BL[0], together.tokens_BL[b, :size])
        assert alone.calls_B[0] == together.calls_B[b]


@pytest.mark.nightly
def test_coupled_draws_do_not_depend_on_the_drafts():
    samplers = [
        speculative(coupled=True, draft=draft, lookahead=k, order="random")
        for draft, k in (("self", 2), ("stale", 3), ("ngram", 2))
    ]
    one, two, three = (oracle.draw(s, table(0), 2000, seed=5, trace=False) for s in samplers)
    np.testing.assert_array_equal(one.tokens_BL, two.tokens_BL)
    np.testing.assert_array_equal(one.tokens_BL, three.tokens_BL)
    law = law_of(0, NOTHING_FIXED, "random")
    assert oracle.chi_square_p(oracle.counts_of(one.tokens_BL, V), law) > 1e-4


def test_models_and_options_that_are_refused():
    by_rows = oracle.table_denoiser(oracle.random_table(), N)
    guided = dataclasses.replace(
        table(0), reshape=Reshape.of(guidance=1.0), given_BL=jnp.ones((1, L), bool)
    )
    packed = dataclasses.replace(table(0), attend=Attend(segment_BL=i32([[1, 1, 2, 0]])))
    forgetful = dataclasses.replace(by_rows, parameterization=READING)
    for model, options, message in (
        (
            by_rows,
            {"draft": "self"},
            "draft self needs an any-subset model: use the draft stale, batch or ng",
        ),
        (
            table(0),
            {"draft": "batch"},
            "draft batch reads all known tokens anew.* stale, self or ngram",
        ),
        (guided, {}, "takes no guidance with an any-subset model"),
        (packed, {"draft": "ngram"}, "one text in each row .* got the segment 2 .ordered takes"),
        (
            forgetful,
            {},
            "needs a network with a memory of rows to draw .* got TableNetwork: ddit and",
        ),
    ):
        with pytest.raises(UserError, match=message):
            speculative(**options).check(model)
    with pytest.raises(FieldError, match="at least 2, got 1: a single draft saves no call"):
        speculative(draft="self", lookahead=1)

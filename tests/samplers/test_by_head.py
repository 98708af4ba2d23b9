"""Self-speculative sampling against its own law, enumerated over drafts, coins and replacements.

The tables of trunk and head are random, so that p and q belong to no joint distribution: a draft
that is verified on other hidden states, or after other tokens, changes the law.
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
from oracle import NOTHING_FIXED, L, N, f32, i32, keys
from tiers import nightly

from sedd.denoiser import Denoiser
from sedd.errors import FieldError, UserError
from sedd.networks.base import Attend
from sedd.networks.causal_head import CausalHead
from sedd.parameterizations.conditional import Conditional
from sedd.processes.absorbing import Absorbing
from sedd.reshape import Reshape
from sedd.samplers.by_head import order_of_head
from sedd.samplers.drafters import Window
from sedd.samplers.speculative import Speculative
from sedd.schedules import LogLinear

DRAWS = 20_000
GIVEN = (-1, 2, -1, -1)
V = N + 1
READING = Conditional(process=Absorbing(num_tokens=N))


def speculative(**options: Any):
    return Speculative(schedule=LogLinear(), **{"draft": "head"} | options)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TableHead(oracle.TableNetwork):
    """Tables of p and q. Hidden states are p's raw output and the index of the trunk's tokens."""

    has_causal_head = True

    def hidden(self, params, tokens_BL, **_):
        index_B11 = self._index(tokens_BL)[:, None, None]
        raw_BLV = params["table"][index_B11[:, 0, 0]]
        index_BL1 = jnp.broadcast_to(index_B11, (*tokens_BL.shape, 1)).astype(raw_BLV.dtype)
        return jnp.concatenate([raw_BLV, index_BL1], -1)

    def causal_hidden(self, params, hidden_BLD, tokens_BL, order_BL, *, keys_B=None):
        rank_BL = jnp.argsort(order_BL, axis=1)
        before_BLL = rank_BL[:, None] < rank_BL[:, :, None]
        x_BLL = jnp.where(before_BLL, tokens_BL[:, None], self.num_states - 1)
        index_BL = jax.vmap(self._index, 1, 1)(x_BLL)
        trunk_BL = hidden_BLD[..., -1].astype(jnp.int32)
        place_1L = jnp.arange(tokens_BL.shape[1])[None]
        raw_BLV = params["causal"][trunk_BL, index_BL, place_1L]
        return jnp.concatenate([raw_BLV, hidden_BLD[..., -1:]], -1)

    def head(self, params):
        return jnp.eye(self.num_states + 1, self.num_states), jnp.zeros(self.num_states)


@functools.cache
def tables(seed, new=False):
    """Raw outputs: p [V^L, L, V] by the trunk's tokens, q [V^L, V^L, L, V] by known ones too."""
    rng = np.random.default_rng(seed)
    p = 1.2 * rng.standard_normal((V**L, L, V))
    q = 1.2 * rng.standard_normal((V**L, V**L, L, V))
    return p, np.broadcast_to(p[:, None], q.shape) if new else q


@functools.cache
def probabilities(seed, new=False):
    both = (np.exp(raw[..., :N]) for raw in tables(seed, new))
    return tuple(raw / raw.sum(-1, keepdims=True) for raw in both)


@functools.cache
def denoiser(seed, new=False):
    p, q = tables(seed, new)
    return Denoiser(
        params={"table": f32(p), "causal": f32(q)},
        network=TableHead(num_states=V, time_conditioned=False),
        parameterization=READING,
    )


# ------------------------------------------------------- the chain, propagated in float64


def index(x):
    return int(oracle.state_index(np.array(x), V))


def put(x, positions, tokens):
    x = list(x)
    for position, token in zip(positions, tokens, strict=True):
        x[position] = token
    return tuple(x)


def start_of(fixed):
    return tuple(N if token < 0 else token for token in fixed)


def orders_of(order, fixed):
    free = [i for i in range(L) if fixed[i] < 0]
    return list(itertools.permutations(free)) if order == "random" else [tuple(free)]


def round_of(p, q, window, x, trunk):
    """One round: (probability, tokens after it); ``trunk`` are the tokens that the trunk saw."""
    for drafts in itertools.product(range(N), repeat=len(window)):
        weight = np.prod([p[index(trunk), i, d] for i, d in zip(window, drafts, strict=True)])
        for kept, (i, draft) in enumerate(zip(window, drafts, strict=True)):
            accepted = put(x, window[:kept], drafts[:kept])
            ours, target = p[index(trunk), i], q[index(trunk), index(accepted), i]
            ratio = min(1, target[draft] / ours[draft])
            rest = np.maximum(target - ours, 0)
            for token in np.flatnonzero(rest if ratio < 1 else []):
                chance = weight * (1 - ratio) * rest[token] / rest.sum()
                yield chance, put(accepted, [i], [token])
            weight *= ratio
        yield weight, put(x, window, drafts)


@functools.cache
def propagate(sampler, fixed, seed, new=False):
    """The law [V^L] of the sampler, and the law of its calls."""
    p, q = probabilities(seed, new)
    law, work = np.zeros(V**L), defaultdict(float)
    orders = orders_of(sampler.order, fixed)
    for positions in orders:
        states = {(start_of(fixed), None, 0, 0): 1 / len(orders)}
        while states:
            after = defaultdict(float)
            for (x, trunk, rounds, calls), weight in states.items():
                left = [i for i in positions if x[i] == N]
                if not left:
                    law[index(x)] += weight
                    work[calls] += weight
                    continue
                if rounds == 0:
                    trunk, rounds, calls = x, sampler.verifications, calls + 1
                for chance, end in round_of(p, q, left[: sampler.lookahead], x, trunk):
                    after[end, trunk, rounds - 1, calls] += weight * chance
            states = after
    return law, work


def chain(fixed, seed):
    """[V^L]: q one position after the other, from left to right, from one call of the trunk."""
    _, q = probabilities(seed)
    law, trunk = np.zeros(V**L), start_of(fixed)
    free = [i for i in range(L) if fixed[i] < 0]
    for tokens in itertools.product(range(N), repeat=len(free)):
        weight = 1.0
        for j, (i, token) in enumerate(zip(free, tokens, strict=True)):
            weight *= q[index(trunk), index(put(trunk, free[:j], tokens[:j])), i, token]
        law[index(put(trunk, free, tokens))] += weight
    return law


def groups(size, fixed, seed):
    """[V^L]: p of ``size`` positions at once, from left to right: ``ordered`` with fewer calls."""
    p, _ = probabilities(seed)
    law, free = np.zeros(V**L), [i for i in range(L) if fixed[i] < 0]
    for tokens in itertools.product(range(N), repeat=len(free)):
        x, weight = start_of(fixed), 1.0
        for first in range(0, len(free), size):
            now, drawn = free[first : first + size], tokens[first : first + size]
            weight *= np.prod([p[index(x), i, d] for i, d in zip(now, drawn, strict=True)])
            x = put(x, now, drawn)
        law[index(x)] += weight
    return law


PAIRS = speculative(lookahead=2)
WHOLE = speculative(lookahead=4, order="random")
TWICE = speculative(lookahead=2, verifications=2)


@pytest.mark.parametrize("fixed", [NOTHING_FIXED, GIVEN])
def test_enough_verifications_give_the_chain_of_the_head_from_one_call(fixed):
    for lookahead in (1, 2, 4):
        law, work = propagate(speculative(lookahead=lookahead, verifications=L), fixed, 0)
        assert oracle.total_variation(law, chain(fixed, 0)) < 1e-12
        assert set(work) == {1}
    for fewer in (PAIRS, TWICE, speculative(lookahead=4)):  # control
        assert oracle.total_variation(propagate(fewer, fixed, 0)[0], chain(fixed, 0)) > 0.02


@pytest.mark.parametrize(
    "sampler", [nightly(PAIRS), nightly(WHOLE), TWICE], ids=["pairs", "whole", "twice"]
)
def test_draws_follow_the_law(sampler):
    """And take as many calls; without a log probability."""
    for seed, fixed in ((0, NOTHING_FIXED), (0, GIVEN), (1, NOTHING_FIXED)):
        samples = oracle.draw(sampler, denoiser(seed), DRAWS, seed=3, fixed=fixed, trace=False)
        counts = oracle.counts_of(samples.tokens_BL, V)
        law, work = propagate(sampler, fixed, seed)
        assert law.sum() == pytest.approx(1)
        assert oracle.chi_square_p(counts, law) > 1e-4
        number, weight = np.array(list(work)), np.array(list(work.values()))
        mean = weight @ number
        spread = np.sqrt(weight @ (number - mean) ** 2 / DRAWS)
        assert abs(samples.calls_B.mean() - mean) <= 3 * spread + 1e-5
        np.testing.assert_array_equal(samples.rows_B, samples.calls_B)
        assert samples.log_prob_B is None
    for other in (PAIRS, WHOLE, TWICE):  # control: other samplers, and another table
        law, _ = propagate(other, NOTHING_FIXED, 1)
        assert (oracle.chi_square_p(counts, law) > 1e-4) == (other == sampler)
    assert oracle.chi_square_p(counts, propagate(sampler, NOTHING_FIXED, 0)[0]) < 1e-4


def test_a_new_head_draws_groups_independently():
    """As ``ordered`` in groups of K: every draft is kept, and the calls are certain."""
    for fixed in (NOTHING_FIXED, GIVEN):
        law, work = propagate(PAIRS, fixed, 0, new=True)
        assert oracle.total_variation(law, groups(2, fixed, 0)) < 1e-12
        assert list(work) == [2]
        samples = oracle.draw(PAIRS, denoiser(0, new=True), DRAWS, fixed=fixed, trace=False)
        assert oracle.chi_square_p(oracle.counts_of(samples.tokens_BL, V), law) > 1e-4
        assert (samples.calls_B == 2).all()


@pytest.mark.nightly
def test_a_request_alone_draws_what_it_draws_in_a_batch():
    fixed_BL = np.array([NOTHING_FIXED, GIVEN, (0, 1, 2, 0), NOTHING_FIXED] * 2)
    batch = oracle.draw(TWICE, denoiser(0), 8, seed=1, fixed=fixed_BL, trace=False)
    assert batch.calls_B[2] == 0
    keys_B = keys(1, 8)
    for row in range(8):
        fixed_1L = fixed_BL[row : row + 1]
        alone = oracle.sample(
            TWICE,
            denoiser(0),
            keys_B[row : row + 1],
            i32(np.maximum(fixed_1L, 0)),
            jnp.asarray(fixed_1L >= 0),
            trace=False,
        )
        np.testing.assert_array_equal(alone.tokens_BL[0], batch.tokens_BL[row])
        assert alone.calls_B[0] == batch.calls_B[row]


@pytest.mark.nightly
def test_a_logit_processor_sees_the_drafts_before_each_position():
    """Tokens must rise by 1, modulo 3, after the first: nothing else is accepted."""

    def rising(log_probs_BKN, tokens_BL, positions_BK):
        before_BK = jnp.take_along_axis(tokens_BL, jnp.maximum(positions_BK - 1, 0), 1)
        wanted_BK = jnp.where(before_BK == N, jnp.arange(1), (before_BK + 1) % N)
        chosen_BKN = jax.nn.one_hot(wanted_BK, N) > 0
        bound_BK1 = ((positions_BK > 0) & (before_BK < N))[..., None]
        return jnp.where(bound_BK1 & ~chosen_BKN, -1e6, log_probs_BKN)

    reshape = Reshape.of(logit_processor=rising)
    changed = dataclasses.replace(denoiser(0), reshape=reshape)
    x_BL = np.asarray(oracle.draw(PAIRS, changed, 200, trace=False).tokens_BL)
    np.testing.assert_array_equal(x_BL[:, 1:], (x_BL[:, :-1] + 1) % N)


# ------------------------------------------------------- the network, and refusals


def test_the_order_of_the_head():
    """Given tokens first, then free positions by rank; masks of later blocks and padding last."""
    x_1L = i32([[N, 0, N, N, 1, 2]])
    window = Window(
        x_BL=x_1L,
        order_BL=i32([[3, 1, 0, 2, 4, 5]]),  # position 1 is drawn, 2 belongs to a later block
        known_B=i32([2]),
        left_B=i32([1]),
        size=2,
    )
    attend = Attend(segment_BL=i32([[1, 1, 1, 1, 1, 0]]))
    padded = dataclasses.replace(denoiser(0), attend=attend)
    assert order_of_head(padded, window)[0].tolist() == [4, 3, 1, 0, 2, 5]
    assert order_of_head(denoiser(0), window)[0].tolist() == [4, 5, 3, 1, 0, 2]


@pytest.mark.nightly
def test_a_new_causal_head_on_a_transformer():
    """All drafts are kept; an input that is padded draws the tokens of the one that is not."""
    network = CausalHead(
        num_states=V, time_conditioned=False, hidden_dim=16, num_layers=1, num_heads=2
    )
    params = network.init(jax.random.key(0))
    model = Denoiser(params=params, network=network, parameterization=READING)
    samples = oracle.draw(PAIRS, model, 6, trace=False)
    assert (samples.calls_B == 2).all()
    params = jax.tree.map(lambda x: jax.random.normal(jax.random.key(x.size), x.shape), params)
    model = dataclasses.replace(model, params=params)
    whole = oracle.draw(PAIRS, model, 6, fixed=GIVEN, trace=False)
    padding = dataclasses.replace(
        model, attend=Attend(segment_BL=jnp.ones((6, L + 2)).at[:, L:].set(0).astype(jnp.int32))
    )
    tokens_BL = i32([[0, 2, 0, 0, 1, 1]] * 6)
    fixed_BL = jnp.asarray([[False, True, False, False, True, True]] * 6)
    padded = oracle.sample(PAIRS, padding, keys(0, 6), tokens_BL, fixed_BL, trace=False)
    np.testing.assert_array_equal(padded.tokens_BL[:, :L], whole.tokens_BL)
    np.testing.assert_array_equal(padded.calls_B, whole.calls_B)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"verifications": 0}, "verifications must be at least 1, got 0"),
        (
            {"verifications": 2, "draft": "stale"},
            "verifications is for the draft head only: got 2 with stale",
        ),
        ({"bonus": True}, "bonus does not go with the draft head; leave it out"),
        ({"coupled": True}, "coupled does not go with the draft head; leave it out"),
    ],
)
def test_options_that_are_refused(options, message):
    with pytest.raises(FieldError, match=message):
        speculative(**options)


def test_models_that_are_refused():
    with pytest.raises(UserError, match="needs a network with a causal head, got TableNetwork"):
        PAIRS.check(oracle.table_denoiser(oracle.random_table(), N))
    guided = dataclasses.replace(
        denoiser(0), reshape=Reshape.of(guidance=1.0), given_BL=jnp.ones((1, L), bool)
    )
    with pytest.raises(UserError, match="takes no guidance with the draft head"):
        PAIRS.check(guided)

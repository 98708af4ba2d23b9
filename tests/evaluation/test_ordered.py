"""The NLL of an order against the chain rule over an enumerable world."""

import functools
import itertools
from dataclasses import fields, replace

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from oracle import L, N, i32, keys
from scipy import special

from sedd.denoiser import Denoiser
from sedd.errors import FieldError
from sedd.evaluation.ordered import make_order, nats_over_orders, ordered_nats
from sedd.evaluation.protocols import Protocol
from sedd.evaluation.scoring import choose_estimate
from sedd.networks.ddit import DDiT
from sedd.parameterizations.any_subset import UNKNOWN, AnySubset
from sedd.processes.absorbing import Absorbing

ORDERS = np.array(list(itertools.permutations(range(L))))
CLEAN = oracle.all_states(N)
# Every clean sequence in every order: 81 × 24 rows, and one program for all cases.
X0_BL, ORDER_BL = np.repeat(CLEAN, len(ORDERS), 0), np.tile(ORDERS, (len(CLEAN), 1))
ALL_BL = np.ones(X0_BL.shape, bool)
SOME_BL = np.random.default_rng(3).random(X0_BL.shape) < 0.6
run = jax.jit(ordered_nats)


def chain_rule(table, scored_BL):
    """[B] in float64: what a table [V^L, L, V] says of each token given those before it."""
    log_c = table[..., :N] - special.logsumexp(table[..., :N], axis=-1, keepdims=True)
    total = np.zeros(len(X0_BL))
    for row, (x0, order, scored) in enumerate(zip(X0_BL, ORDER_BL, scored_BL, strict=True)):
        xt = np.where(scored, N, x0)
        for i in order[scored[order]]:
            total[row] -= log_c[oracle.state_index(xt, N + 1), i, x0[i]]
            xt[i] = x0[i]
    return total


@pytest.mark.parametrize("scored_BL", [ALL_BL, SOME_BL], ids=["all", "some"])
def test_every_order_is_the_chain_rule(scored_BL):
    table = oracle.random_table(seed=5, scale=1.5)
    got = run(oracle.table_denoiser(table, N), i32(ORDER_BL), i32(X0_BL), jnp.asarray(scored_BL))
    exact = chain_rule(table, scored_BL)
    np.testing.assert_allclose(got, exact, rtol=1e-5, atol=1e-5)
    assert exact.reshape(len(CLEAN), -1).std(1).mean() > 0.5  # the orders differ


@pytest.mark.parametrize("scored_BL", [ALL_BL, SOME_BL], ids=["all", "some"])
def test_every_order_of_the_exact_conditionals_is_the_joint(scored_BL):
    here = oracle.Oracle("absorbing", seed=3)
    denoiser = here.conditional_denoiser()
    got = run(denoiser, i32(ORDER_BL), i32(X0_BL), jnp.asarray(scored_BL))
    given = [
        here.joint[tuple(slice(None) if s else x for s, x in zip(scored, x0, strict=True))].sum()
        for x0, scored in zip(X0_BL, scored_BL, strict=True)
    ]
    exact = np.log(given) - np.log(here.joint[tuple(X0_BL.T)])
    np.testing.assert_allclose(got, exact, rtol=1e-5, atol=1e-5)


def test_only_scored_positions_cost_a_call():
    calls = []

    class Counting(oracle.ConstantNetwork):
        def hidden(self, params, tokens_BL, **kwargs):
            jax.debug.callback(lambda: calls.append(1))
            return super().hidden(params, tokens_BL, **kwargs)

    denoiser = oracle.table_denoiser(oracle.random_table(), N)
    network = Counting(num_states=N + 1, time_conditioned=False)
    params = jnp.zeros((1, L, N + 1))
    denoiser = type(denoiser)(
        params=params, network=network, parameterization=denoiser.parameterization
    )
    scored_BL = jnp.asarray([[True, False, True, False], [False, True, False, False]])
    nats_B = run(denoiser, i32([[3, 2, 1, 0]] * 2), i32([[0, 1, 2, 0]] * 2), scored_BL)
    jax.effects_barrier()
    assert len(calls) == 2
    np.testing.assert_allclose(nats_B, np.log(N) * np.array([2, 1]), rtol=1e-6)


def test_orders():
    scored_BL = jnp.asarray(np.repeat([[True, True, False, True]], 6000, 0))
    keys_B = keys(0, len(scored_BL))
    forward, backward, drawn = (
        np.asarray(make_order(name, keys_B, scored_BL))
        for name in ("forward", "backward", "random")
    )
    assert (forward == np.arange(4)).all()
    assert (backward == np.arange(4)[::-1]).all()
    assert (np.sort(drawn, 1) == np.arange(4)).all()
    assert (drawn[:, 3] == 2).all()
    _, counts = np.unique(drawn, axis=0, return_counts=True)
    assert len(counts) == 6
    assert oracle.chi_square_p(counts, np.ones(6)) > 1e-4
    with pytest.raises(ValueError, match="'sideways'"):
        make_order("sideways", keys_B, scored_BL)


def test_models_without_such_a_law_are_refused():
    x = i32([[0, 1, 2, 0]])
    with pytest.raises(ValueError, match="needs a time-independent model"):
        ordered_nats(oracle.Oracle("absorbing").score_denoiser(), i32([[0, 1, 2, 3]]), x, x >= 0)
    with pytest.raises(ValueError, match="needs an absorbing process"):
        ordered_nats(oracle.Oracle("uniform").score_denoiser(), i32([[0, 1, 2, 3]]), x, x >= 0)


# ---------------------------------------------------------------- any-subset models


@functools.cache
def any_subset_denoiser():
    """A small transformer with random weights."""
    network = DDiT(
        num_states=N + 1,
        time_conditioned=False,
        hidden_dim=16,
        num_layers=2,
        num_heads=2,
        dropout=0.0,
    )
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    params = jax.tree.map(lambda x: 0.4 * rng.standard_normal(x.shape, np.float32), shapes)
    parameterization = AnySubset(process=Absorbing(num_tokens=N))
    return Denoiser(params=params, network=network, parameterization=parameterization)


@functools.partial(jax.jit, compiler_options=oracle.QUICKLY)
def one_call(denoiser, xt_BL, rank_BL, position_B1, rank_B1):
    """[B, N]: log conditionals of one position, the known content given."""
    hidden = denoiser.hidden_in_order(xt_BL, rank_BL, position_B1, rank_B1)
    return denoiser.log_conditional_in_order(hidden, xt_BL, position_B1)[:, 0]


def test_one_pass_gives_the_nats_of_a_call_for_each_token():
    denoiser = any_subset_denoiser()
    rng = np.random.default_rng(4)
    x0_BL, scored_BL = rng.integers(0, N, (20, 8)), rng.random((20, 8)) < 0.8
    scored_BL[0] = False
    order_BL = np.stack([rng.permutation(8) for _ in range(20)])
    got = run(denoiser, i32(order_BL), i32(x0_BL), jnp.asarray(scored_BL))
    total = np.zeros(20)
    xt_BL, rank_BL = np.where(scored_BL, N, x0_BL), np.where(scored_BL, UNKNOWN, 0)
    row, done = np.arange(20), np.zeros(20, int)
    for place in order_BL.T:
        counts = scored_BL[row, place]
        rank = done + 1
        log_probs = one_call(
            denoiser, i32(xt_BL), i32(rank_BL), i32(place[:, None]), i32(rank[:, None])
        )
        token = x0_BL[row, place]
        total -= np.where(counts, np.asarray(log_probs)[row, token], 0)
        xt_BL[row, place] = token
        rank_BL[row, place] = np.where(counts, rank, 0)
        done += counts
    np.testing.assert_allclose(got, total, rtol=1e-5, atol=1e-5)
    assert got[0] == 0


def test_one_pass_is_one_call_of_the_network():
    calls = []

    class Counting(DDiT):
        def hidden(self, params, tokens_BL, **kwargs):
            jax.debug.callback(lambda: calls.append(tokens_BL.shape))
            return super().hidden(params, tokens_BL, **kwargs)

    model = any_subset_denoiser()
    network = Counting(**{f.name: getattr(model.network, f.name) for f in fields(DDiT)})
    counted = replace(model, network=network)
    jax.block_until_ready(run(counted, i32([[3, 2, 1, 0]]), i32([[0, 1, 2, 0]]), ALL_BL[:1]))
    jax.effects_barrier()
    assert calls == [(1, 8)]


# ---------------------------------------------------------------- several orders


def test_the_mean_over_orders_bounds_their_mixture_from_above_and_falls():
    """Against all 24 orders of a table whose conditionals are inconsistent."""
    denoiser = oracle.table_denoiser(oracle.random_table(seed=5, scale=1.5), N)
    x0_L, count = np.array([0, 2, 1, 1]), 2000
    of_each = run(denoiser, i32(ORDERS), i32(np.tile(x0_L, (24, 1))), jnp.ones((24, L), bool))
    mixture = np.log(24) - special.logsumexp(-np.asarray(of_each, np.float64))
    means = []
    for orders in (1, 2, 16):
        estimate = jax.jit(functools.partial(nats_over_orders, order="random", orders=orders))
        x0_BL, scored_BL = i32(np.tile(x0_L, (count, 1))), jnp.ones((count, L), bool)
        nats_B = np.asarray(estimate(denoiser, keys(7, count), x0_BL, scored_BL), np.float64)
        means.append((nats_B.mean(), nats_B.std() / np.sqrt(count)))
    (one, one_error), (two, two_error), (many, many_error) = means
    assert abs(one - np.mean(of_each)) < 4 * one_error
    # Of two independent orders, exactly: the mean over all pairs.
    pairs = np.log(2) - np.logaddexp(-of_each[:, None], -of_each[None])
    assert abs(two - pairs.mean()) < 4 * two_error
    assert one > two + 4 * one_error
    assert two > many + 4 * two_error
    assert many > mixture - 4 * many_error
    assert many - mixture < 0.1 * (one - mixture)


def test_an_estimate_names_its_order_and_refuses_what_makes_no_sense():
    radd = oracle.table_denoiser(oracle.random_table(), N)
    ordered = Protocol(estimator="ordered")
    for model, protocol, name in (
        (radd, Protocol(), "k_dce"),
        (any_subset_denoiser(), Protocol(), "forward order"),
        (any_subset_denoiser(), Protocol(estimator="k_dce"), "k_dce"),
        (radd, ordered, "forward order"),
    ):
        assert choose_estimate(protocol, model).name == name
    averaged = choose_estimate(Protocol(), radd, "random", 8)
    assert (averaged.name, averaged.draws) == ("8 random orders", 8)
    assert choose_estimate(Protocol(), radd, "random").draws == 0
    with pytest.raises(FieldError, match="orders must be at least 1, got 0"):
        choose_estimate(Protocol(), radd, "random", 0)
    with pytest.raises(FieldError, match="orders 3 averages over random orders: it needs"):
        choose_estimate(ordered, radd, "forward", 3)
    with pytest.raises(FieldError, match="orders 3 averages over random orders: it needs"):
        choose_estimate(Protocol(), radd, None, 3)
    sedd = oracle.Oracle("absorbing").score_denoiser()
    with pytest.raises(FieldError, match=r"^estimator ordered needs a time-"):
        choose_estimate(ordered, sedd)

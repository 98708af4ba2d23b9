"""The NLL of an order against the chain rule over an enumerable world."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from oracle import L, N, i32, keys
from scipy import special

from sedd.evaluation.ordered import make_order, ordered_nats

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
        here.joint[tuple(np.where(scored, slice(None), x0))].sum()
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

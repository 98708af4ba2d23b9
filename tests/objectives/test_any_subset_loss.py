"""The any-subset objective against a plain computation, and its draws of prompts and orders."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from oracle import f32, i32, keys
from scipy import special

from sedd.errors import FieldError
from sedd.networks.ddit import DDiT
from sedd.objectives.any_subset import AnySubset
from sedd.parameterizations.any_subset import UNKNOWN
from sedd.parameterizations.any_subset import AnySubset as Parameterization
from sedd.parameterizations.conditional import Conditional
from sedd.processes.absorbing import Absorbing
from sedd.schedules import LogLinear

B, L, N = 6, 8, 5
MASK = N
READING = Parameterization(process=Absorbing(num_tokens=N))
DEFAULT = AnySubset(schedule=LogLinear(), parameterization=READING)
NETWORK = DDiT(
    num_states=N + 1, time_conditioned=False, hidden_dim=16, num_layers=2, num_heads=2, dropout=0.0
)
RNG = np.random.default_rng(1)
X0_BL = i32(RNG.integers(0, N, (B, L)))
SCORED_BL = np.ones((B, L), bool)
SCORED_BL[0, 2:5] = SCORED_BL[3, :6] = SCORED_BL[5] = False


@functools.cache
def params():
    shapes = jax.eval_shape(NETWORK.init, jax.random.key(0))
    return jax.tree.map(lambda x: 0.4 * RNG.standard_normal(x.shape, np.float32), shapes)


@functools.partial(jax.jit, static_argnums=0)
def drawn(objective, keys_B, u_B, x0_BL, scored_BL, step):
    return objective.corrupt_at(step, keys_B, u_B, x0_BL, scored_BL)


@functools.partial(jax.jit, compiler_options=oracle.QUICKLY)
def logits_of_one(tokens_1L, rank_1L, place_11, rank_11):
    """The raw output at one query, [V]."""
    call = READING.in_order(tokens_1L, rank_1L, place_11, rank_11)
    raw_1MV = NETWORK.raw(
        params(), call.tokens_BM, positions_BL=call.positions_BM, attend=call.attend
    )
    return raw_1MV[0, -1]


@pytest.mark.parametrize(
    "fields", [{}, {"order": "random", "max_rate": 0.75, "min_rate": 0.5}], ids=["default", "some"]
)
def test_the_loss_is_a_plain_sum_of_conditionals(fields):
    """Each term from a call of its own, in which no later token is known."""
    objective = dataclasses.replace(DEFAULT, **fields)
    u_B = f32([0.0, 0.3, 0.6, 0.9, 0.2, 0.5])
    corrupted = drawn(objective, keys(3, B), u_B, X0_BL, jnp.asarray(SCORED_BL), 0)
    got_BL = jax.jit(objective.nats, static_argnums=0)(NETWORK, params(), corrupted, X0_BL)
    rank_BL = np.asarray(corrupted.rank_BL)
    exact_BL = np.zeros((B, L))
    for b, i in zip(*np.nonzero(rank_BL), strict=True):
        rank = rank_BL[b]
        known = rank < rank[i]
        tokens, ranks = np.where(known, X0_BL[b], MASK), np.where(known, rank, UNKNOWN)
        logits = np.asarray(
            logits_of_one(i32(tokens[None]), i32(ranks[None]), i32([[i]]), i32([[rank[i]]])),
            np.float64,
        )[:N]
        weight = SCORED_BL[b].sum() / (rank > 0).sum()
        exact_BL[b, i] = weight * (special.logsumexp(logits) - logits[X0_BL[b, i]])
    assert (exact_BL > 0).sum() > 15
    np.testing.assert_allclose(got_BL, exact_BL, atol=1e-5)


@pytest.mark.parametrize("order", ["forward", "random"])
def test_generated_positions_are_a_uniform_subset_in_the_order(order):
    objective = dataclasses.replace(DEFAULT, order=order, min_rate=0.25, max_rate=0.75)
    count = 6000
    x0_BL = i32(np.zeros((count, 4)))
    scored_BL = jnp.asarray(np.tile([True, False, True, True], (count, 1)))
    u_B = f32((np.arange(count) + 0.5) / count)
    corrupted = drawn(objective, keys(0, count), u_B, x0_BL, scored_BL, 0)
    rank_BL = np.asarray(corrupted.rank_BL)
    np.testing.assert_array_equal(np.asarray(corrupted.xt_BL) == MASK, rank_BL > 0)
    size_B = (rank_BL > 0).sum(1)
    np.testing.assert_array_equal(size_B, np.ceil((0.75 - 0.5 * np.asarray(u_B)) * 3 - 1e-4))
    np.testing.assert_allclose(corrupted.weight_BL, (rank_BL > 0) * (3 / size_B)[:, None])
    assert (rank_BL[:, 1] == 0).all()
    ordered = np.sort(np.where(rank_BL > 0, rank_BL, 9), 1)
    np.testing.assert_array_equal(ordered[:, 0], 1)
    # Of two generated positions: 3 subsets, in one order or in both.
    two = rank_BL[size_B == 2]
    _, counts = np.unique(two, axis=0, return_counts=True)
    assert len(counts) == (3 if order == "forward" else 6)
    assert oracle.chi_square_p(counts, np.ones(len(counts))) > 1e-4
    if order == "forward":
        assert all((np.diff(rank[rank > 0]) == 1).all() for rank in two)


def test_the_default_draws_every_number_of_generated_positions_equally_often():
    u_B = f32((np.arange(80) + 0.5) / 80)
    ones = jnp.ones((80, L), bool)
    corrupted = drawn(DEFAULT, keys(0, 80), u_B, i32(np.zeros((80, L))), ones, 0)
    sizes = np.bincount((np.asarray(corrupted.rank_BL) > 0).sum(1), minlength=L + 1)
    np.testing.assert_array_equal(sizes, [0] + [10] * L)


@pytest.mark.parametrize(
    ("recipe", "before", "half", "after"),
    [  # of 100 positions: text, infill, code
        ({"start_rate": 0.15, "min_rate": 0.9, "max_rate": 0.99}, (15, 15), (53, 57), (91, 99)),
        ({"start_rate": 0.15, "min_rate": 0.6, "max_rate": 0.75}, (15, 15), (38, 45), (61, 75)),
        ({"start_rate": 0.01, "min_rate": 0.05, "max_rate": 0.25}, (1, 1), (4, 13), (6, 25)),
    ],
)
def test_the_rates_of_the_published_recipes_ramp(recipe, before, half, after):
    objective = dataclasses.replace(DEFAULT, ramp=100, **recipe)
    assert objective.rows(100) == 100 + after[1] + after[1] % 2  # an even number, for cuDNN
    u_B, x0_BL = f32([0.99, 0.0]), i32(np.zeros((2, 100)))
    for step, expected in ((0, before), (50, half), (100, after), (999, after)):
        corrupted = drawn(objective, keys(0, 2), u_B, x0_BL, jnp.ones((2, 100), bool), step)
        sizes = (np.asarray(corrupted.rank_BL) > 0).sum(1)
        np.testing.assert_array_equal(sizes, expected)
    last = objective.corrupt(keys(0, 2), u_B, x0_BL, jnp.ones((2, 100), bool))
    np.testing.assert_array_equal((np.asarray(last.rank_BL) > 0).sum(1), after)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"min_rate": 0.8, "max_rate": 0.5}, "min_rate must be at most max_rate 0.5, got 0.8"),
        ({"min_rate": -0.1}, r"min_rate must be in \[0, 1\], got -0.1"),
        ({"max_rate": 1.5}, r"max_rate must be in \(0, 1\], got 1.5"),
        ({"max_rate": 0.0}, r"max_rate must be in \(0, 1\], got 0.0"),
        ({"start_rate": 0.0, "ramp": 3}, r"start_rate must be in \(0, 1\], got 0.0"),
        ({"ramp": 3}, "ramp goes with start_rate, got 3 with start_rate None"),
        ({"start_rate": 0.5}, "ramp goes with start_rate, got 0 with start_rate 0.5"),
        ({"ramp": -1}, "ramp must be at least 0 updates, got -1"),
    ],
)
def test_wrong_options_are_named(fields, message):
    with pytest.raises(FieldError, match=f"^{message}$"):
        dataclasses.replace(DEFAULT, **fields)


def test_another_parameterization_is_refused():
    radd = Conditional(process=READING.process)
    with pytest.raises(ValueError, match="trains the parameterization any_subset only"):
        AnySubset(schedule=LogLinear(), parameterization=radd)

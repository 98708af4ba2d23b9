"""Training on an energy: its gradient by enumeration, an Ising grid with exact answers."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import tiny_run
from oracle import L, N, f32, keys, random_table
from scipy import special
from tiers import nightly

from sedd.denoiser import Denoiser
from sedd.errors import UserError
from sedd.evaluation.energy import free_energy
from sedd.networks.marginal_head import MarginalHead
from sedd.objectives.energy import Energy
from sedd.parameterizations.conditional import Conditional
from sedd.processes.absorbing import Absorbing
from sedd.schedules import LogLinear
from sedd.training.optimizer import OptimizerOptions, make_optimizer
from sedd.training.state import init_state
from sedd.training.step import Step

TEXTS = oracle.all_states(N)
ORDERS = np.array(list(itertools.permutations(range(L))))
NETWORK = oracle.MarginalTable(num_states=N + 1, time_conditioned=False)
ENERGY_X = np.random.default_rng(5).standard_normal(len(TEXTS))


def table_log_prob(tokens_BL):
    index_B = (tokens_BL * N ** jnp.arange(L)[::-1]).sum(1)
    return -f32(ENERGY_X)[index_B]


def objective_on(num_tokens, log_prob, **fields):
    reading = Conditional(process=Absorbing(num_tokens=num_tokens))
    return Energy(schedule=LogLinear(), parameterization=reading, log_prob=log_prob, **fields)


def exact_free_energy(table, given):
    """The mean of F over orders and texts, the tokens of ``given`` (-1 is free) fixed."""
    log_c = jax.nn.log_softmax(table[..., :N], -1)
    given = np.asarray(given)
    free = [x for x in TEXTS if (x[given >= 0] == given[given >= 0]).all()]
    orders = [
        o for o in ORDERS if (np.sort(o[: (given >= 0).sum()]) == np.flatnonzero(given >= 0)).all()
    ]
    state, place, token = [], [], []
    for x_L, order_L in itertools.product(free, orders):
        known_L = np.where(given >= 0, given, N)
        for i in order_L[(given >= 0).sum() :]:
            state.append(oracle.state_index(known_L, N + 1))
            place.append(i)
            token.append(x_L[i])
            known_L[i] = x_L[i]
    shape = (len(free), len(orders), -1)
    log_p_XO = log_c[np.array(state), np.array(place), np.array(token)].reshape(shape).sum(-1)
    energy_X = f32(ENERGY_X[oracle.state_index(np.array(free), N)])
    return (jnp.exp(log_p_XO) * (log_p_XO + energy_X[:, None])).sum() / len(orders)


@pytest.mark.parametrize("given", [(-1, -1, -1, -1), nightly((-1, 2, -1, 0))])
def test_the_mean_gradient_is_that_of_the_divergence(given):
    """Of the table of conditionals, along random directions, from 300 batches."""
    objective = objective_on(N, table_log_prob)
    table, batch, repeats = f32(random_table(seed=4)), 64, 300
    given = np.asarray(given)
    x0_BL = jnp.asarray(np.broadcast_to(np.maximum(given, 0), (batch, L)), jnp.int32)
    scored_BL = jnp.asarray(np.broadcast_to(given < 0, (batch, L)))
    f = f32(np.random.default_rng(0).standard_normal((N + 1) ** L))

    @jax.jit
    def each(keys_R):
        def one(key):
            keys_B = jax.random.split(key, batch)
            corrupted = objective.corrupt(keys_B, jnp.zeros(batch), x0_BL, scored_BL)

            def loss(table):
                params = {"table": table, "marginal": f}
                return objective.summed_nats(NETWORK, params, corrupted, x0_BL) / batch

            free_B = objective.draw(NETWORK, {"table": table}, corrupted, x0_BL)[1]
            return jax.grad(loss)(table), free_B.mean()

        return jax.lax.map(one, keys_R)

    grads, free_R = each(keys(0, repeats))
    expected, gradient = jax.value_and_grad(exact_free_energy)(table, given)
    free_R = np.asarray(free_R, np.float64)
    assert abs(free_R.mean() - expected) < 4 * free_R.std() / math.sqrt(repeats)
    grads = np.asarray(grads, np.float64)[..., :N].reshape(repeats, -1)
    gradient = np.asarray(gradient, np.float64)[..., :N].reshape(-1)
    # Single entries are seen rarely; sums of many of them are close to normal.
    directions = np.random.default_rng(1).standard_normal((grads.shape[1], 30))
    seen_RK, exact_K = grads @ directions, gradient @ directions
    error_K = seen_RK.std(0) / math.sqrt(repeats)
    z_K = (seen_RK.mean(0) - exact_K) / error_K
    assert np.abs(z_K).max() < 4.5
    assert (np.abs(exact_K) > 5 * error_K).sum() > 10  # a gradient of 0 or of the wrong sign fails


def test_only_the_head_follows_the_consistency():
    """Without a divergence, from the exact conditionals, f goes to the log marginals."""
    objective = objective_on(N, table_log_prob)
    world = oracle.Oracle("absorbing", seed=1)
    table = np.log(np.maximum(world.conditional(), 1e-30))
    params = {"table": f32(np.pad(table, [(0, 0), (0, 0), (0, 1)])), "marginal": jnp.zeros(4**L)}
    x0_BL, scored_BL = jnp.zeros((8, L), jnp.int32), jnp.ones((8, L), bool)
    corrupted = objective.corrupt(keys(0, 8), jnp.zeros(8), x0_BL, scored_BL)
    padded = world.joint
    for axis in range(L):
        padded = np.concatenate([padded, padded.sum(axis, keepdims=True)], axis)

    @jax.jit
    def gradient(marginal):
        return jax.grad(
            lambda f: objective.summed_nats(NETWORK, params | {"marginal": f}, corrupted, x0_BL)
        )(marginal)

    assert np.abs(gradient(f32(np.log(padded).ravel()))).max() < 1e-3
    assert np.abs(gradient(params["marginal"])).max() > 0.1


# ---------------------------------------------------------------- an Ising grid

SIZE, COUPLING, FIELD = 4, 0.1, 0.1


def ising(tokens_BL):
    """4 x 4 spins on a torus: token 0 is up and token 1 is down."""
    grid = (1.0 - 2.0 * tokens_BL).reshape(-1, SIZE, SIZE)
    pairs = sum((grid * jnp.roll(grid, 1, axis)).sum((1, 2)) for axis in (1, 2))
    return COUPLING * pairs + FIELD * grid.sum((1, 2))


@functools.cache
def exact_ising():
    """log Z, and the probability that a spin is up, over all 65,536 states."""
    states = oracle.all_states(2, SIZE**2)
    log_p = np.asarray(ising(jnp.asarray(states)), np.float64)
    p = special.softmax(log_p)
    return special.logsumexp(log_p), p @ (states[:, 0] == 0)


@pytest.mark.nightly
def test_an_ising_grid_against_exact_answers():
    """log Z, and the marginals by the conditionals and by f, are within 1 %."""
    length, steps, batch = SIZE**2, 600, 64
    network = MarginalHead(
        num_states=3,
        time_conditioned=False,
        hidden_dim=32,
        num_layers=1,
        num_heads=2,
        mlp_ratio=2,
        norm_bias=True,
        dropout=0.0,
        freeze=False,
    )
    objective = objective_on(2, ising)
    objective.check(network)
    options = OptimizerOptions(
        learning_rate=3e-3,
        warmup_steps=10,
        schedule="cosine",
        final_fraction=0.02,
        clip_norm=10.0,
    )
    optimizer = make_optimizer(options, steps)
    step = Step(
        network=network, objective=objective, optimizer=optimizer, ema_decay=0.97, batch_size=batch
    )
    rows = {
        "x0": np.zeros((1, batch, length), np.int32),
        "scored": np.ones((1, batch, length), bool),
        "index": np.arange(batch)[None],
    }
    run = jax.jit(functools.partial(step, axis_name=None))
    state = init_state(network, optimizer, 0)
    for _ in range(steps):
        state, _ = run(state, rows)
    denoiser = Denoiser(
        params=state.averaged, network=network, parameterization=objective.parameterization
    )
    log_z, up = exact_ising()
    held_out = [(rows["x0"][0], rows["scored"][0])] * 16
    found = free_energy(denoiser, objective, jax.random.key(1), held_out)
    print(log_z, up, found)
    assert found.free.value > -log_z - 4 * found.free.error
    assert abs(-found.free.value / log_z - 1) < 0.01
    assert abs(found.log_z.value / log_z - 1) < 0.01
    conditional = np.exp(denoiser.log_conditional(np.full((1, length), 2))[0, :, 0])
    each_BL = np.where(np.eye(length, dtype=bool), 0, 2).astype(np.int32)
    marginal = np.exp(denoiser.log_marginal(each_BL))
    print(conditional, marginal)
    np.testing.assert_allclose(conditional, up, rtol=0.01)
    np.testing.assert_allclose(marginal, up, rtol=0.01)


# ---------------------------------------------------------------- sedd train

SPINS = """
import jax.numpy as jnp

def log_prob(tokens_BL):
    return 0.1 * (tokens_BL == 0).sum(1).astype(jnp.float32)

def per_token(tokens_BL):
    return tokens_BL * 1.0

def branches(tokens_BL):
    if tokens_BL[0, 0] > 0:
        return 1
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("energy")
    (place / "spins.py").write_text(SPINS)
    (place / "spins.txt").write_text("+-" * 400)
    return place


def train(place, workdir, *flags):
    return tiny_run.call(
        "train",
        *(*tiny_run.TINY, "--workdir", workdir, "--data.corpus", place / "spins.txt"),
        *("--network", "marginal_head", "--network.no-freeze", "--objective", "energy"),
        *("--training.steps", 2, "--evaluation.max-sequences", 2, *flags),
    )


@pytest.mark.nightly
def test_train_prints_log_z(place, tmp_path):
    outcome = train(place, tmp_path, "--objective.function", f"{place}/spins.py:log_prob")
    assert outcome.code == 0, outcome.err
    assert "log Z =" in outcome.out
    assert "log Z ≥" in outcome.out
    assert "of them trained" in outcome.out  # all but the frequencies


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "--objective.function is missing: the unnormalised log probability, as file.py:func"),
        (("--objective.function", "PLACE/no.py:f"), "no.py: no such file"),
        (("--objective.function", "PLACE/spins.py:f"), "spins.py defines no function 'f'"),
        (
            ("--objective.function", "PLACE/spins.py:per_token"),
            "per_token: it must return one float for each of 2 sequences, got an array of float32",
        ),
        (("--objective.function", "PLACE/spins.py:branches"), ", line 11: TracerBool"),
        (
            ("--objective.function", "PLACE/spins.py:log_prob", "--network.freeze"),
            "trains the trunk as well: give --network.no-freeze",
        ),
        (
            ("--objective.function", "PLACE/spins.py:log_prob", "--objective.consistency", -1),
            "--objective.consistency must not be negative, got -1",
        ),
    ],
)
def test_mistakes_are_one_line(place, tmp_path, flags, message):
    flags = [str(flag).replace("PLACE", str(place)) for flag in flags]
    outcome = train(place, tmp_path, *flags)
    assert outcome.code == 2
    [line] = outcome.errors
    assert message in line


def test_it_needs_a_marginal_head_on_a_trunk_that_is_trained():
    objective = objective_on(N, table_log_prob)
    with pytest.raises(UserError, match=r"trains the trunk as well: give --network\.no-freeze"):
        objective.check(NETWORK)

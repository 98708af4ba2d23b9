"""Noise that differs among positions: its bound, its orders and its draws, all enumerated."""

import dataclasses
import functools
import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import tiny_run
from oracle import L, N, f32, i32, keys

from sedd.commands.train_start import check_same_run
from sedd.configuration.build import build_parts
from sedd.configuration.components import options
from sedd.configuration.config import Config, DataOptions
from sedd.configuration.position_weights import measure_weights, read_weights
from sedd.data.packing import Packed
from sedd.errors import FieldError, UserError
from sedd.evaluation.estimators import resolve
from sedd.evaluation.monte_carlo import sequence_nats
from sedd.evaluation.price_draws import measure_price
from sedd.objectives.score_entropy import ScoreEntropy
from sedd.objectives.t_dce import TDCE
from sedd.samplers.event_jump import EventJump
from sedd.schedules import ByPosition, LogLinear

WEIGHTS = np.array([2.0, 0.5, 1.0, 3.0])
SCHEDULE = ByPosition(weights="2,.5,1,3")
TABLE = oracle.random_table(seed=5)
DENOISER = oracle.table_denoiser(TABLE, N)
CLEAN, ORDERS = oracle.all_states(N), list(itertools.permutations(range(L)))
LOG_C = TABLE[..., :N] - np.log(np.exp(TABLE[..., :N]).sum(-1, keepdims=True))  # [256, L, N]
DRAWS = 8_000


def order_probability(order, weights):
    """The next position has its weight over the sum of those that are left."""
    left = [weights[list(order[k:])].sum() for k in range(L)]
    return np.prod([weights[i] / total for i, total in zip(order, left, strict=True)])


def log_c_of(x0_L, visible, i):
    x = np.where(visible, x0_L, N)
    return LOG_C[oracle.state_index(x, N + 1), i, x0_L[i]]


def order_nll(x0_L, order):
    visible, total = np.zeros(L, bool), 0.0
    for i in order:
        total -= log_c_of(x0_L, visible, i)
        visible[i] = True
    return total


@functools.cache
def expected_nll(weights):
    """[81]: over the orders of the weights."""
    weights = np.array(weights)
    chances = [order_probability(order, weights) for order in ORDERS]
    assert sum(chances) == pytest.approx(1)
    return np.array([np.dot(chances, [order_nll(x0, o) for o in ORDERS]) for x0 in CLEAN])


def mean_loss(x0_L, t, eps=1e-3):
    """E over masks of rate/expm1(σ)·nats at time t, from λ^w alone, in float64."""
    low = (1 - eps) * t
    masked_share, total = low**WEIGHTS, 0.0
    for masked in itertools.product((False, True), repeat=L):
        masked = np.array(masked)
        chance = np.where(masked, masked_share, 1 - masked_share).prod()
        nats = [WEIGHTS[i] / t * -log_c_of(x0_L, ~masked, i) for i in np.flatnonzero(masked)]
        total += chance * sum(nats)
    return total


# ---------------------------------------------------------------- the schedule


def test_noise_of_each_position():
    t_B = f32([1e-3, 0.3, 1.0])
    sigma_BL, rate_BL = SCHEDULE.at_positions(t_B, L)
    share = (0.999 * np.asarray(t_B, np.float64))[:, None] ** WEIGHTS
    np.testing.assert_allclose(-np.expm1(-np.asarray(sigma_BL, np.float64)), share, rtol=1e-4)
    slope = WEIGHTS * share / np.asarray(t_B, np.float64)[:, None]
    np.testing.assert_allclose(rate_BL, slope / (1 - share), rtol=1e-4)
    ones = ByPosition(weights="1,1,1,1").at_positions(t_B, L)
    for got, exact in zip(ones, LogLinear().at_positions(t_B, L), strict=True):
        np.testing.assert_allclose(got, np.broadcast_to(exact[:, None], (3, L)), rtol=1e-5)
    np.testing.assert_array_equal(SCHEDULE.powers(6), [2, 0.5, 1, 3, 1, 1])
    assert not ByPosition().by_position


# ---------------------------------------------------------------- losses and bounds


def test_the_integral_of_the_loss_is_the_expected_nll_over_orders():
    """In float64: the theorem itself, for one text and λ up to 1."""
    nodes, weights = np.polynomial.legendre.leggauss(60)
    s = (nodes + 1) / 2  # t = s², since a weight of .5 has a root at 0
    integral = sum(
        w / 2 * 2 * x * mean_loss(CLEAN[7], x**2, 0.0) for x, w in zip(s, weights, strict=True)
    )
    assert integral == pytest.approx(expected_nll(tuple(WEIGHTS))[7], rel=1e-6)
    assert abs(expected_nll((1.0,) * L)[7] / integral - 1) > 0.01  # the control


@pytest.mark.parametrize("kind", [TDCE, ScoreEntropy])
def test_objectives_have_the_mean_of_the_formula(kind):
    """At two times, over draws of the masks; t-DSE is t-DCE in the mean over masks."""
    objective = kind(schedule=SCHEDULE, parameterization=DENOISER.parameterization)
    x0_L = CLEAN[7]

    @jax.jit
    def losses(keys_B, u_B):
        x0_BL = jnp.broadcast_to(i32(x0_L), (len(u_B), L))
        corrupted = objective.corrupt(keys_B, u_B, x0_BL, jnp.ones_like(x0_BL, bool))
        return objective.nats(DENOISER.network, DENOISER.params, corrupted, x0_BL).sum(1)

    for u in (0.2, 0.8):
        nats_B = np.asarray(losses(keys(1, DRAWS), jnp.full(DRAWS, u)), np.float64)
        z = (nats_B.mean() - mean_loss(x0_L, 1e-3 + 0.999 * u)) / (nats_B.std() / math.sqrt(DRAWS))
        assert abs(z) < 4.5


def test_the_price_of_parallelism_is_of_uniform_orders():
    with pytest.raises(UserError, match="uniformly random orders, and the schedule by_position"):
        measure_price(DENOISER, SCHEDULE, jax.random.key(0), [], model="m", length=L, draws=4)


@functools.partial(jax.jit, static_argnames="schedule")
def estimates(schedule, keys_B, x0_BL):
    nats = sequence_nats(DENOISER, schedule, keys_B, x0_BL, x0_BL >= 0, draws=16)
    return nats.prior_B[:, None] + nats.reconstruction_BR + nats.diffusion_BR


@pytest.mark.parametrize("weights", [tuple(WEIGHTS), (2.0,) * L])
def test_the_bound_is_the_expected_nll_over_the_orders_of_the_weights(weights):
    """With equal weights it is k-DCE."""
    schedule = ByPosition(weights=",".join(map(str, weights)))
    assert resolve("auto", DENOISER, schedule) == "t_dce"
    repeats, x0_BL = 200, np.tile(CLEAN, (200, 1))
    got = np.asarray(estimates(schedule, keys(0, len(x0_BL)), i32(x0_BL)), np.float64)
    got = got.reshape(repeats, len(CLEAN), -1).transpose(0, 2, 1).reshape(-1, len(CLEAN))
    z = (got.mean(0) - expected_nll(weights)) / (got.std(0) / math.sqrt(len(got)))
    assert np.abs(z).max() < 5
    other = expected_nll((1.0,) * L if weights[0] != weights[1] else tuple(WEIGHTS))
    assert (np.abs(got.mean(0) - other) > 5 * got.std(0) / math.sqrt(len(got))).mean() > 0.2


# ---------------------------------------------------------------- event_jump


def grouped_law(groups):
    """[81]: groups of positions, each drawn at once given the groups before it."""
    law = np.ones(len(CLEAN))
    for row, x0 in enumerate(CLEAN):
        visible = np.zeros(L, bool)
        for group in groups:
            law[row] *= np.exp(sum(log_c_of(x0, visible, i) for i in group))
            visible[list(group)] = True
    return law


def event_jump_law(steps, weights):
    """[81]: each position's interval is its own, with probability λ^w at its start less its end."""
    if steps is None:
        chances = [order_probability(order, weights) for order in ORDERS]
        return sum(c * grouped_law([[i] for i in o]) for c, o in zip(chances, ORDERS, strict=True))
    ends = (np.arange(steps, -1, -1) / steps)[:, None] ** weights
    chance_KL, law = ends[:-1] - ends[1:], 0.0
    for intervals in itertools.product(range(steps), repeat=L):
        groups = [[i for i in range(L) if intervals[i] == k] for k in range(steps)]
        law = law + chance_KL[intervals, range(L)].prod() * grouped_law([g for g in groups if g])
    return law


@pytest.mark.parametrize("steps", [None, 3])
def test_event_jump_draws_the_orders_of_the_noise(steps):
    samples = oracle.draw(EventJump(schedule=SCHEDULE, steps=steps), DENOISER, DRAWS, trace=False)
    counts = np.bincount(oracle.state_index(samples.tokens_BL, N), minlength=len(CLEAN))
    assert oracle.chi_square_p(counts, event_jump_law(steps, WEIGHTS)) > 1e-4
    assert oracle.chi_square_p(counts, event_jump_law(steps, np.ones(L))) < 1e-4
    # Idle intervals are still skipped.
    assert int(samples.calls_B.max()) <= (steps or L)
    assert (np.asarray(samples.calls_B) == L).all() == (steps is None)
    assert DENOISER.time_independent


# ---------------------------------------------------------------- numbers, files, mistakes


def config(weights, **changes):
    base = Config(
        data=DataOptions(corpus="stdlib", length=4),
        schedule=options("schedules", "by_position", weights=weights),
        objective=options("objectives", "t_dce"),
    )
    return dataclasses.replace(base, **changes)


def test_weights_from_a_file(tmp_path):
    (tmp_path / "w.txt").write_text("2 .5\n1, 3\n")
    read = read_weights(config(str(tmp_path / "w.txt")))
    assert build_parts(read, 5).schedule.powers(4).tolist() == [2, 0.5, 1, 3]
    assert Config.from_json(read.to_json()) == read
    (tmp_path / "w.txt").write_text("2 x 1 3")
    with pytest.raises(FieldError, match=r"weights .*w\.txt must be positive numbers.*got '2,x"):
        read_weights(config(str(tmp_path / "w.txt")))
    (tmp_path / "w.txt").write_text("")
    with pytest.raises(FieldError, match=r"w\.txt must be positive numbers.*got none"):
        read_weights(config(str(tmp_path / "w.txt")))


def test_weights_of_a_corpus():
    """The entropy of each position over their mean; a constant position has a small weight."""
    rng = np.random.default_rng(0)
    tokens_SL = np.stack([np.zeros(400), *rng.integers(0, [[2], [4], [4]], (3, 400))], 1)
    packed = Packed(
        name="here",
        num_rows=400,
        length=4,
        num_tokens_total=1600,
        text_characters=1600,
        text_bytes=1600,
        counts=np.zeros(4),
        pad_id=0,
        tokens=tokens_SL.ravel(),
        spans=None,
    )
    measured = measure_weights(config("corpus"), [packed])
    got = build_parts(measured, 5).schedule.powers(4)
    np.testing.assert_allclose(got, [0.05, 0.8, 1.6, 1.6], rtol=0.02)
    assert measure_weights(config("1,1,1,1"), [packed]) == config("1,1,1,1")


def test_a_resumed_run_keeps_the_weights_that_were_measured(tmp_path):
    """The command says ``corpus`` again; other numbers are another configuration."""
    (tmp_path / "config.json").write_text(json.dumps(config("2,.5,1,3").to_json()))
    (tmp_path / "tokenizer.json").write_text(json.dumps(tiny_run.TOKENIZER.to_json()))
    resumed, _ = check_same_run(tmp_path, config("corpus"))
    assert resumed.schedule == config("2,.5,1,3").schedule
    with pytest.raises(UserError, match=r"another configuration: .*schedule\.weights"):
        check_same_run(tmp_path, config("2,.5,1,4"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"weights": "1,2,3"},
            "schedule.weights must be 4 numbers, one for each position of a row, got 3",
        ),
        (
            {"weights": "1,2,0,1"},
            "schedule.weights must be positive numbers .*got 0.0 at position 2",
        ),
        ({"weights": "1,2,nan,1"}, "got nan at position 2"),
        (
            {"weights": "no_such_file.txt"},
            "schedule.weights must be positive .*got 'no_such_file.txt'",
        ),
        (
            {"objective": options("objectives", "k_dce")},
            "objective k_dce does not train with the w",
        ),
        (
            {
                "process": options("processes", "uniform"),
                "parameterization": options("parameterizations", "score"),
                "objective": options("objectives", "score_entropy"),
            },
            "schedule by_position needs a model of the absorbing .*got score on uniform",
        ),
    ],
)
def test_mistakes_are_named(changes, said):
    changes = dict(changes)
    made = config(changes.pop("weights", "2,.5,1,3"), **changes)
    with pytest.raises(FieldError, match=said):
        build_parts(read_weights(made), 5)

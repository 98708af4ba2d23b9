"""Autoregressive models: the chain rule in training, evaluation and sampling, and what they refuse.

Exact on an enumerable world, whose factors p(x_i | x_<i) a table holds; causal on a transformer.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportOptionalMemberAccess=false

import dataclasses
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from oracle import L, N, f32, i32, keys

from sedd.configuration.build import build_parts, build_sampler
from sedd.configuration.components import build, makers, options
from sedd.configuration.config import Config
from sedd.constraints.base import Constraint
from sedd.denoiser import Denoiser
from sedd.errors import UserError
from sedd.evaluation.bound import evaluate_bound
from sedd.evaluation.ordered import ordered_nats
from sedd.networks.base import Attend
from sedd.objectives.autoregressive import Autoregressive as Objective
from sedd.parameterizations.autoregressive import Autoregressive
from sedd.parameterizations.conditional import Conditional
from sedd.parameterizations.score import Score
from sedd.processes.absorbing import Absorbing
from sedd.processes.uniform import Uniform
from sedd.reshape import Reshape
from sedd.samplers.ordered import Ordered
from sedd.samplers.planned import Profile
from sedd.schedules import LogLinear

CLEAN = oracle.all_states(N)
ALL = np.ones(CLEAN.shape, bool)
WORLD = oracle.Oracle("absorbing", seed=3)
READING = Autoregressive(process=WORLD.process)
EXACT = WORLD.autoregressive_denoiser()


def prefix_nats():
    """[81, L] in float64: -log p(x_i | x_<i) from the joint itself."""
    prefix = [WORLD.joint.sum(tuple(range(i, L)))[tuple(CLEAN.T[:i])] for i in range(L + 1)]
    log_p = np.log(np.stack([np.broadcast_to(p, len(CLEAN)) for p in prefix], 1))
    return log_p[:, :-1] - log_p[:, 1:]


@jax.jit
def nats(denoiser, x0_BL, scored_BL):
    """[B, L]: what training scores."""
    objective = Objective(schedule=LogLinear(), parameterization=READING)
    zero_B = jnp.zeros(len(x0_BL))
    corrupted = objective.corrupt(keys(0, len(x0_BL)), zero_B, x0_BL, scored_BL)
    return objective.nats(denoiser.network, denoiser.params, corrupted, x0_BL)


log_conditional = jax.jit(Denoiser.log_conditional)


# ---------------------------------------------------------------- what the network is given


def test_inputs_are_shifted_and_attend_to_what_is_before():
    inputs = READING.inputs(i32([[0, 1, 2, 0], [2, 2, 1, 3]]))
    np.testing.assert_array_equal(inputs.tokens_BM, [[3, 0, 1, 2], [3, 2, 2, 1]])
    np.testing.assert_array_equal(inputs.attend.mask(4, 4)[0, 0], np.tri(4, dtype=bool))


def test_every_segment_begins_with_the_mask():
    segment_BL = i32([[1, 1, 2, 2], [1, 1, 1, 0]])
    inputs = READING.inputs(i32([[0, 1, 2, 0]] * 2), Attend(segment_BL=segment_BL))
    np.testing.assert_array_equal(inputs.tokens_BM, [[3, 0, 3, 2], [3, 0, 1, 3]])
    seen_B1LL = np.asarray(inputs.attend.mask(4, 4))
    own_BLL = np.asarray(segment_BL)[:, :, None] == np.asarray(segment_BL)[:, None]
    np.testing.assert_array_equal(seen_B1LL[:, 0], np.tri(4, dtype=bool) & own_BLL)


# ---------------------------------------------------------------- the chain rule


def test_the_objective_is_the_chain_rule():
    some = np.random.default_rng(0).random(CLEAN.shape) < 0.6
    for scored in (ALL, some):
        nats_BL = nats(EXACT, i32(CLEAN), jnp.asarray(scored))
        np.testing.assert_allclose(nats_BL, np.where(scored, prefix_nats(), 0), atol=1e-5)


def test_the_conditional_is_that_of_the_prefix():
    """Whatever stands behind it, masks or tokens."""
    log_probs = np.asarray(log_conditional(EXACT, i32(WORLD.states)))
    exact = WORLD.conditional()
    for i in range(L):
        prefix = (WORLD.states[:, :i] < N).all(1) & (WORLD.states[:, i] == N)
        alone = np.where(np.arange(L) < i, WORLD.states, N)
        wanted = exact[oracle.state_index(alone, N + 1), i]
        np.testing.assert_allclose(np.exp(log_probs[prefix, i]), wanted[prefix], atol=1e-5)


def test_the_evaluation_is_exact():
    scored_BL = np.random.default_rng(1).random(CLEAN.shape) < 0.7
    exact = np.where(scored_BL, prefix_nats(), 0).sum(1)
    rows = [(CLEAN[:50], scored_BL[:50]), (CLEAN[50:], scored_BL[50:])]
    result = evaluate_bound(EXACT, LogLinear(), jax.random.key(0), rows)
    np.testing.assert_allclose(result.sequence_nats, exact, atol=1e-5)
    assert result.nats_per_token == pytest.approx(exact.sum() / scored_BL.sum(), rel=1e-5)
    assert (result.estimator, result.exact, result.draws) == ("exact", True, 0)
    assert (result.standard_error_draws, result.prior, result.reconstruction) == (0, 0, 0)
    assert result.diffusion == pytest.approx(result.nats_per_token)
    assert result.standard_error > 0


@pytest.mark.parametrize("fixed", [oracle.NOTHING_FIXED, (1, -1, -1, -1)])
def test_the_samples_are_of_the_joint(fixed):
    samples = oracle.draw(Ordered(schedule=LogLinear()), EXACT, 20_000, fixed=fixed, trace=False)
    counts = oracle.counts_of(samples.tokens_BL, WORLD.V)
    assert oracle.chi_square_p(counts, oracle.conditional_joint(WORLD, fixed)) > 1e-4
    assert (samples.calls_B == L - (fixed[0] >= 0)).all()


# ---------------------------------------------------------------- a transformer


@functools.cache
def transformer():
    """A small one with random weights."""
    network = build(
        *("networks", "ddit"),
        **{"num_states": N + 1, "time_conditioned": False},
        **{"hidden_dim": 16, "num_layers": 2, "num_heads": 2},
    )
    leaves, tree = jax.tree.flatten(jax.eval_shape(network.init, jax.random.key(0)))
    rng = np.random.default_rng(0)
    leaves = [f32(0.5 * rng.standard_normal(leaf.shape)) for leaf in leaves]
    return Denoiser(params=tree.unflatten(leaves), network=network, parameterization=READING)


def test_later_tokens_change_no_earlier_nats():
    """Those that see the change do differ."""
    x0 = np.random.default_rng(0).integers(0, N, 8)
    changed = np.tile(x0, (9, 1))
    changed[np.arange(8), np.arange(8)] = (x0 + 1) % N  # row i differs at position i alone
    rows = np.asarray(nats(transformer(), i32(changed), jnp.ones((9, 8), bool)))
    change = np.abs(rows[:8] - rows[8])
    assert change[np.tri(8, k=-1, dtype=bool)].max() < 1e-5
    assert (change[~np.tri(8, k=-1, dtype=bool)] > 1e-3).mean() > 0.9


def test_sampling_reads_what_was_trained():
    """The conditional behind a prefix is the distribution that the loss is of."""
    x0_BL = i32(np.tile(np.random.default_rng(2).integers(0, N, 8), (9, 1)))
    masked_BL = jnp.where(jnp.arange(8)[None] < jnp.arange(9)[:, None], x0_BL, N)
    log_probs_BLN = np.asarray(log_conditional(transformer(), masked_BL))
    trained_L = nats(transformer(), x0_BL, jnp.ones((9, 8), bool))[0]
    place = np.arange(8)
    np.testing.assert_allclose(-log_probs_BLN[place, place, x0_BL[0]], trained_L, atol=1e-4)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("name", [n for n in makers("objectives") if n != "autoregressive"])
def test_other_objectives_refuse_it(name):
    context = {"schedule": LogLinear(), "parameterization": READING}
    if name == "energy":
        context["log_prob"] = jnp.sum
    with pytest.raises(UserError, match=f"^objectives '{name}'.*the objective autoregressive"):
        build("objectives", name, **context)


@pytest.mark.parametrize("reading", [Conditional, Score])
def test_the_objective_refuses_others(reading):
    with pytest.raises(ValueError, match="needs the autoregressive parameterization"):
        Objective(schedule=LogLinear(), parameterization=reading(process=WORLD.process))


def test_every_other_sampler_names_the_one_that_works():
    inner = {"inner": "ordered"}
    cases = {name: inner if "inner" in fields else {} for name, fields in sampler_fields().items()}
    cases["ordered"] = {"order": "backward"}
    for name, given in [*cases.items(), ("ordered", {"steps": 2})]:
        if "verifier" in sampler_fields()[name]:
            given = {**given, "verifier": len}
        if "profile" in sampler_fields()[name]:
            given = {**given, "profile": Profile(model="m", nats_L=(1.0,))}
        sampler = build_sampler(name, LogLinear(), **given)
        with pytest.raises(UserError, match=f"^sampler '{name}' .*--sampler ordered --order forw"):
            sampler.check(EXACT)
    Ordered(schedule=LogLinear()).check(EXACT)


def sampler_fields():
    return {n: {f.name for f in dataclasses.fields(m)} for n, m in makers("samplers").items()}


@pytest.mark.parametrize(
    "given",
    [
        {"reshape": Reshape.of(guidance=1.0), "given_BL": jnp.ones((1, 1), bool)},
        {"constraint": mock.Mock(spec=Constraint)},
    ],
    ids=list("gc"),
)
def test_what_reads_behind_masks_is_refused(given):
    with pytest.raises(UserError, match="guidance and constraints"):
        Ordered(schedule=LogLinear()).check(dataclasses.replace(EXACT, **given))
    Ordered(schedule=LogLinear()).check(dataclasses.replace(EXACT, reshape=Reshape.of(top_p=0.5)))


def test_refusals():
    with pytest.raises(ValueError, match="absorbing"):
        Autoregressive(process=Uniform(num_tokens=N))
    with pytest.raises(ValueError, match="no score"):
        READING.log_score(jnp.zeros((1, 1, N + 1)), i32([[0]]), jnp.ones((1, 1)))
    x = i32([[0, 1, 2, 0]])
    with pytest.raises(ValueError, match="evaluate_bound"):
        ordered_nats(EXACT, x, x, x >= 0)
    with pytest.raises(ValueError, match="segments only"):
        READING.inputs(x, Attend(kind="ranks", rank_q_BL=x, rank_k_BL=x))
    with pytest.raises(ValueError, match="segments only"):
        READING.inputs(x, Attend(kind="causal"))


def test_a_configuration_that_keeps_another_sampler_is_refused():
    config = Config(
        parameterization=options("parameterizations", "autoregressive"),
        objective=options("objectives", "autoregressive"),
    )
    with pytest.raises(UserError, match="sampler 'tweedie'"):
        build_parts(config, N)
    parts = build_parts(dataclasses.replace(config, sampler=options("samplers", "ordered")), N)
    assert parts.parameterization == Autoregressive(process=Absorbing(num_tokens=N))

"""What every component keeps to; a new file in a family is tested the day it appears."""

import dataclasses
import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from oracle import f32, i32, keys
from tiers import daily

from sedd.configuration.components import build, makers, options
from sedd.denoiser import Denoiser
from sedd.errors import UserError
from sedd.objectives.base import Corrupted
from sedd.parameterizations.any_subset import AnySubset
from sedd.parameterizations.autoregressive import Autoregressive
from sedd.parameterizations.block import Block
from sedd.parameterizations.conditional import Conditional
from sedd.parameterizations.mean import Mean
from sedd.parameterizations.score import Score
from sedd.processes.absorbing import Absorbing
from sedd.processes.hybrid import Hybrid
from sedd.processes.uniform import Uniform
from sedd.samplers.base import Samples
from sedd.samplers.event_jump import EventJump
from sedd.samplers.planned import Profile
from sedd.samplers.tweedie import Tweedie
from sedd.schedules import LogLinear

FAMILIES = ["schedules", "processes", "parameterizations", "objectives", "samplers", "networks"]
COMPONENTS = [(family, name) for family in FAMILIES for name in sorted(makers(family))]
N, B, L = 5, 3, 6
MODELS = {  # the readings that a component may be asked to work on
    "radd": Conditional(process=Absorbing(num_tokens=N)),
    "sedd": Score(process=Absorbing(num_tokens=N)),
    "sedd_uniform": Score(process=Uniform(num_tokens=N)),
    "gidd": Mean(process=Hybrid(num_tokens=N, gamma=1.0)),
    "mdlm": Conditional(process=Absorbing(num_tokens=N), time_independent=False),
    "ar": Autoregressive(process=Absorbing(num_tokens=N)),
    "any_subset": AnySubset(process=Absorbing(num_tokens=N)),
    "block": Block(process=Absorbing(num_tokens=N), block=2),
}
SMALL = {"hidden_dim": 16, "num_layers": 1, "num_heads": 2, "condition_dim": 8, "steps": 6}
SMALL |= {"calls": 3}

every = pytest.mark.parametrize(("family", "name"), COMPONENTS)


def names(family):
    return pytest.mark.parametrize("name", sorted(makers(family)))


def context(reading, name=None):
    only_reveals = name == "search_paths"
    inner = (
        EventJump(schedule=LogLinear()) if only_reveals else Tweedie(schedule=LogLinear(), steps=6)
    )
    return {
        "num_tokens": N,
        "process": reading.process,
        "parameterization": reading,
        "schedule": LogLinear(),
        "num_states": reading.process.num_states,
        "time_conditioned": not reading.time_independent,
        "inner": inner,
        "verifier": first_tokens,
        "log_prob": even_tokens,
        "profile": Profile(model="m", nats_L=(3.0, 2.5, 2.0, 1.5, 1.2, 1.0)),
    }


def first_tokens(tokens_RL, real_RL):
    """A verifier that likes high ids at the start."""
    return np.asarray(tokens_RL)[:, 0].astype(np.float32)


def even_tokens(tokens_BL):
    """An unnormalised log probability that dislikes odd ids."""
    return -0.5 * (tokens_BL % 2).sum(1).astype(jnp.float32)


def make(family, name, reading, **fields):
    """The component from its defaults and what a model determines."""
    known = {f.name for f in dataclasses.fields(makers(family)[name])}
    fields |= {k: v for k, v in SMALL.items() if k in known and family in ("networks", "samplers")}
    return build(
        family, name, **fields, **{k: v for k, v in context(reading, name).items() if k in known}
    )


def accepted(family, name):
    """(label, reading, component) for every reading that it does not refuse."""
    found = []
    for label, reading in MODELS.items():
        try:
            found.append((label, reading, make(family, name, reading)))
        except UserError:
            continue
    return found


# ---------------------------------------------------------------- all of them


@every
def test_builds_from_defaults(family, name):
    _, reading, _ = accepted(family, name)[0]
    component = options(family, name).build(**context(reading, name))
    assert component == options(family, name).build(**context(reading, name))


@every
def test_is_a_value(family, name):
    """Frozen and hashable: it goes through jit as a static argument."""
    _, _, component = accepted(family, name)[0]
    assert hash(component) == hash(dataclasses.replace(component))
    field = dataclasses.fields(component)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(component, field, None)


@every
def test_takes_keywords_only(family, name):
    constructor = makers(family)[name]
    parameters = inspect.signature(constructor).parameters.values()
    assert all(p.kind is p.KEYWORD_ONLY for p in parameters)
    with pytest.raises(TypeError):
        constructor(*[0.5] * len(parameters))


@every
def test_says_what_it_is_and_where_it_comes_from(family, name):
    constructor = makers(family)[name]
    own = constructor.__doc__
    assert own
    assert not own.startswith(f"{constructor.__name__}("), "the dataclass' own signature"
    module = inspect.getmodule(constructor).__doc__
    assert "arXiv:" in own + (module or "" if family != "schedules" else "")


@every
def test_refuses_an_unknown_option_by_name(family, name):
    with pytest.raises(UserError, match="no_such_option"):
        build(family, name, no_such_option=1)


# ---------------------------------------------------------------- schedules


@names("schedules")
def test_schedule(name):
    schedule = make("schedules", name, MODELS["radd"])
    t = jnp.linspace(0.0, 1.0, 101)
    sigma, rate = np.asarray(schedule.sigma(t)), np.asarray(schedule.rate(t))
    assert (np.diff(sigma) > 0).all()
    assert np.isfinite(sigma).all()
    assert np.isfinite(rate).all()
    assert (rate >= 0).all()
    np.testing.assert_allclose(schedule.t_of_sigma(schedule.sigma(t)), t, atol=1e-3)


# ---------------------------------------------------------------- processes


@names("processes")
def test_process_is_a_markov_semigroup(name):
    process = make("processes", name, MODELS["radd"])
    x = jnp.arange(process.num_states)
    kernels = {}
    for sigma in (0.0, 0.2, 0.5, 0.7):
        kernels[sigma] = np.asarray(process.transition(x, f32(sigma)), np.float64)
        assert (kernels[sigma] >= 0).all()
        np.testing.assert_allclose(kernels[sigma].sum(-1), 1, rtol=1e-6)
        np.testing.assert_allclose(
            process.transition_to(x, f32(sigma), f32(sigma)), kernels[sigma].T, rtol=1e-6
        )
    np.testing.assert_array_equal(kernels[0.0], np.eye(process.num_states))
    np.testing.assert_allclose(kernels[0.2] @ kernels[0.5], kernels[0.7], atol=1e-6)


@names("processes")
def test_process_draws_and_scores(name):
    process = make("processes", name, MODELS["radd"])
    x0_BL = i32(np.random.default_rng(0).integers(0, N, (B, L)))
    sigma_B = f32([0.1, 1.0, 3.0])
    corrupt, sample_prior = (
        jax.jit(process.corrupt),
        jax.jit(process.sample_prior, static_argnums=1),
    )
    xt_BL = corrupt(keys(0, B), x0_BL, sigma_B)
    for drawn in (xt_BL, sample_prior(keys(0, B), L, f32(5.0))):
        assert drawn.shape == (B, L)
        assert drawn.dtype == jnp.int32
        assert ((drawn >= 0) & (drawn < process.num_states)).all()
    log_score = jax.random.normal(jax.random.key(1), (B, L, process.num_states))
    log_score = jnp.where(jax.nn.one_hot(xt_BL, process.num_states) > 0, 0, log_score)
    entropy = jax.jit(process.score_entropy)(log_score, xt_BL, x0_BL, sigma_B[:, None])
    assert entropy.shape == (B, L)
    assert (entropy >= 0).all()
    assert (entropy > 0).any()
    rate = jax.jit(process.reverse_rate)(log_score, xt_BL, sigma_B)
    np.testing.assert_allclose(rate.sum(-1), 0, atol=1e-4)
    assert (process.prior_kl(f32([0.5, 5.0])) > 0).all()


# ---------------------------------------------------------------- parameterizations


@names("parameterizations")
def test_parameterization(name):
    readings = accepted("parameterizations", name)
    assert readings
    for _, _, reading in readings:
        process = reading.process
        x = i32(np.random.default_rng(0).integers(0, process.num_states, (B, L)))
        raw = jax.random.normal(jax.random.key(0), (B, L, process.num_states))
        sigma = f32([0.1, 1.0, 3.0])[:, None]
        if reading.causal:
            with pytest.raises(ValueError, match="no score"):
                reading.log_score(raw, x, sigma)
        else:
            log_score = reading.log_score(raw, x, sigma)
            assert log_score.shape == raw.shape
            np.testing.assert_array_equal(jnp.take_along_axis(log_score, x[..., None], -1), 0)
        if not process.absorbing:
            with pytest.raises(ValueError, match="absorbing"):
                reading.log_conditional(raw, x)
        else:
            log_probs = reading.log_conditional(raw, x)
            np.testing.assert_allclose(jnp.exp(log_probs).sum(-1), 1, rtol=1e-5)


# ---------------------------------------------------------------- objectives


@pytest.mark.parametrize(
    "name",
    daily(
        sorted(makers("objectives")),
        set(makers("objectives")) - {"latent_distill", "hmm", "self_distill"},
    ),
)
def test_objective(name):
    """Finite nats [B, L] and gradients on random outputs, only where positions are scored."""
    models = accepted("objectives", name)
    assert models
    for _, reading, objective in models:
        process = reading.process
        rng = np.random.default_rng(0)
        x0_BL, scored_BL = i32(rng.integers(0, N, (B, L))), jnp.asarray(rng.random((B, L)) < 0.8)
        kind = oracle.ConstantNetwork
        for trains, network in (
            (objective.trains_causal_head, oracle.WithCausalHead),
            (objective.trains_marginal_head, oracle.WithMarginalHead),
            (objective.trains_hmm_head, oracle.WithHmmHead),
            (objective.trains_latent, oracle.WithLatent),
        ):
            kind = network if trains else kind
        network = kind(num_states=process.num_states, time_conditioned=not reading.time_independent)

        shape = B, objective.rows(L), process.num_states
        raw_BLV, teacher_BLV = jax.random.normal(jax.random.key(0), (2, *shape))

        def loss(
            raw_BLV,
            objective=objective,
            network=network,
            teacher_BLV=teacher_BLV,
            x0_BL=x0_BL,
            scored_BL=scored_BL,
        ):
            corrupted = objective.corrupt(keys(0, B), f32([0.1, 0.5, 0.95]), x0_BL, scored_BL)
            if objective.teacher_calls:  # another one: where it agrees, the loss is 0
                corrupted = objective.taught(network, teacher_BLV, corrupted)
            nats_BL = objective.nats(network, jax.lax.stop_gradient(raw_BLV), corrupted, x0_BL)
            total = objective.summed_nats(network, raw_BLV, corrupted, x0_BL)
            return total, (corrupted, nats_BL)

        step = jax.jit(jax.value_and_grad(loss, has_aux=True))
        (total, (corrupted, nats_BL)), gradient = step(raw_BLV)
        assert isinstance(corrupted, Corrupted)
        assert nats_BL.shape == (B, L)
        assert np.isfinite(nats_BL).all()
        assert np.isfinite(gradient).all()
        assert total > 0
        assert float(total) == pytest.approx(float(nats_BL.sum()), rel=1e-5)
        assert np.abs(gradient).max() > 0
        np.testing.assert_array_equal(corrupted.xt_BL[~scored_BL], x0_BL[~scored_BL])
        assert (np.asarray(nats_BL)[~scored_BL] == 0).all()


# ---------------------------------------------------------------- samplers


@pytest.mark.parametrize(
    "name",
    daily(
        sorted(makers("samplers")),
        set(makers("samplers"))
        - {"best_of_n", "euler", "particle", "search_paths", "self_correct", "zero_order"},
    ),
)
def test_sampler(name):
    """In one jit, traced once: tokens in range, no mask left, the clamp respected."""
    ran = 0
    for label, reading, sampler in accepted("samplers", name):
        # Samplers read these models as they read radd; test_two_stream tests one exception, and
        # test_blocks the other.
        if label in ("mdlm", "any_subset", "block"):
            continue
        size = reading.process.num_states
        network = oracle.ConstantNetwork(
            num_states=size, time_conditioned=not reading.time_independent
        )
        raw_BLV = jax.random.normal(jax.random.key(0), (1, L, size))
        denoiser = Denoiser(params=raw_BLV, network=network, parameterization=reading)
        rng = np.random.default_rng(0)
        tokens_BL, fixed_BL = i32(rng.integers(0, N, (B, L))), jnp.asarray(rng.random((B, L)) < 0.4)
        traces = []

        @jax.jit
        def run(keys_B, tokens_BL, fixed_BL, denoiser=denoiser, sampler=sampler, traces=traces):
            traces.append(1)
            return sampler(denoiser, keys_B, tokens_BL, fixed_BL)

        try:
            first = run(keys(0, B), tokens_BL, fixed_BL)
        except ValueError:
            radd = reading.process.absorbing and reading.time_independent
            assert not radd or reading.causal or name == "self_correct"
            continue  # it says that it needs another kind of model
        second = run(keys(1, B), tokens_BL, fixed_BL)
        assert len(traces) == 1
        for samples in (first, second):
            assert isinstance(samples, Samples)
            assert samples.tokens_BL.shape == (B, L)
            assert samples.calls_B.shape == (B,)
            assert ((samples.tokens_BL >= 0) & (samples.tokens_BL < N)).all()
            np.testing.assert_array_equal(
                np.asarray(samples.tokens_BL)[fixed_BL], np.asarray(tokens_BL)[fixed_BL]
            )
        assert (first.tokens_BL != second.tokens_BL).any()
        ran += 1
    assert ran


# ---------------------------------------------------------------- networks


@pytest.mark.parametrize(
    ("name", "label"),
    daily(
        itertools.product(sorted(makers("networks")), ["radd", "sedd"]),
        [*((name, "radd") for name in makers("networks")), ("ddit", "sedd")],
    ),
)
def test_network(name, label):
    reading = MODELS[label]
    if name == "decoder" and not reading.time_independent:
        with pytest.raises(UserError, match="'decoder': takes no noise level: it needs a time-ind"):
            make("networks", name, reading)
        return
    network = make("networks", name, reading)
    params = jax.jit(network.init)(jax.random.key(0))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    tokens_BL = i32(np.random.default_rng(0).integers(0, network.num_states, (B, L)))
    sigma = {"sigma_B": f32([0.1, 1.0, 3.0])}
    right, wrong = (sigma, {}) if network.time_conditioned else ({}, sigma)
    raw = jax.jit(network.raw)
    raw_BLV = raw(params, tokens_BL, **right)
    assert raw_BLV.shape == (B, L, network.num_states)
    assert raw_BLV.dtype == jnp.float32
    assert np.isfinite(raw_BLV).all()
    with pytest.raises(ValueError, match="sigma_B"):
        raw(params, tokens_BL, **wrong)

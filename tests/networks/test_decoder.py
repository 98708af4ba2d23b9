import copy
import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_run
from jax.extend.core import jaxprs_in_params
from tiers import nightly

from sedd.configuration.build import build_parts, build_step
from sedd.configuration.components import options
from sedd.configuration.config import Config
from sedd.errors import FieldError, UserError
from sedd.networks.base import Attend
from sedd.networks.decoder import Decoder
from sedd.networks.rotary import RopeScaling
from sedd.training.state import init_state

B, L, V, N = 3, 8, 13, 11
NET = Decoder(
    num_states=V,
    time_conditioned=False,
    hidden_dim=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=32,
    qkv_bias=True,
    output_bias=True,
    qk_norm=True,
)
TOKENS = jax.random.randint(jax.random.key(1), (B, L), 0, V, jnp.int32)

# These tests compile much and run little.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@functools.cache
def random_params(net):
    """Parameters with nothing at its initial value."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(net.init, jax.random.key(0))
    return jax.tree.map(
        lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape, np.float32), x.dtype), shapes
    )


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def raw(net, params, tokens_BL, **kwargs):
    return net.raw(params, tokens_BL, **kwargs)


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def grads(net, params):
    return jax.grad(lambda params: jax.nn.logsumexp(net.raw(params, TOKENS), -1).sum())(params)


@pytest.mark.parametrize(
    ("fields", "count"),
    [
        ({}, 162_150_144),  # at V = 50258
        (  # LLaDA-8B
            {"num_states": 126464, "hidden_dim": 4096, "num_layers": 32, "num_heads": 32}
            | {"mlp_dim": 12288},
            8_015_581_184,
        ),
        (  # Qwen3-0.6B: tied, heads wider than hidden_dim / num_heads
            {"num_states": 151936, "hidden_dim": 1024, "num_layers": 28, "num_heads": 16}
            | {"num_kv_heads": 8, "head_dim": 128, "mlp_dim": 3072, "qk_norm": True, "tied": True},
            596_049_920,
        ),
        (  # Qwen2.5-0.5B
            {"num_states": 151936, "hidden_dim": 896, "num_layers": 24, "num_heads": 14}
            | {"num_kv_heads": 2, "mlp_dim": 4864, "qkv_bias": True, "tied": True},
            494_032_768,
        ),
    ],
    ids=["default", "llada-8b", "qwen3-0.6b", "qwen2.5-0.5b"],
)
def test_parameter_counts_are_the_published_ones(fields, count):
    net = Decoder(**{"num_states": 50258, "time_conditioned": False, **fields})
    shapes = jax.eval_shape(net.init, jax.random.key(0))
    assert sum(x.size for x in jax.tree.leaves(shapes)) == count


def test_a_fresh_network_returns_zero_unless_it_is_tied():
    for tied in (False, True):
        net = dataclasses.replace(NET, tied=tied)
        out = raw(net, jax.jit(net.init)(jax.random.key(0)), TOKENS)
        assert bool(out.any()) == tied


def test_shared_heads_are_repeated_heads():
    """Two heads of keys give what four give whose parameters are those of the two, repeated."""
    params = random_params(NET)
    blocks = dict(params["trunk"]["blocks"])
    for name in ("key", "value"):
        blocks[name] = {
            kind: jnp.repeat(leaf.reshape(*leaf.shape[:-1], 2, 8), 2, axis=-2).reshape(
                *leaf.shape[:-1], 32
            )
            for kind, leaf in blocks[name].items()
        }
    repeated = params | {"trunk": params["trunk"] | {"blocks": blocks}}
    many = dataclasses.replace(NET, num_kv_heads=4)
    np.testing.assert_allclose(raw(many, repeated, TOKENS), raw(NET, params, TOKENS), atol=1e-5)


@jax.numpy_dtype_promotion("standard")  # the XLA path of jax.nn relies on it
def test_bfloat16_and_another_backend_compute_the_same():
    exact = raw(NET, random_params(NET), TOKENS)
    other = raw(dataclasses.replace(NET, attention="xla"), random_params(NET), TOKENS)
    np.testing.assert_allclose(other, exact, atol=1e-5)
    low = dataclasses.replace(NET, dtype="bfloat16", param_dtype="bfloat16")
    assert {x.dtype.name for x in jax.tree.leaves(random_params(low))} == {"bfloat16"}
    rounded = raw(low, random_params(low), TOKENS)
    assert rounded.dtype == jnp.float32
    assert float(jnp.abs(rounded - exact).mean()) < 0.03 * float(exact.std())


def test_a_tied_head_is_the_embedding():
    tied = dataclasses.replace(NET, tied=True)
    params = random_params(tied)
    assert set(params) == {"trunk"}
    embedding_VD = params["trunk"]["embed"]["embedding"]
    untied = {**params, "head": {"kernel": embedding_VD.T}}
    np.testing.assert_array_equal(raw(tied, params, TOKENS), raw(NET, untied, TOKENS))
    both, single = grads(tied, params), grads(NET, untied)
    expected = single["trunk"]["embed"]["embedding"] + single["head"]["kernel"].T
    np.testing.assert_allclose(both["trunk"]["embed"]["embedding"], expected, atol=1e-5)


def test_a_norm_of_the_embeddings_is_another_table():
    params = random_params(NET)
    table_VD = np.asarray(params["trunk"]["embed"]["embedding"], np.float64)
    table_VD /= np.sqrt(np.square(table_VD).mean(-1, keepdims=True) + NET.norm_eps)
    trunk = {**params["trunk"], "embed": {"embedding": table_VD.astype(np.float32)}}
    normed = raw(dataclasses.replace(NET, embed_norm=True), params, TOKENS)
    np.testing.assert_allclose(normed, raw(NET, {**params, "trunk": trunk}, TOKENS), atol=1e-5)


@pytest.mark.parametrize("remat", [False, True])
def test_every_parameter_has_a_gradient(remat):
    found = grads(dataclasses.replace(NET, remat=remat), random_params(NET))
    for leaf in jax.tree.leaves(found):
        assert bool(jnp.isfinite(leaf).all())
        assert bool(leaf.any())
    for a, b in zip(*map(jax.tree.leaves, (found, grads(NET, random_params(NET)))), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-4)


def test_what_a_block_keeps_for_its_backward_pass():
    """Input, sum of the first branch, q, the output of its heads: D or H·K; k, v; gate, up."""
    params = jax.eval_shape(NET.init, jax.random.key(0))["trunk"]

    def derivative(trunk):
        return jax.vjp(lambda trunk: NET.hidden({"trunk": trunk}, TOKENS), trunk)[1]

    held = jax.tree.leaves(jax.eval_shape(derivative, params))
    layers = [x.shape for x in held if x.shape[:2] == (NET.num_layers, B)]
    assert not [shape for shape in layers if shape[-2:] == (L, L)]  # no attention weights
    entries = sum(math.prod(shape) for shape in layers) // (NET.num_layers * B * L)
    statistics = 2 * NET.num_heads  # the largest logit and the sum of each query
    assert entries == 2 * 24 + 2 * 32 + 2 * 16 + 2 * 32 + statistics


@functools.partial(jax.jit, compiler_options=QUICK)
def extend(params, memory, tokens, positions, rank, write):
    return NET.extend(params, tokens, memory, positions_BM=positions, rank_BM=rank, write_BM=write)


def test_the_memory_gives_the_hidden_states_of_all_rows_together():
    """Positions in a random order, two a call; rows that are not written are seen by nobody."""
    rng = np.random.default_rng(0)
    order_BL = rng.permuted(np.tile(np.arange(L, dtype=np.int32), (B, 1)), axis=1)
    rank_BL = jnp.asarray(np.argsort(order_BL, axis=1).astype(np.int32) // 2)
    attend = Attend(kind="ranks", rank_q_BL=rank_BL, rank_k_BL=rank_BL)
    params = random_params(NET)
    full = jax.jit(NET.hidden, compiler_options=QUICK)(params, TOKENS, attend=attend)
    memory = NET.memory(B, L)
    assert memory.keys.shape == (B, NET.num_layers, L, 2, 8)
    for call in range(L // 2):
        positions = order_BL[:, 2 * call : 2 * call + 2]
        rank, tokens = (np.take_along_axis(np.asarray(x), positions, 1) for x in (rank_BL, TOKENS))
        _, same = extend(params, memory, tokens, positions, rank, np.zeros((B, 2), bool))
        np.testing.assert_array_equal(same.keys, memory.keys)
        hidden, memory = extend(params, memory, tokens, positions, rank, np.ones((B, 2), bool))
        expected = np.take_along_axis(np.asarray(full), positions[..., None], 1)
        np.testing.assert_allclose(hidden, expected, atol=2e-5)


def test_who_sees_whom():
    params, changed = random_params(NET), TOKENS.at[:, 5].set((TOKENS[:, 5] + 1) % V)
    causal = Attend(kind="causal")
    before, after = (raw(NET, params, x, attend=causal) for x in (TOKENS, changed))
    np.testing.assert_array_equal(before[:, :5], after[:, :5])
    assert (np.abs(before - after).max(-1)[:, 5:] > 0).all()
    packed = raw(
        NET,
        params,
        TOKENS.reshape(1, -1),
        positions_BL=jnp.tile(jnp.arange(L, dtype=jnp.int32), B)[None],
        attend=Attend(segment_BL=jnp.repeat(jnp.arange(B, dtype=jnp.int32), L)[None]),
    )
    np.testing.assert_allclose(packed.reshape(B, L, V), raw(NET, params, TOKENS), atol=1e-5)


def products(jaxpr):
    """The FLOPs of all products of a program, those of a scan once for each round."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += 2 * equation.outvars[0].aval.size * math.prod(shape[i] for i in contracted)
        for inner in jaxprs_in_params(equation.params):
            total += products(inner) * equation.params.get("length", 1)
    return total


@pytest.mark.parametrize("tied", [False, True])
def test_flops_are_those_of_the_products(tied):
    net = dataclasses.replace(NET, tied=tied)
    params = jax.eval_shape(net.init, jax.random.key(0))
    program = jax.make_jaxpr(net.raw)(params, TOKENS)
    assert B * net.flops(L, float(L)) == products(program.jaxpr)


def test_long_texts_scale_the_frequencies():
    """Fast channels keep their frequency, that of slow ones is divided by the factor."""
    plain = RopeScaling().frequencies(64, 1e6)
    np.testing.assert_allclose(plain, 1e6 ** (-np.arange(32) / 32))
    for kind, low, high in (("yarn", 1.0, 32.0), ("llama3", 1.0, 4.0)):
        scaling = RopeScaling(
            kind=kind, factor=8.0, original_length=1024, low_turns=low, high_turns=high
        )
        share = scaling.frequencies(64, 1e6) / plain
        turns = 1024 * plain / (2 * np.pi)
        assert (np.diff(share) <= 1e-12).all()
        assert share[turns > 2 * high] == pytest.approx(1)
        assert share[turns < low / 2] == pytest.approx(1 / 8)
        assert ((share > 0.13) & (share < 0.99)).sum() >= 2
    assert RopeScaling(kind="yarn", factor=8.0).amplitude == pytest.approx(0.1 * np.log(8) + 1)
    assert RopeScaling(kind="llama3", factor=8.0).amplitude == 1


@pytest.mark.parametrize(
    "kind", ["ar", nightly("any_subset")]
)  # a recipe trains the conditional model
def test_other_objectives_train_it(kind):
    sizes = {"hidden_dim": 16, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1}
    config = dataclasses.replace(
        tiny_run.config(kind), network=options("networks", "decoder", **sizes)
    )
    parts = build_parts(config, num_tokens=N)
    step = build_step(config, parts)
    state = init_state(step.network, step.optimizer, 0)
    x0 = np.random.default_rng(0).integers(0, N, (1, 4, L), np.int32)
    rows = {"x0": x0, "scored": np.ones(x0.shape, bool), "index": np.arange(4)[None]}
    run = jax.jit(step, static_argnames="axis_name", compiler_options=QUICK)
    after, metrics = run(state, rows, axis_name=None)
    assert metrics["loss"] == pytest.approx(np.log(N), rel=1e-3)  # of a fresh network
    assert bool((after.params["head"]["kernel"] != 0).any())


def test_bfloat16_parameters_are_not_trained():
    low = dataclasses.replace(NET, param_dtype="bfloat16")
    with pytest.raises(FieldError, match=r"network\.param_dtype must be float32 in training"):
        init_state(low, optax.sgd(0.1), 0)


def test_options_survive_json():
    scaling = RopeScaling(kind="yarn", factor=16.0, original_length=4096)
    config = Config(network=options("networks", "decoder", num_kv_heads=3, rope_scaling=scaling))
    data = json.loads(json.dumps(config.to_json()))
    assert data["network"]["rope_scaling"]["factor"] == 16
    assert Config.from_json(data) == config
    net = config.network.build(num_states=7, time_conditioned=False)
    assert net.rope_scaling == scaling
    assert (net.num_kv_heads, net.head_dim, net.mlp_dim) == (3, 64, 2048)
    data["network"]["rope_scaling"]["kind"] = "linear"
    with pytest.raises(UserError, match=r"network\.rope_scaling\.kind must be one of none, yarn"):
        Config.from_json(data)
    data["network"]["rope_scaling"] = {"factors": 2.0}
    with pytest.raises(UserError, match=r"unknown field network\.rope_scaling.factors; did you"):
        Config.from_json(data)
    data["network"]["rope_scaling"] = {"factor": 0.5}
    with pytest.raises(FieldError, match=r"network\.rope_scaling\.factor must be at least 1"):
        Config.from_json(data)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("num_states", 1, "num_states must be at least 2, got 1"),
        ("hidden_dim", 0, "hidden_dim must be at least 1, got 0"),
        ("num_layers", 0, "num_layers must be at least 1, got 0"),
        ("num_kv_heads", 3, "num_kv_heads must divide num_heads, got 3 with 4 heads"),
        ("num_kv_heads", -1, "num_kv_heads must be at least 0, got -1"),
        ("head_dim", 7, r"head_dim must be even .*, got 7"),
        ("norm_eps", 0.0, "norm_eps must be above 0, got 0.0"),
        ("rope_theta", -1.0, "rope_theta must be above 0, got -1.0"),
        ("dtype", "float16", "dtype must be one of float32, bfloat16, got 'float16'"),
        ("param_dtype", "int8", "param_dtype must be one of float32, bfloat16, got 'int8'"),
        ("attention", "cudnn", "attention 'cudnn' needs dtype bfloat16, got 'float32'"),
        ("time_conditioned", True, "takes no noise level: it needs a time-independent"),
    ],
)
def test_fields_are_checked(field, value, words):
    net = copy.copy(NET)
    object.__setattr__(net, field, value)  # what no type checker would let through
    with pytest.raises(ValueError, match=words) as error:
        net.__post_init__()
    assert "\n" not in str(error.value)


def test_widths_that_do_not_fit_are_refused():
    with pytest.raises(FieldError, match="multiple of num_heads where head_dim is 0, got 25 with"):
        Decoder(num_states=3, time_conditioned=False, hidden_dim=25, num_heads=4)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"factor": 0.5}, "factor must be at least 1, got 0.5"),
        ({"original_length": 0}, "original_length must be at least 1, got 0"),
        ({"low_turns": 40.0}, "low_turns must be above 0 and below high_turns, got 40.0 and 32.0"),
        ({"attention_factor": 0.0}, "attention_factor must be above 0, got 0.0"),
        ({"query_growth": -1.0}, "query_growth must not be negative, got -1.0"),
    ],
)
def test_scalings_are_checked(fields, words):
    with pytest.raises(FieldError, match=words):
        RopeScaling(**fields)

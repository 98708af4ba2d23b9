import copy
import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sedd.networks.base import Attend, read_out
from sedd.networks.ddit import DDiT, _Block, drop, make, sigma_features
from sedd.networks.rotary import rotary, rotate

B, L, V = 4, 10, 13
SEDD = DDiT(
    num_states=V,
    time_conditioned=True,
    hidden_dim=24,
    num_layers=3,
    num_heads=3,
    condition_dim=8,
    dropout=0.4,
)
RADD = dataclasses.replace(SEDD, time_conditioned=False, norm_bias=True)
BOTH = pytest.mark.parametrize("net", [SEDD, RADD], ids=["sedd", "radd"])

TOKENS = jax.random.randint(jax.random.key(1), (B, L), 0, V, jnp.int32)
SIGMA = jnp.array([0.01, 0.3, 1.0, 6.0])
POSITIONS = jnp.tile(jnp.arange(L)[None], (B, 1))
KEYS = jax.random.split(jax.random.key(2), B)

# These tests compile much and run little.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@functools.cache
def fresh_params(net):
    return jax.jit(net.init, compiler_options=QUICK)(jax.random.key(0))


@functools.cache
def random_params(net):
    """Parameters with nothing at its initial zero."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(net.init, jax.random.key(0))
    return jax.tree.map(lambda x: 0.3 * rng.standard_normal(x.shape, np.float32), shapes)


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def hidden(net, params, tokens_BL, **kwargs):
    return net.hidden(params, tokens_BL, **kwargs)


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def raw(net, params, tokens_BL, **kwargs):
    return net.raw(params, tokens_BL, **kwargs)


def inputs(net, rows=slice(None), **kwargs):
    return ({"sigma_B": SIGMA[rows]} if net.time_conditioned else {}) | kwargs


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({"time_conditioned": True}, 169_627_218),
        (
            {"time_conditioned": True, "hidden_dim": 1024, "num_layers": 24, "num_heads": 16},
            424_477_010,
        ),
        ({"time_conditioned": False, "norm_bias": True}, 162_265_682),
        (
            {
                "time_conditioned": False,
                "norm_bias": True,
                "hidden_dim": 1024,
                "num_layers": 24,
                "num_heads": 16,
            },
            405_191_762,
        ),
    ],
    ids=["sedd-small", "sedd-medium", "radd-small", "radd-medium"],
)
def test_parameter_counts_are_the_published_ones(options, count):
    shapes = jax.eval_shape(make(num_states=50258, **options).init, jax.random.key(0))
    assert sum(x.size for x in jax.tree.leaves(shapes)) == count


@BOTH
def test_a_fresh_network_returns_zero(net):
    params = fresh_params(net)
    np.testing.assert_array_equal(raw(net, params, TOKENS, **inputs(net)), 0)
    assert hidden(net, params, TOKENS, **inputs(net)).std() > 0.1


def test_initial_distributions():
    """U(±1/√fan_in): the largest of n draws is within 1 - 20/n of the bound but for e^-20."""
    trunk, blocks = fresh_params(SEDD)["trunk"], fresh_params(SEDD)["trunk"]["blocks"]
    drawn = [
        (trunk["embed"]["embedding"], 24),
        (trunk["sigma_map"]["in"]["kernel"], 256),
        (trunk["sigma_map"]["out"]["kernel"], 8),
        (blocks["qkv"]["kernel"], 24),
        (blocks["attention_out"]["kernel"], 24),
        (blocks["mlp_in"]["kernel"], 24),
        (blocks["mlp_in"]["bias"], 24),
        (blocks["mlp_out"]["kernel"], 96),
        (blocks["mlp_out"]["bias"], 96),
    ]
    for values, fan_in in drawn:
        largest = float(jnp.abs(values).max()) * fan_in**0.5
        assert 1 - 20 / values.size < largest <= 1
        assert abs(float(values.mean())) * fan_in**0.5 < 4 * (3 * values.size) ** -0.5  # 4σ
    for modulation in (blocks["modulation"], trunk["modulation"]):
        assert not any(bool(x.any()) for x in jax.tree.leaves(modulation))
    assert not np.array_equal(blocks["qkv"]["kernel"][0], blocks["qkv"]["kernel"][1])
    radd = fresh_params(RADD)["trunk"]
    for norm in (radd["norm"], radd["blocks"]["norm_attention"], radd["blocks"]["norm_mlp"]):
        np.testing.assert_array_equal(norm["scale"], 1)
        np.testing.assert_array_equal(norm["bias"], 1)


@BOTH
def test_raw_is_the_head_on_hidden(net):
    params = random_params(net)
    raw_BLV = raw(net, params, TOKENS, **inputs(net))
    hidden_BLD = hidden(net, params, TOKENS, **inputs(net))
    weight_DV, bias_V = net.head(params)
    exact = np.asarray(hidden_BLD, np.float64) @ np.asarray(weight_DV) + np.asarray(bias_V)
    np.testing.assert_allclose(raw_BLV, exact, atol=1e-5)
    picked = read_out(hidden_BLD[1, 2:4], weight_DV, bias_V)
    np.testing.assert_allclose(picked, raw_BLV[1, 2:4], atol=1e-5)


@pytest.mark.parametrize(("net", "num_layers"), [(SEDD, 4), (RADD, 1)])
def test_the_scan_is_the_loop_over_layers(net, num_layers):
    net = dataclasses.replace(net, num_layers=num_layers)
    trunk = random_params(net)["trunk"]
    hidden_BLD = hidden(net, {"trunk": trunk}, TOKENS, **inputs(net, keys_B=KEYS))

    x_BLD = trunk["embed"]["embedding"][TOKENS]
    condition_BC = None
    if net.time_conditioned:
        condition_BC = sigma_features(SIGMA)
        for name in ("in", "out"):
            layer = trunk["sigma_map"][name]
            condition_BC = jax.nn.silu(condition_BC @ layer["kernel"] + layer["bias"][None])
    rotation = rotary(jnp.arange(L)[None], net.head_dim)
    apply = jax.jit(_Block(net).apply, compiler_options=QUICK)
    for i in range(num_layers):
        block = {"params": jax.tree.map(lambda x, i=i: x[i], trunk["blocks"])}
        condition_B1C = None if condition_BC is None else condition_BC[:, None]
        x_BLD, _ = apply(block, x_BLD, i, condition_B1C, (rotation, rotation), None, KEYS)
    x_BLD = (x_BLD - x_BLD.mean(-1, keepdims=True)) / jnp.sqrt(x_BLD.var(-1, keepdims=True) + 1e-5)
    x_BLD = x_BLD * trunk["norm"]["scale"][None, None]
    if net.norm_bias:
        x_BLD = x_BLD + trunk["norm"]["bias"][None, None]
    if net.time_conditioned:
        layer = trunk["modulation"]
        modulation = (condition_BC @ layer["kernel"] + layer["bias"][None])[:, None]
        shift, scale = jnp.split(modulation, 2, axis=-1)
        x_BLD = x_BLD * (1 + scale) + shift
    np.testing.assert_allclose(hidden_BLD, x_BLD, atol=2e-5)


def test_the_program_does_not_grow_with_depth():
    def size(num_layers):
        net = dataclasses.replace(RADD, num_layers=num_layers)
        shapes = jax.eval_shape(net.init, jax.random.key(0))
        grad = jax.grad(lambda params: net.raw(params, TOKENS).sum())
        return str(jax.make_jaxpr(grad)(shapes)).count(" = ")

    assert size(12) == size(30)


@pytest.mark.parametrize("net", [SEDD, RADD], ids=["sedd", "radd"])
@pytest.mark.parametrize("remat", [False, True])
def test_what_a_block_keeps_for_its_backward_pass(net, remat):
    """By the arrays that the derivative of the trunk holds, but for the parameters."""
    net = dataclasses.replace(net, remat=remat, dropout=0.0)
    params = jax.eval_shape(net.init, jax.random.key(0))["trunk"]

    def derivative(trunk):
        return jax.vjp(lambda trunk: net.hidden({"trunk": trunk}, TOKENS, **inputs(net)), trunk)[1]

    held = jax.tree.leaves(jax.eval_shape(derivative, params))
    layers = [x.shape for x in held if x.shape[:2] == (net.num_layers, B)]
    assert not [shape for shape in layers if shape[-2:] == (L, L)]  # no attention weights
    width = B * L * net.hidden_dim
    wide = sum(math.prod(shape) for shape in layers) / net.num_layers // width
    # The input; q, k, v, the sum over values, the middle and 4 of the MLP; a gate needs its branch.
    assert wide == (1 if remat else 12 if net.time_conditioned else 10)


@pytest.mark.nightly
def test_remat_has_the_same_gradients():
    def grads(net):
        def loss(params):
            raw_BLV = net.raw(params, TOKENS, keys_B=KEYS)
            return jax.nn.logsumexp(raw_BLV, axis=-1).sum()

        return jax.jit(jax.grad(loss), compiler_options=QUICK)(random_params(RADD))

    recomputed = grads(dataclasses.replace(RADD, remat=True))
    for a, b in zip(*map(jax.tree.leaves, (grads(RADD), recomputed)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-4)


def test_dropout_keeps_the_mean():
    """512·96·5 Bernoulli draws: 4σ of their mean, each of variance rate / (1 - rate)."""
    rate = 0.3
    keys = jax.random.split(jax.random.key(3), 512)
    ones = jax.jit(lambda index: drop(jnp.ones((512, 96, 5)), keys, index, rate))
    dropped = ones(jnp.int32(7))
    error = 4 * np.sqrt(rate / (1 - rate) / dropped.size)
    assert abs(float(dropped.mean()) - 1) < error
    np.testing.assert_allclose(np.unique(dropped), [0, 1 / (1 - rate)], rtol=1e-6)
    other = ones(jnp.int32(8))
    agree = float(((dropped > 0) == (other > 0)).mean())
    chance = rate**2 + (1 - rate) ** 2
    assert abs(agree - chance) < 4 * np.sqrt(chance * (1 - chance) / dropped.size)


@BOTH
def test_dropout_depends_on_the_key_of_the_example_alone(net):
    params = random_params(net)

    def outputs(rows, keys=KEYS):
        return hidden(net, params, TOKENS[rows], **inputs(net, rows, keys_B=keys[rows]))

    whole = outputs(np.arange(B))
    order = np.array([2, 0, 3, 1])
    np.testing.assert_allclose(outputs(order), whole[order], atol=1e-4)
    halves = [outputs(np.arange(2)), outputs(np.arange(2, B))]
    np.testing.assert_allclose(jnp.concatenate(halves), whole, atol=1e-4)
    assert float(jnp.abs(outputs(np.arange(B), KEYS[::-1]) - whole).max()) > 0.1
    assert float(jnp.abs(hidden(net, params, TOKENS, **inputs(net)) - whole).max()) > 0.1


def test_no_dropout_without_keys_or_rate():
    params = random_params(RADD)
    none = dataclasses.replace(RADD, dropout=0.0)
    np.testing.assert_array_equal(
        hidden(none, params, TOKENS, keys_B=KEYS), hidden(RADD, params, TOKENS)
    )


@BOTH
@jax.numpy_dtype_promotion("standard")  # the XLA path of jax.nn relies on it
def test_bfloat16_computes_what_float32_does(net):
    exact = raw(net, random_params(net), TOKENS, **inputs(net))
    for attention in ("einsum", "xla"):
        low = dataclasses.replace(net, dtype="bfloat16", attention=attention)
        raw_BLV = raw(low, random_params(net), TOKENS, **inputs(net))
        assert raw_BLV.dtype == jnp.float32
        assert float(jnp.abs(raw_BLV - exact).mean()) < 0.02 * float(exact.std())


def test_bfloat16_keeps_parameters_and_gradients_in_float32():
    low = dataclasses.replace(RADD, dtype="bfloat16")
    params = random_params(low)
    shapes = jax.eval_shape(low.init, jax.random.key(0))
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(shapes))

    @functools.partial(jax.jit, compiler_options=QUICK)
    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss_and_grads(params):
        hidden_BLD = low.hidden(params, TOKENS)
        return (read_out(hidden_BLD, *low.head(params)) ** 2).mean(), hidden_BLD

    (loss, hidden_BLD), grads = loss_and_grads(params)
    assert hidden_BLD.dtype == jnp.bfloat16
    assert loss.dtype == jnp.float32
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(grads))
    assert all(bool(jnp.isfinite(x).all()) and bool(x.any()) for x in jax.tree.leaves(grads))


def test_sigma_is_required_or_refused():
    with pytest.raises(ValueError, match="sigma_B is required"):
        SEDD.hidden(random_params(SEDD), TOKENS)
    with pytest.raises(ValueError, match="sigma_B must be None"):
        RADD.hidden(random_params(RADD), TOKENS, sigma_B=SIGMA)


def test_sigma_features_by_the_formula():
    k = np.arange(128)
    phase = np.asarray(SIGMA, np.float64)[:, None] * np.exp(-np.log(1e4) * k / 128)
    expected = np.concatenate([np.cos(phase), np.sin(phase)], axis=-1)
    np.testing.assert_allclose(sigma_features(SIGMA), expected, atol=1e-6)


def test_each_example_is_conditioned_on_its_own_sigma():
    params = random_params(SEDD)
    whole = raw(SEDD, params, TOKENS, sigma_B=SIGMA)
    changed = raw(SEDD, params, TOKENS, sigma_B=SIGMA.at[1].add(1.0))
    np.testing.assert_array_equal(np.abs(whole - changed).max((1, 2)) > 1e-3, np.arange(B) == 1)


def test_rotary_products_depend_on_the_distance_alone():
    """Phases up to 1e3 in float32 are 6e-5 off; a product of 8 unit terms stays below 1e-3."""
    q, k = jax.random.normal(jax.random.key(0), (2, 1, L, 1, 8))

    def products(positions):
        rotation = rotary(positions[None], 8)
        return jnp.einsum("bqhk,bshk->qs", rotate(q, rotation), rotate(k, rotation))

    positions = jnp.arange(L)
    np.testing.assert_allclose(products(positions + 1000), products(positions), atol=1e-3)
    assert float(jnp.abs(products(2 * positions) - products(positions)).max()) > 0.1
    turned = rotate(q, rotary(positions[None], 8))
    np.testing.assert_allclose(
        jnp.linalg.norm(turned, axis=-1), jnp.linalg.norm(q, axis=-1), atol=1e-5
    )
    np.testing.assert_array_equal(turned[:, 0], q[:, 0])


def test_rotary_turns_half_split_pairs():
    """Channels k and k + K/2 are the plane that turns by position·10⁴^(-2k/K)."""
    rotation = rotary(jnp.array([[3]]), 8)
    for k in range(4):
        turned = rotate(jnp.zeros((1, 1, 1, 8)).at[..., k].set(1), rotation)[0, 0, 0]
        angle = 3 * 1e4 ** (-2 * k / 8)
        expected = np.zeros(8)
        expected[[k, k + 4]] = np.cos(angle), np.sin(angle)
        np.testing.assert_allclose(turned, expected, atol=1e-6)


@BOTH
def test_the_network_sees_positions_only_through_their_differences(net):
    def at(positions_BL):
        return raw(net, random_params(net), TOKENS, **inputs(net, positions_BL=positions_BL))

    default = raw(net, random_params(net), TOKENS, **inputs(net))
    np.testing.assert_allclose(at(POSITIONS), default, atol=1e-4)
    np.testing.assert_allclose(at(POSITIONS + 50), default, atol=1e-3)
    assert float(jnp.abs(at(2 * POSITIONS) - default).max()) > 0.05


@BOTH
def test_permuting_tokens_with_their_positions_permutes_the_output(net):
    order = np.random.default_rng(0).permutation(L)

    def at(tokens_BL, positions_BL):
        return raw(net, random_params(net), tokens_BL, **inputs(net, positions_BL=positions_BL))

    for positions in (POSITIONS, 0 * POSITIONS):
        moved = at(TOKENS[:, order], positions[:, order])
        np.testing.assert_allclose(moved, at(TOKENS, positions)[:, order], atol=1e-4)
    assert (
        float(jnp.abs(at(TOKENS[:, order], POSITIONS) - at(TOKENS, POSITIONS)[:, order]).max())
        > 1e-2
    )


def test_sigma_may_differ_by_position():
    """The same σ everywhere is that of the sequence; another one at a position changes it."""
    params, sigma_BL = random_params(SEDD), jnp.repeat(SIGMA[:, None], L, 1)
    alone, together, changed = (
        raw(SEDD, params, TOKENS, sigma_B=sigma)
        for sigma in (SIGMA, sigma_BL, sigma_BL.at[0, 2].add(1.0))
    )
    np.testing.assert_allclose(together, alone, atol=1e-5)
    assert (np.abs(changed - alone).max((1, 2)) > 1e-3).tolist() == [True] + [False] * (B - 1)


def test_causal_hidden_states_ignore_the_future():
    params = random_params(RADD)
    attend = Attend(kind="causal")
    changed = TOKENS.at[:, 6].set((TOKENS[:, 6] + 1) % V)
    before, after = (hidden(RADD, params, x, attend=attend) for x in (TOKENS, changed))
    np.testing.assert_array_equal(before[:, :6], after[:, :6])
    assert (np.abs(before - after).max(-1)[:, 6:] > 0).all()


@BOTH
def test_padding_in_its_own_segment_changes_nothing(net):
    params = random_params(net)
    padded = jnp.concatenate([TOKENS, jnp.full((B, 3), V - 1)], axis=1)
    segment_BL = jnp.tile(jnp.array([0] * L + [1] * 3)[None], (B, 1))
    attended = raw(net, params, padded, **inputs(net, attend=Attend(segment_BL=segment_BL)))
    alone = raw(net, params, TOKENS, **inputs(net))
    np.testing.assert_allclose(attended[:, :L], alone, atol=1e-5)
    leaking = raw(net, params, padded, **inputs(net))
    assert float(jnp.abs(leaking[:, :L] - alone).max()) > 1e-2


def test_packed_documents_are_as_if_alone():
    params = random_params(RADD)
    packed = TOKENS.reshape(1, B * L)
    segment_BL = jnp.repeat(jnp.arange(B), L)[None]
    positions_BL = jnp.tile(jnp.arange(L), B)[None]
    together = raw(
        RADD, params, packed, positions_BL=positions_BL, attend=Attend(segment_BL=segment_BL)
    )
    np.testing.assert_allclose(together.reshape(B, L, V), raw(RADD, params, TOKENS), atol=1e-5)


def test_an_empty_row_has_finite_gradients():
    params = random_params(RADD)
    attend = Attend(kind="ranks", rank_q_BL=POSITIONS, rank_k_BL=POSITIONS, strict=True)
    loss = jax.grad(lambda p: (RADD.raw(p, TOKENS, attend=attend) ** 2).mean())
    grads = jax.jit(loss, compiler_options=QUICK)(params)
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(grads))


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("num_states", 1, "num_states must be at least 2, got 1"),
        ("hidden_dim", 25, "hidden_dim .* got 25 with 3 heads"),
        ("hidden_dim", 27, "hidden_dim .* got 27 with 3 heads"),
        ("num_layers", 0, "num_layers must be at least 1, got 0"),
        ("num_heads", 0, "num_heads must be at least 1, got 0"),
        ("condition_dim", -1, "condition_dim must be at least 1, got -1"),
        ("mlp_ratio", 0, "mlp_ratio must be at least 1, got 0"),
        ("dropout", 1.0, r"dropout must be in \[0, 1\), got 1.0"),
        ("dtype", "float16", "dtype must be one of float32, bfloat16, got 'float16'"),
        ("attention", "flash", "attention must be one of auto, .*, got 'flash'"),
        ("attention", "cudnn", "attention 'cudnn' needs dtype bfloat16, got 'float32'"),
    ],
)
def test_fields_are_checked(field, value, words):
    net = copy.copy(SEDD)
    object.__setattr__(net, field, value)  # what no type checker would let through
    with pytest.raises(ValueError, match=words) as error:
        net.__post_init__()
    assert "\n" not in str(error.value)


def test_cudnn_head_width_is_checked():
    options = {"dtype": "bfloat16", "attention": "cudnn"}
    with pytest.raises(ValueError, match="multiple of 8 and at most 128, got 4"):
        dataclasses.replace(SEDD, hidden_dim=12, **options)
    assert dataclasses.replace(SEDD, **options).head_dim == 8


def test_a_kernel_by_name_does_not_get_in_the_way_of_init():
    net = dataclasses.replace(SEDD, attention="splash")
    assert jax.eval_shape(net.init, jax.random.key(0)) == jax.eval_shape(
        SEDD.init, jax.random.key(0)
    )

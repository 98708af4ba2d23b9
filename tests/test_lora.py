"""Low-rank adapters: what they compute, what they learn, and the commands that train them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
from tiers import daily

import sedd
from sedd.configuration.components import build
from sedd.denoiser import Denoiser
from sedd.errors import FieldError
from sedd.model import read_config
from sedd.networks.causal_head import CausalHead
from sedd.networks.ddit import DDiT
from sedd.networks.decoder import Decoder
from sedd.networks.lora import Lora, merged
from sedd.objectives.lambda_dce import LambdaDCE
from sedd.parameterizations.conditional import Conditional
from sedd.processes.absorbing import Absorbing
from sedd.reshape import Reshape
from sedd.schedules import LogLinear
from sedd.training.optimizer import OptimizerOptions, make_optimizer
from sedd.training.state import init_state
from sedd.training.step import Step

V, L = 11, 8
READING = Conditional(process=Absorbing(num_tokens=16))
SIZES = {"num_states": V, "hidden_dim": 16, "num_layers": 2, "num_heads": 2}
NETWORKS = {
    "sedd": DDiT(**SIZES, time_conditioned=True, condition_dim=8, lora=Lora(rank=3)),
    "radd": DDiT(
        **SIZES,
        time_conditioned=False,
        norm_bias=True,
        lora=Lora(rank=3, alpha=5.0, layers="qkv, mlp_out"),
    ),
    "decoder": Decoder(
        **SIZES, time_conditioned=False, num_kv_heads=1, qkv_bias=True, lora=Lora(rank=3)
    ),
}
TOKENS = jax.random.randint(jax.random.key(0), (2, L), 0, V, jnp.int32)
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def raw(net, params):
    return net.raw(params, TOKENS, sigma_B=jnp.ones(2) if net.time_conditioned else None)


def moved(params, seed=0):
    """Parameters with nothing at its first value."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: (x + 0.3 * rng.standard_normal(x.shape)).astype(x.dtype), params)


@pytest.mark.parametrize("name", daily(NETWORKS, ["radd"]))
def test_fresh_adapters_change_nothing_and_merged_equal_unmerged(name):
    net = NETWORKS[name]
    params = net.init(jax.random.key(0))
    fresh, params = params["adapters"], moved(params)
    plain = dataclasses.replace(net, lora=Lora())
    base = {name: tree for name, tree in params.items() if name != "adapters"}
    assert jax.tree.structure(jax.eval_shape(plain.init, jax.random.key(0))) == jax.tree.structure(
        base
    )
    expected = raw(plain, base)
    np.testing.assert_array_equal(raw(net, params | {"adapters": fresh}), expected)

    adapted = raw(net, params)
    assert abs(adapted - expected).max() > 0.1
    network, whole = merged(net, params)
    assert network == plain
    np.testing.assert_allclose(raw(plain, whole), adapted, atol=1e-5 * abs(adapted).max())
    for kernel, before in zip(*map(jax.tree.leaves, (whole, base)), strict=True):
        assert kernel.dtype == before.dtype
    assert merged(plain, whole) == (plain, whole)


def test_only_the_named_layers_have_adapters():
    net = NETWORKS["radd"]
    blocks = net.init(jax.random.key(0))["adapters"]["blocks"]
    assert {name: tree["a"].shape + tree["b"].shape for name, tree in blocks.items()} == {
        "qkv": (2, 16, 3, 2, 3, 48),
        "mlp_out": (2, 64, 3, 2, 3, 16),
    }
    assert net.lora.scale == 5 / 3
    assert Lora(rank=4).scale == 2


def test_training_flops_count_no_gradient_of_frozen_matrices():
    """Written out for the decoder: forward, gradients of rows, and those of the adapters."""
    net = NETWORKS["decoder"]
    layer = 16 * (16 + 8 + 8 + 16) + 3 * 16 * net.mlp_dim
    factors = 3 * (32 + 24 + 24 + 32 + 3 * (16 + net.mlp_dim))
    attention = 4 * L * 16
    rows = L * 2 * (2 * 2 * layer + 3 * attention + 3 * 2 * factors)
    assert net.training_flops(L, 5.0) == rows + 2 * 2 * 5 * 16 * V


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Lora(rank=-1), "rank must not be negative, got -1"),
        (lambda: Lora(rank=2, alpha=0.0), "alpha must be positive, got 0"),
        (
            lambda: dataclasses.replace(NETWORKS["decoder"], lora=Lora(rank=2, layers="qery")),
            r"lora.layers has 'qery'; did you mean 'query'\?; the linear layers of this network "
            "are query, key, value, attention_out, mlp_gate, mlp_up, mlp_down",
        ),
        (
            lambda: CausalHead(**SIZES, time_conditioned=False, lora=Lora(rank=2)),
            "lora.rank goes with ddit and decoder: causal_head trains a block of its own",
        ),
    ],
)
def test_mistakes_name_the_option(make, message):
    with pytest.raises(FieldError, match=message):
        make()


# ---------------------------------------------------------------- sedd train, sedd export


@pytest.fixture(scope="module")
def base(tmp_path_factory, text):
    config = tiny_run.config("radd", corpus=str(text))
    network = dataclasses.replace(config.network, norm_bias=True)
    config = dataclasses.replace(config, network=network)
    return tiny_run.make_run(tmp_path_factory.mktemp("base") / "run", config)


def train(workdir, text, *flags):
    few = ("--data.corpus", text, "--training.steps", 2, "--evaluation.max-sequences", 8)
    fast = ("--optimizer.warmup-steps", 0, "--optimizer.learning-rate", 0.01)
    norms = ("--network.norm-bias", *fast)
    return tiny_run.call("train", *tiny_run.TINY, "--workdir", workdir, *norms, *few, *flags)


@pytest.fixture(scope="module")
def adapted(tmp_path_factory, text, base):
    workdir = tmp_path_factory.mktemp("runs") / "adapted"
    outcome = train(workdir, text, "--init-from", base, "--lora", 4)
    assert outcome.code == 0, outcome.err
    return workdir, outcome


@pytest.mark.nightly
def test_a_run_trains_the_adapters_only_and_loads_as_any_other(adapted, base):
    workdir, outcome = adapted
    model, before = sedd.load(workdir), sedd.load(base)
    params = dict(model.denoiser.params)
    adapters = params.pop("adapters")
    count, total = (sum(x.size for x in jax.tree.leaves(t)) for t in (adapters, params))
    assert outcome.out.startswith(f"{total + count:,} parameters ({count:,} of them trained) · ")
    assert jax.tree.all(jax.tree.map(np.array_equal, params, before.denoiser.params))
    assert all(leaf.any() for leaf in jax.tree.leaves(adapters))
    assert read_config(workdir).network.lora.rank == 4
    assert sedd.sample(model, jax.random.key(0), num=1, sampler="ordered").tokens.shape == (1, 12)


@pytest.mark.nightly
def test_a_run_with_adapters_is_resumed(adapted, tmp_path, text, base):
    workdir = tmp_path / "resumed"
    flags = ("--init-from", base, "--lora", 4)
    for steps in (1, 2):
        outcome = train(workdir, text, *flags, "--training.steps", steps)
        assert outcome.code == 0, outcome.err
    one, other = (sedd.load(path).denoiser.params for path in (workdir, adapted[0]))
    assert jax.tree.all(jax.tree.map(np.array_equal, one, other))
    outcome = train(workdir, text, *flags[:2], "--lora", 8)
    assert outcome.errors == [
        f"error: --workdir {workdir}: it holds a run of another configuration: network.lora.rank "
        "was 4 and is now 8. Choose another directory, or the same values"
    ]


@pytest.mark.nightly
def test_export_merges(adapted, tmp_path):
    model = sedd.load(adapted[0])
    outcome = tiny_run.call("export", "--checkpoint", adapted[0], "--output", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    exported = sedd.load(tmp_path / "out")
    assert exported.config.network.lora == Lora()
    x_BL = np.full((2, 12), model.process.mask_id)
    expected = model.log_conditional(x_BL)
    np.testing.assert_allclose(exported.log_conditional(x_BL), expected, atol=1e-5)


@pytest.mark.nightly
@pytest.mark.parametrize("rank", [4, 0])
def test_a_run_starts_from_adapters_of_another(adapted, tmp_path, text, rank):
    """Equal ones go on, others are merged: in both cases the first model is that of the source."""
    outcome = train(
        *(tmp_path / "next", text, "--init-from", adapted[0], "--lora", rank),
        *("--optimizer.learning-rate", 1e-12),
    )
    assert outcome.code == 0, outcome.err
    before, after = sedd.load(adapted[0]), sedd.load(tmp_path / "next")
    assert ("adapters" in after.denoiser.params) == (rank > 0)
    x_BL = np.full((2, 12), before.process.mask_id)
    expected = before.log_conditional(x_BL)
    np.testing.assert_allclose(after.log_conditional(x_BL), expected, atol=1e-5)


def test_adapters_need_a_trained_network(tmp_path, text):
    assert train(tmp_path / "run", text, "--lora", 4).errors == [
        "error: --network.lora.rank is 4: adapters are trained beside a trained network, name one "
        "by --init-from"
    ]


def test_the_flag_is_an_option_of_the_network(tmp_path, text, base):
    flags = ("--init-from", base, "--lora", "many")
    [error] = train(tmp_path / "run", text, *flags).errors
    assert error.startswith("error: --network.lora.rank: not a whole number: 'many'")


# ---------------------------------------------------------------- what they learn


def learned(net, rate, x0_BL, scored_BL, params=None):
    """The state after 500 steps on one batch, and the state before."""
    settings = OptimizerOptions(
        **{"learning_rate": rate, "warmup_steps": 10, "schedule": "cosine"},
        **{"beta2": 0.99, "ema_decay": 0.9},
    )
    optimizer = make_optimizer(settings, 500)
    step = Step(
        network=net,
        objective=LambdaDCE(schedule=LogLinear(), parameterization=READING),
        optimizer=optimizer,
        ema_decay=settings.ema_decay,
        batch_size=len(x0_BL),
    )
    index_B = np.arange(len(x0_BL))
    batch = {"x0": x0_BL[None], "scored": scored_BL[None], "index": index_B[None]}
    start = init_state(net, optimizer, 0, params=params)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def train(state):
        return jax.lax.scan(lambda s, _: step(s, batch, axis_name=None), state, length=500)[0]

    return train(start), start


def answers(net, state, x0_BL, scored_BL):
    """The tokens with the most likely ones, from left to right, in the place of the scored ones."""
    denoiser = Denoiser(
        params=state.averaged,
        network=net,
        parameterization=READING,
        reshape=Reshape.of(temperature=0.0),
    )
    sampler = build("samplers", "ordered", schedule=LogLinear())
    asked_BL = np.where(scored_BL, READING.process.mask, x0_BL)
    keys_B = jax.random.split(jax.random.key(1), len(x0_BL))
    return jax.jit(sampler)(denoiser, keys_B, asked_BL, ~scored_BL).tokens_BL


@pytest.mark.nightly
def test_eight_answers_are_learned_by_all_parameters_then_eight_others_by_adapters():
    """Prompts of four tokens with answers of eight, which are random and cannot be inferred."""
    first_BL, second_BL = np.random.default_rng(0).integers(0, 16, (2, 8, 12), np.int32)
    scored_BL = np.broadcast_to(np.arange(12) >= 4, first_BL.shape)
    net = Decoder(
        num_states=17,
        time_conditioned=False,
        hidden_dim=32,
        num_layers=2,
        num_heads=2,
        tied=True,
    )
    state, _ = learned(net, 3e-3, first_BL, scored_BL)
    np.testing.assert_array_equal(answers(net, state, first_BL, scored_BL), first_BL)

    adapted = dataclasses.replace(net, lora=Lora(rank=8))
    assert (answers(net, state, second_BL, scored_BL) != second_BL).any()
    after, before = learned(adapted, 1e-2, second_BL, scored_BL, state.averaged)
    np.testing.assert_array_equal(answers(adapted, after, second_BL, scored_BL), second_BL)
    same = jax.tree.map(np.array_equal, after.params["trunk"], before.params["trunk"])
    assert jax.tree.all(same)

"""The network with a latent, its loss and its teacher by enumeration, and training with it."""

import functools
import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
import tiny_run
from oracle import N, f32, i32, keys
from scipy import stats
from tiers import nightly

import sedd
from sedd.denoiser import Denoiser
from sedd.errors import UserError
from sedd.networks.ddit import DDiT
from sedd.networks.latent import Latent
from sedd.objectives.lambda_dce import LambdaDCE
from sedd.objectives.latent_distill import LatentDistill
from sedd.parameterizations.conditional import Conditional
from sedd.processes.absorbing import Absorbing
from sedd.samplers.ordered import Ordered
from sedd.samplers.speculative import Speculative
from sedd.schedules import LogLinear

SIZES = {"hidden_dim": 32, "num_layers": 1, "num_heads": 2, "dropout": 0.0, "norm_bias": True}
SIZES |= {"num_states": N + 1, "time_conditioned": False}
NET, TRUNK = Latent(latents=2, **SIZES), DDiT(**SIZES)
FITS = {
    "schedule": LogLinear(),
    "parameterization": Conditional(process=Absorbing(num_tokens=N)),
}


@functools.cache
def params():
    """Parameters with an output layer that is not 0."""
    fresh = jax.jit(NET.init)(jax.random.key(0))
    kernel = 0.3 * jax.random.normal(jax.random.key(5), fresh["head"]["kernel"].shape)
    return fresh | {"head": fresh["head"] | {"kernel": kernel}}


hidden = jax.jit(NET.hidden)


def log_probs(params, x_BL, latent_BZ=None):
    raw_BLV = hidden(params, x_BL, latent_BZ=latent_BZ) @ params["head"]["kernel"]
    return jax.nn.log_softmax((raw_BLV + params["head"]["bias"])[..., :N], -1)


# ---------------------------------------------------------------- the network


def test_without_a_latent_it_is_ddit_and_the_latent_acts_through_masks_alone():
    x_BL = i32([[0, N, 1, N], [2, 1, 0, 1]])
    trunk = {name: params()[name] for name in ("trunk", "head")}
    plain_BLD = jax.jit(TRUNK.hidden)(trunk, x_BL)
    np.testing.assert_array_equal(hidden(params(), x_BL), plain_BLD)
    np.testing.assert_allclose(
        hidden(params(), x_BL, latent_BZ=jnp.zeros((2, 2))), plain_BLD, atol=1e-6
    )
    given_BLD = hidden(params(), x_BL, latent_BZ=jnp.ones((2, 2)))
    assert np.abs(given_BLD - plain_BLD)[0].min(-1).max() > 1e-3
    np.testing.assert_allclose(given_BLD[1], plain_BLD[1], atol=1e-6)  # no mask, no noise


# ---------------------------------------------------------------- the loss


def test_loss_and_gradient_are_those_of_the_formula():
    """-L/M·log mean_s Π c, differentiated as it stands."""
    objective = LatentDistill(**FITS, samples=3, data=0.4)
    x0 = i32(np.random.default_rng(0).integers(0, N, (5, 4)))
    drawn = i32(np.random.default_rng(1).integers(0, N, (5, 4)))
    scored = jnp.ones((5, 4), bool).at[2, 1].set(False)
    corrupted = jax.jit(objective.corrupt)(keys(0, 5), jnp.linspace(0.1, 0.9, 5), x0, scored)
    assert (np.asarray(corrupted.xt_BL)[2, 1] == np.asarray(x0)[2, 1]).all()
    corrupted = replace(corrupted, drawn_BL=drawn)
    masked_BL, weight_BL = corrupted.weight_BL > 0, corrupted.weight_BL

    def fold(number):
        return jax.vmap(jax.random.fold_in, (0, None))(corrupted.keys_B, number)

    coin_B = jax.vmap(jax.random.uniform)(fold(2)) < 0.4
    assert 0 < coin_B.sum() < 5
    target = jnp.where(coin_B[:, None], x0, drawn)
    noise_BSZ = jax.vmap(lambda key: jax.random.normal(key, (3, 2)))(fold(3))

    def formula(params):
        each = []
        for s in range(3):
            log_probs_BLN = log_probs(params, corrupted.xt_BL, noise_BSZ[:, s])
            own_BL = jnp.take_along_axis(log_probs_BLN, target[..., None], -1)[..., 0]
            each.append(jnp.where(masked_BL, own_BL, 0).sum(-1))
        log_mean_B = jax.nn.logsumexp(jnp.stack(each), 0) - jnp.log(3)
        return -(weight_BL.max(1) * log_mean_B).sum()

    value, gradient = jax.jit(jax.value_and_grad(formula))(params())
    got, got_gradient = jax.jit(
        jax.value_and_grad(lambda p: objective.summed_nats(NET, p, corrupted, x0))
    )(params())
    np.testing.assert_allclose(got, value, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), got_gradient, gradient
    )
    nats_BL = jax.jit(objective.nats, static_argnums=0)(NET, params(), corrupted, x0)
    np.testing.assert_allclose(nats_BL.sum(), value, rtol=1e-5)
    assert (np.asarray(nats_BL)[~np.asarray(masked_BL)] == 0).all()


@pytest.mark.parametrize("calls", [nightly(1), 4])
def test_the_teacher_draws_the_law_of_its_calls(calls):
    """Four calls on four positions are exact, one call is independent."""
    exact = oracle.Oracle("absorbing", seed=3)
    teacher, count = exact.conditional_denoiser(), 20_000
    objective = LatentDistill(**FITS, calls=calls)
    x0 = jnp.zeros((count, 4), jnp.int32)
    ones = jnp.ones(count)

    @jax.jit
    def drawn():
        corrupted = objective.corrupt(keys(1, count), 0.999 * ones, x0, jnp.ones(x0.shape, bool))
        return objective.taught(teacher.network, teacher.params, corrupted).drawn_BL

    counts = oracle.counts_of(np.asarray(drawn()), N)
    one_by_one = exact.joint.ravel()
    each = [exact.joint.sum(tuple(j for j in range(4) if j != i)) for i in range(4)]
    independent = functools.reduce(np.multiply.outer, each).ravel()
    right, wrong = (one_by_one, independent) if calls == 4 else (independent, one_by_one)
    assert oracle.chi_square_p(counts, right) > 1e-3
    assert oracle.chi_square_p(counts, wrong) < 1e-6


@pytest.mark.nightly
def test_one_call_draws_equal_tokens_which_no_product_can():
    """x1 = x2 uniform over 3 tokens, distilled from two calls of an exact teacher.

    The total variation is that of the whole law, by 40,000 latents on a grid of quantiles. The best
    product, two of the tokens with 1/2 each, has 1/2.
    """
    pair = i32([[N, N]])
    states = oracle.all_states(N + 1, 2)
    table = np.zeros((len(states), 2, N + 1))
    for (row, x), place in itertools.product(enumerate(states), range(2)):
        other = x[1 - place]
        table[row, place, :N] = 0 if other == N else -30.0 * (np.arange(N) != other)
    teacher = oracle.TableNetwork(num_states=N + 1, time_conditioned=False)
    objective = LatentDistill(**FITS, calls=2, samples=16, data=0.0)
    optimizer = optax.adam(optax.warmup_cosine_decay_schedule(0, 5e-3, 20, 1500), b2=0.99)
    batch = 256
    x0 = jnp.zeros((batch, 2), jnp.int32)

    def step(carry, key):
        student, state = carry
        corrupted = objective.corrupt(
            jax.random.split(key, batch),
            (jnp.arange(batch) + 0.5) / batch,
            x0,
            jnp.ones((batch, 2), bool),
        )
        corrupted = objective.taught(teacher, {"table": f32(table)}, corrupted)
        gradient = jax.grad(lambda p: objective.summed_nats(NET, p, corrupted, x0) / batch)(student)
        updates, state = optimizer.update(gradient, state, student)
        return (optax.apply_updates(student, updates), state), None

    keys_T = jax.random.split(jax.random.key(1), 1500)
    run = jax.jit(
        lambda carry: jax.lax.scan(step, carry, keys_T), compiler_options=oracle.THOROUGHLY
    )
    (student, _), _ = run((params(), optimizer.init(params())))
    quantile = stats.norm.ppf((np.arange(200) + 0.5) / 200)
    latent_BZ = f32(np.array(list(itertools.product(quantile, quantile))))
    each = np.exp(log_probs(student, jnp.tile(pair, (len(latent_BZ), 1)), latent_BZ))
    law = np.einsum("ea,eb->ab", each[:, 0], each[:, 1]) / len(latent_BZ)
    assert oracle.total_variation(law, np.eye(N) / N) < 0.02  # 0.012 to 0.019 by four seeds
    product = np.multiply.outer(law.sum(1), law.sum(0))
    assert oracle.total_variation(product, np.eye(N) / N) > 0.5  # control: what one latent can do


# ---------------------------------------------------------------- draws


def test_each_call_has_a_latent_of_its_own_by_the_key_of_the_sequence():
    model = Denoiser(
        params=params(),
        network=NET,
        parameterization=FITS["parameterization"],
        latent_keys_B=keys(3, 2),
    )
    x_BL = i32([[N, N, 0, 1], [N, N, 0, 1]])
    first, second = model.hidden(x_BL)[0]
    assert np.abs(first - second).max() > 1e-3
    np.testing.assert_array_equal(model.hidden(x_BL)[0], model.hidden(x_BL)[0])
    turned = replace(model, latent_keys_B=keys(3, 2)[::-1])
    np.testing.assert_allclose(turned.hidden(x_BL)[0][0], second, atol=1e-6)
    copies = model.repeat(2)
    assert len({each.tobytes() for each in jax.random.key_data(copies.latent_keys_B)}) == 4
    with pytest.raises(UserError, match="different latents here"):
        Speculative(schedule=LogLinear()).check(model)
    Ordered(schedule=LogLinear()).check(model)


def test_only_the_two_go_together():
    with pytest.raises(UserError, match="trains a network with a latent, and this one has none"):
        LatentDistill(**FITS).check(TRUNK)
    with pytest.raises(UserError, match="does not train the latent of the network"):
        LambdaDCE(**FITS).check(NET)
    LatentDistill(**FITS).check(NET)


# ---------------------------------------------------------------- commands


def train(workdir, text, *flags):
    network = ("--network", "latent", "--network.latents", 3)
    if "--objective" not in flags:
        network = (*network, "--objective", "latent_distill", "--objective.samples", 2)
        network = (*network, "--objective.calls", 2)
    few = ("--data.corpus", text, "--training.steps", 2, "--evaluation.max-sequences", 8)
    return tiny_run.call("train", *tiny_run.TINY, "--workdir", workdir, *network, *few, *flags)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, text, trunk):
    workdir = tmp_path_factory.mktemp("runs") / "latent"
    outcome = train(workdir, text, "--teacher", trunk)
    assert outcome.code == 0, outcome.err
    return workdir, outcome


@pytest.mark.nightly
def test_a_run_prints_what_the_latent_gains_and_draws_by_it(trained, text):
    assert "nats per masked token" in trained[1].out
    assert "perplexity" not in trained[1].out
    model = sedd.load(trained[0])
    drawing = functools.partial(sedd.sample, model, sampler="ordered", order="random", steps=2)
    key = jax.random.split(jax.random.key(5), 2)
    drawn, turned = drawing(key), drawing(key[::-1])
    np.testing.assert_array_equal(drawn.tokens, turned.tokens[::-1])
    np.testing.assert_array_equal(drawn.calls, 2)
    outcome = tiny_run.call(
        "evaluate", "--checkpoint", trained[0], "--data", text, "--max-sequences", 4, "--draws", 4
    )
    assert outcome.code == 0, outcome.err
    assert "the bound is that of the network without a latent" in outcome.err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "--objective latent_distill has no teacher: name a trained model by --teacher"),
        (("--init-from", "TRUNK"), "is TRUNK: name the model by --teacher instead"),
        (("--teacher", "TRUNK", "--data.length", 16), "its length is 12, and --data.length is 16"),
        (
            ("--teacher", "TRUNK", "--objective.samples", 1),
            "samples must be at least 2, got 1",
        ),
        (
            ("--teacher", "TRUNK", "--objective.data", 2),
            "data must be in [0, 1], got 2",
        ),
        (
            ("--teacher", "TRUNK", "--objective", "k_dce"),
            "--objective k_dce does not train the latent of the network: use latent_distill",
        ),
    ],
)
def test_mistakes_are_one_line(text, trunk, tmp_path, flags, message):
    flags = [trunk if flag == "TRUNK" else flag for flag in flags]
    outcome = train(tmp_path / "run", text, *flags)
    assert outcome.code == 2
    [line] = outcome.errors
    assert message.replace("TRUNK", str(trunk)) in line

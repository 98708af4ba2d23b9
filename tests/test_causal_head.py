"""The causal head: q = p when it is new, causal in the order, its loss, and training with it."""

import dataclasses
import functools
import importlib
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
from scipy import special

import sedd
from sedd.denoiser import Denoiser
from sedd.errors import UserError
from sedd.evaluation.joint_heads import joint_nats
from sedd.networks.causal_head import CausalHead
from sedd.networks.ddit import DDiT
from sedd.objectives.k_dce import KDCE
from sedd.objectives.lambda_dce import LambdaDCE
from sedd.objectives.self_speculative import SelfSpeculative
from sedd.parameterizations.conditional import Conditional
from sedd.processes.absorbing import Absorbing
from sedd.schedules import LogLinear
from sedd.training.optimizer import OptimizerOptions, make_optimizer
from sedd.training.state import init_state
from sedd.training.step import Step

N, B, L = 8, 3, 8
SIZES = {"hidden_dim": 16, "num_layers": 2, "num_heads": 2, "norm_bias": True, "dropout": 0.3}
NET = CausalHead(num_states=N + 1, time_conditioned=False, **SIZES)
TRUNK = DDiT(num_states=N + 1, time_conditioned=False, **SIZES)
FITS = {"schedule": LogLinear(), "parameterization": Conditional(process=Absorbing(num_tokens=N))}
OBJECTIVE = SelfSpeculative(**FITS)
RNG = np.random.default_rng(0)
TOKENS = jnp.asarray(RNG.permuted(np.tile(np.arange(N, dtype=np.int32), (B, 1)), axis=1))
ORDER = jnp.asarray(RNG.permuted(np.tile(np.arange(L, dtype=np.int32), (B, 1)), axis=1))
SCORED = np.ones((B, L), bool)
SCORED[0, [1, 2, 6]] = SCORED[1] = False  # a prompt in the first row, nothing to do in the second


@functools.cache
def fresh_params():
    return jax.jit(NET.init)(jax.random.key(0))


@functools.cache
def random_params():
    """Parameters with nothing at its initial zero."""
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: 0.3 * rng.standard_normal(x.shape, np.float32), fresh_params())


hidden = jax.jit(NET.hidden)
causal_hidden = jax.jit(NET.causal_hidden)


# ---------------------------------------------------------------- the network


def test_a_new_head_changes_nothing():
    """Bit for bit: what it adds is exactly 0."""
    params = fresh_params()
    trunk = jax.jit(TRUNK.init)(jax.random.key(0))
    assert jax.tree.all(jax.tree.map(np.array_equal, params | trunk, params))
    h_BLD = hidden(params, TOKENS)
    np.testing.assert_array_equal(h_BLD, jax.jit(TRUNK.hidden)(trunk, TOKENS))
    np.testing.assert_array_equal(causal_hidden(params, h_BLD, TOKENS, ORDER), h_BLD)
    keys_B = jax.random.split(jax.random.key(0), B)
    dropped_BLD = causal_hidden(params, h_BLD, TOKENS, ORDER, keys_B=keys_B)
    np.testing.assert_array_equal(dropped_BLD, h_BLD)
    narrow = dataclasses.replace(NET, dtype="bfloat16")
    h_BLD16 = narrow.hidden(params, TOKENS)
    np.testing.assert_array_equal(
        narrow.causal_hidden(params, h_BLD16, TOKENS, ORDER).view(jnp.uint16),
        h_BLD16.view(jnp.uint16),
    )
    q_BLD = causal_hidden(random_params(), h_BLD, TOKENS, ORDER)
    assert (jnp.abs(q_BLD - h_BLD).max(-1) > 1e-3).sum() == B * (L - 1)  # control
    np.testing.assert_array_equal(np.argmax((q_BLD == h_BLD).all(-1), 1), ORDER[:, 0])


def test_each_row_depends_on_the_tokens_before_it_in_the_order():
    """The gradients of a row by the embeddings and by the trunk's hidden states."""
    params, h_BLD = random_params(), hidden(random_params(), TOKENS)

    @jax.jit
    def jacobian(embedding_VD, h_BLD):
        def rows(embedding_VD, h_BLD):
            trunk = params["trunk"] | {"embed": {"embedding": embedding_VD}}
            q_BLD = NET.causal_hidden(params | {"trunk": trunk}, h_BLD, TOKENS, ORDER)
            return jnp.take_along_axis(q_BLD, ORDER[..., None], 1)[0].sum(-1)  # by rank

        return jax.jacrev(rows, (0, 1))(embedding_VD, h_BLD)

    by_token_LVD, by_hidden_LBLD = jacobian(params["trunk"]["embed"]["embedding"], h_BLD)
    # Tokens of a row are distinct, so that a row of the embedding is one of its positions.
    by_token_LL = np.abs(by_token_LVD).max(-1)[:, TOKENS[0][ORDER[0]]]
    before_LL = np.tri(L, k=-1, dtype=bool)
    assert (by_token_LL[~before_LL] == 0).all()
    assert (by_token_LL[before_LL] > 0).all()
    by_hidden_LL = np.abs(by_hidden_LBLD).max(-1)[:, 0, ORDER[0]]
    upto_LL = np.tri(L, dtype=bool)
    assert (by_hidden_LL[~upto_LL] == 0).all()
    assert (by_hidden_LL[upto_LL] > 0).all()
    assert not by_hidden_LBLD[:, 1:].any()  # nor on other sequences


def test_later_tokens_make_no_difference():
    """Bit for bit: a draft may be verified before those after it are known."""
    params, h_BLD = random_params(), hidden(random_params(), TOKENS)

    def by_rank(tokens_BL):
        rows_BLD = causal_hidden(params, h_BLD, tokens_BL, ORDER)
        return np.asarray(jnp.take_along_axis(rows_BLD, ORDER[..., None], 1))

    expected = by_rank(TOKENS)
    rank_BL = jnp.argsort(ORDER, 1)
    for rank in range(L):
        got = by_rank(jnp.where(rank_BL >= rank, (TOKENS + 3) % N, TOKENS))
        np.testing.assert_array_equal(got[:, : rank + 1], expected[:, : rank + 1])
        assert (got[:, rank + 1 :] != expected[:, rank + 1 :]).any(-1).all()


def test_both_positions_are_encoded():
    """The same tokens and hidden states at other places give another result."""
    params = random_params()
    h_BLD, x_BL = jnp.ones((1, L, 16)), jnp.zeros((1, L), jnp.int32)
    results = []
    for order in ([0, 1, 2, 3], [1, 0, 2, 3], [0, 2, 1, 3], [0, 3, 2, 1]):
        order_BL = jnp.asarray([[*order, 4, 5, 6, 7]])
        results.append(causal_hidden(params, h_BLD, x_BL, order_BL)[0, order_BL[0, 2]])
    assert len({np.asarray(result).tobytes() for result in results}) == 4


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"a multiple of 4·num_heads .* got 12"):
        dataclasses.replace(NET, hidden_dim=12)


def test_flops():
    width, read, head = 16, 3.0, 2 * 3 * 16 * (N + 1)
    causal = L * (2 * (3 + 4 + 8 + 1) * width**2 + 4 * L * width)
    assert NET.causal_flops(L) == causal
    assert NET.flops(L, read) == TRUNK.flops(L, read)
    assert NET.training_flops(L, read) == TRUNK.flops(L, 0.0) + 3 * causal + 2 * head
    both = dataclasses.replace(NET, freeze=False).training_flops(L, read)
    assert both == 3 * (TRUNK.flops(L, read) + causal + head)


# ---------------------------------------------------------------- the objective


@functools.partial(jax.jit, static_argnums=0)
def corrupted_batch(objective, keys_B, u_B, scored_BL):
    return objective.corrupt(keys_B, u_B, jnp.broadcast_to(TOKENS[:1], scored_BL.shape), scored_BL)


def test_numbers_of_masks_and_orders_are_uniform():
    count = 4000
    scored_BL = np.tile([True, False, True, True, True, False, True, True], (count, 1))
    keys_B = jax.random.split(jax.random.key(3), count)
    u_B = (jnp.arange(count) + 0.5) / count
    c = corrupted_batch(OBJECTIVE, keys_B, u_B, scored_BL)
    order_BL, masked_BL = np.argsort(np.asarray(c.rank_BL), 1), np.asarray(c.xt_BL) == N
    np.testing.assert_array_equal(np.sort(order_BL, 1), np.tile(np.arange(L), (count, 1)))
    assert set(order_BL[:, :2].ravel()) == {1, 5}  # what is not scored comes first
    in_order_BL = np.take_along_axis(masked_BL, order_BL, 1)
    assert (np.diff(in_order_BL.astype(int), axis=1) >= 0).all()  # the masked ones are the last
    sizes, counts = np.unique(masked_BL.sum(1), return_counts=True)
    np.testing.assert_array_equal(sizes, np.arange(1, 7))
    np.testing.assert_allclose(counts, count / 6, atol=1)
    expected = np.where(masked_BL, 6 / masked_BL.sum(1)[:, None], 0)
    np.testing.assert_allclose(c.weight_BL, expected, rtol=1e-6)
    place_BL = np.argsort(order_BL, 1)[:, [0, 2, 3, 4, 6, 7]] - 2
    # The mean place of each position, within 5 standard errors of a uniform draw.
    assert (np.abs(place_BL.mean(0) - 2.5) < 5 * math.sqrt(35 / 12 / count)).all()


@pytest.mark.parametrize("freeze", [True, False])
def test_the_loss_is_the_formula(freeze):
    """Against numpy on the outputs of the network; a trunk that is trained adds its own loss."""
    net, params = dataclasses.replace(NET, freeze=freeze), random_params()
    keys_B = jax.random.split(jax.random.key(0), B)
    u_B = jnp.array([0.5, 0.3, 0.9])
    c = jax.jit(OBJECTIVE.corrupt)(keys_B, u_B, TOKENS, jnp.asarray(SCORED))
    h_BLD = hidden(params, c.xt_BL)
    readings = [causal_hidden(params, h_BLD, TOKENS, np.argsort(np.asarray(c.rank_BL), 1)), h_BLD]
    kernel, bias = (np.asarray(x, np.float64) for x in NET.head(params))
    each = []
    for x_BLD in readings:
        logits = (np.asarray(x_BLD, np.float64) @ kernel + bias)[..., :N]
        log_probs = logits - special.logsumexp(logits, -1, keepdims=True)
        nats_BL = -np.take_along_axis(log_probs, np.asarray(TOKENS)[..., None], -1)[..., 0]
        each.append(np.where(np.asarray(c.xt_BL) == N, np.asarray(c.weight_BL) * nats_BL, 0))
    expected_BL = each[0] if freeze else each[0] + each[1]
    assert 0 < (expected_BL > 0).sum() < SCORED.sum()
    nats, summed, both = (
        jax.jit(one, static_argnums=0)(net, params, c, TOKENS)
        for one in (OBJECTIVE.nats, OBJECTIVE.summed_nats, OBJECTIVE.both_nats)
    )
    np.testing.assert_allclose(nats, expected_BL, rtol=1e-5)
    np.testing.assert_allclose(summed, expected_BL.sum(), rtol=1e-5)
    np.testing.assert_allclose(both, each, rtol=1e-5)


def test_a_new_head_has_the_nats_of_the_trunk_and_they_are_k_dce():
    params = random_params() | {"causal": fresh_params()["causal"]}
    denoiser = Denoiser(params=params, network=NET, parameterization=OBJECTIVE.parameterization)
    rows = [(np.asarray(TOKENS), SCORED), (np.asarray(TOKENS[:2]), SCORED[:2])]
    seen = joint_nats(denoiser, OBJECTIVE, jax.random.key(0), rows, draws=400)
    assert seen.joint == seen.trunk
    assert seen.gain.value == 0
    k_dce = KDCE(**FITS)

    @jax.jit
    def exact(key):
        keys_B = jax.random.split(key, B)
        u_B = jax.random.uniform(key, (B,))
        c = k_dce.corrupt(keys_B, u_B, TOKENS, jnp.asarray(SCORED))
        return k_dce.nats(NET, params, c, TOKENS).sum(-1)

    nats_SB = np.asarray(jax.lax.map(exact, jax.random.split(jax.random.key(1), 400)))
    tokens_B = SCORED.sum(1)
    expected = 2 * nats_SB.mean(0) - np.array([0, 0, 1]) * nats_SB.mean(0)
    error = 2 * np.sqrt((nats_SB.var(0) / 400).sum()) / (2 * tokens_B - [0, 0, L]).sum()
    value = expected.sum() / (2 * tokens_B - [0, 0, L]).sum()
    assert abs(seen.trunk.value - value) < 5 * math.sqrt(2) * error
    # A fixed fraction masks that many positions.
    half = joint_nats(denoiser, OBJECTIVE, jax.random.key(0), rows[:1], draws=4, masked=0.5)
    assert half.joint == half.trunk
    assert half.joint.value != pytest.approx(seen.joint.value)


def test_only_the_two_go_together():
    with pytest.raises(UserError, match="trains a causal head, and this network has none"):
        OBJECTIVE.check(TRUNK)
    with pytest.raises(UserError, match="does not train the causal head of the network"):
        LambdaDCE(**FITS).check(NET)
    OBJECTIVE.check(NET)


@pytest.mark.nightly
def test_it_learns_what_the_trunk_cannot():
    """Rows of one repeated token: without any token the trunk has log N each, and q only once."""
    net = dataclasses.replace(NET, num_layers=1, dropout=0.0, freeze=False)
    options = OptimizerOptions(learning_rate=1e-2, warmup_steps=20, ema_decay=0.95)
    optimizer = make_optimizer(options, 150)
    step = Step(
        network=net, objective=OBJECTIVE, optimizer=optimizer, ema_decay=0.95, batch_size=32
    )
    run = jax.jit(functools.partial(step, axis_name=None))

    def rows(token_B):
        return np.repeat(token_B[:, None].astype(np.int32), L, 1), np.ones((32, L), bool)

    state = init_state(net, optimizer, 0)
    for number in range(150):
        x0_BL, scored_BL = rows(np.random.default_rng(number).integers(0, N, 32))
        batch = {"x0": x0_BL[None], "scored": scored_BL[None], "index": np.arange(32)[None]}
        state, _ = run(state, batch)
    denoiser = Denoiser(
        params=state.averaged, network=net, parameterization=OBJECTIVE.parameterization
    )
    held_out = [rows(np.arange(32) % N)]
    seen = joint_nats(denoiser, OBJECTIVE, jax.random.key(0), held_out, draws=8, masked=1.0)
    assert seen.trunk.value > math.log(N) - 1e-5  # all are masked: nothing better is possible
    assert math.log(N) / L - 1e-5 < seen.joint.value < 0.3 * math.log(N)
    assert seen.gain.value == pytest.approx(seen.trunk.value - seen.joint.value)


# ---------------------------------------------------------------- sedd train


def train(workdir, text, *flags):
    network = ("--network", "causal_head", "--objective", "self_speculative")
    few = ("--data.corpus", text, "--training.steps", 2, "--evaluation.max-sequences", 8)
    return tiny_run.call("train", *tiny_run.TINY, "--workdir", workdir, *network, *few, *flags)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, text, trunk):
    workdir = tmp_path_factory.mktemp("runs") / "head"
    outcome = train(workdir, text, "--init-from", trunk)
    assert outcome.code == 0, outcome.err
    return workdir, outcome


@pytest.mark.nightly
def test_a_run_trains_the_head_only_and_prints_its_gain(trained, trunk):
    workdir, outcome = trained
    model, before = sedd.load(workdir), sedd.load(trunk)
    params = model.denoiser.params
    count = sum(x.size for x in jax.tree.leaves(params["causal"]))
    total = sum(x.size for x in jax.tree.leaves(params))
    assert outcome.out.startswith(f"{total:,} parameters ({count:,} of them trained) · ")
    [start] = [i for i, line in enumerate(outcome.out.splitlines()) if "masked token" in line]
    causal, both, difference, *_ = outcome.out.splitlines()[start + 1 :]
    assert causal.endswith("jointly")
    assert "independently" in both
    assert float(both.split()[0]) - float(causal.split()[0]) == pytest.approx(
        float(difference.removeprefix("  difference: ").split()[0]), abs=2e-4
    )
    kept = {name: params[name] for name in ("trunk", "head")}
    assert jax.tree.all(jax.tree.map(np.array_equal, kept, before.denoiser.params))
    assert params["causal"]["out"]["kernel"].any()


@pytest.mark.nightly
def test_samples_and_bounds_are_those_of_the_trunk(trained, trunk):
    head, before = sedd.load(trained[0]), sedd.load(trunk)
    key = jax.random.key(0)
    samples = [sedd.sample(model, key, num=2, sampler="ordered") for model in (head, before)]
    np.testing.assert_array_equal(samples[0].tokens, samples[1].tokens)
    x0_BL = np.tile(np.arange(12), (2, 1))
    results = [sedd.evaluate(model, x0_BL) for model in (head, before)]
    assert results[0].nats_per_token == results[1].nats_per_token


@pytest.mark.nightly
def test_the_head_verifies_drafts_of_its_trunk(trained):
    """A second round on the same hidden states takes no call."""
    model = sedd.load(trained[0])
    draws = [
        sedd.sample(
            model, 0, num=4, sampler="speculative", draft="head", lookahead=2, verifications=rounds
        )
        for rounds in (1, 2)
    ]
    for drawn in draws:
        assert drawn.log_prob is None
        assert (drawn.tokens < model.denoiser.mask_id).all()
        np.testing.assert_array_equal(drawn.rows, drawn.calls)
    once, twice = (drawn.calls.mean() for drawn in draws)
    assert twice < once < model.length


@pytest.mark.nightly
def test_head_and_trunk_can_be_trained_together_from_a_run_with_a_head(trained, text, tmp_path):
    assert "--network.no-freeze" in train(tmp_path / "frozen", text).err
    second = tmp_path / "second"
    outcome = train(second, text, "--network.no-freeze", "--init-from", trained[0])
    assert outcome.code == 0, outcome.err
    assert "of them trained" not in outcome.out
    before, after = (sedd.load(run).denoiser.params for run in (trained[0], second))
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), before, after)
    assert jax.tree.all(moved)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            (),
            "--network causal_head trains a part of the network on a frozen trunk: name a trained",
        ),
        (
            ("--init-from", "TRUNK", "--network.hidden-dim", 24),
            "its network.hidden_dim is 16 and --network.hidden-dim is 24",
        ),
        (
            ("--init-from", "TRUNK", "--objective", "k_dce"),
            "--objective k_dce does not train the causal head of the network: use self_speculative",
        ),
        (
            ("--init-from", "TRUNK", "--network", "ddit"),
            "--objective self_speculative trains a causal head, and this network has none: use",
        ),
        (
            ("--init-from", "OTHER"),
            "its parameterization is autoregressive; the frozen trunk of a network causal_head",
        ),
    ],
)
def test_mistakes_are_one_line(text, trunk, tmp_path, flags, message):
    if "OTHER" in flags:
        other = tiny_run.config("ar", corpus=str(text))
        trunk = tiny_run.make_run(tmp_path / "other", other)
    flags = [trunk if flag in ("TRUNK", "OTHER") else flag for flag in flags]
    outcome = train(tmp_path / "run", text, *flags)
    assert outcome.code == 2
    [line] = outcome.errors
    assert message in line


@pytest.mark.nightly
def test_the_benchmark_prints_a_row_for_each_fraction(trained, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(tiny_run.ROOT / "benchmarks"))
    benchmark = importlib.import_module("causal_head")
    sizes = {"masked": (1.0, 0.5), "sequences": 4, "draws": 2}
    benchmark.main(benchmark.Settings(checkpoint=trained[0], **sizes))
    rows = json.loads(capsys.readouterr().out.strip().splitlines()[-1])["rows"]
    assert [row["masked"] for row in rows] == [1.0, 0.5]
    for row in rows:
        assert row["difference"] == pytest.approx(row["trunk"] - row["head"])


@pytest.mark.nightly
def test_no_published_layout_holds_it(trained, tmp_path):
    outcome = tiny_run.call("export", "--checkpoint", trained[0], "--output", tmp_path / "out")
    assert outcome.code == 2
    assert outcome.errors == ["error: no published layout holds the network CausalHead"]

"""Log marginals: the minimum of the loss, its law, the head, training, and ``--marginals``."""

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
from oracle import L, N, Oracle, f32, i32, keys, random_table, state_index
from scipy import special, stats

import sedd
from sedd.errors import UserError
from sedd.evaluation.marginals import Marginals, pick_apart
from sedd.networks.ddit import DDiT
from sedd.networks.marginal_head import MarginalHead
from sedd.objectives.k_dce import KDCE
from sedd.objectives.marginal import Marginal
from sedd.parameterizations.conditional import Conditional
from sedd.processes.absorbing import Absorbing
from sedd.schedules import LogLinear
from sedd.training.optimizer import OptimizerOptions, make_optimizer
from sedd.training.state import init_state
from sedd.training.step import Step

FITS = {"schedule": LogLinear(), "parameterization": Conditional(process=Absorbing(num_tokens=N))}
TEXTS = oracle.all_states(N)
ORDERS = np.array(list(itertools.permutations(range(L))))
WORLD = Oracle("absorbing", seed=1)
NETWORK = oracle.MarginalTable(num_states=N + 1, time_conditioned=False)
SIZES = {"hidden_dim": 16, "num_layers": 1, "num_heads": 2, "norm_bias": True, "dropout": 0.0}
HEAD = MarginalHead(num_states=N + 1, time_conditioned=False, **SIZES)


# ---------------------------------------------------------------- exact, in float64


def conditionals(consistent):
    """[V^L, L, N] log c: of the oracle's joint, or of a random table that belongs to no joint."""
    if consistent:
        return np.log(np.maximum(WORLD.conditional(), 1e-30))
    return special.log_softmax(random_table(seed=2)[..., :N], -1)


@functools.cache
def paths(consistent):
    """The states [X, O, L + 1] on all paths of all texts, and log p [X, O, L + 1] up to each."""
    log_c = conditionals(consistent)
    states, sums = [], []
    for x_L, order_L in itertools.product(TEXTS, ORDERS):
        known_L, total = np.full(L, N), 0.0
        states.append([state_index(known_L, N + 1)])
        sums.append([0.0])
        for i in order_L:
            total += log_c[states[-1][-1], i, x_L[i]]
            known_L[i] = x_L[i]
            states[-1].append(state_index(known_L, N + 1))
            sums[-1].append(total)
    shape = (len(TEXTS), len(ORDERS), L + 1)
    return np.reshape(states, shape), np.reshape(sums, shape)


def minimiser(window, consistent):
    """[V^L] f of the smallest expected loss, by least squares; f is 0 for the last state."""
    state_XOS, sum_XOS = paths(consistent)
    weight_X = np.sqrt(WORLD.joint.ravel())
    rows, targets = {}, {}
    for first in range(L - window + 1):
        for a, b in itertools.combinations(range(first, first + window + 1), 2):
            for x, o in itertools.product(range(len(TEXTS)), range(len(ORDERS))):
                edge = (state_XOS[x, o, a], state_XOS[x, o, b])
                rows[edge] = rows.get(edge, 0) + weight_X[x] ** 2
                step = sum_XOS[x, o, b] - sum_XOS[x, o, a]
                targets[edge] = targets.get(edge, 0) + weight_X[x] ** 2 * step
    matrix = np.zeros((len(rows), (N + 1) ** L))
    target = np.zeros(len(rows))
    for row, (edge, weight) in enumerate(rows.items()):
        matrix[row, edge[1]], matrix[row, edge[0]] = 1, -1
        matrix[row] *= math.sqrt(weight)
        target[row] = targets[edge] / math.sqrt(weight)
    f = np.linalg.lstsq(matrix[:, :-1], target, rcond=None)[0]
    return np.append(f, 0.0)


def log_marginal_table():
    """[V^L]: the exact log p(x_S)."""
    padded = WORLD.joint
    for axis in range(L):
        padded = np.concatenate([padded, padded.sum(axis, keepdims=True)], axis)
    return np.log(padded).ravel()


@pytest.mark.parametrize("window", [1, 2, L])
def test_the_minimum_is_the_log_marginal_of_every_subset(window):
    np.testing.assert_allclose(minimiser(window, True), log_marginal_table(), atol=1e-9)


@pytest.mark.parametrize("window", [1, 2, L])
def test_level_identity_and_no_normalisation_for_conditionals_of_no_joint(window):
    f = minimiser(window, False)
    state_XOS, sum_XOS = paths(False)
    q_X = WORLD.joint.ravel()
    mean_S = np.einsum("x,xos->s", q_X, f[state_XOS]) / len(ORDERS)
    expected_S = np.einsum("x,xos->s", q_X, sum_XOS) / len(ORDERS)
    np.testing.assert_allclose(mean_S, expected_S, atol=1e-9)
    assert abs(np.exp(f[state_XOS[:, 0, L]]).sum() - 1) > 0.05
    # f lies below the log mean probability over orders, on average over the texts.
    log_mean_X = special.logsumexp(sum_XOS[:, :, L], axis=1) - math.log(len(ORDERS))
    assert mean_S[L] < q_X @ log_mean_X - 0.01


# ---------------------------------------------------------------- the objective


@functools.partial(jax.jit, static_argnums=0)
def corrupted_and_nats(objective, table, f, keys_B, u_B, x0_BL, scored_BL):
    corrupted = objective.corrupt(keys_B, u_B, x0_BL, scored_BL)
    params = {"table": table, "marginal": f}
    return corrupted, objective.nats(NETWORK, params, corrupted, x0_BL)


@pytest.mark.parametrize("window", [1, 3])
def test_the_loss_is_the_formula(window):
    """On random f and conditionals, with positions that are not scored."""
    rng = np.random.default_rng(0)
    table, f = random_table(seed=2), rng.standard_normal((N + 1) ** L)
    f[-1] = 0
    x0_BL, scored_BL = rng.integers(0, N, (6, L)), np.ones((6, L), bool)
    scored_BL[0, 1:3] = scored_BL[1] = False
    given = (keys(0, 6), f32(np.linspace(0, 0.99, 6)), i32(x0_BL), jnp.asarray(scored_BL))
    objective = Marginal(**FITS, window=window)
    corrupted, nats_BL = corrupted_and_nats(objective, f32(table), f32(f), *given)
    log_c = conditionals(False)
    for b in range(6):
        order_L = np.argsort(np.asarray(corrupted.rank_BL[b]))
        steps = min(window, scored_BL[b].sum())
        first = int((np.asarray(corrupted.xt_BL[b]) < N).sum())
        assert first >= L - scored_BL[b].sum()
        residuals, total = [], 0.0
        for known in range(first, first + steps + 1):
            x_L = np.full(L, N)
            x_L[order_L[:known]] = x0_BL[b, order_L[:known]]
            residuals.append(f[state_index(x_L, N + 1)] - total)
            if known < first + steps:
                i = order_L[known]
                total += log_c[state_index(x_L, N + 1), i, x0_BL[b, i]]
        pairs = [(p - q) ** 2 for p, q in itertools.combinations(residuals, 2)]
        expected = scored_BL[b].sum() * np.mean(pairs) if pairs else 0.0
        np.testing.assert_allclose(nats_BL[b].sum(), expected, rtol=1e-4)
        counted_L = np.asarray(corrupted.weight_BL[b]) > 0
        np.testing.assert_array_equal(np.flatnonzero(counted_L), np.sort(order_L[first:][:steps]))
        assert (np.asarray(nats_BL[b])[~counted_L] == 0).all()


def test_windows_and_orders_are_uniform():
    count = 2400
    objective = Marginal(**FITS, window=2)
    u_B = (jnp.arange(count) + 0.5) / count
    x0_BL = jnp.zeros((count, L), jnp.int32)
    drawn = jax.jit(objective.corrupt)(keys(3, count), u_B, x0_BL, jnp.ones((count, L), bool))
    first_B = (np.asarray(drawn.xt_BL) < N).sum(1)
    np.testing.assert_array_equal(np.bincount(first_B), [count / 3] * 3)
    place_B = state_index(np.argsort(np.asarray(drawn.rank_BL), 1), L)
    _, counts = np.unique(place_B, return_counts=True)
    assert stats.chisquare(counts).pvalue > 1e-3
    assert len(counts) == len(ORDERS)


@functools.cache
def trained(consistent, steps=800, batch=128):
    """f after SGD on whole paths of texts of the joint; conditionals of the joint or of none."""
    objective = Marginal(**FITS, window=L)
    optimizer = make_optimizer(
        OptimizerOptions(
            learning_rate=0.1, warmup_steps=1, schedule="cosine", final_fraction=0.0, clip_norm=None
        ),
        steps,
    )
    step = Step(
        network=NETWORK, objective=objective, optimizer=optimizer, ema_decay=0.9, batch_size=batch
    )
    table = np.concatenate([conditionals(consistent), np.zeros(((N + 1) ** L, L, 1))], -1)
    params = {"table": f32(table), "marginal": jnp.zeros((N + 1) ** L)}
    state = init_state(NETWORK, optimizer, 0, params=params)
    draws = np.random.default_rng(0).choice(len(TEXTS), (steps, batch), p=WORLD.joint.ravel())

    @jax.jit
    def run(state, x0_SBL):
        def one(state, x0_BL):
            rows = {
                "x0": x0_BL[None],
                "scored": jnp.ones((1, *x0_BL.shape), bool),
                "index": jnp.arange(batch)[None],
            }
            return step(state, rows, axis_name=None)[0], None

        return jax.lax.scan(one, state, x0_SBL)[0]

    return np.asarray(run(state, i32(TEXTS[draws])).averaged["marginal"], np.float64)


def test_sgd_finds_the_log_marginals():
    """The residuals are 0 at the minimum, so that f converges where texts are drawn often."""
    f, exact = trained(True), log_marginal_table()
    state_XOS, _ = paths(True)
    likely_X = WORLD.joint.ravel() > 4e-3
    seen = np.unique(state_XOS[likely_X])
    assert len(seen) > 100
    error = np.abs(f[seen[:-1]] - exact[seen[:-1]])
    assert np.median(error) < 0.01
    assert error.max() < 0.1 < np.abs(exact[seen[:-1]]).min()


def test_level_identity_after_sgd():
    """Within the error of a stochastic optimizer, on conditionals that belong to no joint."""
    f = trained(False)
    state_XOS, sum_XOS = paths(False)
    q_X = WORLD.joint.ravel()
    error = q_X @ (f[state_XOS[:, 0, L]] - sum_XOS[:, :, L].mean(1))
    spread = math.sqrt(q_X @ (f[state_XOS[:, 0, L]] - sum_XOS[:, :, L].mean(1)) ** 2)
    assert abs(error) < 0.1
    assert spread > 0.1  # it holds for the mean only


# ---------------------------------------------------------------- the network


@functools.cache
def params_of_head(random):
    params = jax.jit(HEAD.init)(jax.random.key(0))
    if not random:
        return params
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: 0.3 * rng.standard_normal(x.shape, np.float32), params)


def test_the_head_is_zero_without_tokens_and_leaves_the_trunk_alone():
    x_BL = i32([[N] * 5, [N, 0, N, 2, 1], [0, 1, 2, 0, 1]])
    value = jax.jit(lambda params: HEAD.log_marginal(params, HEAD.hidden(params, x_BL), x_BL))
    new_B = value(params_of_head(False))
    np.testing.assert_allclose(new_B, -math.log(N) * np.array([0, 3, 5]), rtol=1e-6)
    params = params_of_head(True)
    value_B = value(params)
    assert value_B[0] == 0
    assert (np.abs(value_B[1:]) > 1e-3).all()
    trunk = jax.jit(DDiT(num_states=N + 1, time_conditioned=False, **SIZES).init)(jax.random.key(0))
    assert jax.tree.all(
        jax.tree.map(np.array_equal, params_of_head(False) | trunk, params_of_head(False))
    )
    assert HEAD.trainable(params).keys() == {"marginal"}
    with pytest.raises(UserError, match=r"lora\.rank"):
        MarginalHead(num_states=4, time_conditioned=False, **SIZES, lora=sedd.networks.Lora(rank=2))


def test_only_head_and_objective_go_together():
    objective = Marginal(**FITS)
    objective.check(HEAD)
    trunk = DDiT(num_states=N + 1, time_conditioned=False, **SIZES)
    with pytest.raises(UserError, match="trains a marginal head, and this network has none"):
        objective.check(trunk)
    with pytest.raises(UserError, match="does not train the marginal head of the network"):
        KDCE(**FITS).check(HEAD)
    with pytest.raises(ValueError, match="window must be at least 1, got 0"):
        Marginal(**FITS, window=0)
    with pytest.raises(UserError, match=r"leave out --network\.no-freeze"):
        objective.check(MarginalHead(num_states=4, time_conditioned=False, **SIZES, freeze=False))


# ---------------------------------------------------------------- correlations


def test_texts_that_lie_apart():
    values_S = np.array([3.0, -20.0, 0.0, -8.0, -40.0, -11.0])
    np.testing.assert_array_equal(values_S[pick_apart(values_S, 10.0)], [3.0, -8.0, -20.0, -40.0])


def test_agreement_is_that_of_scipy_on_the_chosen_texts():
    rng = np.random.default_rng(0)
    log_probs_SK = -100 + 20 * rng.standard_normal((30, 1)) + rng.standard_normal((30, 4))
    f_S = log_probs_SK.mean(1) + 10 * rng.standard_normal(30)
    found = Marginals(log_marginal_S=f_S, known_S=np.full(30, 9), log_probs_SK=log_probs_SK)
    mean_S = np.log(np.exp(log_probs_SK[:, :3]).mean(1))
    np.testing.assert_allclose(found.log_mean, mean_S)
    assert found.orders == 3
    got = found.agreement()
    assert got.pearson == pytest.approx(stats.pearsonr(f_S, mean_S).statistic)
    assert got.spearman == pytest.approx(stats.spearmanr(f_S, mean_S).statistic)
    apart = found.agreement(apart=10.0)
    assert 3 <= apart.texts < 30
    one = found.agreement(with_one=True)
    assert one.pearson == pytest.approx(stats.pearsonr(log_probs_SK[:, 3], mean_S).statistic)
    few = Marginals(log_marginal_S=f_S[:2], known_S=np.full(2, 9), log_probs_SK=log_probs_SK[:2])
    assert few.agreement() == (None, None, 2)


# ---------------------------------------------------------------- sedd train, sedd evaluate


def train(workdir, text, *flags):
    network = ("--network", "marginal_head", "--objective", "marginal")
    few = ("--data.corpus", text, "--training.steps", 2, "--evaluation.max-sequences", 4)
    return tiny_run.call("train", *tiny_run.TINY, "--workdir", workdir, *network, *few, *flags)


@pytest.fixture(scope="module")
def head(tmp_path_factory, text):
    """A model with a head, with random weights."""
    config = tiny_run.config("marginal", corpus=str(text))
    return tiny_run.make_run(tmp_path_factory.mktemp("runs") / "head", config)


@pytest.mark.nightly
def test_a_run_trains_the_head_only(tmp_path, text, trunk):
    workdir = tmp_path / "head"
    outcome = train(workdir, text, "--init-from", trunk)
    assert outcome.code == 0, outcome.err
    model, before = sedd.load(workdir), sedd.load(trunk)
    params = model.denoiser.params
    assert "of them trained" in outcome.out
    assert "root mean square difference" in outcome.out
    kept = {name: params[name] for name in ("trunk", "head")}
    assert jax.tree.all(jax.tree.map(np.array_equal, kept, before.denoiser.params))
    assert params["marginal"]["out"]["kernel"].any()
    # The frequencies are the trunk's mean prediction without any visible token.
    x_BL = np.full((1, 12), model.process.mask_id)
    expected_N = np.exp(np.asarray(before.log_conditional(x_BL), np.float64))[0].mean(0)
    np.testing.assert_allclose(np.exp(params["unigram"]["log_prob"]), expected_N, rtol=1e-4)


def evaluate(head, text, *flags):
    return tiny_run.call(
        *("evaluate", "--checkpoint", head, "--data", text),
        *("--max-sequences", 6, "--draws", 4, *flags),
    )


def test_marginals_of_a_file(head, text, tmp_path):
    file, out = tmp_path / "texts.txt", tmp_path / "out.json"
    file.write_text("the {mask:4}on a\n\n{mask:3}[b]cat\n".replace("[b]", "."))
    outcome = evaluate(head, text, "--marginals", file, "--marginal-check", 2, "--json", out)
    assert outcome.code == 0, outcome.err
    assert "exp(f) does not sum to 1" in " ".join(outcome.out.split())
    figures = json.loads(out.read_text())["marginals"]
    assert [one["known"] for one in figures["texts"]] == [8, 4]
    assert figures["agreement"]["f, all texts"]["texts"] == 6
    identity = figures["level_identity"]
    assert identity["difference"]["value"] == pytest.approx(
        identity["value"]["value"] - identity["bound"]["value"]
    )
    # The same from Python, from token ids, and from the network itself.
    model = sedd.load(head)
    texts = [one["text"] for one in figures["texts"]]
    found = sedd.marginals(model, texts, orders=2)
    np.testing.assert_allclose(
        found.log_marginal_S, [one["log_marginal"] for one in figures["texts"]], rtol=1e-5
    )
    np.testing.assert_allclose(
        found.log_mean, [one["log_mean"] for one in figures["texts"]], rtol=1e-5
    )
    ids = [model.tokenizer.encode_batch([piece])[0] for piece in ("the ", "on a")]
    x_BL = np.full((1, 12), model.process.mask_id)
    x_BL[0, :4], x_BL[0, 8:] = ids
    again = sedd.marginals(model, x_BL, batch_size=1)
    np.testing.assert_allclose(again.log_marginal_S, found.log_marginal_S[:1], rtol=1e-5)
    assert again.orders == 0


def test_log_probs_of_orders_are_those_of_the_visible_tokens(head):
    """With one visible token there is one order, and its likelihood is c of all masks."""
    model = sedd.load(head)
    x_BL = np.full((1, 12), model.process.mask_id)
    log_probs_N = np.asarray(model.log_conditional(x_BL))[0, 5]
    x_BL[0, 5] = 3
    found = sedd.marginals(model, x_BL, orders=2)
    np.testing.assert_allclose(found.log_probs_SK, log_probs_N[3], rtol=1e-5)


def test_samples_in_json_lines_need_no_gap(head, text, tmp_path):
    file = tmp_path / "samples.jsonl"
    file.write_text('{"text": "the cat sat ", "id": 1}\n{"infill": "the{mask:9}"}\n')
    outcome = evaluate(head, text, "--marginals", file)
    assert outcome.code == 0, outcome.err
    assert "Level identity" in outcome.out
    assert "Pearson" not in outcome.out


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "the cat\non a mat\n", "no line has a gap; write {mask:12} for one of twelve"),
        ("a.txt", "\n", "the file is empty"),
        (
            "a.txt",
            "the {mask:4}\nthe {mask:20}",
            "line 2: infill text with its gaps (24 tokens) do",
        ),
        ("a.txt", "THE {mask:4}", "line 1: "),
        ("a.txt", "the {mask:x}", "line 1: infill gap '{mask:x}': the size must be a whole number"),
        ("a.jsonl", '{"txt": "the"}', 'line 1: no JSON with an "infill" or a "text"'),
        ("a.jsonl", '{"text": 1}', 'line 1: "infill" and "text" must be strings'),
        ("a.txt", None, "No such file"),
    ],
)
def test_mistakes_in_a_file_are_one_line(head, text, tmp_path, name, content, message):
    file = tmp_path / name
    if content is not None:
        file.write_text(content)
    outcome = evaluate(head, text, "--marginals", file)
    assert outcome.code == 2
    [line] = outcome.errors
    assert line.startswith(f"error: --marginals {file}")
    assert message in line


def test_mistakes_are_one_line(head, trunk, text, tmp_path):
    file = tmp_path / "texts.txt"
    file.write_text("the {mask:4}")
    padded = ("--data.no-wrap", "--init-from", trunk)
    for outcome, message in (
        (evaluate(trunk, text, "--marginals", file), "the network DDiT has no marginal head: tr"),
        (
            evaluate(trunk, text, "--marginal-check", 2),
            "--marginal-check: the network DDiT has n",
        ),
        (evaluate(head, text, "--marginal-check", 0), "marginal_check must be at least 1, got 0"),
        (
            evaluate(head, text, "--marginals", file, "--order", "forward"),
            "--marginals compares with the k-DCE bound: leave out --order",
        ),
        (train(tmp_path / "a", text), "name a trained one by --init-from RUN"),
        (train(tmp_path / "b", text, *padded), "--objective marginal needs rows without padding"),
    ):
        assert outcome.code == 2
        [line] = outcome.errors
        assert message in line
    with pytest.raises(UserError, match=r"texts\[1\]: infill text with its gaps"):
        sedd.marginals(sedd.load(head), ["the", "the {mask:9}"])
    with pytest.raises(UserError, match=r"token ids \[S, 12\], got an array of shape \(1, 3\)"):
        sedd.marginals(sedd.load(head), np.zeros((1, 3), int))
    with pytest.raises(UserError, match="DDiT has no marginal head"):
        sedd.marginals(sedd.load(trunk), ["the"])

"""The HMM head: dynamic programs, draws of windows and loss by enumeration; training with it."""

import functools
import itertools
import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import tiny_run
from oracle import L, N, f32, i32, keys
from scipy import special
from tiers import daily

import sedd
from sedd.constraints.windows import Windows
from sedd.denoiser import Denoiser
from sedd.errors import UserError
from sedd.networks.base import Attend
from sedd.networks.hidden_markov import HiddenMarkov
from sedd.networks.hmm_head import HmmHead
from sedd.objectives.hmm import Hmm
from sedd.parameterizations.conditional import Conditional
from sedd.processes.absorbing import Absorbing
from sedd.reshape import Reshape
from sedd.samplers.confidence import Confidence
from sedd.samplers.event_jump import EventJump
from sedd.samplers.ordered import Ordered
from sedd.samplers.remdm import ReMDM
from sedd.samplers.token_confidence import TokenConfidence
from sedd.samplers.tweedie import Tweedie
from sedd.schedules import LogLinear
from sedd.watermark.scheme import Scheme

H = 3
RNG = np.random.default_rng(0)
LOGITS = (2 * RNG.standard_normal((H + 1, H)), 2 * RNG.standard_normal((H, N)))
FITS = {
    "schedule": LogLinear(),
    "parameterization": Conditional(process=Absorbing(num_tokens=N)),
}
TABLE = oracle.random_table(seed=1)
STATES = oracle.all_states(N + 1)
ALL = oracle.all_states(N)  # [N^L, L]: every text
DRAWS = 20_000


def denoiser(logits=LOGITS, **fields):
    """The table's conditionals with an HMM head; windows of all four positions by default."""
    fields.setdefault("windows", Windows(width=L, below_B=jnp.ones(DRAWS)))
    params = {"table": f32(TABLE), "hmm": tuple(map(f32, logits))}
    network = oracle.HmmTable(num_states=N + 1, time_conditioned=False)
    return Denoiser(
        params=params, network=network, parameterization=FITS["parameterization"], **fields
    )


# ---------------------------------------------------------------- by enumeration, in numpy


def conditionals(x):
    """[L, N]: the table's conditionals of a text with masks; one-hot where a token is visible."""
    raw = TABLE[oracle.state_index(np.asarray(x), N + 1)][:, :N]
    probs = special.softmax(raw, -1)
    return np.where(np.asarray(x)[:, None] < N, np.eye(N + 1)[np.asarray(x)][:, :N], probs)


def hmm_law(logits=LOGITS, width=L):
    """[N^width] p_ω of every string, summed over all paths of states, and [paths, N^width]."""
    transition, emission = (special.softmax(each, -1) for each in logits)
    strings = oracle.all_states(N, width)
    paths = []
    for path in itertools.product(range(H), repeat=width):
        steps = [transition[a, b] for a, b in itertools.pairwise((H, *path))]
        paths.append(np.prod(steps) * np.prod(emission[path, strings], -1))
    return np.sum(paths, 0), np.array(paths)


def joint_law(x, logits=LOGITS, width=L):
    """[N^L]: p̂ of every text given the visible tokens of x, windows independent."""
    law = np.prod(conditionals(x)[np.arange(L), ALL], -1)
    each = hmm_law(logits, width)[0]
    for start in range(0, L, width):
        law = law * each[oracle.state_index(ALL[:, start : start + width], N)]
    return law / law.sum()


def independent_law(x):
    return np.prod(conditionals(x)[np.arange(L), ALL], -1)


def two_calls(first, second, place):
    """[N^L]: the positions ``place`` by the law first(x), and the others by second(x)."""
    start, law = np.full(L, N), np.zeros(N**L)
    before = first(start)
    for tokens in itertools.product(range(N), repeat=len(place)):
        x = start.copy()
        x[place] = tokens
        agrees = (ALL[:, place] == tokens).all(-1)
        law += before[agrees].sum() * second(x)
    return law


def law_of(sampler, model, fixed=oracle.NOTHING_FIXED):
    drawn = oracle.draw(sampler, model, DRAWS, fixed=fixed, trace=False)
    return oracle.counts_of(np.asarray(drawn.tokens_BL), N)


# ---------------------------------------------------------------- the dynamic programs


def test_partition_and_posterior_are_those_of_the_enumeration():
    hmm = HiddenMarkov(*(jax.nn.softmax(f32(each), -1) for each in LOGITS))
    law, paths = hmm_law()
    for x in ([N] * L, [N, 1, N, 2], [0, 1, 1, 2]):
        c = conditionals(x)
        factor_WH = jnp.where(
            np.asarray(x)[:, None] < N,
            hmm.log_factors_of(i32(np.minimum(x, N - 1))),
            hmm.log_factors(f32(np.log(np.maximum(c, 1e-30)))),
        )
        value, posterior_WH = jax.value_and_grad(hmm.log_partition)(factor_WH)
        weight = np.prod(c[np.arange(L), ALL], -1)
        np.testing.assert_allclose(value, np.log((law * weight).sum()), rtol=1e-5)
        by_path = (paths * weight).sum(-1)
        each = np.array(list(itertools.product(range(H), repeat=L)))
        expected = [[by_path[each[:, i] == z].sum() for z in range(H)] for i in range(L)]
        np.testing.assert_allclose(posterior_WH, np.array(expected) / by_path.sum(), atol=1e-5)


def test_far_factors_stay_finite():
    """Log factors of hundreds of nats apart, as rare tokens have."""
    hmm = HiddenMarkov(*(jax.nn.softmax(f32(each), -1) for each in LOGITS))
    factor_WH = f32([[-400, -300, -500], [0, -200, -900], [-1e3, -1e3, -1e3]])
    value, gradient_WH = jax.value_and_grad(hmm.log_partition)(factor_WH)
    log_transition = special.log_softmax(LOGITS[0], -1)
    paths = itertools.product(range(H), repeat=3)
    expected = special.logsumexp(
        [
            sum(log_transition[a, b] for a, b in itertools.pairwise((H, *path)))
            + sum(float(factor_WH[i, z]) for i, z in enumerate(path))
            for path in paths
        ]
    )
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(gradient_WH.sum(-1), 1, rtol=1e-5)


# ---------------------------------------------------------------- draws


@pytest.mark.parametrize(
    "kind",
    daily(
        [EventJump, Ordered, Confidence, TokenConfidence, ReMDM, Tweedie],
        [EventJump],
    ),
)
def test_one_call_draws_the_joint_law(kind):
    sampler = kind(schedule=LogLinear(), steps=1)
    law = joint_law([N] * L)
    counts = law_of(sampler, denoiser())
    assert oracle.chi_square_p(counts, law) > 1e-3
    assert oracle.chi_square_p(counts, independent_law([N] * L)) < 1e-6  # control


FORWARD = Ordered(schedule=LogLinear(), order="forward", steps=2)
SETTINGS = {  # windows, sampler, given tokens: the law
    "two calls": (L, 1.0, FORWARD, lambda: two_calls(joint_law, joint_law, [0, 1])),
    "only below the share": (
        L,
        0.5,
        FORWARD,
        lambda: two_calls(independent_law, joint_law, [0, 1]),
    ),
    "two windows": (
        2,
        1.0,
        replace(FORWARD, steps=1),
        lambda: joint_law([N] * L, width=2),
    ),
    "a window that is filled up": (3, 1.0, replace(FORWARD, steps=1), lambda: three_and_one()),
    "alone in its window": (
        2,
        1.0,
        Ordered(schedule=LogLinear(), order="0,2,1,3", steps=2),
        lambda: two_calls(independent_law, independent_law, [0, 2]),
    ),
}


def three_and_one():
    """Windows of the first three positions, and of the last one, which is drawn alone."""
    c = conditionals([N] * L)
    first = np.prod(c[np.arange(3), ALL[:, :3]], -1)
    first = first * hmm_law(width=3)[0][oracle.state_index(ALL[:, :3], N)]
    law = first * c[3, ALL[:, 3]]
    return law / law.sum()


@pytest.mark.parametrize("name", daily(SETTINGS, ["two windows", "only below the share"]))
def test_settings(name):
    width, below, sampler, law = SETTINGS[name]
    windows = Windows(width=width, below_B=jnp.full(DRAWS, below))
    counts = law_of(sampler, denoiser(windows=windows))
    assert oracle.chi_square_p(counts, law()) > 1e-3
    control = independent_law([N] * L) if name == "alone in its window" else joint_law([N] * L)
    assert oracle.chi_square_p(counts, control) < 1e-6


def test_visible_tokens_are_given():
    counts = law_of(replace(FORWARD, steps=1), denoiser(), fixed=(-1, 2, -1, -1))
    assert oracle.chi_square_p(counts, joint_law([N, 2, N, N])) > 1e-3


def test_uniform_emissions_are_the_identity():
    logits = (LOGITS[0], np.zeros((H, N)))
    counts = law_of(replace(FORWARD, steps=1), denoiser(logits))
    np.testing.assert_allclose(joint_law([N] * L, logits), independent_law([N] * L))
    assert oracle.chi_square_p(counts, independent_law([N] * L)) > 1e-3


def test_temperature_sharpens_the_tokens_given_the_states():
    """The states keep their law; at temperature 1 it is the joint law."""
    temperature = 0.5
    counts = law_of(
        replace(FORWARD, steps=1),
        denoiser(reshape=Reshape.of(temperature=[temperature] * DRAWS)),
    )
    c, (_, paths) = conditionals([N] * L), hmm_law()
    by_path = (paths * independent_law([N] * L)).sum(-1)
    emission = special.softmax(LOGITS[1], -1)
    law = np.zeros(N**L)
    for weight, path in zip(
        by_path / by_path.sum(), itertools.product(range(H), repeat=L), strict=True
    ):
        each = (emission[list(path)] * c) ** (1 / temperature)
        law += weight * np.prod((each / each.sum(-1, keepdims=True))[np.arange(L), ALL], -1)
    assert oracle.chi_square_p(counts, law) > 1e-3
    assert oracle.chi_square_p(counts, joint_law([N] * L)) < 1e-6  # control


def test_padding_is_summed_out():
    """Two positions that are padding, whatever is there: the law of the first two alone."""
    fixed_BL = jnp.tile(jnp.array([False, False, True, True]), (DRAWS, 1))
    tokens_BL = i32(np.random.default_rng(0).integers(0, N, (DRAWS, L))) * fixed_BL
    attend = Attend(segment_BL=jnp.tile(jnp.array([1, 1, 0, 0]), (DRAWS, 1)))
    raw = f32(RNG.standard_normal((1, L, N + 1)))
    network = ConstantWithHmm(num_states=N + 1, time_conditioned=False)
    model = Denoiser(
        params={"raw": raw, "hmm": tuple(map(f32, LOGITS))},
        network=network,
        parameterization=FITS["parameterization"],
        attend=attend,
        windows=Windows(width=L, below_B=jnp.ones(DRAWS)),
    )
    drawn = oracle.sample(
        replace(FORWARD, steps=1), model, keys(0, DRAWS), tokens_BL, fixed_BL, False
    )
    counts = np.bincount(oracle.state_index(np.asarray(drawn.tokens_BL)[:, :2], N), minlength=N**2)
    c = special.softmax(np.asarray(raw, np.float64)[0, :, :N], -1)
    pairs = oracle.all_states(N, 2)
    law = hmm_law(width=2)[0] * np.prod(c[np.arange(2), pairs], -1)
    assert oracle.chi_square_p(counts, law) > 1e-3


class ConstantWithHmm(oracle.HmmTable):
    """The same raw output whatever it is given."""

    def hidden(self, params, tokens_BL, **_):
        return jnp.broadcast_to(params["raw"], (len(tokens_BL), *params["raw"].shape[1:]))


# ---------------------------------------------------------------- the loss


def test_the_mean_loss_is_its_expectation_and_the_gradient_that_of_the_formula():
    """All masks of all sizes on one text, in one batch; the gradient against differences."""
    objective = Hmm(**FITS, window=2)
    model = denoiser()
    masks = np.array(list(itertools.product([False, True], repeat=L)))[1:]
    x0 = np.tile([0, 2, 1, 1], (len(masks), 1))
    weight = L / masks.sum(1)
    corrupted = objective._masked(jnp.asarray(masks), i32(x0), f32(weight))

    def expected(logits):
        each = []
        for mask, x in zip(masks, x0, strict=True):
            law = joint_law(np.where(mask, N, x), logits, 2)
            each.append(-np.log(law[oracle.state_index(x, N)]))
        return np.array(each)

    def loss(params):
        nats_BL = objective.nats(model.network, params, corrupted, i32(x0))
        return objective.summed_nats(model.network, params, corrupted, i32(x0)), nats_BL

    (value, nats_BL), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(model.params)
    np.testing.assert_allclose(nats_BL.sum(1), weight * expected(LOGITS), rtol=1e-4)
    assert (np.asarray(nats_BL)[~masks] == 0).all()
    np.testing.assert_allclose(value, (weight * expected(LOGITS)).sum(), rtol=1e-4)
    assert not np.asarray(gradient["table"]).any()
    for number, (which, place) in enumerate([(0, (0, 1)), (0, (H, 2)), (1, (0, 0)), (1, (2, 1))]):
        shifted = []
        for sign in (1, -1):
            logits = [each.copy() for each in LOGITS]
            logits[which][place] += sign * 1e-5
            shifted.append((weight * expected(logits)).sum())
        difference = (shifted[0] - shifted[1]) / 2e-5
        got = float(gradient["hmm"][which][place])
        assert got == pytest.approx(difference, rel=1e-3, abs=1e-4), number


def test_a_head_that_begins_changes_nothing_and_has_different_states():
    net = HmmHead(
        num_states=9, time_conditioned=False, hidden_dim=16, num_layers=1, num_heads=2, states=5
    )
    params = jax.jit(net.init)(jax.random.key(0))
    kernel = jax.random.normal(jax.random.key(1), (16, 9))
    params["head"] = params["head"] | {"kernel": kernel}
    log_unigram_N = jax.nn.log_softmax(jax.random.normal(jax.random.key(2), (8,)))
    hmm = net.hmm(params | {"hmm": jax.jit(net.first_hmm)(params, log_unigram_N)})
    np.testing.assert_allclose(hmm.emission_HN.mean(0), 1 / 8, atol=1e-5)
    c_WN = jax.nn.log_softmax(jax.random.normal(jax.random.key(3), (6, 8)))
    tokens_W = jnp.arange(6)
    alone = hmm.log_partition(hmm.log_factors_of(tokens_W))
    np.testing.assert_allclose(alone, -6 * np.log(8), rtol=1e-5)
    np.testing.assert_allclose(hmm.log_partition(hmm.log_factors(c_WN)), -6 * np.log(8), rtol=1e-5)
    distance = np.abs(hmm.emission_HN[:, None] - hmm.emission_HN[None]).sum(-1)
    assert distance[~np.eye(5, dtype=bool)].min() > 0.05


def test_it_learns_which_tokens_go_together():
    """x1 = x2 uniform: no product comes closer than 1 - 1/N; p̂ of one call does."""
    objective = Hmm(**FITS, window=2)
    params = {"table": jnp.zeros_like(f32(TABLE)), "hmm": tuple(map(f32, LOGITS))}
    network = oracle.HmmTable(num_states=N + 1, time_conditioned=False)
    x0 = i32(np.repeat(np.arange(N), 2).reshape(N, 2)[:, [0, 1, 1, 0]])

    @jax.jit
    def step(hmm):
        corrupted = objective._masked(jnp.ones((N, L), bool), x0, jnp.ones(N))
        return jax.grad(
            lambda hmm: objective.summed_nats(network, params | {"hmm": hmm}, corrupted, x0)
        )(hmm)

    hmm = (jnp.zeros((H + 1, H)), 3 * jnp.eye(N))  # as ``first_hmm`` begins
    for _ in range(400):
        hmm = jax.tree.map(lambda x, g: x - g, hmm, step(hmm))
    pairs, _ = hmm_law([np.asarray(each, float) for each in hmm], 2)
    assert oracle.total_variation(pairs, np.eye(N).ravel() / N) < 0.02


# ---------------------------------------------------------------- commands


def train(workdir, text, *flags):
    network = ("--network", "hmm_head", "--network.states", 4)
    if "--objective" not in flags:
        network = (*network, "--objective", "hmm", "--objective.window", 6)
    few = ("--data.corpus", text, "--training.steps", 2, "--evaluation.max-sequences", 8)
    return tiny_run.call("train", *tiny_run.TINY, "--workdir", workdir, *network, *few, *flags)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, text, trunk):
    workdir = tmp_path_factory.mktemp("runs") / "hmm"
    outcome = train(workdir, text, "--init-from", trunk)
    assert outcome.code == 0, outcome.err
    return workdir, outcome


@pytest.mark.nightly
def test_a_run_trains_the_hmm_only_and_prints_its_gain(trained, trunk):
    workdir, outcome = trained
    params, before = (sedd.load(run).denoiser.params for run in (workdir, trunk))
    count = sum(x.size for x in jax.tree.leaves(params["hmm"]))
    assert f"({count:,} of them trained)" in outcome.out.splitlines()[0]
    assert "nats per masked token" in outcome.out
    kept = {name: params[name] for name in ("trunk", "head")}
    assert jax.tree.all(jax.tree.map(np.array_equal, kept, before))


@pytest.fixture(scope="module")
def head(tmp_path_factory, text):
    """A model with a head, with random weights."""
    config = tiny_run.config("hmm", corpus=str(text))
    return tiny_run.make_run(tmp_path_factory.mktemp("runs") / "head", config)


def evaluate(run, text):
    outcome = tiny_run.call(
        "evaluate", "--checkpoint", run, "--data", text, "--max-sequences", 4, "--draws", 4
    )
    assert outcome.code == 0, outcome.err
    return outcome


def test_evaluate_says_that_its_bound_is_that_of_the_trunk(head, text):
    assert "is that of the trunk" in evaluate(head, text).err


@pytest.mark.nightly
def test_bounds_are_those_of_the_trunk_and_evaluate_says_so(trained, trunk, text):
    figures = {}
    for run in (trained[0], trunk):
        outcome = evaluate(run, text)
        figures[run] = [line for line in outcome.out.splitlines() if "≤" in line]
        said = "is that of the trunk" in outcome.err
        assert said == (run == trained[0])
    assert figures[trained[0]] == figures[trunk] != []


@pytest.mark.nightly
def test_sample_draws_windows_and_requests_keep_their_noise(trained, tmp_path):
    model = sedd.load(trained[0])
    drawing = functools.partial(sedd.sample, model, sampler="ordered", order="random", steps=2)
    jointly = functools.partial(drawing, window=6, below=1.0)
    drawn, alone = jointly(0, num=2), drawing(0, num=2)
    assert (drawn.tokens < model.denoiser.mask_id).all()
    assert (drawn.tokens != alone.tokens).any()
    np.testing.assert_array_equal(drawn.calls, 2)
    out = tmp_path / "out.jsonl"
    flags = ("--sampler", "ordered", "--order", "random", "--steps", 2, "--window", 6)
    flags = (*flags, "--num", 2, "--output", out)
    outcome = tiny_run.call("sample", "--checkpoint", trained[0], *flags)
    assert outcome.code == 0, outcome.err
    assert [line["calls"] for line in map(json.loads, out.read_text().splitlines())] == [2, 2]
    # A sequence depends on its own key and length alone.
    key = jax.random.split(jax.random.key(5), 2)
    lengths = [sedd.constraints.clamp.free(length) for length in (12, 9)]
    both, turned = jointly(key, clamp=lengths), jointly(key[::-1], clamp=lengths[::-1])
    np.testing.assert_array_equal(both.tokens, turned.tokens[::-1])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--window", 13), "--window must be in 2..12, the tokens of a sequence, got 13"),
        (("--window", 6, "--below", 0), "--below must be in (0, 1], got 0"),
        (("--window", 6, "--below", 1.5), "--below must be in (0, 1], got 1.5"),
        (("--below", 0.5), "--below 0.5 goes with --window"),
        (("--window", 6, "--regex", "a+"), "--window 6: windows take no regex"),
        (("--window", 6, "--sampler", "speculative"), "draws no windows by an HMM head"),
        (("--checkpoint", "TRUNK", "--window", 6), "has no HMM head to draw windows by"),
        (("--window", 6, "--watermark", "green", "--watermark-key", "KEY"), "take no watermarks"),
    ],
)
def test_mistakes_of_sample_are_one_line(head, trunk, tmp_path, flags, message):
    secret = tmp_path / "secret"
    secret.write_text("a long enough secret of many words")
    secret.chmod(0o600)
    flags = [{"TRUNK": trunk, "KEY": secret}.get(flag, flag) for flag in flags]
    if "--checkpoint" not in flags:
        flags = ["--checkpoint", head, *flags]
    outcome = tiny_run.call("sample", *flags)
    assert outcome.code == 2
    [line] = outcome.errors
    assert message in line


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "--network hmm_head trains a part of the network on a frozen trunk: name a trained"),
        (("--init-from", "TRUNK", "--objective.window", 13), "--objective.window must be in 2..12"),
        (("--init-from", "TRUNK", "--network.states", 0), "--network.states must be at least 1"),
        (("--init-from", "ar"), "its parameterization is autoregressive; the frozen trunk"),
        (("--init-from", "any_subset"), "its parameterization is any_subset; the frozen trunk"),
        (
            ("--init-from", "TRUNK", "--objective", "k_dce"),
            "--objective k_dce does not train the hmm head of the network: use hmm",
        ),
    ],
)
def test_mistakes_of_train_are_one_line(text, trunk, tmp_path, flags, message):
    if flags[1:2] in (("ar",), ("any_subset",)):
        config = tiny_run.config(flags[1], corpus=str(text))
        trunk = tiny_run.make_run(tmp_path / "other", config)
    flags = [trunk if flag in ("TRUNK", "ar", "any_subset") else flag for flag in flags]
    outcome = train(tmp_path / "run", text, *flags)
    assert outcome.code == 2
    [line] = outcome.errors
    assert message in line


def test_a_watermark_is_refused_from_python():
    model = denoiser(
        watermark=Scheme(secret=b"secret", kind="green").batch(np.zeros(1), np.ones((1, L), bool))
    )
    with pytest.raises(UserError, match="windows drawn by an HMM head take no watermarks"):
        FORWARD.check(model)

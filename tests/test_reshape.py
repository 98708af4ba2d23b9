"""Reshaped conditionals: their own laws, their order, and that samplers draw from them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from oracle import L, N, f32, i32, keys
from tiers import daily, nightly

from sedd.denoiser import Denoiser
from sedd.errors import FieldError, UserError
from sedd.networks.ddit import DDiT
from sedd.parameterizations.conditional import Conditional
from sedd.processes.absorbing import Absorbing
from sedd.reshape import Reshape
from sedd.samplers.confidence import Confidence
from sedd.samplers.entropy_bounded import EntropyBounded
from sedd.samplers.euler import Euler
from sedd.samplers.event_jump import EventJump
from sedd.samplers.ordered import Ordered
from sedd.samplers.remdm import ReMDM
from sedd.samplers.token_confidence import TokenConfidence
from sedd.samplers.tweedie import Tweedie
from sedd.schedules import LogLinear

SCHEDULE = LogLinear()
DRAWS = 8_000


def reshaped(probs, **options):
    """What ``Reshape`` makes of rows of probabilities [R, N] in float32."""
    log_probs = f32(np.log(probs))[None]
    rows = jnp.arange(len(probs))[None]
    return np.exp(np.asarray(Reshape.of(**options)(log_probs, rows, rows), np.float64))[0]


def law_of(probs, *, temperature=1.0, top_k=None, top_p=None):
    """The same in float64, one row after another, by the definitions."""
    probs = probs ** (1 / temperature)
    probs = probs / probs.sum(-1, keepdims=True)
    if top_k is not None:
        probs = np.where(probs >= np.sort(probs)[..., [-top_k]], probs, 0)
        probs = probs / probs.sum(-1, keepdims=True)
    if top_p is not None:
        rising = np.sort(probs)[..., ::-1]
        last = (rising.cumsum(-1) < top_p).sum(-1, keepdims=True)  # the first to reach it
        probs = np.where(probs >= np.take_along_axis(rising, last, -1), probs, 0)
        probs = probs / probs.sum(-1, keepdims=True)
    return probs


def random_rows(seed, rows=40, size=9):
    return np.random.default_rng(seed).dirichlet(np.full(size, 0.5), rows)


# ---------------------------------------------------------------- each change by itself


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.3},
        {"temperature": 2.5},
        {"top_k": 1},
        {"top_k": 4},
        {"top_p": 0.3},
        {"top_p": 0.9},
        {"temperature": 0.7, "top_k": 6, "top_p": 0.8},
    ],
)
def test_reshaped_laws(options):
    probs = random_rows(0)
    got, law = reshaped(probs, **options), law_of(probs, **options)
    np.testing.assert_allclose(got, law, rtol=2e-4, atol=1e-6)
    np.testing.assert_array_equal(got == 0, law == 0)
    assert np.abs(got - probs).max() > 0.05  # the control: it does something


def test_each_sequence_has_its_own_numbers():
    probs = np.stack([random_rows(seed) for seed in range(4)])
    numbers = {
        "temperature": [1.0, 0.0, 0.4, 2.0],
        "top_k": [None, None, 3, 7],
        "top_p": [1.0, None, 0.9, 0.5],
    }
    log_probs, rows = f32(np.log(probs)), jnp.zeros((4, 40), jnp.int32)
    apply = jax.jit(Reshape.__call__)
    got = apply(Reshape.of(**numbers), log_probs, rows, rows)
    for i in range(4):
        own = {name: values[i] for name, values in numbers.items()}
        alone = apply(Reshape.of(**own), log_probs[i : i + 1], rows[:1], rows[:1])
        np.testing.assert_allclose(got[i], alone[0], rtol=1e-5)  # other shapes may round
    np.testing.assert_array_equal(got[0], log_probs[0])  # what changes nothing keeps every bit
    repeated = Reshape.of(**numbers).repeat(3)(jnp.repeat(log_probs, 3, 0), rows, rows)
    np.testing.assert_allclose(repeated, jnp.repeat(got, 3, 0), rtol=1e-5)


def test_nothing_is_sorted_and_thresholds_are_sought_only_where_wanted():
    """One conditional each for top-k and top-p; without one it would be paid for by everybody."""
    row = jnp.zeros((2, 3, 9))
    places = jnp.zeros((2, 3), jnp.int32)
    jaxpr = jax.make_jaxpr(lambda reshape: reshape(row, places, places))(Reshape.of(top_p=0.5))
    names = [equation.primitive.name for equation in jaxpr.jaxpr.eqns]
    assert names.count("cond") == 2
    assert "sort" not in str(jaxpr)
    assert "top_k" not in str(jaxpr)
    assert not {"while", "scan"} & set(names)  # the bisections are inside the conditionals


@pytest.mark.parametrize("options", [{"temperature": 1}, {"top_k": 9}, {"top_k": 99}, {"top_p": 1}])
def test_what_changes_nothing(options):
    probs = random_rows(1)
    np.testing.assert_allclose(reshaped(probs, **options), probs, rtol=1e-5)


def test_temperature_zero_takes_the_first_of_the_likeliest():
    got = reshaped(np.array([[0.1, 0.6, 0.3], [0.4, 0.2, 0.4]]), temperature=0, top_k=2, top_p=0.1)
    np.testing.assert_array_equal(got, [[0, 1, 0], [1, 0, 0]])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"top_p": 0.5}, [1, 0, 0, 0]),  # reached exactly
        ({"top_p": 0.51}, [2 / 3, 1 / 3, 0, 0]),
        ({"top_p": 0.76}, [0.5, 0.25, 0.125, 0.125]),  # a tie is kept whole
        ({"top_p": 1e-6}, [1, 0, 0, 0]),
        ({"top_k": 1}, [1, 0, 0, 0]),
        ({"top_k": 3}, [0.5, 0.25, 0.125, 0.125]),
    ],
)
def test_edges_and_ties(options, expected):
    probs = np.array([[0.5, 0.25, 0.125, 0.125], [0.125, 0.5, 0.125, 0.25]])
    got = reshaped(probs, **options)
    np.testing.assert_allclose(got[0], expected, atol=1e-6)
    np.testing.assert_allclose(got[1], np.array(expected)[[3, 0, 2, 1]], atol=1e-6)


@pytest.mark.parametrize("options", [{"temperature": 1e-40}, {"top_p": 1e-40}])
def test_values_below_float32(options):
    np.testing.assert_array_equal(reshaped(np.array([[0.1, 0.6, 0.3]]), **options), [[0, 1, 0]])


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", v) for v in (-1.0, float("nan"), float("inf"))]
    + [("top_p", v) for v in (0.0, 1.5, -0.1, float("nan"))]
    + [("top_k", v) for v in (0, -1, 2.5)]
    + [("guidance", v) for v in (-1.0, float("nan"), float("inf"))],
)
def test_values_out_of_range_are_named(name, value):
    with pytest.raises(FieldError, match=f"^{name} must be .*got {value}") as caught:
        Reshape.of(**{name: [value]})
    assert caught.value.field == name


def halve_first(log_probs, tokens_BL, positions_BK):
    """A processor: token 0 loses."""
    return log_probs.at[..., 0].add(-1.5)


def test_the_order_of_application():
    """Processor, temperature, top-k, top-p."""
    probs = np.array([[0.33, 0.3, 0.2, 0.1, 0.07]])
    got = reshaped(probs, logit_processor=halve_first, temperature=0.6, top_k=4, top_p=0.85)
    steps = [
        lambda p: p * np.array([np.exp(-1.5), 1, 1, 1, 1]),
        lambda p: law_of(p, temperature=0.6),
        lambda p: law_of(p, top_k=4),
        lambda p: law_of(p, top_p=0.85),
    ]
    laws = []
    for order in ((0, 1, 2, 3), (1, 0, 2, 3), (0, 1, 3, 2)):
        law = functools.reduce(lambda p, i: steps[i](p), order, probs)
        laws.append(law / law.sum())
    np.testing.assert_allclose(got, laws[0], atol=1e-5)
    # The controls: processor and temperature swapped, and top-k and top-p.
    assert all(np.abs(law - laws[0]).max() > 0.05 for law in laws[1:])


# ---------------------------------------------------------------- the model's conditionals


@functools.cache
def world():
    return oracle.Oracle("absorbing", seed=5)


def model(reshape=None, given_BL=None):
    denoiser = world().conditional_denoiser()
    return dataclasses.replace(denoiser, reshape=reshape, given_BL=given_BL)


def test_only_masked_positions_are_reshaped():
    x_BL = i32(world().states)
    log_conditional = jax.jit(Denoiser.log_conditional)
    log_probs = log_conditional(model(Reshape.of(temperature=0.5, top_k=2)), x_BL)
    law = law_of(world().conditional(), temperature=0.5, top_k=2)
    np.testing.assert_allclose(np.exp(log_probs), law, atol=1e-5)
    visible = world().states != N
    np.testing.assert_array_equal(log_probs[visible], log_conditional(model(), x_BL)[visible])


def test_guidance():
    """c(x)^(1+w) / c(x without what is given)^w, normalised; the processor sees the result."""
    weight, states = 1.5, world().states
    given_BL = np.random.default_rng(0).random(states.shape) < 0.5
    hidden = oracle.state_index(np.where(given_BL, N, states), N + 1)
    c = np.maximum(world().conditional(), 1e-30)
    law = c ** (1 + weight) / c[hidden] ** weight
    law /= law.sum(-1, keepdims=True)
    guided = model(Reshape.of(guidance=weight), jnp.asarray(given_BL))
    assert guided.guided
    got = np.exp(np.asarray(guided.log_conditional(i32(states)), np.float64))
    masked = states == N
    np.testing.assert_allclose(got[masked], law[masked], atol=1e-5)
    assert np.abs(law - c)[masked].max() > 0.05
    first = Reshape.of(guidance=weight, logit_processor=halve_first)
    got = np.exp(model(first, jnp.asarray(given_BL)).log_conditional(i32(states)))
    law = law * np.array([np.exp(-1.5), 1, 1])
    np.testing.assert_allclose(got[masked], (law / law.sum(-1, keepdims=True))[masked], atol=1e-5)


@pytest.mark.parametrize(
    "sampler", [Ordered(schedule=SCHEDULE), nightly(Tweedie(schedule=SCHEDULE, steps=3))]
)
def test_guidance_takes_two_calls(sampler):
    fixed = (1, -1, -1, 0)
    given_BL = jnp.broadcast_to(jnp.array(fixed) >= 0, (8, L))
    calls = {
        weight: oracle.draw(sampler, model(Reshape.of(guidance=weight), given_BL), 8, fixed=fixed)
        for weight in (0.0, 1.0)
    }
    plain = oracle.draw(sampler, model(), 8, fixed=fixed)
    np.testing.assert_array_equal(calls[0.0].calls_B, plain.calls_B)
    np.testing.assert_array_equal(calls[0.0].tokens_BL, plain.tokens_BL)  # a weight of 0 is off
    np.testing.assert_array_equal(calls[1.0].calls_B, 2 * plain.calls_B)
    nothing_given = oracle.draw(sampler, model(Reshape.of(guidance=1.0)), 8, fixed=fixed)
    np.testing.assert_array_equal(nothing_given.tokens_BL, plain.tokens_BL)


def test_a_score_keeps_its_total():
    """So that positions are revealed when they would have been; visible ones do not change."""
    states, masked = world().states, world().states == N
    sigma_B, log_score = f32(np.full(len(states), 0.7)), jax.jit(Denoiser.log_score)
    for denoiser in (world().conditional_denoiser(), world().score_denoiser()):
        shaped = dataclasses.replace(denoiser, reshape=Reshape.of(temperature=0.5, top_k=2))
        plain, got = (
            np.exp(np.asarray(log_score(d, i32(states), sigma_B), np.float64))
            for d in (denoiser, shaped)
        )
        tokens, total = got[masked][:, :N], plain[masked][:, :N].sum(-1, keepdims=True)
        np.testing.assert_allclose(tokens.sum(-1, keepdims=True), total, rtol=1e-5)
        law = law_of(plain[masked][:, :N], temperature=0.5, top_k=2)
        np.testing.assert_allclose(tokens / total, law, atol=1e-5)
        np.testing.assert_array_equal(got[masked][:, N], plain[masked][:, N])
        np.testing.assert_array_equal(got[~masked], plain[~masked])


@pytest.mark.nightly
def test_tweedie_reveals_when_it_would_have():
    sampler = Tweedie(schedule=SCHEDULE, steps=8)
    plain, cold = (
        np.asarray(oracle.draw(sampler, model(reshape), 500).trace_TBL)
        for reshape in (None, Reshape.of(temperature=0.0))
    )
    np.testing.assert_array_equal(plain == N, cold == N)
    assert (plain != cold).any()


# ---------------------------------------------------------------- samplers draw from them


def chain_law(conditional, fixed=oracle.NOTHING_FIXED):
    """[V^L]: the product of conditionals [V^L, L, N] from left to right, given what is fixed."""
    law = oracle.masked_start(world(), fixed)
    for i in range(L):
        if fixed[i] < 0:
            reveal = np.arange(L) == i
            law = law @ oracle.reveal_kernel(world(), reveal, conditional=conditional)
    return law


FIXED = (-1, 2, -1, -1)
CASES = [
    ({"temperature": 0.6}, oracle.NOTHING_FIXED),
    ({"temperature": 0.6}, FIXED),
    ({"temperature": 1.8, "top_k": 2}, oracle.NOTHING_FIXED),
    ({"top_p": 0.6}, FIXED),
]


@pytest.mark.parametrize(("options", "fixed"), CASES)
def test_one_position_a_call_is_the_chain_of_reshaped_conditionals(options, fixed):
    drawn = oracle.draw(
        Ordered(schedule=SCHEDULE), model(Reshape.of(**options)), DRAWS, seed=1, fixed=fixed
    )
    counts = oracle.counts_of(drawn.tokens_BL, N + 1)
    law = chain_law(law_of(world().conditional(), **options), fixed)
    assert oracle.chi_square_p(counts, law) > 1e-4
    assert oracle.chi_square_p(counts, chain_law(world().conditional(), fixed)) < 1e-4


def test_guided_infilling_has_its_law():
    """The given tokens stay hidden from the second reading at every step; drawn ones do not."""
    weight, c = 1.0, np.maximum(world().conditional(), 1e-30)
    given = np.array(FIXED) >= 0
    hidden = oracle.state_index(np.where(given, N, world().states), N + 1)
    guided = c ** (1 + weight) / c[hidden] ** weight
    denoiser = model(Reshape.of(guidance=weight), jnp.broadcast_to(jnp.asarray(given), (DRAWS, L)))
    drawn = oracle.draw(Ordered(schedule=SCHEDULE), denoiser, DRAWS, seed=2, fixed=FIXED)
    counts = oracle.counts_of(drawn.tokens_BL, N + 1)
    assert oracle.chi_square_p(counts, chain_law(law_of(guided), FIXED)) > 1e-4
    assert oracle.chi_square_p(counts, chain_law(world().conditional(), FIXED)) < 1e-4


def place_decides(log_probs, tokens_BL, positions_BK):
    """A processor: token 2 nowhere, and at a position only the token of its parity."""
    allowed = jnp.arange(N) == (positions_BK % 2)[..., None]
    return jnp.where(allowed, log_probs, -1e6)


def no_repeat(log_probs, tokens_BL, positions_BK):
    """A processor: not the token on the left."""
    left_BL = jnp.pad(tokens_BL[:, :-1], ((0, 0), (1, 0)), constant_values=N)
    left_BK = jnp.take_along_axis(left_BL, positions_BK, 1)
    return jnp.where(jnp.arange(N) == left_BK[..., None], -jnp.inf, log_probs)


EVERY = [
    Euler(schedule=SCHEDULE, steps=4),
    Tweedie(schedule=SCHEDULE, steps=4),
    EventJump(schedule=SCHEDULE, steps=2),
    Confidence(schedule=SCHEDULE, steps=2),
    TokenConfidence(schedule=SCHEDULE),
    ReMDM(schedule=SCHEDULE, steps=6, eta=0.5),
]


@pytest.mark.parametrize(
    "sampler", daily(EVERY, EVERY[2:3]), ids=lambda sampler: type(sampler).__name__
)
def test_what_a_processor_bans_never_appears(sampler):
    denoiser = model(Reshape.of(logit_processor=place_decides))
    tokens_BL = np.asarray(oracle.draw(sampler, denoiser, 500, trace=False).tokens_BL)
    np.testing.assert_array_equal(tokens_BL, np.broadcast_to([0, 1, 0, 1], (500, L)))


def test_a_processor_sees_the_tokens():
    denoiser = model(Reshape.of(logit_processor=no_repeat))
    tokens_BL = np.asarray(oracle.draw(Ordered(schedule=SCHEDULE), denoiser, 2000).tokens_BL)
    assert (tokens_BL[:, 1:] != tokens_BL[:, :-1]).all()
    plain_BL = np.asarray(oracle.draw(Ordered(schedule=SCHEDULE), model(), 2000).tokens_BL)
    assert (plain_BL[:, 1:] == plain_BL[:, :-1]).any()


def ban_first(log_probs, tokens_BL, positions_BK):
    """A processor that takes a token away for good."""
    return log_probs.at[..., 0].set(-jnp.inf)


@pytest.mark.parametrize(
    "sampler",
    [
        pytest.param(Confidence(schedule=SCHEDULE), id="entropy", marks=pytest.mark.nightly),
        pytest.param(Confidence(schedule=SCHEDULE, by="margin"), id="margin"),
        pytest.param(EntropyBounded(schedule=SCHEDULE), id="entropy_bounded"),
        pytest.param(TokenConfidence(schedule=SCHEDULE), id="token_confidence"),
    ],
)
def test_every_round_reveals_something(sampler):
    """A round that does not is repeated for ever: here is one round, not the loop."""
    denoiser = model(Reshape.of(logit_processor=ban_first))
    tokens_BL, fixed_BL = i32([[0, 1, 0, 0]]), jnp.array([[False, True, False, False]])
    state = sampler.start(denoiser, keys(0, 1), tokens_BL, fixed_BL)
    after = sampler.advance(denoiser, state)
    assert int((after.x_BL == N).sum()) < int((state.x_BL == N).sum())


# ---------------------------------------------------------------- some positions, another process


@pytest.mark.nightly
def test_some_positions_are_read_as_all_are():
    """In float32 by the transformer, with guidance and all; products of other shapes may round."""
    reading = Conditional(process=Absorbing(num_tokens=9))
    network = DDiT(num_states=10, time_conditioned=False, hidden_dim=16, num_layers=1, num_heads=2)
    rng = np.random.default_rng(3)
    params = jax.tree.map(
        lambda leaf: leaf + f32(0.3 * rng.standard_normal(leaf.shape)),
        network.init(jax.random.key(0)),
    )
    x_BL = i32(rng.integers(0, 10, (3, 12)))
    positions_BK = i32([rng.permutation(12)[:5] for _ in range(3)])
    shape = Reshape.of(guidance=1.0, temperature=0.8, top_p=0.9, logit_processor=halve_first)
    for reshape in (None, shape):
        denoiser = Denoiser(
            params=params,
            network=network,
            parameterization=reading,
            reshape=reshape,
            given_BL=jnp.asarray(rng.random((3, 12)) < 0.3),
        )
        every = np.asarray(denoiser.log_conditional(x_BL))
        some = denoiser.log_conditional_at(denoiser.hidden(x_BL), x_BL, positions_BK)
        picked = np.take_along_axis(every, np.asarray(positions_BK)[..., None], 1)
        np.testing.assert_allclose(some, picked, rtol=1e-5, atol=1e-5)
        assert (picked == 0).any()  # some are visible


@pytest.mark.nightly
def test_some_positions_are_exactly_those_in_float64():
    rng = np.random.default_rng(4)
    with jax.enable_x64(True):
        table = jnp.asarray(rng.standard_normal(((N + 1) ** L, L, N + 1)))
        denoiser = dataclasses.replace(
            model(Reshape.of(temperature=0.8, top_p=0.9, logit_processor=no_repeat)),
            params={"table": table},
        )
        x_BL, positions_BK = i32(world().states), i32(rng.integers(0, L, (256, 2)))
        every = np.asarray(denoiser.log_conditional(x_BL))
        some = denoiser.log_conditional_at(denoiser.hidden(x_BL), x_BL, positions_BK)
        picked = np.take_along_axis(every, np.asarray(positions_BK)[..., None], 1)
        assert some.dtype == every.dtype == np.float64
        np.testing.assert_array_equal(some, picked)


@pytest.mark.parametrize(
    "reshape",
    [
        Reshape.of(temperature=0.5),
        Reshape.of(top_k=2),
        Reshape.of(top_p=0.5),
        Reshape.of(guidance=1.0),
        Reshape.of(logit_processor=halve_first),
    ],
)
def test_a_uniform_process_has_nothing_to_reshape(reshape):
    denoiser = oracle.Oracle("uniform").score_denoiser()
    sampler = Tweedie(schedule=SCHEDULE, steps=2)
    sampler.check(denoiser)
    with pytest.raises(UserError, match="exists on the absorbing process only"):
        oracle.draw(sampler, dataclasses.replace(denoiser, reshape=reshape), 2)

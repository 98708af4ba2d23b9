"""The denoising cross entropies against exact expectations over every masking of 4 positions."""

import dataclasses
import itertools
import math
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from oracle import f32, i32, keys
from scipy import integrate, special, stats
from tiers import daily

from sedd.objectives.base import Corrupted, draw_uniform
from sedd.objectives.k_dce import KDCE
from sedd.objectives.lambda_dce import LambdaDCE
from sedd.objectives.mdlm import MDLM
from sedd.objectives.score_entropy import ScoreEntropy
from sedd.objectives.t_dce import TDCE
from sedd.parameterizations.conditional import Conditional
from sedd.parameterizations.score import Score
from sedd.processes.absorbing import Absorbing
from sedd.processes.uniform import Uniform
from sedd.schedules import Cosine, Geometric, LogLinear, Polynomial

N, L, MASK = oracle.N, oracle.L, oracle.N
X0 = (0, 2, 1, 1)
ALL = (True,) * L
SOME = (True, False, True, True)
TABLE = oracle.random_table(seed=5, scale=1.5)
DENOISER = oracle.table_denoiser(TABLE, N)
READING = DENOISER.parameterization
SCHEDULES = {
    "log_linear": LogLinear(),
    "geometric": Geometric(),
    "cosine": Cosine(),
    "polynomial": Polynomial(),
}


# ---------------------------------------------------------------- exact expectations


def nll_of_masking(masked):
    """Σ_masked -log c(x0_i | x0 with these positions masked)."""
    xt = np.where(masked, MASK, X0)
    logits = TABLE[oracle.state_index(xt, N + 1)][:, :N]
    log_c = logits - special.logsumexp(logits, axis=-1, keepdims=True)
    return -sum(log_c[i, X0[i]] for i in range(L) if masked[i])


@cache
def maskings(scored=ALL):
    """(number masked, nats) of each masking of the scored positions."""
    choices = [(False, True) if s else (False,) for s in scored]
    table = [(sum(m), nll_of_masking(m)) for m in itertools.product(*choices)]
    return np.array([size for size, _ in table]), np.array([nats for _, nats in table])


def given_lambda(masking_probability, scored=ALL):
    """E Σ_masked -log c, each scored position masked with this probability."""
    size, nats = maskings(scored)
    p = np.asarray(masking_probability, np.float64)[..., None]
    return (p**size * (1 - p) ** (sum(scored) - size) * nats).sum(-1)


def over_orders(scored=ALL):
    """The expected NLL over all orders of the scored positions."""
    free = [i for i in range(L) if scored[i]]
    orders = list(itertools.permutations(free))
    total = 0.0
    for order in orders:
        for j, i in enumerate(order):
            hidden = set(order[j:])
            masked = [k in hidden for k in range(L)]
            logits = TABLE[oracle.state_index(np.where(masked, MASK, X0), N + 1)][i, :N]
            total += special.logsumexp(logits) - logits[X0[i]]
    return total / len(orders)


def exact_lambda_dce(scored=ALL):
    size, nats = maskings(scored)
    some = size > 0
    return (special.beta(size[some], sum(scored) - size[some] + 1) * nats[some]).sum()


def exact_power(power):
    """(2 - power) E λ^-power Σ_masked -log c; the complement of a mask has the same law."""
    size, nats = maskings()
    some = size > 0
    beta = special.beta(size[some] + 1 - power, L - size[some] + 1)
    return (2 - power) * (beta * nats[some]).sum()


def exact_k_dce(scored=ALL):
    size, nats = maskings(scored)
    return np.mean([sum(scored) / k * nats[size == k].mean() for k in range(1, sum(scored) + 1)])


def exact_t_dce(schedule, t_min, scored=ALL):
    """∫ rate/expm1(σ)·E dt / (1 - t_min) = ∫ dλ/λ·E / (1 - t_min)."""
    low, high = (-np.expm1(-float(schedule.sigma(jnp.float32(t)))) for t in (t_min, 1.0))
    value, _ = integrate.quad(lambda v: given_lambda(np.exp(v), scored), np.log(low), np.log(high))
    return value / (1 - t_min)


def exact_mdlm(schedule, steps):
    alpha = np.exp(-np.asarray(schedule.sigma(jnp.linspace(0.0, 1.0, steps + 1)), np.float64))
    weight = (alpha[:-1] - alpha[1:]) / (1 - alpha[1:])
    return (weight * given_lambda(1 - alpha[1:])).sum()


# ---------------------------------------------------------------- what the library draws


def corrupted_batch(objective, keys_B, u_B, scored=ALL, length=None):
    x0_BL = jnp.broadcast_to(i32(X0), (len(u_B), L))
    scored_BL = jnp.broadcast_to(jnp.asarray(scored), x0_BL.shape)
    if length is not None:
        x0_BL, scored_BL = (jnp.tile(a, length // L) for a in (x0_BL, scored_BL))
    return x0_BL, objective.corrupt(keys_B, u_B, x0_BL, scored_BL)


@partial(jax.jit, static_argnames=("objective", "scored", "count"))
def draws(objective, seed, scored=ALL, count=30_000):
    """One loss a key, at independent noise levels."""
    u_B = jax.random.uniform(jax.random.key(seed), (count,))
    x0_BL, corrupted = corrupted_batch(objective, keys(seed + 1, count), u_B, scored)
    return objective.nats(DENOISER.network, DENOISER.params, corrupted, x0_BL).sum(-1)


class MasksEverything(Absorbing):
    """So that every position shows the weight that goes with u."""

    def corrupt(self, keys_B, x0_BL, sigma):
        return jnp.full_like(x0_BL, self.mask_id)


def weight_given_u(objective, u):
    """(weight, σ) of each noise level, in float64."""
    everything = Conditional(process=MasksEverything(num_tokens=N))
    objective = dataclasses.replace(objective, parameterization=everything)
    _, corrupted = corrupted_batch(objective, keys(0, len(u)), f32(u))
    return (np.asarray(a, np.float64) for a in (corrupted.weight_BL[:, 0], corrupted.sigma))


TWICE = {"complementary": True}
CASES = {
    "lambda_dce": (LambdaDCE, LogLinear(), {}, lambda s: exact_lambda_dce()),
    "lambda_dce_power": (LambdaDCE, LogLinear(), {"power": 0.5}, lambda s: exact_power(0.5)),
    "complementary": (LambdaDCE, LogLinear(), TWICE, lambda s: exact_lambda_dce()),
    "complementary_power": (
        LambdaDCE,
        LogLinear(),
        {**TWICE, "power": 0.0},
        lambda s: exact_power(0.0),
    ),
    "k_dce": (KDCE, LogLinear(), {}, lambda s: exact_k_dce()),
    "t_dce": (TDCE, LogLinear(), {}, lambda s: exact_t_dce(s, 1e-3)),
    "t_dce_geometric": (TDCE, Geometric(), {"t_min": 0.1}, lambda s: exact_t_dce(s, 0.1)),
    "t_dce_cosine": (TDCE, Cosine(), {}, lambda s: exact_t_dce(s, 1e-3)),
    "t_dse": (ScoreEntropy, LogLinear(), {}, lambda s: exact_t_dce(s, 1e-3)),
    "t_dse_polynomial": (ScoreEntropy, Polynomial(), {}, lambda s: exact_t_dce(s, 1e-3)),
    "mdlm_1": (MDLM, LogLinear(), {"num_steps": 1}, lambda s: exact_mdlm(s, 1)),
    "mdlm_4": (MDLM, Polynomial(), {"num_steps": 4}, lambda s: exact_mdlm(s, 4)),
    "mdlm_1000": (MDLM, LogLinear(), {"num_steps": 1000}, lambda s: exact_mdlm(s, 1000)),
}


# One schedule and one setting of each objective; `make test-all` tries all.
EACH_DAY = [
    "lambda_dce",
    "lambda_dce_power",
    "complementary",
    "k_dce",
    "t_dce_geometric",
    "t_dse_polynomial",
    "mdlm_4",
]


@pytest.mark.parametrize("name", daily(CASES, EACH_DAY))
def test_mean_loss_is_the_exact_expectation(name):
    make, schedule, fields, exact = CASES[name]
    objective = make(schedule=schedule, parameterization=READING, **fields)
    losses = np.asarray(draws(objective, 1), np.float64)
    error = losses.std() / math.sqrt(len(losses))
    assert abs(losses.mean() - exact(schedule)) < 3.5 * error
    assert error < 0.05 * losses.mean()  # or the test could not fail


@pytest.mark.parametrize("scored", [ALL, SOME])
def test_lambda_k_and_the_mean_over_orders_are_one_number(scored):
    assert exact_lambda_dce(scored) == pytest.approx(over_orders(scored), rel=1e-12)
    assert exact_k_dce(scored) == pytest.approx(over_orders(scored), rel=1e-12)
    for make in (LambdaDCE, KDCE):
        objective = make(schedule=LogLinear(), parameterization=READING)
        losses = np.asarray(draws(objective, 2, scored), np.float64)
        error = losses.std() / math.sqrt(len(losses))
        assert abs(losses.mean() - over_orders(scored)) < 3.5 * error


def test_the_t_losses_miss_only_the_ends():
    """Log-linear t covers λ in [(1-ε)·t_min, 1-ε]; the mean is that integral / (1 - t_min)."""
    low, high = 0.999e-3, 0.999
    ends, _ = integrate.quad(lambda v: given_lambda(v) / v, 1e-12, low)
    top, _ = integrate.quad(lambda v: given_lambda(v) / v, high, 1)
    covered = (1 - 1e-3) * exact_t_dce(LogLinear(), 1e-3)
    assert covered + ends + top == pytest.approx(over_orders(), rel=1e-5)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("make", [TDCE, ScoreEntropy, MDLM])
def test_weights(make, name):
    """The weight of each u against float64, without a draw."""
    schedule = SCHEDULES[name]
    objective = make(schedule=schedule, parameterization=READING)
    u = np.float32(np.linspace(0.05, 0.95, 12))
    got, _ = weight_given_u(objective, u)
    if make is MDLM:
        step = np.floor(u * 1000)
        alpha_s, alpha_t = (
            np.exp(-np.asarray(schedule.sigma(f32(v / 1000)), np.float64)) for v in (step, step + 1)
        )
        exact, rtol = 1000 * (alpha_s - alpha_t) / (1 - alpha_t), 1e-3  # σ's 1e-7 of steps of 1e-3
    else:
        t = f32(1e-3 + (1 - 1e-3) * u)
        sigma, exact = (np.asarray(a, np.float64) for a in (schedule.sigma(t), schedule.rate(t)))
        if make is TDCE:
            exact = exact / np.expm1(sigma)
        rtol = 1e-5
    np.testing.assert_allclose(got, exact, rtol=rtol)


def test_k_weights():
    objective = KDCE(schedule=LogLinear(), parameterization=READING)
    u = f32((np.arange(L) + 0.5) / L)
    _, corrupted = corrupted_batch(objective, keys(0, L), u)
    np.testing.assert_array_equal((corrupted.xt_BL == MASK).sum(-1), [1, 2, 3, 4])
    np.testing.assert_allclose(corrupted.weight_BL.max(-1), [4, 2, 4 / 3, 1], rtol=1e-6)


@pytest.mark.parametrize("schedule", [LogLinear(), Polynomial()])
def test_mdlm_tends_to_t_dce(schedule):
    """The gap falls as 1/T."""
    continuous = exact_t_dce(schedule, 1e-7)
    gaps = []
    for steps in (8, 64, 512):
        objective = MDLM(schedule=schedule, parameterization=READING, num_steps=steps)
        u = np.float32((np.arange(steps) + 0.5) / steps)
        weight, sigma = weight_given_u(objective, u)
        gaps.append(abs((weight * given_lambda(-np.expm1(-sigma))).mean() - continuous))
    assert gaps[2] < 0.01 * continuous
    assert 4 < gaps[0] / gaps[1] < 16
    assert 4 < gaps[1] / gaps[2] < 16


@pytest.mark.parametrize("name", SCHEDULES)
def test_t_dse_is_t_dce_pointwise(name):
    """With a normalised conditional, score entropy collapses to cross entropy (2406.03736, 3.3)."""
    schedule = SCHEDULES[name]
    entropy = ScoreEntropy(schedule=schedule, parameterization=READING)
    cross = TDCE(schedule=schedule, parameterization=READING)
    u_B = f32(np.linspace(0.3, 0.999, 200))
    x0_BL, corrupted = corrupted_batch(entropy, keys(3, 200), u_B)
    _, same = corrupted_batch(cross, keys(3, 200), u_B)
    np.testing.assert_array_equal(corrupted.xt_BL, same.xt_BL)
    assert int((same.xt_BL == MASK).sum()) > 100
    a, b = (
        jax.jit(o.nats, static_argnums=0)(DENOISER.network, DENOISER.params, c, x0_BL)
        for o, c in ((entropy, corrupted), (cross, same))
    )
    np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5)


# ---------------------------------------------------------------- corruption

EVERY = {
    "lambda_dce": LambdaDCE(schedule=LogLinear(), parameterization=READING),
    "complementary": LambdaDCE(schedule=LogLinear(), parameterization=READING, **TWICE),
    "k_dce": KDCE(schedule=LogLinear(), parameterization=READING),
    "t_dce": TDCE(schedule=LogLinear(), parameterization=READING),
    "mdlm": MDLM(schedule=LogLinear(), parameterization=READING),
    "t_dse": ScoreEntropy(schedule=LogLinear(), parameterization=READING),
    "sedd": ScoreEntropy(
        schedule=LogLinear(), parameterization=Score(process=Absorbing(num_tokens=N))
    ),
    "sedd_uniform": ScoreEntropy(
        schedule=Geometric(), parameterization=Score(process=Uniform(num_tokens=N))
    ),
}
every = pytest.mark.parametrize("name", EVERY)


@every
def test_positions_not_scored_are_neither_corrupted_nor_counted(name):
    u_B = f32(np.linspace(0.5, 0.99, 64))
    x0_BL, corrupted = corrupted_batch(EVERY[name], keys(4, 64), u_B, SOME, length=32)
    given = ~np.tile(SOME, 8)
    np.testing.assert_array_equal(corrupted.xt_BL[:, given], x0_BL[:, given])
    assert (np.asarray(corrupted.weight_BL)[:, given] == 0).all()
    assert int((corrupted.xt_BL != x0_BL).sum()) > 100  # the others are
    assert (np.asarray(corrupted.weight_BL)[:, ~given] > 0).any()


@every
def test_a_sequence_without_scored_positions_costs_nothing(name):
    u_B = f32([0.1, 0.9])
    x0_BL, corrupted = corrupted_batch(EVERY[name], keys(4, 2), u_B, (False,) * L)
    np.testing.assert_array_equal(corrupted.xt_BL, x0_BL)
    np.testing.assert_array_equal(corrupted.weight_BL, 0)


@pytest.mark.parametrize(
    ("name", "schedule"),
    [(name, LogLinear()) for name in EVERY]
    + [(n, s) for n in ("t_dce", "mdlm", "sedd_uniform") for s in list(SCHEDULES.values())[1:]],
)
def test_finite_at_the_ends(name, schedule):
    objective = dataclasses.replace(EVERY[name], schedule=schedule)
    u_B = f32(np.repeat([0.0, 1e-7, 1 - 2**-24], 4))
    x0_BL, corrupted = corrupted_batch(objective, keys(5, 12), u_B)
    assert np.isfinite(corrupted.weight_BL).all()
    assert (np.asarray(corrupted.weight_BL) >= 0).all()
    size = objective.process.num_states
    sigma_BL = (
        None if corrupted.sigma is None else jnp.broadcast_to(corrupted.sigma[:, None], (12, L))
    )

    def loss(raw_BLV):
        nats_BL = objective.row_nats(raw_BLV, x0_BL, corrupted.xt_BL, sigma_BL)
        return (nats_BL * corrupted.weight_BL).sum()

    raw_BLV = jax.random.normal(jax.random.key(0), (12, L, size))
    value, gradient = jax.jit(jax.value_and_grad(loss))(raw_BLV)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


def test_every_token_is_predicted_once_with_its_complement():
    """The masks of both calls are complements, and dropout differs between them."""
    objective = EVERY["complementary"]
    x0_BL, corrupted = corrupted_batch(objective, keys(6, 64), f32(np.linspace(0, 0.99, 64)), SOME)
    twice, x0_RL = objective._with_complement(corrupted, x0_BL)
    first, second = np.split(np.asarray(twice.xt_BL == MASK), 2)
    np.testing.assert_array_equal(first ^ second, np.broadcast_to(SOME, first.shape))
    np.testing.assert_array_equal(np.asarray(twice.weight_BL) > 0, np.asarray(twice.xt_BL == MASK))
    np.testing.assert_array_equal(x0_RL[64:], x0_BL)
    nats_BL = objective.nats(DENOISER.network, DENOISER.params, corrupted, x0_BL)
    assert ((np.asarray(nats_BL) > 0) == SOME).all()
    total = objective.summed_nats(DENOISER.network, DENOISER.params, corrupted, x0_BL)
    assert total == pytest.approx(float(nats_BL.sum()), rel=1e-5)


def test_complements_have_less_variance_than_twice_as_many_draws():
    """At power 0 every token counts once in each draw: what varies is its context alone."""
    one, both = (
        np.asarray(
            draws(LambdaDCE(schedule=LogLinear(), parameterization=READING, power=0.0, **f), 3)
        )
        for f in ({}, TWICE)
    )
    assert both.var() < 0.5 * one.var()


def test_every_subset_is_equally_likely_under_k():
    objective = EVERY["k_dce"]
    _, corrupted = corrupted_batch(objective, keys(6, 6000), f32(np.full(6000, 0.3)))  # k = 2
    subset = np.asarray(corrupted.xt_BL == MASK) @ (2 ** np.arange(L))
    counts = np.bincount(subset, minlength=16)
    pairs = [2**a + 2**b for a, b in itertools.combinations(range(L), 2)]
    assert counts[pairs].sum() == 6000
    assert stats.chisquare(counts[pairs]).pvalue > 1e-4


def test_infinite_nats_do_not_leak_from_positions_that_do_not_count():
    """0·inf is nan: both the value and the gradient must skip them."""
    objective = EVERY["t_dce"]
    raw = jnp.zeros((1, L, N + 1)).at[0, 1, 1].set(-jnp.inf)
    xt_BL = i32([[MASK, MASK, 1, 1]])
    corrupted = Corrupted(xt_BL=xt_BL, weight_BL=f32([[1, 0, 0, 0]]), sigma=f32([0.5]))
    network = oracle.ConstantNetwork(num_states=N + 1, time_conditioned=False)
    x0_BL = i32([[0, 1, 1, 1]])

    # The product with the identity would make nan of inf·0: feed rows directly instead.
    nats_BL = objective.row_nats(raw, x0_BL, xt_BL, jnp.full((1, L), 0.5))
    assert not np.isfinite(nats_BL[0, 1])
    finite = raw.at[0, 1, 1].set(-1e30)
    value, gradient = jax.value_and_grad(
        lambda r: objective.summed_nats(network, r, corrupted, x0_BL)
    )(finite)
    assert value == pytest.approx(math.log(3), rel=1e-6)
    assert np.isfinite(gradient).all()
    assert (np.asarray(gradient)[0, 1:] == 0).all()


# ---------------------------------------------------------------- noise levels


def test_stratified_draws_cover_the_batch_and_each_slot_is_uniform():
    index_B = jnp.arange(8)
    u_RB = np.asarray(
        jax.vmap(lambda key: draw_uniform(key, index_B, 8, stratified=True))(keys(7, 3000))
    )
    assert ((u_RB >= 0) & (u_RB < 1)).all()
    gaps = np.diff(np.sort(u_RB, -1), axis=-1)
    np.testing.assert_allclose(gaps, 1 / 8, atol=1e-6)
    for slot in range(8):
        assert stats.kstest(u_RB[:, slot], "uniform").pvalue > 1e-4
    # The control: (u + b)/B covers the batch as well, but a slot keeps its stratum.
    assert stats.kstest((u_RB[:, 0] + 3) / 8, "uniform").pvalue < 1e-4


def test_plain_draws_are_uniform_and_independent():
    index_B = jnp.arange(8)
    u_RB = np.asarray(
        jax.vmap(lambda key: draw_uniform(key, index_B, 8, stratified=False))(keys(8, 3000))
    )
    assert stats.kstest(u_RB.ravel(), "uniform").pvalue > 1e-4
    assert abs(np.corrcoef(u_RB.T)[0, 1]) < 4 / math.sqrt(3000)


@pytest.mark.parametrize("stratified", [True, False])
def test_draws_go_by_the_global_index(stratified):
    key = jax.random.key(9)
    whole = draw_uniform(key, jnp.arange(8), 8, stratified=stratified)
    part = draw_uniform(key, jnp.arange(4, 8), 8, stratified=stratified)
    np.testing.assert_array_equal(whole[4:], part)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("make", [LambdaDCE, KDCE, TDCE, MDLM])
def test_cross_entropies_refuse_a_process_without_a_mask(make):
    with pytest.raises(ValueError, match="absorbing"):
        make(schedule=LogLinear(), parameterization=Score(process=Uniform(num_tokens=N)))


@pytest.mark.parametrize("make", [LambdaDCE, KDCE])
def test_losses_without_a_time_refuse_a_model_with_one(make):
    reading = Conditional(process=Absorbing(num_tokens=N), time_independent=False)
    with pytest.raises(ValueError, match=r"time.independent"):
        make(schedule=LogLinear(), parameterization=reading)


@pytest.mark.parametrize(
    ("make", "field", "value"),
    [
        (TDCE, "t_min", 0.0),
        (LambdaDCE, "power", 1.5),
        (ScoreEntropy, "t_min", 1.0),
        (MDLM, "num_steps", 0),
    ],
)
def test_mistakes_are_named(make, field, value):
    with pytest.raises(ValueError, match=f"{field} .*{value}"):
        make(schedule=LogLinear(), parameterization=READING, **{field: value})

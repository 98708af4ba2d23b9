"""Hybrid noise and the mean parameterization, on two tokens and a mask at two positions."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from oracle import f32, i32
from scipy import optimize
from scipy.linalg import expm
from tiers import daily

from sedd.errors import FieldError, UserError
from sedd.evaluation.monte_carlo import sequence_nats
from sedd.objectives.score_entropy import ScoreEntropy
from sedd.parameterizations.conditional import Conditional
from sedd.parameterizations.mean import Mean
from sedd.parameterizations.score import Score
from sedd.processes.absorbing import Absorbing
from sedd.processes.hybrid import Hybrid
from sedd.processes.uniform import Uniform
from sedd.samplers.euler import Euler
from sedd.samplers.event_jump import EventJump
from sedd.samplers.tweedie import Tweedie
from sedd.schedules import LogLinear

N, V, L = 2, 3, 2
JOINT = np.array([[0.5, 0.1], [0.05, 0.35]])
STATES, CLEAN = oracle.all_states(V, L), oracle.all_states(N, L)
SCHEDULE = LogLinear()
SIGMA, RATE = oracle.SCHEDULES["log_linear"]
T_MIN = 0.03
MIXTURES = [(0.3, None), (0.2, 1.0), (0.4, 0.5), (0.1, 2.0)]
mixtures = pytest.mark.parametrize(("uniform", "gamma"), daily(MIXTURES, MIXTURES[:2]))


def hybrid(uniform, gamma, num_tokens=N):
    return Hybrid(num_tokens=num_tokens, uniform=uniform, gamma=gamma)


# ---------------------------------------------------------------- the process, from its formulas


@functools.cache
def noise(sigma, uniform, gamma):
    """[V] in float64: the mass of noise at each token and at the mask."""
    if sigma == 0:
        return np.zeros(V)
    if gamma is None:
        moved = -np.expm1(-sigma)
        return np.append(np.full(N, moved * uniform / N), moved * (1 - uniform))

    def weight(logit):  # c of GIDD at its time τ
        half = -np.logaddexp(0, logit) - np.logaddexp(0, -logit)
        return 2**gamma * uniform / (1 - uniform) * np.exp(gamma / 2 * half)

    def excess(logit):
        return np.logaddexp(0, logit) + np.log1p(weight(logit)) - sigma

    logit = optimize.brentq(excess, -300, 100, xtol=1e-14, rtol=1e-14)
    c, tau = weight(logit), 1 / (1 + math.exp(-logit))
    return np.append(np.full(N, c / N), tau) / (1 + c)


def kernel(sigma, uniform, gamma):
    """[V, V]: from no noise to σ."""
    return np.exp(-sigma) * np.eye(V) + noise(sigma, uniform, gamma)


def rates(sigma, uniform, gamma):
    """[V]: the rate of jumps to each state, b + db/dσ."""
    h = 1e-5 * sigma
    up, down = (noise(sigma + d, uniform, gamma) for d in (h, -h))
    return noise(sigma, uniform, gamma) + (up - down) / (2 * h)


@mixtures
@pytest.mark.parametrize("sigma", [1e-4, 0.05, 1.0, 6.9])
def test_noise_and_rates_are_those_of_the_formulas(uniform, gamma, sigma):
    process = hybrid(uniform, gamma)
    rows = process.transition(jnp.arange(V), f32(sigma))
    np.testing.assert_allclose(rows, kernel(sigma, uniform, gamma), rtol=2e-4)
    log_score = np.random.default_rng(0).standard_normal((V, V))
    got = np.array(process.reverse_rate(f32(log_score), jnp.arange(V), f32(sigma)))
    exact = rates(sigma, uniform, gamma)[:, None] * np.exp(log_score)
    away = ~np.eye(V, dtype=bool)
    np.testing.assert_allclose(got[away], exact[away], rtol=2e-3)
    assert (got[away] > 0).all()


@mixtures
@pytest.mark.parametrize(("sigma", "dsigma"), [(6.9, 6.5), (1.0, 0.3), (0.02, 0.001), (1e-3, 1e-3)])
def test_steps_compose(uniform, gamma, sigma, dsigma):
    """P up to σ - Δσ, and then the step of ``transition_to``, are P up to σ."""
    process, states = hybrid(uniform, gamma), jnp.arange(V)
    columns = np.asarray(process.transition_to(states, f32(sigma), f32(dsigma)))
    before = process.transition(states, f32(max(sigma - dsigma, 0.0)))
    after = process.transition(states, f32(sigma))
    assert (columns > 0).all()
    np.testing.assert_allclose(np.asarray(before) @ columns.T, after, rtol=1e-4, atol=1e-8)


def test_steep_mixtures_are_no_process():
    """With gamma above 2 the rate of uniform tokens is negative at late times."""
    assert rates(5.0, 0.3, 2.0).min() > 0
    assert rates(5.0, 0.3, 3.0).min() < 0
    with pytest.raises(FieldError, match=r"gamma must be in \(0, 2\].*no process.*got 3"):
        hybrid(0.3, 3.0)


def test_the_share_at_the_middle_of_giddy_time():
    """The option is the probability of uniform noise at τ = 1/2, where exp(-σ) = (1 - u)/2."""
    token, mask = noise(-math.log((1 - 0.2) / 2), 0.2, 1.0)[1:]
    assert (N * token, mask) == pytest.approx((0.2, 0.4))


@mixtures
def test_corruption_and_prior_have_their_laws(uniform, gamma):
    process, sigma = hybrid(uniform, gamma), 0.7
    x0_BL = jnp.broadcast_to(jnp.arange(N), (8_000, N))
    xt_BL = np.asarray(process.corrupt(oracle.keys(0, 8_000), x0_BL, jnp.full(8_000, sigma)))
    for token in range(N):
        counts = np.bincount(xt_BL[:, token], minlength=V)
        assert oracle.chi_square_p(counts, kernel(sigma, uniform, gamma)[token]) > 1e-4
        wrong = kernel(sigma, uniform / 2, gamma)[token]
        assert oracle.chi_square_p(counts, wrong) < 1e-4  # the control
    prior = np.asarray(process.sample_prior(oracle.keys(1, 8_000), 2, f32(SIGMA(1.0))))
    counts = np.bincount(prior.ravel(), minlength=V)
    assert oracle.chi_square_p(counts, noise(SIGMA(1.0), uniform, gamma)) > 1e-4


# ---------------------------------------------------------------- score entropy


def definition(log_score, x, x0, sigma, uniform, gamma):
    """Σ_(y≠x) Q(y, x)·(e^s - r·s + r·(log r - 1)) in float64."""
    into = rates(sigma, uniform, gamma)
    p = kernel(sigma, uniform, gamma)[x0]
    r = p / p[np.arange(len(x)), x][:, None]
    terms = np.exp(log_score) - r * log_score + r * (np.log(r) - 1)
    return into[x] * np.where(np.arange(V) == x[:, None], 0, terms).sum(-1)


@mixtures
@pytest.mark.parametrize("sigma", [1e-3, 0.3, 5.0])
def test_score_entropy_is_its_definition(uniform, gamma, sigma):
    x, x0 = (a.ravel() for a in np.meshgrid(np.arange(V), np.arange(N)))
    log_score = 2 * np.random.default_rng(1).standard_normal((len(x), V))
    log_score[np.arange(len(x)), x] = 0
    process = hybrid(uniform, gamma)
    got = process.score_entropy(f32(log_score), i32(x), i32(x0), f32(np.full(len(x), sigma)))
    exact = definition(log_score, x, x0, sigma, uniform, gamma)
    np.testing.assert_allclose(got, exact, rtol=2e-3)


@pytest.mark.parametrize("other", [Absorbing, Uniform])
def test_the_ends_of_the_mixture_are_absorbing_and_uniform(other):
    """Score entropy and its gradient, the prior and the last step, to 1e-6."""
    n, rng = 20, np.random.default_rng(2)
    end, exact = hybrid(float(other is Uniform), None, n), other(num_tokens=n)
    raw, x0 = rng.standard_normal((n, n + 1)), rng.integers(0, n, n)
    x = (
        np.full(n, n)
        if other is Absorbing
        else np.where(np.arange(n) < 5, x0, rng.integers(0, n, n))
    )

    def terms(raw, sigma, process):
        sigma_R = jnp.full(n, sigma)
        log_score = Mean(process=process).log_score(raw[:, : process.num_states], x, sigma_R)
        nats = process.score_entropy(log_score, x, x0, sigma_R)
        return nats.sum(), (nats, process.denoise(log_score, x, sigma_R)[:, :n])

    with jax.enable_x64(True):
        raw, x, x0 = jnp.asarray(raw), jnp.asarray(x), jnp.asarray(x0)
        run = jax.jit(jax.grad(terms, has_aux=True), static_argnums=2)
        for sigma in (1e-3, 0.3, 5.0):
            (slope, (nats, last)), (slope_, (nats_, last_)) = (
                run(raw, jnp.float64(sigma), process) for process in (end, exact)
            )
            np.testing.assert_allclose(nats, nats_, rtol=1e-6)
            np.testing.assert_allclose(slope, slope_, rtol=1e-6, atol=1e-9 * np.abs(slope_).max())
            np.testing.assert_allclose(last, last_, rtol=1e-6)
            priors = [process.prior_kl(jnp.float64(sigma)) for process in (end, exact)]
            np.testing.assert_allclose(*priors, rtol=1e-6)


@pytest.mark.parametrize(
    "process", [Uniform(num_tokens=30), hybrid(0.2, 1.0, 30)], ids=["duo", "gidd"]
)
def test_the_mean_parameterization_has_the_published_loss(process):
    """u_z/q_z·(KL(q‖p) + r - log r - 1), r = q_z/p_z, of UDLM, Duo and GIDD, from x_θ itself."""
    rng = np.random.default_rng(3)
    n, size = process.num_tokens, process.num_states
    raw, z = rng.standard_normal((40, size)), rng.integers(0, size, 40)
    x0 = rng.integers(0, n, 40)
    z[:10] = x0[:10]
    with jax.enable_x64(True):
        sigma, states = jnp.float64(0.8), jnp.arange(size)
        sigma_R = jnp.full(40, sigma)
        log_score = Mean(process=process).log_score(jnp.asarray(raw), jnp.asarray(z), sigma_R)
        got = process.score_entropy(log_score, jnp.asarray(z), jnp.asarray(x0), sigma_R)
        row = np.asarray(process.transition(states, sigma))
        rate = process.reverse_rate(jnp.zeros((size, size)), states, sigma)
        into = -np.diag(rate) / (size - 1)  # of jumps into each state
    x_theta = np.exp(raw[:, :n]) / np.exp(raw[:, :n]).sum(-1, keepdims=True)
    q, p = row[x0], np.pad(x_theta, ((0, 0), (0, size - n))) @ row
    q_z, p_z = q[np.arange(40), z], p[np.arange(40), z]
    kl, r = (q * np.log(q / p)).sum(-1), q_z / p_z
    np.testing.assert_allclose(got, into[z] / q_z * (kl + r - np.log(r) - 1), rtol=1e-5)


def test_weightings_are_those_of_the_paper():
    """GIDD's weights of (KL + IS): clipped at 1, or dynamic; and 1 times the bound's by default."""
    process, length = hybrid(0.2, 1.0), 4_000
    common = {"schedule": SCHEDULE, "parameterization": Mean(process=process)}
    x0_BL = jnp.broadcast_to(i32([[0], [1]]), (2, length))
    u_B, t_B = f32([0.2, 0.9]), 1e-3 + (1 - 1e-3) * np.array([0.2, 0.9])
    drawn = {
        name: ScoreEntropy(**common, weighting=name).corrupt(
            oracle.keys(0, 2), u_B, x0_BL, jnp.ones_like(x0_BL, bool)
        )
        for name in ("bound", "clipped", "dynamic")
    }
    for row, t in enumerate(t_B):
        sigma, x0 = SIGMA(t), row
        x = np.asarray(drawn["bound"].xt_BL[row])
        assert set(x) == {0, 1, 2}
        w = RATE(t) * rates(sigma, 0.2, 1.0)[x] / kernel(sigma, 0.2, 1.0)[x0, x]
        clean = 2 * 0.2 / 0.8 / N * math.exp(-0.5 * (-sigma - np.log(-np.expm1(-sigma))))
        dynamic = np.where(x == N, 2.0, np.where(x == x0, clean, 1.0))
        # A weight of the loss is that of the bound's score entropy, which has w in it.
        for name, wanted in (("bound", w), ("clipped", np.minimum(w, 1)), ("dynamic", dynamic)):
            got = np.asarray(drawn[name].weight_BL[row], np.float64) * w / RATE(t)
            np.testing.assert_allclose(got, wanted, rtol=2e-3)


# ---------------------------------------------------------------- models, by enumeration


def marginal(sigma, uniform, gamma):
    """[V, V]: p_t of both positions."""
    row = kernel(sigma, uniform, gamma)[:N]
    return row.T @ JOINT @ row


@mixtures
def test_the_exact_leave_one_out_prediction_gives_the_true_score(uniform, gamma):
    denoiser = oracle.mean_denoiser(hybrid(uniform, gamma), JOINT)
    for sigma in (0.01, 0.7, 5.0):
        p = marginal(sigma, uniform, gamma)
        exact = (
            np.stack([p[:, STATES[:, 1]].T, p[STATES[:, 0]]], 1) / p[tuple(STATES.T)][:, None, None]
        )
        got = denoiser.log_score(i32(STATES), f32(np.full(len(STATES), sigma)))
        np.testing.assert_allclose(got, np.log(exact), atol=2e-4)


def wrong(uniform, gamma):
    """A network that is far from the joint, and differs in every noisy text."""
    shift = 1.5 * np.random.default_rng(4).standard_normal((V**L, L, V))
    return oracle.mean_denoiser(hybrid(uniform, gamma), JOINT, shift)


@jax.jit
def score(denoiser, sigma):
    return denoiser.log_score(i32(STATES), jnp.full(len(STATES), sigma))


def model_law(denoiser, uniform, gamma, steps=120):
    """[N, N]: the reverse process from the bound's prior, by matrix exponentials."""
    times = T_MIN ** np.linspace(0, 1, steps + 1)
    middle = np.sqrt(times[1:] * times[:-1])
    to = oracle.neighbours(STATES, V)
    b = noise(SIGMA(1.0), uniform, gamma)
    one = np.append(b[:N] + np.exp(-SIGMA(1.0)) / N, b[N])
    law = np.outer(one, one).ravel()
    for t, length in zip(middle, times[:-1] - times[1:], strict=True):
        away = np.exp(np.asarray(score(denoiser, f32(SIGMA(t))), np.float64))
        away *= (RATE(t) * rates(SIGMA(t), uniform, gamma))[STATES][..., None]
        generator = np.zeros((V**L, V**L))
        np.add.at(generator, (np.arange(V**L)[:, None, None], to), away)
        np.fill_diagonal(generator, 0)
        np.fill_diagonal(generator, -generator.sum(1))
        law = law @ expm(generator * length)
    clean = np.exp(np.asarray(last_step(denoiser), np.float64))
    return np.einsum("s,sa,sb->ab", law, clean[:, 0, :N], clean[:, 1, :N])


@jax.jit
def last_step(denoiser):
    sigma_S = f32(np.full(len(STATES), SIGMA(T_MIN)))
    return denoiser.process.denoise(denoiser.log_score(i32(STATES), sigma_S), i32(STATES), sigma_S)


def exact_bound(denoiser, uniform, gamma):
    """([4], [4], [4]): prior, diffusion and reconstruction of every text, by quadrature."""
    nodes, weights = np.polynomial.legendre.leggauss(32)
    low, high = np.log(SIGMA(T_MIN)), np.log(SIGMA(1.0))

    def mean(nats_SLN, sigma):
        """E over q(xt | x0) of the nats of both positions."""
        row = kernel(sigma, uniform, gamma)
        law = row[CLEAN[:, :1], STATES[None, :, 0]] * row[CLEAN[:, 1:], STATES[None, :, 1]]
        return sum((law * nats_SLN[:, i, CLEAN[:, i]].T).sum(1) for i in range(L))

    diffusion = np.zeros(len(CLEAN))
    for node, weight in zip(nodes, weights, strict=True):
        sigma = np.exp(low + (high - low) * (node + 1) / 2)
        log_score = np.asarray(score(denoiser, f32(sigma)), np.float64).reshape(-1, V)
        nats = [
            definition(log_score, STATES.ravel(), np.full(STATES.size, y), sigma, uniform, gamma)
            for y in range(N)
        ]
        nats_SLN = np.stack(nats, -1).reshape(len(STATES), L, N)
        diffusion += weight * sigma * mean(nats_SLN, sigma) * (high - low) / 2
    reconstruction = mean(-np.asarray(last_step(denoiser), np.float64)[..., :N], SIGMA(T_MIN))
    b = noise(SIGMA(1.0), uniform, gamma)
    row, prior = (
        kernel(SIGMA(1.0), uniform, gamma)[0],
        np.append(b[:N] + np.exp(-SIGMA(1.0)) / N, b[N]),
    )
    return np.full(len(CLEAN), L * (row * np.log(row / prior)).sum()), diffusion, reconstruction


@functools.partial(jax.jit, static_argnames="draws", compiler_options=oracle.QUICKLY)
def estimates(denoiser, keys_B, x0_BL, draws):
    return sequence_nats(denoiser, SCHEDULE, keys_B, x0_BL, x0_BL >= 0, draws=draws, t_min=T_MIN)


@pytest.mark.parametrize(("uniform", "gamma"), daily(MIXTURES[:2], MIXTURES[:1]))
def test_the_bound_of_any_network_is_above_its_likelihood(uniform, gamma):
    """And the estimate has it as its mean; for the exact network it is the likelihood itself."""
    for denoiser, tight in (
        (oracle.mean_denoiser(hybrid(uniform, gamma), JOINT), True),
        (wrong(uniform, gamma), False),
    ):
        terms = exact_bound(denoiser, uniform, gamma)
        nll = -np.log(model_law(denoiser, uniform, gamma)).ravel()
        gap = sum(terms) - nll
        print(f"\nu {uniform} gamma {gamma}: bound - NLL", *(f"{g:.4f}" for g in gap))
        assert (gap > -1e-3).all()
        assert (gap < 0.02).all() if tight else (gap > 0.02).any()
    repeats = 400
    x0_BL = jnp.tile(i32(CLEAN), (repeats, 1))
    nats = estimates(denoiser, oracle.keys(0, len(x0_BL)), x0_BL, 16)
    np.testing.assert_allclose(nats.prior_B[:4], terms[0], rtol=1e-4, atol=1e-7)
    for got_BR, exact in ((nats.diffusion_BR, terms[1]), (nats.reconstruction_BR, terms[2])):
        got = np.asarray(got_BR, np.float64).reshape(repeats, len(CLEAN), -1).transpose(0, 2, 1)
        got = got.reshape(-1, len(CLEAN))
        z = (got.mean(0) - exact) / (got.std(0) / math.sqrt(len(got)))
        assert np.abs(z).max() < 5, z  # of skewed draws


# ---------------------------------------------------------------- samplers


def sampler_law(rule, steps, uniform, gamma):
    """[N^2]: finite steps of the exact score, then the last step, in float64."""

    def score(sigma):
        p = marginal(sigma, uniform, gamma)
        rows = np.stack([p[:, STATES[:, 1]].T, p[STATES[:, 0]]], 1)
        return rows / p[tuple(STATES.T)][:, None, None]

    def tweedie(sigma, earlier):
        step = np.linalg.solve(kernel(earlier, uniform, gamma), kernel(sigma, uniform, gamma))
        back = np.einsum("slb,ba->sla", score(sigma), np.linalg.inv(step))
        return back * np.moveaxis(step[:, STATES], 0, -1)

    def euler(sigma, dsigma):
        probs = dsigma * rates(sigma, uniform, gamma)[STATES][..., None] * score(sigma)
        own = np.eye(V, dtype=bool)[STATES]
        probs[own] = 0
        probs[own] = 1 - probs.sum(-1).ravel()
        return probs

    b = noise(SIGMA(1.0), uniform, gamma)
    prior = np.broadcast_to(b / b.sum(), (len(STATES), L, V))
    law = oracle.product_kernel(prior, STATES)[0]
    for t, s in itertools.pairwise(np.linspace(1, 1e-5, steps + 1)):
        probs = (
            tweedie(SIGMA(t), SIGMA(s)) if rule is Tweedie else euler(SIGMA(t), (t - s) * RATE(t))
        )
        law = law @ oracle.product_kernel(oracle.clip_normalise(probs), STATES)
    probs = tweedie(SIGMA(1e-5), 0.0)
    probs[..., N] = 0
    return law @ oracle.product_kernel(oracle.clip_normalise(probs), STATES)


@functools.partial(jax.jit, static_argnames="sampler", compiler_options=oracle.QUICKLY)
def drawn(sampler, denoiser, keys_B, tokens_BL):
    return sampler(denoiser, keys_B, tokens_BL, tokens_BL < 0).tokens_BL


@pytest.mark.nightly
@pytest.mark.parametrize("rule", [Euler, Tweedie])
def test_samplers_have_their_finite_step_law_under_a_moving_mixture(rule):
    """The constant mixture is among the processes of test_tau_leaping."""
    uniform, gamma = 0.3, 1.0
    law = sampler_law(rule, 4, uniform, gamma)
    denoiser = oracle.mean_denoiser(hybrid(uniform, gamma), JOINT)
    tokens_BL = jnp.zeros((8_000, L), jnp.int32)
    got = drawn(rule(schedule=SCHEDULE, steps=4), denoiser, oracle.keys(5, 8_000), tokens_BL)
    counts = np.bincount(oracle.state_index(got, V), minlength=V**L)
    assert oracle.chi_square_p(counts, law) > 1e-4
    assert oracle.chi_square_p(counts, sampler_law(rule, 16, uniform, gamma)) < 1e-4
    joint = np.pad(JOINT, (0, 1)).ravel()
    distance = [
        oracle.total_variation(sampler_law(rule, n, uniform, gamma), joint) for n in (32, 64, 128)
    ]
    print(f"\n{rule.__name__}", *(f"{d:.4f}" for d in distance))
    assert distance[2] < 0.02
    assert all(1.6 < a / b < 2.5 for a, b in itertools.pairwise(distance))


# ---------------------------------------------------------------- what does not go together


def test_a_fresh_score_is_that_of_uniform_tokens():
    process, sigma = hybrid(0.3, 1.0), f32([0.6])
    got = Score(process=process).log_score(jnp.zeros((1, V, V)), jnp.arange(V)[None], sigma)
    p = kernel(0.6, 0.3, 1.0)[:N].mean(0)
    np.testing.assert_allclose(got[0], np.log(p[None] / p[:, None]), atol=1e-5)


def test_mistakes_are_named():
    for share, gamma, wanted in (
        (1.1, None, r"\[0, 1\]"),
        (-0.1, None, r"\[0, 1\]"),
        (1.0, 1.0, r"\[0, 1\) with gamma"),
        (float("nan"), None, "got nan"),
    ):
        with pytest.raises(FieldError, match=f"uniform must be a share in .*{wanted}|{wanted}"):
            hybrid(share, gamma)
    with pytest.raises(FieldError, match=r"gamma must be in \(0, 2\].*got 0"):
        hybrid(0.1, 0.0)
    with pytest.raises(ValueError, match="needs an absorbing process; score and mean"):
        Conditional(process=hybrid(0.1, None))
    common = {"schedule": SCHEDULE, "parameterization": Mean(process=hybrid(0.1, None))}
    with pytest.raises(FieldError, match="weighting dynamic needs the process hybrid with gamma"):
        ScoreEntropy(**common, weighting="dynamic")
    with pytest.raises(UserError, match="visible tokens may be wrong"):
        EventJump(schedule=SCHEDULE).check(oracle.mean_denoiser(hybrid(0.1, None), JOINT))

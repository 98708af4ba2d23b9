"""Score entropy in float32 against float64, from σ = 1e-8 to 20 at GPT-2's vocabulary."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from oracle import PROCESSES, f32, i32, transition_matrix

both = pytest.mark.parametrize("kind", ["absorbing", "uniform"])
SIGMAS = [1e-8, 1e-6, 1e-4, 1e-2, 0.3, 1.0, 4.0, 20.0]
GPT2 = 50257


def log_ratios(kind, sigma, x, x0, size):
    """log p_σ(y | x0) / p_σ(x | x0) in float64; -inf where there is no jump y → x to reverse."""
    log_r = np.full((len(x), size), -np.inf)
    moved = np.expm1(np.float64(sigma))
    for row, (a, b) in enumerate(zip(x, x0, strict=True)):
        if kind == "absorbing":
            if a == size - 1:
                log_r[row, b] = -np.log(moved)
        else:
            log_ratio = np.log(moved) - np.log(moved + size)
            log_r[row] = log_ratio if a == b else 0.0
            log_r[row, b] = 0.0 if a == b else -log_ratio
    return log_r


def exact_entropy(kind, log_score, log_r, x):
    """(1/N for uniform) Σ_{y≠x} e^s - r·s + r·(log r - 1), as r·(e^δ - 1 - δ), and its gradient."""
    rows, size = log_score.shape
    s = log_score.astype(np.float64)
    r = np.exp(log_r)
    delta = np.where(r > 0, s - np.where(r > 0, log_r, 0), 0)
    terms = np.where(r > 0, r * (np.expm1(delta) - delta), np.exp(s))
    gradient = np.exp(s) - r
    if kind == "absorbing":
        terms[x != size - 1] = gradient[x != size - 1] = 0
    terms[np.arange(rows), x] = gradient[np.arange(rows), x] = 0
    scale = 1 if kind == "absorbing" else size
    return terms.sum(-1) / scale, gradient / scale


def case(kind, num_tokens=GPT2):
    """(process, x, x0): still clean, and moved."""
    process = PROCESSES[kind](num_tokens=num_tokens)
    moved_to = process.mask_id if kind == "absorbing" else 4
    return process, np.array([moved_to, 5]), np.array([2, 5])


@partial(jax.jit, static_argnames="process")
def _value_and_gradient(process, log_score, x, x0, sigma):
    def total(log_score):
        entropy = process.score_entropy(log_score, x, x0, sigma)
        return entropy.sum(), entropy

    (_, entropy), gradient = jax.value_and_grad(total, has_aux=True)(log_score)
    return entropy, gradient


def value_and_gradient(process, log_score, x, x0, sigma):
    sigma = f32(np.full(len(x), sigma))
    entropy, gradient = _value_and_gradient(process, f32(log_score), i32(x), i32(x0), sigma)
    return np.asarray(entropy), np.asarray(gradient)


@both
@pytest.mark.parametrize("sigma", SIGMAS)
@pytest.mark.parametrize("distance", ["near", "far"])
def test_values_and_gradients_in_float32(kind, sigma, distance):
    process, x, x0 = case(kind)
    log_r = log_ratios(kind, sigma, x, x0, process.num_states)
    rng = np.random.default_rng(0)
    noise = rng.standard_normal(log_r.shape)
    if distance == "near":
        # Tokens that cannot be x0 get e^s = r·1e-8 each: together as much as the optimum's own.
        optimum = np.where(np.isfinite(log_r), log_r, log_r.max(-1, keepdims=True) - 18)
        s = np.where(np.isfinite(optimum), optimum, 0) + 0.1 * noise
    else:
        s = 3 * noise
    s = np.float32(s)
    s[np.arange(2), x] = 0
    entropy, gradient = value_and_gradient(process, s, x, x0, sigma)
    exact, exact_gradient = exact_entropy(kind, s, log_r, x)
    # δ = 0.1 carries the rounding of log r, at most 2e-6 at |log r| = 29: 4e-5 of δ²/2.
    np.testing.assert_allclose(entropy, exact, rtol=1e-4, atol=1e-30)
    assert np.isfinite(gradient).all()
    scale = np.abs(exact_gradient).max(-1, keepdims=True)
    np.testing.assert_allclose(gradient, exact_gradient, rtol=2e-4, atol=float(1e-5 * scale.max()))


def test_control_the_published_uniform_form_cancels_in_float32():
    process, x, x0 = case("uniform")
    sigma, n = np.float32(0.3), np.float32(GPT2)
    log_r = log_ratios("uniform", sigma, x, x0, GPT2)
    s = np.float32(log_r + 0.01 * np.random.default_rng(0).standard_normal(log_r.shape))
    s[np.arange(2), x] = 0
    moved = np.expm1(sigma)
    ratio = moved / (moved + n)
    positive = np.exp(s[1]).mean(dtype=np.float32) - 1 / n
    negative = s[1].mean(dtype=np.float32)
    published = positive - ratio * negative + (n - 1) / n * ratio * (np.log(ratio) - 1)
    exact, _ = exact_entropy("uniform", s, log_r, x)
    assert abs(published / exact[1] - 1) > 1e-3
    ours, _ = value_and_gradient(process, s, x, x0, sigma)
    np.testing.assert_allclose(ours, exact, rtol=1e-4)


@both
@pytest.mark.parametrize("sigma", SIGMAS)
def test_zero_at_the_true_ratios(kind, sigma):
    process, x, x0 = case(kind)
    log_r = log_ratios(kind, sigma, x, x0, process.num_states)
    s = np.where(np.isfinite(log_r), log_r, -100.0)
    s[np.arange(2), x] = 0
    entropy, _ = value_and_gradient(process, s, x, x0, sigma)
    r = np.exp(np.where(np.isfinite(log_r), log_r, -100)).max(-1)
    assert (entropy >= 0).all()
    assert (entropy <= r * 1e-10).all()  # r·δ²/2, δ the rounding of log r in float32


@both
@pytest.mark.parametrize("sigma", [1e-4, 0.3, 5.0])
def test_gradient_descent_ends_at_the_true_ratio(kind, sigma):
    """Convex in s with its minimum there: from both sides the gradient points back."""
    process, x, x0 = case(kind, num_tokens=6)
    log_r = log_ratios(kind, sigma, x, x0, process.num_states)
    counts = np.isfinite(log_r)
    counts[np.arange(2), x] = False
    for offset in (-0.5, 0.5):
        s = np.where(counts, log_r + offset, 0.0)
        _, gradient = value_and_gradient(process, s, x, x0, sigma)
        assert (np.sign(gradient[counts]) == np.sign(offset)).all()
        assert (gradient[np.arange(2), x] == 0).all()


@pytest.mark.parametrize("kind", PROCESSES)
def test_the_expected_entropy_is_least_at_the_marginal_ratios(kind):
    """Denoising score matching: averaged over p(x0 | xt), the minimum is the score of p_t."""
    world, sigma = oracle.Oracle(kind), 0.6
    kernel = transition_matrix(kind, sigma)
    clean = oracle.all_states(3)
    weight = world.joint.ravel()[:, None] * np.prod(kernel[clean[:, None], world.states[None]], -1)
    weight = weight / weight.sum(0)  # [81, S]: p(x0 | xt)
    score = world.log_score(sigma)
    own = np.eye(world.V, dtype=bool)[world.states]

    def mean_entropy(log_score_SLV):
        def given(x0_L, weight_S):
            x0_SL = jnp.broadcast_to(x0_L, world.states.shape)
            entropy = world.process.score_entropy(
                log_score_SLV, i32(world.states), x0_SL, f32(np.full((1, 1), sigma))
            )
            return (weight_S[:, None] * entropy).sum()

        return jax.vmap(given)(i32(clean), f32(weight)).sum()

    gradient = np.asarray(jax.jit(jax.grad(mean_entropy))(f32(score)))
    # Each entry's two sides are e^s·Q(y, x); they cancel.
    np.testing.assert_allclose(gradient, 0, atol=2e-4)
    moved = np.asarray(jax.jit(jax.grad(mean_entropy))(f32(np.where(own, 0, score + 0.1))))
    assert np.abs(moved).max() > 2e-2  # the control


def test_no_gradient_reaches_positions_that_are_clean():
    process, x, x0 = case("absorbing", num_tokens=6)
    s = np.full((2, 7), 80.0)
    _, gradient = value_and_gradient(process, s, x, x0, 1.0)
    assert (gradient[1] == 0).all()

"""Schedules: the rate is the derivative, the inverse inverts, float32 is good enough."""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sedd.configuration.components import makers
from sedd.schedules import ByPosition, Cosine, Geometric, LogLinear, Polynomial

GOLDEN = np.load(Path(__file__).parent / "golden" / "sedd.npz")
CLAMP = 1e-4


def clamped(alpha):
    return (1 - 2 * CLAMP) * alpha + CLAMP


EXACT = {  # name: (schedule, α(t) = exp(-σ(t)) in float64)
    "log_linear": (LogLinear(), lambda t: 1 - (1 - 1e-3) * t),
    "by_position": (ByPosition(), lambda t: 1 - (1 - 1e-3) * t),  # of a position of weight 1
    "geometric": (Geometric(), lambda t: np.exp(-(1e-4 ** (1 - t)) * 20.0**t)),
    "cosine": (Cosine(), lambda t: clamped(1 - np.cos(np.pi / 2 * (1 - t)))),
    "polynomial": (Polynomial(), lambda t: clamped(1 - t**2)),
    "polynomial_1": (Polynomial(power=1.0), lambda t: clamped(1 - t)),
    "polynomial_2.5": (Polynomial(power=2.5), lambda t: clamped(1 - t**2.5)),
}
everywhere = pytest.mark.parametrize("name", EXACT)


def test_every_schedule_is_tested():
    assert set(makers("schedules")) <= set(EXACT)


@everywhere
def test_sigma_is_minus_log_alpha(name):
    schedule, alpha = EXACT[name]
    t = np.array([0.0, 1e-5, 1e-4, 1e-3, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99])
    # log_linear at t = 1e-5 would lose 1 % as -log(1 - 0.999t) in float32: the log1p is needed.
    np.testing.assert_allclose(schedule.sigma(jnp.float32(t)), -np.log(alpha(t)), rtol=1e-5)


@everywhere
def test_rate_is_the_derivative_of_sigma(name):
    schedule, alpha = EXACT[name]
    t = np.array([1e-3, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.97])
    step = 1e-4 * t  # central differences: (step / (1 - t))² / 3 and 1e-16 / step are below 5e-6
    difference = (np.log(alpha(t - step)) - np.log(alpha(t + step))) / (2 * step)
    # At t = 0.97 cosine has α = 1e-3, computed as 1 - 0.999 in float32.
    np.testing.assert_allclose(schedule.rate(jnp.float32(t)), difference, rtol=1e-4)
    by_jax = jax.vmap(jax.grad(schedule.sigma))(jnp.float32(t))
    np.testing.assert_allclose(schedule.rate(jnp.float32(t)), by_jax, rtol=1e-4)


@everywhere
def test_inverse(name):
    schedule, _ = EXACT[name]
    t = jnp.linspace(0.0, 1.0, 41)
    # σ has 1e-7 relative; where the schedule is steep or flat in t that is this much of t.
    np.testing.assert_allclose(schedule.t_of_sigma(schedule.sigma(t)), t, atol=1e-3)
    np.testing.assert_allclose(
        schedule.t_of_sigma(schedule.sigma(t[2:-2])), t[2:-2], atol=2e-5, rtol=1e-5
    )


@everywhere
def test_ends(name):
    schedule, alpha = EXACT[name]
    ends = jnp.array([0.0, 1.0])
    sigma, rate = np.asarray(schedule.sigma(ends)), np.asarray(schedule.rate(ends))
    assert np.isfinite(sigma).all()
    assert np.isfinite(rate).all()
    assert (rate >= 0).all()
    # α = 1e-4 or 1e-3 is left after subtracting from 1 in float32: 6e-8/1e-4
    np.testing.assert_allclose(sigma, -np.log(alpha(np.array([0.0, 1.0]))), rtol=1e-3)
    assert (np.diff(np.asarray(schedule.sigma(jnp.linspace(0.0, 1.0, 1001)))) > 0).all()


def test_ends_by_hand():
    assert float(LogLinear(eps=0.01).sigma(jnp.float32(0))) == 0
    np.testing.assert_allclose(LogLinear(eps=0.01).sigma(jnp.float32(1)), -math.log(0.01), 1e-5)
    geometric = Geometric(sigma_min=1e-3, sigma_max=5.0)
    np.testing.assert_allclose(geometric.sigma(jnp.array([0.0, 1.0])), [1e-3, 5.0], rtol=1e-5)


@pytest.mark.parametrize("name", EXACT)
def test_any_shape(name):
    schedule, _ = EXACT[name]
    for method in (schedule.sigma, schedule.rate):
        assert method(jnp.full((2, 3), 0.5)).shape == (2, 3)
        assert method(jnp.float32(0.5)).dtype == jnp.float32


@pytest.mark.parametrize("kind", ["absorb", "uniform"])
@pytest.mark.parametrize(
    ("name", "schedule"), [("loglinear", LogLinear()), ("geometric", Geometric())]
)
def test_golden(kind, name, schedule):
    golden = {k: GOLDEN[f"{kind}/{name}/{k}"] for k in ("t", "sigma", "dsigma")}
    # Both sides are float32: (1 - ε)t near 1 leaves 6e-8/0.08 of relative error.
    np.testing.assert_allclose(schedule.sigma(golden["t"]), golden["sigma"], rtol=1e-5)
    np.testing.assert_allclose(schedule.rate(golden["t"]), golden["dsigma"], rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "fields", "named"),
    [
        (LogLinear, {"eps": 0.0}, "0.0"),
        (LogLinear, {"eps": 1.5}, "1.5"),
        (LogLinear, {"eps": float("nan")}, "nan"),
        (Geometric, {"sigma_min": 0.0}, "sigma_min"),
        (Geometric, {"sigma_min": 3.0, "sigma_max": 2.0}, "3.0"),
        (Cosine, {"clamp": 0.5}, "0.5"),
        (Polynomial, {"clamp": 0.0}, "clamp"),
        (Polynomial, {"power": 0.5}, "0.5"),
    ],
)
def test_mistakes_are_named(make, fields, named):
    with pytest.raises(ValueError, match=named):
        make(**fields)

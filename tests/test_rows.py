"""The loss that is read out in chunks equals the plain one, in value and gradient."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sedd.networks.base import read_out
from sedd.objectives import rows
from sedd.parameterizations.conditional import Conditional
from sedd.parameterizations.score import Score
from sedd.processes.absorbing import Absorbing
from sedd.processes.uniform import Uniform

ROWS, WIDTH, NUM_TOKENS = 1100, 16, 37  # 4 long chunks and 2 short ones, the last not full


def nats_of(process, parameterization):
    """As the objectives use it: score entropy of a row."""

    def of(raw_RV, leaves):
        x0_R, xt_R, sigma_R = leaves
        log_score_RV = parameterization.log_score(raw_RV, xt_R, sigma_R)
        return process.score_entropy(log_score_RV, xt_R, x0_R, sigma_R)

    return of


def plain(of, hidden_MD, head, weight_M, leaves):
    nats_M = of(read_out(hidden_MD, *head), leaves)
    return jnp.where(weight_M > 0, weight_M * jnp.where(weight_M > 0, nats_M, 0.0), 0.0)


def case(process, rate):
    rng = np.random.default_rng(0)
    x0_M = rng.integers(0, NUM_TOKENS, ROWS)
    moved_M = np.arange(ROWS) == 77 if rate == "one" else rng.random(ROWS) < rate
    if process.mask_id is not None:
        xt_M = np.where(moved_M, process.mask_id, x0_M)
        counts_M = moved_M
    else:
        xt_M = np.where(moved_M, rng.integers(0, NUM_TOKENS, ROWS), x0_M)
        counts_M = np.ones(ROWS, bool)
    weight_M = np.where(counts_M, rng.uniform(0.5, 3, ROWS), 0)
    head = (
        rng.normal(size=(WIDTH, process.num_states)) / 4,
        rng.normal(size=process.num_states) / 4,
    )
    hidden_MD = rng.normal(size=(ROWS, WIDTH))
    sigma_M = rng.uniform(0.05, 3, ROWS)
    f32 = partial(jnp.asarray, dtype=jnp.float32)
    tokens = [jnp.asarray(x, jnp.int32) for x in (x0_M, xt_M)]
    return f32(hidden_MD), tuple(map(f32, head)), f32(weight_M), (*tokens, f32(sigma_M))


ABSORBING, UNIFORM = Absorbing(num_tokens=NUM_TOKENS), Uniform(num_tokens=NUM_TOKENS)
READ = {
    "absorbing": nats_of(ABSORBING, Conditional(process=ABSORBING)),
    "uniform": nats_of(UNIFORM, Score(process=UNIFORM)),
}


@partial(jax.jit, static_argnums=(0, 1))
def both(of, form, hidden_MD, head, weight_M, leaves):
    def total(hidden_MD, head):
        if form == "plain":
            return plain(of, hidden_MD, head, weight_M, leaves).sum()
        return rows.summed_nats(of, hidden_MD, head, weight_M, leaves)

    return jax.value_and_grad(total, argnums=(0, 1))(hidden_MD, head)


def worst(found, expected):
    """The largest difference, relative to the largest entry of its array."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    return max(float(jnp.abs(a - b).max() / jnp.maximum(jnp.abs(b).max(), 1e-6)) for a, b in pairs)


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("rate", [0.0, "one", 0.5, 1.0])
def test_values_and_gradients_are_those_of_the_plain_form(name, rate):
    process = ABSORBING if name == "absorbing" else UNIFORM
    inputs = case(process, rate)
    value, grads = both(READ[name], "rows", *inputs)
    plain_value, plain_grads = both(READ[name], "plain", *inputs)
    assert abs(value - plain_value) <= 1e-5 * max(abs(plain_value), 1)
    assert worst(grads, plain_grads) < 1e-4
    each_M = jax.jit(rows.row_nats, static_argnums=0)(READ[name], *inputs)
    np.testing.assert_allclose(each_M, plain(READ[name], *inputs), rtol=1e-5, atol=1e-5)


def test_logits_of_all_rows_are_never_alive():
    inputs = case(ABSORBING, 0.5)
    sizes = rows.chunk_rows(ROWS, NUM_TOKENS + 1)
    assert len(sizes) == 2
    text = both.lower(READ["absorbing"], "rows", *inputs).as_text()
    for size in sizes:
        assert size < ROWS / 4
        assert f"tensor<{size}x{NUM_TOKENS + 1}xf32>" in text
    assert f"tensor<{ROWS}x{NUM_TOKENS + 1}xf32>" not in text
    assert (
        f"tensor<{ROWS}x{NUM_TOKENS + 1}xf32>"
        in both.lower(READ["absorbing"], "plain", *inputs).as_text()
    )


def test_infinite_nats_without_a_weight_spoil_nothing():
    hidden, head, weight, (x0, xt, sigma) = case(ABSORBING, 0.5)
    sigma = jnp.where(weight > 0, sigma, 0.0)  # log_expm1(0) is -inf
    value, grads = both(READ["absorbing"], "rows", hidden, head, weight, (x0, xt, sigma))
    assert np.isfinite(value)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))

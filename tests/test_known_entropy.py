"""On a source of known entropy a bound is above it, and after training close to it."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from sedd.configuration.components import build
from sedd.denoiser import Denoiser
from sedd.evaluation.bound import evaluate_bound
from sedd.training.optimizer import OptimizerOptions, make_optimizer
from sedd.training.state import init_state
from sedd.training.step import Step

LENGTH = 8
# Each state mostly moves on to the next one: 0.75 nats a token, and every conditional needs both
# neighbours.
CHAIN = np.array([[0.1, 0.75, 0.15], [0.1, 0.1, 0.8], [0.7, 0.2, 0.1]])


def stationary() -> np.ndarray:
    values, vectors = np.linalg.eig(CHAIN.T)
    pi = np.real(vectors[:, np.argmax(np.real(values))])
    return pi / pi.sum()


def entropy_per_token() -> float:
    """Exact: H(pi) for the first token, the entropy rate for each of the others."""
    pi = stationary()
    rate = -(pi[:, None] * CHAIN * np.log(CHAIN)).sum()
    return float((-(pi * np.log(pi)).sum() + (LENGTH - 1) * rate) / LENGTH)


def draw(rng: np.random.Generator, num: int) -> np.ndarray:
    cumulative = CHAIN.cumsum(-1)
    x = np.empty((num, LENGTH), np.int32)
    x[:, 0] = rng.choice(3, size=num, p=stationary())
    for i in range(1, LENGTH):
        x[:, i] = (rng.random((num, 1)) > cumulative[x[:, i - 1]]).sum(-1)
    return x


def negative_log_likelihood(x: np.ndarray) -> np.ndarray:
    steps = np.log(CHAIN)[x[:, :-1], x[:, 1:]].sum(-1)
    return -(np.log(stationary())[x[:, 0]] + steps)


MODELS = {
    "sedd-absorbing": ("absorbing", "score", "score_entropy", {}),
    "sedd-uniform": ("uniform", "score", "score_entropy", {}),
    "t-dse": ("absorbing", "conditional", "score_entropy", {}),
    "t-dce": ("absorbing", "conditional", "t_dce", {}),
    "lambda-dce": ("absorbing", "conditional", "lambda_dce", {}),
    "k-dce": ("absorbing", "conditional", "k_dce", {}),
    "mdlm": ("absorbing", "conditional", "mdlm", {"num_steps": 100}),
    # Its figure is the likelihood in the order from left to right.
    "any-subset": ("absorbing", "any_subset", "any_subset", {}),
}


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_the_bound_is_above_the_entropy_and_within_5_percent_after_training(name):
    process_name, parameterization_name, objective_name, options = MODELS[name]
    process = build("processes", process_name, num_tokens=3)
    uniform = process_name == "uniform"
    # Under log-linear noise rare draws carry much of a uniform bound: its error would hide a miss.
    schedule = build("schedules", "geometric" if uniform else "log_linear")
    parameterization = build("parameterizations", parameterization_name, process=process)
    objective = build(
        "objectives",
        objective_name,
        schedule=schedule,
        parameterization=parameterization,
        **options,
    )
    network = build(
        "networks",
        "ddit",
        num_states=process.num_states,
        time_conditioned=not parameterization.time_independent,
        hidden_dim=32,
        num_layers=2,
        num_heads=2,
        condition_dim=32,
        dropout=0.0,
    )
    # The uniform process learns more slowly: stopped early, luck would decide.
    steps, batch, rate, decay = (1000, 256, 3e-3, 0.99) if uniform else (500, 64, 5e-3, 0.98)
    optimizer = make_optimizer(
        OptimizerOptions(learning_rate=rate, warmup_steps=50, schedule="cosine", ema_decay=decay),
        steps,
    )
    step = Step(
        network=network,
        objective=objective,
        optimizer=optimizer,
        ema_decay=decay,
        batch_size=batch,
    )
    rng = np.random.default_rng(0)
    held_out = draw(rng, 256)
    scored = np.ones_like(held_out, bool)

    def bound(params):
        denoiser = Denoiser(params=params, network=network, parameterization=parameterization)
        result = evaluate_bound(
            denoiser, schedule, jax.random.key(1), [(held_out, scored)], draws=16
        )
        # Paired with the source's own likelihood of each sequence, most of the noise goes.
        excess = result.sequence_nats - negative_log_likelihood(held_out)
        return excess.mean() / LENGTH, excess.std(ddof=1) / np.sqrt(len(excess)) / LENGTH

    def many(state, x0):
        batches = {
            "x0": x0[:, None],
            "scored": jnp.ones_like(x0[:, None], bool),
            "index": jnp.broadcast_to(jnp.arange(batch), (len(x0), 1, batch)),
        }
        return jax.lax.scan(lambda s, b: step(s, b, axis_name=None), state, batches)

    state = init_state(network, optimizer, 0)
    excess, error = bound(state.ema_params)
    assert excess > 0.2 * entropy_per_token(), "a fresh network is far from the source"
    run = jax.jit(many, donate_argnums=0, compiler_options=oracle.THOROUGHLY)
    for _ in range(5):
        x0 = draw(rng, steps // 5 * batch).reshape(steps // 5, batch, LENGTH)
        state, metrics = run(state, jnp.asarray(x0))
    assert np.isfinite(metrics["loss"]).all()
    excess, error = bound(state.ema_params)
    print(f"{name}: {entropy_per_token():.4f} + {excess:.4f} ± {error:.4f} nats per token")
    # The excess is the KL of the model from the source, per token, and never negative.
    assert excess > -3 * error
    assert excess + entropy_per_token() < 1.05 * entropy_per_token() + 3 * error

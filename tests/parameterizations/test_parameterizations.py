"""Reading raw outputs: normalised, certain where revealed, score and conditional consistent."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import f32, i32

from sedd.errors import FieldError
from sedd.networks.base import Attend
from sedd.parameterizations.autoregressive import Autoregressive
from sedd.parameterizations.conditional import Conditional
from sedd.parameterizations.mean import Mean
from sedd.parameterizations.score import Score
from sedd.processes.absorbing import Absorbing
from sedd.processes.uniform import Uniform

N, MASK = 5, 5
ABSORBING, UNIFORM = Absorbing(num_tokens=N), Uniform(num_tokens=N)
X = i32([[0, MASK, 4, MASK], [MASK, MASK, 1, 2]])
SIGMA = f32([0.3, 1e-4])[:, None]
RAW = 5 * jax.random.normal(jax.random.key(0), (2, 4, N + 1))

each = pytest.mark.parametrize("make", [Score, Conditional])


@each
def test_conditional_is_normalised_and_revealed_tokens_are_certain(make):
    log_probs = np.asarray(make(process=ABSORBING).log_conditional(RAW, X))
    assert log_probs.shape == (2, 4, N)
    # Summing N exponentials in float32
    np.testing.assert_allclose(np.exp(log_probs).sum(-1), 1, rtol=1e-5)
    for b, i in np.argwhere(np.asarray(X) != MASK):
        expected = np.full(N, -1e6)
        expected[X[b, i]] = 0
        np.testing.assert_array_equal(log_probs[b, i], expected)
    masked = np.asarray(X) == MASK
    np.testing.assert_allclose(
        log_probs[masked], jax.nn.log_softmax(RAW[..., :N], -1)[masked], rtol=1e-5
    )


@each
def test_the_conditional_is_the_normalised_score(make):
    """e^s over the real tokens, normalised: the shift by σ drops out (arXiv:2406.03736, thm 1)."""
    parameterization = make(process=ABSORBING)
    log_score = parameterization.log_score(RAW, X, SIGMA)[..., :N]
    by_score = jax.nn.log_softmax(log_score, -1)
    masked = np.asarray(X) == MASK
    by_raw = parameterization.log_conditional(RAW, X)
    np.testing.assert_allclose(by_score[masked], by_raw[masked], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("parameterization", "x", "raw"),
    [
        (Score(process=ABSORBING), X, RAW),
        (Conditional(process=ABSORBING), X, RAW),
        (Score(process=UNIFORM), X % N, RAW[..., :N]),
    ],
)
def test_log_score_is_zero_at_the_current_token(parameterization, x, raw):
    log_score = parameterization.log_score(raw, x, SIGMA)
    assert log_score.shape == raw.shape
    np.testing.assert_array_equal(jnp.take_along_axis(log_score, x[..., None], -1), 0)


def test_score_on_an_absorbing_process_starts_from_equally_likely_tokens():
    sigma = np.array([1e-8, 1e-3, 1.0, 20.0])
    x = i32(np.full((4, 1), MASK))
    got = Score(process=ABSORBING).log_score(jnp.zeros((4, 1, N + 1)), x, f32(sigma)[:, None])
    exact = -np.log(np.expm1(sigma)) - np.log(N)
    np.testing.assert_allclose(got[:, 0, :N], np.repeat(exact[:, None], N, 1), rtol=1e-6)


def test_score_on_a_uniform_process_is_the_raw_output():
    x = X % N
    got = np.asarray(Score(process=UNIFORM).log_score(RAW[..., :N], x, SIGMA))
    away = ~np.eye(N, dtype=bool)[np.asarray(x)]
    np.testing.assert_array_equal(got[away], np.asarray(RAW[..., :N])[away])


def test_conditional_score_is_log_c_minus_log_expm1():
    got = Conditional(process=ABSORBING).log_score(RAW, X, SIGMA)
    raw = np.asarray(RAW, np.float64)[..., :N]
    log_c = raw - np.log(np.exp(raw).sum(-1, keepdims=True))
    exact = log_c - np.log(np.expm1(np.asarray(SIGMA, np.float64)))[..., None]
    masked = np.asarray(X) == MASK
    np.testing.assert_allclose(np.asarray(got)[..., :N][masked], exact[masked], rtol=1e-5)


def test_mean_on_an_absorbing_process_is_the_conditional():
    """At masks, where alone the score matters; t-DSE is therefore one loss for both."""
    masked = np.asarray(X) == MASK
    got, exact = (make(process=ABSORBING).log_score(RAW, X, SIGMA) for make in (Mean, Conditional))
    np.testing.assert_allclose(
        np.asarray(got)[masked][:, :N], np.asarray(exact)[masked][:, :N], rtol=1e-5, atol=1e-5
    )
    log_probs = Mean(process=ABSORBING).log_conditional(RAW, X)
    np.testing.assert_array_equal(log_probs, Conditional(process=ABSORBING).log_conditional(RAW, X))


def test_the_mask_column_of_the_raw_output_is_not_read():
    changed = RAW.at[..., MASK].add(100)
    for make in (Score, Conditional):
        p = make(process=ABSORBING)
        np.testing.assert_array_equal(p.log_conditional(RAW, X), p.log_conditional(changed, X))


def test_refusals():
    with pytest.raises(ValueError, match="absorbing"):
        Conditional(process=UNIFORM)
    with pytest.raises(TypeError, match="time_independent"):
        Score(process=ABSORBING, time_independent=True)  # pyright: ignore[reportCallIssue]
    with pytest.raises(ValueError, match="absorbing"):
        Score(process=UNIFORM).log_conditional(RAW[..., :N], X % N)


def test_a_shifted_conditional_reads_the_row_before():
    """Dream's conditional of position i is row i - 1; a segment's first position reads its own."""
    shifted = Conditional(process=ABSORBING, shift=True)
    hidden_BMD = f32(np.arange(8).reshape(1, 8, 1))
    x_BL = i32([[MASK] * 8])
    read = shifted.inputs(x_BL).read(hidden_BMD)[0, :, 0]
    np.testing.assert_array_equal(read, [0, 0, 1, 2, 3, 4, 5, 6])
    attend = Attend(segment_BL=i32([[1, 1, 1, 2, 2, 0, 0, 0]]))
    read = shifted.inputs(x_BL, attend).read(hidden_BMD)[0, :, 0]
    np.testing.assert_array_equal(read, [0, 0, 1, 3, 3, 5, 5, 6])
    assert shifted.inputs(x_BL, attend).attend is attend
    assert Conditional(process=ABSORBING).inputs(x_BL).read_BL is None


def test_normalised_over_all_rows_of_a_vocabulary():
    """The published softmax over all V rows, of which the real tokens are the first N."""
    wide = 5 * jax.random.normal(jax.random.key(1), (2, 4, N + 4))  # the mask, and 3 unused rows
    everything = Conditional(process=ABSORBING, normalise="all").log_conditional(wide, X)
    masked = np.asarray(X) == MASK
    np.testing.assert_allclose(
        everything[masked], jax.nn.log_softmax(wide, -1)[masked][:, :N], rtol=1e-5
    )
    real = Conditional(process=ABSORBING).log_conditional(wide, X)
    assert (np.asarray(real - everything)[masked] > 0).any()
    np.testing.assert_array_equal(np.asarray(real)[~masked], np.asarray(everything)[~masked])


def test_an_autoregressive_model_may_begin_with_a_token():
    x_BL = i32([[3, MASK, MASK, 2]])
    np.testing.assert_array_equal(
        Autoregressive(process=ABSORBING).inputs(x_BL).tokens_BM, [[MASK, 3, MASK, MASK]]
    )
    first = Autoregressive(process=ABSORBING, first=1)
    np.testing.assert_array_equal(first.inputs(x_BL).tokens_BM, [[1, 3, 1, 1]])
    with pytest.raises(FieldError, match="first must be a token, 0 to 4, got 5"):
        Autoregressive(process=ABSORBING, first=MASK)

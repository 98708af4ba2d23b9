"""Forward processes against the matrix exponential, and draws against their law."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from oracle import PROCESSES, f32, i32, keys, rate_matrix, transition_matrix
from scipy import stats
from scipy.linalg import expm

from sedd.parameterizations.score import Score

both = pytest.mark.parametrize("kind", PROCESSES)
SIGMAS = [0.0, 1e-4, 0.1, 1.0, 6.9, 20.0]


@both
def test_the_oracle_itself(kind):
    for sigma in SIGMAS:
        np.testing.assert_allclose(
            transition_matrix(kind, sigma), expm(sigma * rate_matrix(kind)), atol=1e-13
        )


@both
@pytest.mark.parametrize("num_tokens", [2, 5])
def test_transition_is_the_matrix_exponential(kind, num_tokens):
    process = PROCESSES[kind](num_tokens=num_tokens)
    x = jnp.arange(process.num_states)
    for sigma in SIGMAS:
        exact = expm(sigma * rate_matrix(kind, num_tokens))
        row, column = (
            process.transition(x, f32(sigma)),
            process.transition_to(x, f32(sigma), f32(sigma)),
        )
        np.testing.assert_allclose(row, exact, rtol=1e-5, atol=1e-12)
        np.testing.assert_allclose(column, exact.T, rtol=1e-5, atol=1e-12)
    if kind == "absorbing":  # the control: rows and columns are not the same thing
        assert np.abs(np.asarray(row) - exact.T).max() > 0.5


@both
def test_small_noise_is_not_rounded_away(kind):
    process = PROCESSES[kind](num_tokens=50257)
    row = np.asarray(process.transition(i32([3]), f32(1e-8)))[0]
    moved = row.sum(dtype=np.float64) - row[3]
    exact = 1e-8 * (1 - oracle.target_of(kind, 50257)[3])
    np.testing.assert_allclose(moved, exact, rtol=1e-4)


@both
@pytest.mark.parametrize("by_position", [False, True])
def test_sigma_is_one_a_sequence_or_one_a_position(kind, by_position):
    """Every method at σ [B] or [B, L] is that method at each position's own σ."""
    process = PROCESSES[kind](num_tokens=3)
    rng = np.random.default_rng(0)
    shape = (2, 3) if by_position else (2,)
    sigma, x_BL = f32(rng.uniform(0.1, 2.0, shape)), i32(rng.integers(0, 3, (2, 3)))
    x0_BL = x_BL.at[:, 0].set((x_BL[:, 0] + 1) % 3)
    if kind == "absorbing":  # a position that moved shows the mask
        x_BL = x_BL.at[:, 0].set(process.mask_id)
    own_BL = np.broadcast_to(sigma if by_position else sigma[:, None], (2, 3))
    log_score = Score(process=process).log_score(
        f32(rng.standard_normal((2, 3, process.num_states))), x_BL, sigma
    )
    methods = {
        "transition": lambda x, x0, s, sigma: process.transition(x, sigma),
        "transition_to": lambda x, x0, s, sigma: process.transition_to(x, sigma, sigma),
        "staggered_score": lambda x, x0, s, sigma: process.staggered_score(s, sigma, sigma),
        "score_entropy": lambda x, x0, s, sigma: process.score_entropy(s, x, x0, sigma),
        "tweedie": lambda x, x0, s, sigma: process.tweedie(s, x, sigma, sigma),
        "euler": lambda x, x0, s, sigma: process.euler(s, x, sigma, sigma),
        "denoise": lambda x, x0, s, sigma: process.denoise(s, x, sigma),
        "log_score": lambda x, x0, s, sigma: Score(process=process).log_score(s, x, sigma),
    }
    for name, method in methods.items():
        together = np.asarray(method(x_BL, x0_BL, log_score, sigma))
        for b, i in np.ndindex(2, 3):
            alone = method(x_BL[b, i], x0_BL[b, i], log_score[b, i], f32(own_BL[b, i]))
            np.testing.assert_allclose(together[b, i], alone, rtol=1e-5, atol=1e-7, err_msg=name)


@both
def test_corruption_at_a_noise_of_each_position(kind):
    """σ = 0 leaves a position alone and a large one moves it, whatever its neighbours' are."""
    process = PROCESSES[kind](num_tokens=50)
    x0_BL = jnp.zeros((400, 4), jnp.int32)
    sigma_BL = jnp.broadcast_to(f32([0.0, 30.0, 0.0, 30.0]), x0_BL.shape)
    moved_L = np.asarray(process.corrupt(keys(0, 400), x0_BL, sigma_BL) != x0_BL).mean(0)
    np.testing.assert_array_equal(moved_L[[0, 2]], 0)
    assert (moved_L[[1, 3]] > 0.9).all()


@both
@pytest.mark.parametrize("sigma", [0.2, 2.0])
def test_corrupt_has_the_law_of_its_row(kind, sigma):
    process = PROCESSES[kind](num_tokens=5)
    x0_BL = jnp.broadcast_to(jnp.arange(5), (4000, 5))
    xt_BL = np.asarray(process.corrupt(keys(0, 4000), x0_BL, jnp.full(4000, sigma)))
    assert xt_BL.dtype == np.int32
    law = expm(sigma * rate_matrix(kind, 5))
    for token in range(5):
        counts = np.bincount(xt_BL[:, token], minlength=process.num_states)
        assert oracle.chi_square_p(counts, law[token]) > 1e-4
        wrong = expm(1.5 * sigma * rate_matrix(kind, 5))[token]  # the control
        assert oracle.chi_square_p(counts, wrong) < 1e-4


@both
def test_corrupt_at_tiny_noise(kind):
    process = PROCESSES[kind](num_tokens=50)
    x0_BL = jnp.zeros((40, 100_000), jnp.int32)
    xt_BL = process.corrupt(keys(1, 40), x0_BL, jnp.full(40, 1e-4))
    moved = int((xt_BL != x0_BL).sum())  # about 400
    probability = 1e-4 * (1 - oracle.target_of(kind, 50)[0])
    assert stats.binomtest(moved, x0_BL.size, probability).pvalue > 1e-4


@both
def test_corruption_is_independent_across_positions_and_examples(kind):
    process = PROCESSES[kind](num_tokens=2)
    x0_BL = jnp.zeros((2, 40_000), jnp.int32)
    moved = np.asarray(process.corrupt(keys(2, 2), x0_BL, jnp.full(2, 0.7)) != x0_BL)
    for a, b in [(moved[0], moved[1]), (moved[0, :-1], moved[0, 1:])]:
        table = [[(a & b).sum(), (a & ~b).sum()], [(~a & b).sum(), (~a & ~b).sum()]]
        assert stats.chi2_contingency(table).pvalue > 1e-4
    same = [[(moved[0]).sum(), 0], [0, (~moved[0]).sum()]]  # the control: one key used twice
    assert stats.chi2_contingency(same).pvalue < 1e-4


@both
def test_corruption_belongs_to_the_example(kind):
    process = PROCESSES[kind](num_tokens=9)
    x0_BL = jax.random.randint(jax.random.key(0), (6, 30), 0, 9)
    sigma_B = jnp.linspace(0.1, 2.0, 6)
    whole = process.corrupt(keys(3, 6), x0_BL, sigma_B)
    part = process.corrupt(keys(3, 6)[2:4], x0_BL[2:4], sigma_B[2:4])
    np.testing.assert_array_equal(whole[2:4], part)


@both
def test_prior(kind):
    process = PROCESSES[kind](num_tokens=4)
    x_BL = np.asarray(process.sample_prior(keys(4, 2000), 3, f32(50.0)))
    assert x_BL.shape == (2000, 3)
    law = expm(50 * rate_matrix(kind, 4))[0]
    for i in range(3):
        assert oracle.chi_square_p(np.bincount(x_BL[:, i], minlength=len(law)), law) > 1e-4


@both
@pytest.mark.parametrize("sigma", [0.05, 1.0, 6.9])
@pytest.mark.parametrize("num_tokens", [2, 27])
def test_prior_kl(kind, sigma, num_tokens):
    row = expm(sigma * rate_matrix(kind, num_tokens))[0]
    prior = np.full(num_tokens, 1 / num_tokens)
    if kind != "uniform":  # the mask as often as in the row, and else a uniform token
        prior = np.append((1 - row[-1]) * prior, row[-1])
    direct = stats.entropy(row, prior)
    process = PROCESSES[kind](num_tokens=num_tokens)
    # 1e-7 absolute: at σ = 6.9 uniform's two terms of 1e-3 cancel to 1e-6
    np.testing.assert_allclose(process.prior_kl(f32(sigma)), direct, rtol=1e-5, atol=1e-7)


def test_prior_kl_of_gpt2_under_log_linear():
    process = PROCESSES["absorbing"](num_tokens=50257)
    np.testing.assert_allclose(process.prior_kl(f32(-np.log(1e-3))), 0.0108, atol=5e-5)


@both
@pytest.mark.parametrize("dsigma", [1e-7, 1e-3, 0.5, 4.0, 15.0, 19.5])
def test_staggered_score_takes_the_noise_off_one_position(kind, dsigma):
    """With the exact score; from late times, where e^Δσ is huge, the form must not cancel.

    Not so on hybrid noise: float32 rounds its log scores, which are not near 0 at late times.
    """
    if kind == "hybrid" and dsigma > 4:
        dsigma /= 3
    world = oracle.Oracle(kind)
    sigma = dsigma + 0.5 if dsigma < 1 or kind == "hybrid" else 20.0
    earlier = [world.marginal(np.where(np.arange(4) == i, sigma - dsigma, sigma)) for i in range(4)]
    index = oracle.neighbours(world.states, world.V)
    exact = np.stack([earlier[i][index[:, i]] for i in range(4)], 1)
    exact /= world.marginal(sigma)[:, None, None]
    # A log score of 1e-9 at σ = 20 is as good a float32 as any; rounding e^s first would lose it.
    got = world.process.staggered_score(f32(world.log_score(sigma)), f32(sigma), f32(dsigma))
    rows = (
        world.states == world.mask_id if kind == "absorbing" else np.full(world.states.shape, True)
    )
    np.testing.assert_allclose(np.asarray(got)[rows], exact[rows], rtol=2e-4)


@both
def test_reverse_rate_rows_sum_to_zero(kind):
    world = oracle.Oracle(kind)
    log_score = world.log_score(0.4)
    got = np.asarray(world.process.reverse_rate(f32(log_score), i32(world.states), f32(0.4)))
    np.testing.assert_allclose(got.sum(-1), 0, atol=1e-5)
    rate = np.moveaxis(rate_matrix(kind)[:, world.states], 0, -1) * np.exp(log_score)
    own = np.eye(world.V, dtype=bool)[world.states]
    np.testing.assert_allclose(got[~own], rate[~own], rtol=1e-5)


@both
def test_euler_is_tweedie_to_first_order(kind):
    """Their difference is second order in Δσ: it falls a hundredfold when Δσ falls tenfold."""
    world = oracle.Oracle(kind)
    x, differences = i32(world.states), []
    with jax.enable_x64(True):
        log_score = jnp.asarray(world.log_score(0.4))
        for dsigma in (1e-2, 1e-3):
            euler = world.process.euler(log_score, x, jnp.float64(0.4), jnp.float64(dsigma))
            tweedie = world.process.tweedie(log_score, x, jnp.float64(0.4), jnp.float64(dsigma))
            tweedie = tweedie / tweedie.sum(-1, keepdims=True)
            differences.append(float(jnp.abs(euler - tweedie).max()))
    assert 60 < differences[0] / differences[1] < 140


@both
def test_the_exact_tweedie_step_sums_to_one(kind):
    world = oracle.Oracle(kind)
    got = world.process.tweedie(f32(world.log_score(0.8)), i32(world.states), f32(0.8), f32(0.3))
    np.testing.assert_allclose(np.asarray(got).sum(-1), 1, rtol=1e-5)


@both
def test_denoise_is_the_posterior_of_clean_tokens(kind):
    """p(x0_i = y | xt) by Bayes from the joint, at a σ that is not small at all."""
    world, sigma = oracle.Oracle(kind), 0.7
    clean = oracle.all_states(3)
    kernel = transition_matrix(kind, sigma)
    weight = world.joint.ravel()[:, None] * np.prod(
        kernel[clean[:, None, :], world.states[None, :, :]], -1
    )
    posterior = np.zeros((len(world.states), 4, 3))
    for i in range(4):
        for y in range(3):
            posterior[:, i, y] = weight[clean[:, i] == y].sum(0) / weight.sum(0)
    got = np.exp(
        np.asarray(
            world.process.denoise(f32(world.log_score(sigma)), i32(world.states), f32(sigma))
        )
    )
    # p(x0_i | xt) is the Tweedie step of that position exactly, all the way to σ = 0.
    np.testing.assert_allclose(got[..., :3], posterior, atol=2e-5)
    np.testing.assert_allclose(got.sum(-1), 1, rtol=1e-5)
    if kind != "uniform":
        assert (got[..., 3] == 0).all()


def test_masks():
    absorbing, uniform = (PROCESSES[k](num_tokens=7) for k in ("absorbing", "uniform"))
    assert (absorbing.mask_id, absorbing.num_states) == (7, 8)
    assert (uniform.mask_id, uniform.num_states) == (None, 7)
    np.testing.assert_array_equal(absorbing.can_move(i32([0, 7, 6])), [False, True, False])
    assert bool(uniform.can_move(i32([0, 6])).all())


@both
def test_mistakes_are_named(kind):
    with pytest.raises(ValueError, match="got 1"):
        PROCESSES[kind](num_tokens=1)

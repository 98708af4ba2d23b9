"""The bound against exact likelihoods and exact expectations on an enumerable world."""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from oracle import L, N, i32, keys
from scipy import integrate, special, stats
from tiers import daily, nightly

from sedd.evaluation.bound import Scored, evaluate_bound, score_sequences, summarise
from sedd.evaluation.estimators import resolve
from sedd.evaluation.monte_carlo import MonteCarlo, sequence_nats
from sedd.evaluation.stratified import level, tile, toward_few_masks
from sedd.networks.mesh import Placement, device_mesh
from sedd.schedules import Geometric, LogLinear

CLEAN = oracle.all_states(N)
ALL = (True,) * L
SOME = (True, False, True, True)
NOISE = {"log_linear": LogLinear(), "geometric": Geometric()}
T_MIN = 1e-3


# ---------------------------------------------------------------- exact: orders


TABLE = oracle.random_table(seed=5, scale=1.5)


@functools.cache
def order_nll(scored=ALL):
    """[81, orders]: NLL of the scored positions of every x0 given the rest, one order a column."""
    log_c = TABLE[..., :N] - special.logsumexp(TABLE[..., :N], axis=-1, keepdims=True)
    free = [i for i in range(L) if scored[i]]
    columns = []
    for order in itertools.permutations(free):
        total = np.zeros(len(CLEAN))
        for j, i in enumerate(order):
            xt = CLEAN.copy()
            xt[:, list(order[j:])] = N
            total -= log_c[oracle.state_index(xt, N + 1), i, CLEAN[:, i]]
        columns.append(total)
    return np.stack(columns, -1)


# ---------------------------------------------------------------- exact: scores


def score_entropy(kind, log_score, x, x0, sigma):
    """[S, L]: the forms of arXiv:2310.16834's appendix in float64, as published."""
    expm1 = np.expm1(sigma)
    rows = np.broadcast_to(x0, x.shape)
    at_x0 = np.take_along_axis(log_score, rows[..., None], -1)[..., 0]
    if kind == "absorbing":
        r = 1 / expm1
        entropy = np.exp(log_score[..., :N]).sum(-1) - r * at_x0 + r * (np.log(r) - 1)
        return np.where(x == N, entropy, 0)
    ratio = expm1 / (expm1 + N)
    positive = np.exp(log_score).mean(-1) - 1 / N
    negative = log_score.mean(-1)
    clean = positive - ratio * negative + (N - 1) / N * ratio * (np.log(ratio) - 1)
    moved = positive - (at_x0 / expm1 + negative) + ((-np.log(ratio) - 1) / ratio - (N - 2)) / N
    return np.where(x == rows, clean, moved)


class World:
    """A kind, a schedule and a log score as a function of σ, with every term by quadrature."""

    def __init__(self, kind, noise, log_score, denoiser, scored=ALL, t_min=T_MIN):
        self.kind, self.noise, self.log_score, self.denoiser = kind, noise, log_score, denoiser
        self.V, self.length = oracle.num_states(kind), len(scored)
        self.states = oracle.all_states(self.V, self.length)
        self.clean = oracle.all_states(N, self.length)
        self.scored = np.asarray(scored)
        sigma, _ = oracle.SCHEDULES[noise]
        self.low, self.high = sigma(t_min), sigma(1.0)

    def mean(self, nats_SLN, sigma):
        """[81]: E Σ nats[xt, i, x0_i] over q(xt | x0); positions that are not scored are held.

        One position after the other: what depends on x0 in xt is summed out by its own kernel.
        """
        kernel = oracle.transition_matrix(self.kind, sigma)[:N]
        law = nats_SLN.reshape([self.V] * self.length + [self.length, N])
        for axis, scored in enumerate(self.scored):
            own = kernel if scored else np.eye(N, self.V)
            law = np.moveaxis(np.tensordot(own, law, (1, axis)), 0, axis)
        of_x0 = np.take_along_axis(law.reshape(-1, self.length, N), self.clean[..., None], 2)
        return of_x0[..., 0][:, self.scored].sum(-1)

    def prior(self):
        a = np.exp(-self.high)
        if self.kind == "absorbing":
            per_token = a * np.log(N)
        else:
            kernel = oracle.transition_matrix(self.kind, self.high)
            per_token = stats.entropy(kernel[0], np.full(N, 1 / N))
        return per_token * self.scored.sum()

    @functools.cache  # noqa: B019 - a test's world is small, and lives as long as the tests
    def diffusion(self):
        """[81]: ∫ rate·E Σ SE dt = ∫ σ·E Σ SE d(log σ), 64 Gauss-Legendre nodes."""
        nodes, weights = np.polynomial.legendre.leggauss(64)
        low, high = np.log(self.low), np.log(self.high)
        total = np.zeros(len(self.clean))
        for node, weight in zip(nodes, weights, strict=True):
            sigma = np.exp(low + (high - low) * (node + 1) / 2)
            log_score = self.log_score(sigma)
            entropy = [
                score_entropy(self.kind, log_score, self.states, np.full(self.length, x0), sigma)
                for x0 in range(N)
            ]
            total += weight * sigma * self.mean(np.stack(entropy, -1), sigma)
        return total * (high - low) / 2

    def clean_probs(self):
        """[S, L, V]: the last Tweedie step."""
        score = np.exp(self.log_score(self.low))
        probs = oracle.tweedie_probs(score, self.states, self.kind, self.low)
        if self.kind == "absorbing":
            probs[..., N] = 0
        return oracle.clip_normalise(probs)

    def reconstruction(self):
        """[81]"""
        with np.errstate(divide="ignore"):
            nats_SLN = -np.log(self.clean_probs()[..., :N])
        kernel = oracle.transition_matrix(self.kind, self.low)[:N]
        reached_SLN = np.moveaxis(kernel[:, self.states], 0, -1) > 0
        return self.mean(np.where(reached_SLN, nats_SLN, 0), self.low)

    def bound(self):
        return self.prior() + self.diffusion() + self.reconstruction()

    def log_likelihood(self):
        """[81]: the reverse chain's own law, by its master equation in log σ from the prior."""
        index = oracle.neighbours(self.states, self.V)
        rows = np.broadcast_to(np.arange(len(self.states))[:, None, None], index.shape)
        column = np.moveaxis(oracle.rate_matrix(self.kind)[:, self.states], 0, -1)

        def flow(v, law):
            sigma = np.exp(v)
            rate = sigma * np.maximum(column, 0) * np.exp(self.log_score(sigma))
            rate[index == rows] = 0
            moved = law[:, None, None] * rate
            change = np.bincount(index.ravel(), moved.ravel(), len(law)) - moved.sum((1, 2))
            return -change  # v runs down

        a = np.exp(-self.high)
        one = np.full(self.V, 1 / N)
        if self.kind == "absorbing":
            one = np.append(a * np.full(N, 1 / N), 1 - a)
        start = one[self.states].prod(-1)
        span = (np.log(self.high), np.log(self.low))
        law = integrate.solve_ivp(flow, span, start, rtol=1e-7, atol=1e-12).y[:, -1]
        assert law.sum() == pytest.approx(1, abs=1e-6)
        clean_law = law @ oracle.product_kernel(self.clean_probs(), self.states)
        return np.log(clean_law[oracle.state_index(CLEAN, self.V)])


@functools.cache
def wrong_score_world(kind, noise, scored=ALL, distortion=0.0, t_min=T_MIN):
    """On absorbing a random score of the right size, on uniform that of another joint, distorted.

    Undistorted where means are estimated: uniform charges a wrong score rarely and enormously, at
    early times, and its last step can make negative entries.
    """
    if kind == "uniform":
        other = oracle.Oracle(kind, seed=21, spread=0.8)
        shift = oracle.random_table(kind, seed=22, scale=distortion)
        own = np.eye(N, dtype=bool)[other.states]
        shift[own] = 0
        denoiser = other.score_denoiser()
        denoiser = dataclasses.replace(
            denoiser, params={**denoiser.params, "shift": oracle.f32(shift)}
        )
        return World(kind, noise, lambda s: other.log_score(s) + shift, denoiser, scored, t_min)
    table = oracle.random_table(kind, seed=7, scale=0.7)
    slope = oracle.random_table(kind, seed=8, scale=0.3)
    denoiser = oracle.table_denoiser(table, N, kind=kind, slope=slope)
    own = np.eye(N + 1, dtype=bool)[oracle.all_states(N + 1)]

    def log_score(sigma):
        raw = table + slope * np.sin(np.log(sigma)) - np.log(np.expm1(sigma)) - np.log(N)
        return np.where(own, 0, raw)

    return World(kind, noise, log_score, denoiser, scored, t_min)


def exact_score_world(kind, noise):
    here = oracle.Oracle(kind, seed=3)
    return here, World(kind, noise, here.log_score, here.score_denoiser())


# ---------------------------------------------------------------- the library's estimates


@functools.partial(jax.jit, static_argnames=("schedule", "repeats", "draws"))
def _estimates(denoiser, schedule, seed_keys, scored_L, repeats, draws):
    x0_BL = jnp.tile(i32(CLEAN), (repeats, 1))
    scored_BL = jnp.broadcast_to(scored_L, x0_BL.shape)
    nats = sequence_nats(denoiser, schedule, seed_keys, x0_BL, scored_BL, draws=draws)
    return nats.prior_B[:, None], nats.diffusion_BR, nats.reconstruction_BR


def estimates(world_or_denoiser, schedule, *, scored=ALL, repeats=24, draws=8, seed=0):
    """Independent estimates [repeats·4, 81] of (prior, diffusion, reconstruction) of every x0."""
    seed_keys = keys(seed, repeats * len(CLEAN))
    terms = _estimates(world_or_denoiser, schedule, seed_keys, jnp.asarray(scored), repeats, draws)
    return tuple(by_sequence(a) for a in terms)


def by_sequence(values_BR):
    """[repeats·81, R] → [repeats·R, 81] in float64."""
    values = np.asarray(values_BR, np.float64).reshape(-1, len(CLEAN), values_BR.shape[-1])
    return values.transpose(0, 2, 1).reshape(-1, len(CLEAN))


def assert_means(samples, exact):
    """81 means of independent estimates: none 5 errors off, and their χ² unremarkable.

    Five, not four: the estimates are skewed, and there are 100 to 200 of each.
    """
    error = samples.std(0, ddof=1) / math.sqrt(len(samples))
    z = (samples.mean(0) - exact) / error
    assert np.abs(z).max() < 5
    assert abs(z.sum()) < 4 * math.sqrt(len(z))
    # Student's t of n - 1 degrees: variance (n - 1)/(n - 3), and 81 of them
    n = len(samples)
    assert (z**2).mean() < (n - 1) / (n - 3) * (1 + 5 * math.sqrt(2 / len(z)))


# ---------------------------------------------------------------- time-independent models


@pytest.mark.parametrize("scored", [ALL, SOME])
def test_any_order_models_cost_their_mean_over_orders(scored):
    denoiser = oracle.table_denoiser(TABLE, N)
    prior, diffusion, reconstruction = estimates(denoiser, LogLinear(), scored=scored)
    assert (prior == 0).all()
    assert (reconstruction == 0).all()
    exact = order_nll(scored).mean(-1)
    assert_means(diffusion, exact)
    # The any-order model's own NLL is below, by Jensen, and not by nothing.
    own = -special.logsumexp(-order_nll(scored), axis=-1, b=1 / order_nll(scored).shape[1])
    assert (exact >= own).all()
    assert (exact - own).mean() > 0.01


def test_the_exact_conditional_gives_the_exact_likelihood():
    here = oracle.Oracle("absorbing", seed=3)
    _, diffusion, _ = estimates(here.conditional_denoiser(), LogLinear(), seed=2)
    assert_means(diffusion, -np.log(here.joint.ravel()))


# ---------------------------------------------------------------- how draws are spread


@pytest.mark.parametrize("strata", [1, 2, 5, 16])
def test_levels_have_the_mean_of_uniform_ones(strata):
    """Over the shared number, here a fine grid of midpoints, for functions of different shapes."""
    shared_B = (jnp.arange(2000) + 0.5) / 2000
    u = jnp.stack([level(shared_B, jnp.int32(k), strata) for k in range(strata)])
    assert (np.diff(u, axis=0) > 0).all()
    for levels, weight in ((u, 1.0), toward_few_masks(u)):
        assert (levels >= 0).all()
        assert (levels < 1).all()
        for power in (0, 0.5, 1, 3):
            mean = (weight * levels**power).mean() if power else np.mean(weight)
            assert mean == pytest.approx(1 / (power + 1), rel=1e-4)
    if strata % 2 == 0:  # what is linear cancels for every shared number
        np.testing.assert_allclose(u.mean(0), 0.5, rtol=1e-6)


def test_tiles_are_uniformly_random_subsets():
    """Over all 24 orders, from wherever they begin: each k-subset of 4 equally often."""
    orders = jnp.asarray(list(itertools.permutations(range(4))))
    for begin, size in itertools.product(range(4), range(1, 5)):
        ones_B = jnp.ones(24)
        masked = np.asarray(tile(orders, 4 * ones_B, begin * ones_B, size * ones_B))
        assert (masked.sum(-1) == size).all()
        _, counts = np.unique(masked, axis=0, return_counts=True)
        assert (counts == 24 / math.comb(4, size)).all()
        assert len(counts) == math.comb(4, size)


def test_the_estimate_is_unbiased_by_enumeration():
    """The mean over all orders and a grid of shared numbers, from the masks that are drawn."""
    strata, length, grid = 3, 4, 240
    orders = np.array(list(itertools.permutations(range(length))))
    nats = np.random.default_rng(0).random((2**length, length))  # of a position, given the masks
    shared_B = jnp.repeat((jnp.arange(grid) + 0.5) / grid, len(orders))
    place_BL = jnp.asarray(np.tile(orders, (grid, 1)))
    begin_B, total = jnp.zeros(len(place_BL)), 0.0
    for k in range(strata):
        u_B, weight_B = toward_few_masks(level(shared_B, jnp.int32(k), strata))
        size_B = 1 + jnp.floor(u_B * length)
        masked = np.asarray(tile(place_BL, jnp.full_like(size_B, length), begin_B, size_B))
        loss = (nats[masked @ 2 ** np.arange(length)] * masked).sum(-1)
        total += (weight_B * length / size_B * loss).mean() / strata
        begin_B = (begin_B + size_B) % length
    exact = 0.0
    for masked in itertools.product((False, True), repeat=length):
        masked, k = np.array(masked), sum(masked)
        if k:
            loss = (nats[masked @ 2 ** np.arange(length)] * masked).sum()
            exact += length / k * loss / math.comb(length, k) / length
    # The grid resolves u to 1/(strata·grid), and with it where k changes.
    assert total == pytest.approx(exact, rel=5e-3)


def test_masks_that_tile_count_every_position_as_often():
    """Where nothing but the position matters, 16 masked in turns cost always the same."""
    cost_L = np.random.default_rng(2).random(16)
    orders = np.stack([np.random.default_rng(n).permutation(16) for n in range(100)])
    total, begin = np.zeros(100), 0
    for size in (1, 2, 5, 8):
        masked = tile(
            *map(
                jnp.asarray,
                (orders, np.full(100, 16.0), np.full(100, begin, float), np.full(100, float(size))),
            )
        )
        total += (np.asarray(masked) * cost_L).sum(-1)
        begin = (begin + size) % 16
    np.testing.assert_allclose(total, cost_L.sum(), rtol=1e-6)


# ---------------------------------------------------------------- scores


CASES = [
    ("absorbing", "log_linear"),
    ("absorbing", "geometric"),
    ("uniform", "log_linear"),
    ("uniform", "geometric"),
]
every = pytest.mark.parametrize(("kind", "noise"), daily(CASES, [CASES[3]]))


@every
def test_three_terms_against_quadrature(kind, noise):
    """With a wrong score: nothing cancels by luck."""
    world = wrong_score_world(kind, noise)
    prior, diffusion, reconstruction = estimates(world.denoiser, NOISE[noise], seed=3)
    np.testing.assert_allclose(prior, world.prior(), rtol=1e-4, atol=1e-7)
    if (kind, noise) != ("uniform", "log_linear"):  # whose estimates of one x0 have too long a tail
        assert_means(diffusion, world.diffusion())
    total = (diffusion + reconstruction).mean()
    exact = (world.diffusion() + world.reconstruction()).mean()
    error = (diffusion + reconstruction).mean(-1).std() / math.sqrt(len(diffusion))
    assert abs(total - exact) < 4 * error
    assert error < 0.03 * exact


@every
def test_reconstruction_at_a_time_where_it_matters(kind, noise):
    """At t_min = 1e-3 its mean is 1e-3 nats, hidden by the noise: here at t_min = 0.3 or 0.7."""
    t_min = 0.3 if noise == "log_linear" else 0.7
    world = wrong_score_world(kind, noise, t_min=t_min)
    repeats = 24
    x0_BL = jnp.tile(i32(CLEAN), (repeats, 1))
    nats = jax.jit(
        lambda k: sequence_nats(
            world.denoiser, NOISE[noise], k, x0_BL, x0_BL >= 0, draws=4, t_min=t_min
        )
    )(keys(4, len(x0_BL)))
    samples = by_sequence(nats.reconstruction_BR)
    assert_means(samples, world.reconstruction())
    assert samples.mean() > 0.1
    assert_means(by_sequence(nats.diffusion_BR), world.diffusion())


@every
def test_never_below_the_exact_likelihood_of_a_wrong_score(kind, noise):
    """The three terms together; for every x0, and without the outer terms it need not hold."""
    world = wrong_score_world(kind, noise, distortion=0.4)
    gap = world.bound() + world.log_likelihood()
    assert (gap > -1e-5).all()
    assert gap.mean() > 1e-2
    _, diffusion, reconstruction = estimates(world.denoiser, NOISE[noise], seed=5)
    total = world.prior() + diffusion + reconstruction
    error = total.std(0, ddof=1) / math.sqrt(len(total))
    assert (total.mean(0) + world.log_likelihood() > -3 * error).all()


@every
def test_with_the_exact_score_it_is_the_exact_likelihood_up_to_its_outer_terms(kind, noise):
    here, world = exact_score_world(kind, noise)
    nll = -np.log(here.joint.ravel())
    # The model is not quite the joint (its prior, its last step), so single sequences may cost less
    # than -log p; on average none can: cross entropy against entropy.
    gap = here.joint.ravel() @ (world.bound() - nll)
    outer = here.joint.ravel() @ (world.prior() + world.reconstruction())
    print(f"\n{kind:10}{noise:11} gap {gap:.1e} outer terms {outer:.1e}")
    assert -1e-7 < gap < min(0.005, outer)
    # Without the outer terms it is no bound.
    assert here.joint.ravel() @ (world.diffusion() - nll) < 0
    _, diffusion, _ = estimates(world.denoiser, NOISE[noise], seed=6)
    error = diffusion.mean(-1).std() / math.sqrt(len(diffusion))
    assert abs(diffusion.mean() - world.diffusion().mean()) < 4 * error


def test_unscored_positions_are_given():
    world = wrong_score_world("uniform", "geometric", SOME)
    prior, diffusion, _ = estimates(world.denoiser, Geometric(), scored=SOME, seed=7)
    np.testing.assert_allclose(prior, world.prior(), rtol=1e-4, atol=1e-7)
    assert_means(diffusion, world.diffusion())


# ---------------------------------------------------------------- the corpus' figures


def batches(x0_SL, size, scored_SL=None):
    scored_SL = np.ones(x0_SL.shape, bool) if scored_SL is None else scored_SL
    return [(x0_SL[i : i + size], scored_SL[i : i + size]) for i in range(0, len(x0_SL), size)]


DENOISER = oracle.table_denoiser(TABLE, N)


@pytest.mark.nightly
@pytest.mark.parametrize(
    "denoiser", [DENOISER, oracle.Oracle("uniform").score_denoiser()], ids=["k_dce", "score"]
)
def test_the_batch_size_changes_nothing(denoiser):
    rng = np.random.default_rng(0)
    x0_SL, scored_SL = rng.integers(0, N, (7, L)), rng.random((7, L)) < 0.7
    results = [
        evaluate_bound(denoiser, LogLinear(), jax.random.key(0), batches(x0_SL, size, scored_SL))
        for size in (7, 3)  # 3, 3 and a short 1
    ]
    for name in ("nats_per_token", "standard_error", "standard_error_draws", "reconstruction"):
        values = [getattr(r, name) for r in results]
        assert values[0] == pytest.approx(values[1], rel=1e-5, abs=1e-7)
    np.testing.assert_allclose(*(r.sequence_nats for r in results), rtol=1e-5)
    assert results[0].num_sequences == results[1].num_sequences == 7
    assert results[0].num_tokens == scored_SL.sum()


@pytest.mark.nightly
def test_the_number_of_devices_changes_nothing():
    """A short batch is filled up: 7 sequences on 4 devices, 3 at a time."""
    rng = np.random.default_rng(3)
    x0_SL, scored_SL = rng.integers(0, N, (7, L)), rng.random((7, L)) < 0.7
    denoiser = oracle.Oracle("absorbing").score_denoiser()

    def bound(count):
        placement = Placement.on(device_mesh(jax.devices()[:count]), denoiser.params, None)
        placed = dataclasses.replace(denoiser, params=placement.place(denoiser.params))
        rows = batches(x0_SL, 3, scored_SL)
        return evaluate_bound(placed, LogLinear(), jax.random.key(0), rows)

    one, four = bound(1), bound(4)
    assert len(jax.local_devices()) == 4
    assert four.num_tokens == one.num_tokens == scored_SL.sum()
    np.testing.assert_allclose(four.sequence_nats, one.sequence_nats, rtol=1e-5)
    assert four.standard_error_draws == pytest.approx(one.standard_error_draws, rel=1e-4)


def test_outer_terms_that_are_left_out_are_shown_apart():
    denoiser = oracle.Oracle("absorbing").score_denoiser()
    arguments = (denoiser, LogLinear(), jax.random.key(1), batches(CLEAN[::5], 6))
    bound = evaluate_bound(*arguments)
    mean = evaluate_bound(*arguments, outer_terms=False)
    assert bound.is_bound
    assert not mean.is_bound
    assert mean.nats_per_token == mean.diffusion
    assert mean.diffusion == pytest.approx(bound.diffusion / (1 - T_MIN))
    assert (mean.prior, mean.reconstruction) == (bound.prior, bound.reconstruction)
    assert mean.prior > 0
    assert not bound.exact
    assert not mean.exact  # neither a bound nor the likelihood
    any_order = evaluate_bound(DENOISER, *arguments[1:], outer_terms=False)
    assert any_order.is_bound  # it has none to leave out


@pytest.mark.parametrize("outer_terms", [True, False])
def test_an_exact_likelihood_is_no_bound(outer_terms):
    """Whatever a protocol says of terms that it does not have."""
    here = oracle.Oracle("absorbing", seed=3)
    result = evaluate_bound(
        here.autoregressive_denoiser(),
        LogLinear(),
        jax.random.key(0),
        batches(CLEAN, len(CLEAN)),
        outer_terms=outer_terms,
    )
    assert result.exact
    assert not result.is_bound
    assert (result.draws, result.to_json()["exact"]) == (0, True)
    np.testing.assert_allclose(result.sequence_nats, -np.log(here.joint.ravel()), rtol=1e-4)


def test_an_estimator_that_the_model_does_not_have():
    timed = oracle.Oracle("absorbing").score_denoiser()
    with pytest.raises(ValueError, match="k_dce needs a time-independent absorbing model"):
        resolve("k_dce", timed)
    assert resolve("score_entropy", DENOISER) == "score_entropy"
    assert resolve("auto", DENOISER) == "k_dce"


def test_figures_add_up():
    x0_SL = CLEAN[::5]
    result = evaluate_bound(
        oracle.Oracle("absorbing").score_denoiser(),
        LogLinear(),
        jax.random.key(1),
        batches(x0_SL, 6),
        count_text=lambda ids: (2 * len(ids), 3 * len(ids)),
    )
    tokens = x0_SL.size
    assert result.num_tokens == tokens
    assert result.nats_per_token == pytest.approx(
        result.prior + result.diffusion + result.reconstruction
    )
    assert result.prior == pytest.approx(1e-3 * math.log(N), rel=1e-4)
    assert result.nats_per_token == pytest.approx(result.sequence_nats.sum() / tokens)
    assert result.nats_per_sequence == pytest.approx(result.nats_per_token * L)
    assert result.perplexity == pytest.approx(math.exp(result.nats_per_token))
    assert result.bits_per_character == pytest.approx(result.nats_per_token / 2 / math.log(2))
    assert result.bits_per_byte == pytest.approx(result.nats_per_token / 3 / math.log(2))
    assert result.estimator == "score_entropy"


# ---------------------------------------------------------------- coverage, on V = 4 and L = 6

LONG = 6


@functools.cache
def long_world():
    """A random conditional table for 6 positions, 729 sequences, and their exact mean over orders.

    The mean over orders is that over k = 1..6 of 6/k times the sum over a random k-subset: here
    over all 63 of them.
    """
    clean = oracle.all_states(N, LONG)
    states = oracle.all_states(N + 1, LONG)
    table = 1.5 * np.random.default_rng(4).standard_normal((len(states), LONG, N + 1))
    log_c = table[..., :N] - special.logsumexp(table[..., :N], axis=-1, keepdims=True)
    exact = np.zeros(len(clean))
    for k in range(1, LONG + 1):
        for masked in itertools.combinations(range(LONG), k):
            xt = clean.copy()
            xt[:, list(masked)] = N
            row = oracle.state_index(xt, N + 1)
            nats = -sum(log_c[row, i, clean[:, i]] for i in masked)
            exact += LONG / k * nats / math.comb(LONG, k) / LONG
    return oracle.table_denoiser(table, N), LogLinear(), exact


@functools.cache
def long_score_world(kind, noise):
    """The same of scores, as of `wrong_score_world`, and their exact bound by quadrature."""
    rng, size = np.random.default_rng(14), oracle.num_states(kind)
    states = oracle.all_states(size, LONG)
    if kind == "uniform":
        joint = np.exp(0.8 * rng.standard_normal([N] * LONG))
        joint /= joint.sum()
        denoiser = oracle.Denoiser(
            params={"joint": oracle.f32(joint)},
            network=oracle.ExactScoreNetwork(num_states=N, time_conditioned=True, kind="uniform"),
            parameterization=oracle.Score(process=oracle.Uniform(num_tokens=N)),
        )
        index = oracle.neighbours(states, N)

        def log_score(sigma):
            kernel, law = oracle.transition_matrix(kind, sigma), joint
            for axis in range(LONG):
                law = np.moveaxis(np.tensordot(law, kernel, (axis, 0)), -1, axis)
            log_p = np.log(law.ravel())
            return log_p[index] - log_p[:, None, None]
    else:
        shape = (len(states), LONG, size)
        table, slope = 0.7 * rng.standard_normal(shape), 0.3 * rng.standard_normal(shape)
        denoiser = oracle.table_denoiser(table, N, slope=slope)
        own = np.eye(size, dtype=bool)[states]

        def log_score(sigma):
            raw = table + slope * np.sin(np.log(sigma)) - np.log(np.expm1(sigma)) - np.log(N)
            return np.where(own, 0, raw)

    world = World(kind, noise, log_score, denoiser, scored=(True,) * LONG)
    return denoiser, NOISE[noise], world.bound()


def coverage(world, field, number_BS):
    """How many of B evaluations of S sequences lie within 3 of the errors that they report.

    And how many would where the mean were off by 1 nat a token: the control.
    """
    denoiser, schedule, exact = world
    estimator = resolve("auto", denoiser)
    size = number_BS.shape[1]
    parts = score_sequences(  # in batches of one size: one program serves all tests of a world
        denoiser,
        schedule,
        jax.random.key(7),
        batches(oracle.all_states(N, LONG)[number_BS.ravel()], 4800),
        MonteCarlo(draws=8),
    )
    whole = Scored.join(list(parts))
    off, error = [], []
    for repeat, numbers in enumerate(number_BS):
        here = slice(repeat * size, (repeat + 1) * size)
        own = Scored(**{k: v[here] for k, v in vars(whole).items()})
        result = summarise([own], draws=8, estimator=estimator)
        target = exact[numbers] if field == "standard_error_draws" else exact
        off.append(result.nats_per_token - target.mean() / LONG)
        error.append(getattr(result, field))
    off, error = np.array(off), np.array(error)
    return (np.abs(off) <= 3 * error).mean(), (np.abs(off - 1) <= 3 * error).mean()


covered = pytest.mark.parametrize(
    "world",
    [
        nightly(long_world),
        nightly(lambda: long_score_world("absorbing", "log_linear")),
        lambda: long_score_world("uniform", "geometric"),
    ],
    ids=["k_dce", "score-absorbing", "score-uniform"],
)
THESE_BS = np.tile(np.arange(0, 729, 46), (300, 1))


@covered
def test_the_error_over_draws_covers(world):
    """For these very sequences: 16 of 4 replicates leave 48 degrees of freedom."""
    inside, wrong = coverage(world(), "standard_error_draws", THESE_BS)
    assert inside >= 0.97
    assert wrong <= 0.1  # not 0: where tails are long, a few errors are as large as that


@pytest.mark.nightly
@covered
def test_the_error_over_sequences_covers(world):
    """For the population that the sequences come from, here uniform over all 729."""
    number_BS = np.random.default_rng(1).integers(0, 729, (300, 32))
    inside, wrong = coverage(world(), "standard_error", number_BS)
    assert inside >= 0.97
    assert wrong <= 0.1


@pytest.mark.nightly
def test_the_error_of_few_uniform_sequences_under_log_linear_noise_is_optimistic():
    """What docs/evaluation.md warns of: measured 0.89, where the others have 0.99.

    Three binomial standard errors of 300 evaluations around it.
    """
    world = long_score_world("uniform", "log_linear")
    inside, _ = coverage(world, "standard_error_draws", THESE_BS)
    assert 0.84 <= inside <= 0.95


def test_error_of_a_single_sequence_is_that_of_its_draws():
    result = evaluate_bound(DENOISER, LogLinear(), jax.random.key(0), batches(CLEAN[5:6], 1))
    assert result.standard_error == result.standard_error_draws > 0


def test_replicates_are_independent_of_each_other():
    """If they shared their noise levels their spread would not be the error of their mean."""
    _, diffusion, _ = estimates(DENOISER, LogLinear(), repeats=64, seed=9)
    by_replicate = diffusion.reshape(64, 4, len(CLEAN)) - order_nll().mean(-1)
    correlation = [
        np.corrcoef(by_replicate[:, a].ravel(), by_replicate[:, b].ravel())[0, 1]
        for a, b in itertools.combinations(range(4), 2)
    ]
    assert np.abs(correlation).max() < 4.5 / math.sqrt(64 * len(CLEAN))


@pytest.mark.parametrize("draws", [0, 3, 6, -4])
def test_draws_must_split_into_replicates(draws):
    with pytest.raises(ValueError, match=str(draws)):
        evaluate_bound(DENOISER, LogLinear(), jax.random.key(0), batches(CLEAN[:2], 2), draws=draws)


def test_nothing_to_evaluate():
    with pytest.raises(ValueError, match="no sequence"):
        evaluate_bound(DENOISER, LogLinear(), jax.random.key(0), [])
    with pytest.raises(ValueError, match="scored"):
        evaluate_bound(
            DENOISER,
            LogLinear(),
            jax.random.key(0),
            batches(CLEAN[:2], 2, np.zeros((2, L), bool)),
        )


def test_results_are_values():
    result = evaluate_bound(DENOISER, LogLinear(), jax.random.key(0), batches(CLEAN[:2], 2))
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.draws = 3
    assert result.to_json()["perplexity"] == result.perplexity
    assert "sequence_nats" not in result.to_json()

"""Block models: what rows see, the doubled pass, the loss and the bound, against enumeration."""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from oracle import f32, i32, keys
from scipy import special
from tiers import nightly

from sedd.configuration.build import build_parts
from sedd.configuration.components import options
from sedd.configuration.config import Config, DataOptions
from sedd.denoiser import Denoiser
from sedd.errors import FieldError, UserError
from sedd.evaluation.block_levels import BlockDraws, least_variance, narrowed
from sedd.evaluation.estimators import resolve
from sedd.evaluation.monte_carlo import sequence_nats
from sedd.evaluation.ordered import ordered_nats
from sedd.evaluation.protocols import Protocol
from sedd.evaluation.scoring import choose_estimate
from sedd.networks.base import Attend
from sedd.networks.ddit import DDiT
from sedd.objectives.block import Block as Objective
from sedd.objectives.lambda_dce import LambdaDCE
from sedd.parameterizations.block import Block
from sedd.parameterizations.conditional import Conditional
from sedd.processes.absorbing import Absorbing
from sedd.schedules import LogLinear

N, L, B = oracle.N, oracle.L, 6
MASK = N
PROCESS = Absorbing(num_tokens=N)
NETWORK = DDiT(
    num_states=N + 1, time_conditioned=False, hidden_dim=16, num_layers=2, num_heads=2, dropout=0.0
)
RNG = np.random.default_rng(2)
X0_BL = i32(RNG.integers(0, N, (B, L)))
ALL_BL = jnp.ones((B, L), bool)
SOME_BL = jnp.asarray(RNG.random((B, L)) < 0.7)
STATES = oracle.all_states(N + 1)


@functools.cache
def params():
    shapes = jax.eval_shape(NETWORK.init, jax.random.key(0))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: f32(0.5 * rng.standard_normal(x.shape)), shapes)


def reading(block, **fields):
    return Block(process=PROCESS, block=block, **fields)


def denoiser(block):
    """A block model, or with None a plain one with the same parameters."""
    parameterization = Conditional(process=PROCESS) if block is None else reading(block)
    return Denoiser(params=params(), network=NETWORK, parameterization=parameterization)


@functools.partial(jax.jit, compiler_options=oracle.QUICKLY)
def log_conditional(model, x_BL):
    return model.log_conditional(x_BL)


@functools.cache
def table(block):
    """[V^L, L, N]: the log conditionals of every state."""
    return np.asarray(log_conditional(denoiser(block), i32(STATES)), np.float64)


def nats_of_block(block, x0_L, scored_L, first):
    """-log p of each order of the scored positions of one block, given all tokens before it."""
    places = [i for i in range(first, min(first + block, L)) if scored_L[i]]
    found = []
    for order in itertools.permutations(places):
        xt_L = np.where(np.isin(np.arange(L), places), MASK, x0_L)
        total = 0.0
        for i in order:
            total -= table(block)[oracle.state_index(xt_L, N + 1), i, x0_L[i]]
            xt_L[i] = x0_L[i]
        found.append(total)
    return np.array(found)


def enumerated(block, x0_BL, scored_BL, reduce):
    """The sum over blocks of ``reduce`` of the nats of all orders within the block."""
    return np.array(
        [
            sum(reduce(nats_of_block(block, x0_L, scored_L, first)) for first in range(0, L, block))
            for x0_L, scored_L in zip(np.asarray(x0_BL), np.asarray(scored_BL), strict=True)
        ]
    )


# ---------------------------------------------------------------- what rows see


@pytest.mark.parametrize("block", [1, 2, 3, 4, 6])
def test_every_row_sees_what_the_rules_say(block):
    length = 6
    x0_BL = i32(RNG.integers(0, N, (2, length)))
    xt_BL = x0_BL.at[:, 1::2].set(MASK)
    call = reading(block).doubled(xt_BL, x0_BL)
    of = np.arange(length) // block
    noisy_noisy, noisy_clean = of[:, None] == of, of[None] < of[:, None]
    clean_noisy, clean_clean = np.zeros((length, length), bool), of[None] <= of[:, None]
    expected = np.block([[noisy_noisy, noisy_clean], [clean_noisy, clean_clean]])
    np.testing.assert_array_equal(call.attend.mask(2 * length, 2 * length)[0, 0], expected)
    np.testing.assert_array_equal(call.tokens_BM, np.concatenate([xt_BL, x0_BL], 1))
    np.testing.assert_array_equal(call.positions_BM, [[*range(length)] * 2] * 2)
    np.testing.assert_array_equal(call.read_BL, [[*range(length)]] * 2)
    single = reading(block).inputs(xt_BL)
    np.testing.assert_array_equal(single.attend.mask(length, length)[0, 0], clean_clean)


def test_shifted_rows_are_read_in_the_block_or_at_the_end_of_the_clean_one_before():
    call = reading(3, shift=True).doubled(X0_BL[:1], X0_BL[:1])
    np.testing.assert_array_equal(call.read_BL, [[0, 0, 1, L + 2]])
    single = reading(3, shift=True).inputs(X0_BL[:1])
    np.testing.assert_array_equal(single.read_BL, [[0, 0, 1, 2]])


def test_segments_hold_in_both_halves():
    segment_BL = i32([[1, 1, 1, 0], [1, 1, 1, 1]])
    call = reading(2).doubled(X0_BL[:2], X0_BL[:2], Attend(segment_BL=segment_BL))
    seen = np.asarray(call.attend.mask(2 * L, 2 * L))[0, 0]
    assert not seen[[3, 7]][:, [0, 1, 2, 4, 5, 6]].any()
    assert not seen[[0, 1, 2, 4, 5, 6]][:, [3, 7]].any()
    with pytest.raises(ValueError, match="give segments only"):
        reading(2).inputs(X0_BL, Attend(kind="causal"))


def test_later_tokens_change_nothing_and_earlier_ones_do():
    base = table(2)
    later = STATES.copy()
    later[:, 2:] = (later[:, 2:] + 1) % (N + 1)
    other = table(2)[oracle.state_index(later, N + 1)]
    np.testing.assert_array_equal(base[:, :2], other[:, :2])
    masked = (STATES == MASK)[:, 2:]
    both = masked & (later[:, 2:] == MASK)
    assert not both.any()
    earlier = STATES.copy()
    earlier[:, 0] = (earlier[:, 0] + 1) % N
    moved = np.abs(table(2)[oracle.state_index(earlier, N + 1)] - base)[:, 2:].max(-1)
    assert np.median(moved[masked]) > 1e-3


# ---------------------------------------------------------------- the loss


def objective(block, **fields):
    return Objective(schedule=LogLinear(), parameterization=reading(block), **fields)


@functools.partial(jax.jit, static_argnums=0)
def drawn(loss, keys_B, u_B, x0_BL, scored_BL):
    return loss.corrupt(keys_B, u_B, x0_BL, scored_BL)


@pytest.mark.parametrize(("block", "shift"), [(2, False), (3, True), nightly(3, False)])
def test_the_doubled_pass_is_a_pass_for_each_block(block, shift):
    """Loss and gradient; each block's own pass has masks in place of all later tokens."""
    kind = reading(block, shift=shift)
    loss = Objective(schedule=LogLinear(), parameterization=kind)
    first_b = jnp.arange(-(-L // block)) * block
    corrupted = drawn(loss, keys(1, B), f32(RNG.random(B)), X0_BL, SOME_BL)
    place_L = jnp.arange(L)[None]

    @functools.partial(jax.jit, compiler_options=oracle.QUICKLY)
    @jax.value_and_grad
    def in_one(params):
        return loss.summed_nats(NETWORK, params, corrupted, X0_BL)

    @functools.partial(jax.jit, compiler_options=oracle.QUICKLY)
    @jax.value_and_grad
    def one_by_one(params):
        model = Denoiser(params=params, network=NETWORK, parameterization=kind)

        def nats(first):
            here_BL = (place_L >= first) & (place_L < first + block)
            x_BL = jnp.where(here_BL, corrupted.xt_BL, jnp.where(place_L < first, X0_BL, MASK))
            log_probs_BLN = model.log_conditional(x_BL)
            picked_BL = jnp.take_along_axis(log_probs_BLN, X0_BL[..., None], -1)[..., 0]
            return -(jnp.where(here_BL, corrupted.weight_BL, 0) * picked_BL).sum()

        return jax.vmap(nats)(first_b).sum()

    (nats, grads), (plain, of_plain) = in_one(params()), one_by_one(params())
    assert float(nats) > 1
    np.testing.assert_allclose(nats, plain, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(of_plain), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(1, np.abs(b).max()))
    assert loss.rows(L) == 2 * L


def test_levels_are_stratified_over_rows_and_blocks():
    """One in each of B·m equal intervals, and every block takes every level equally often."""
    rows, block, m = 40, 8, 5
    x0_BL, ones = i32(np.zeros((rows, block * m))), jnp.ones((rows, block * m), bool)
    loss = objective(block, min_level=0.5)
    first = []
    for seed in range(20):
        u_B = f32((0.3 + np.arange(rows) / rows) % 1)
        corrupted = drawn(loss, keys(seed, rows), u_B, x0_BL, ones)
        weight_BmW = np.asarray(corrupted.weight_BL).reshape(rows, m, block)
        u_Bm = 2 * (1 - 1 / weight_BmW.max(-1).clip(1))  # 0 for a block without a mask
        found = weight_BmW.max(-1) > 0
        cells = np.floor((u_Bm[found] * rows * m) % (rows * m) - 0.25).astype(int)
        assert len(set(cells.tolist())) == len(cells) > rows * m - 12
        first += u_Bm[:, 0][found[:, 0]].tolist()
        masked_BmW = np.asarray(corrupted.xt_BL).reshape(weight_BmW.shape) == MASK
        np.testing.assert_array_equal(weight_BmW > 0, masked_BmW)
        assert (
            np.ptp(np.where(masked_BmW, weight_BmW, weight_BmW.max(-1)[..., None]), -1) == 0
        ).all()
    counts = np.histogram(first, bins=5, range=(0, 1))[0]
    assert oracle.chi_square_p(counts, np.ones(5)) > 1e-4


def test_the_mean_of_the_weights_is_that_of_the_integral():
    """Of a set of k masks in a block of n: ∫ t^(k-1) (1-t)^(n-k) dt = (k-1)!(n-k)!/n!."""
    count, block = 40_000, 3
    x0_BL = i32(np.zeros((count, 6)))
    u_B = f32((0.1 + np.arange(count) / count) % 1)
    corrupted = drawn(objective(block), keys(5, count), u_B, x0_BL, jnp.ones((count, 6), bool))
    masked = (np.asarray(corrupted.xt_BL) == MASK).reshape(-1, block)
    weight = np.asarray(corrupted.weight_BL, np.float64).reshape(-1, block).max(-1)
    for size in (2, 3):  # the weight of a single mask, 1/t, has no variance
        for chosen in itertools.combinations(range(block), size):
            same = (masked == np.isin(np.arange(block), chosen)).all(-1)
            exact = math.factorial(size - 1) * math.factorial(block - size) / math.factorial(block)
            each = np.where(same, weight, 0)
            assert abs(each.mean() - exact) < 4.5 * each.std() / len(each) ** 0.5
    single = (masked.sum(-1) == 1).mean()
    assert abs(single - 3 * math.factorial(1) * math.factorial(2) / math.factorial(4)) < 0.01


@pytest.mark.parametrize("scored_BL", [ALL_BL, SOME_BL], ids=["all", "some"])
def test_blocks_of_one_position_have_the_autoregressive_loss_without_noise(scored_BL):
    loss = objective(1, min_level=1.0)
    corrupted = drawn(loss, keys(7, B), f32(RNG.random(B)), X0_BL, scored_BL)
    got_BL = jax.jit(loss.nats, static_argnums=0)(NETWORK, params(), corrupted, X0_BL)
    exact_B = enumerated(1, X0_BL, scored_BL, np.mean)
    np.testing.assert_allclose(got_BL.sum(1), exact_B, atol=1e-5)


# ---------------------------------------------------------------- levels of least variance


def test_the_range_of_least_variance_is_found():
    """Losses whose spread is smallest between .3 and .8, with a mean that falls below .3."""
    rng = np.random.default_rng(0)
    level_R = rng.random(200_000)
    spread_R = np.where((level_R > 0.3) & (level_R <= 0.8), 1.0, 3.0)
    nats_R = spread_R * rng.standard_normal(len(level_R)) + np.minimum(level_R, 0.3)
    low, high, ratio = narrowed(level_R, nats_R)
    assert (low, high) == (0.3, 0.8)
    assert ratio == pytest.approx(1 / nats_R.var(), rel=0.02)
    assert narrowed(level_R, np.zeros(len(level_R))) == (0.0, 1.0, 1.0)


def test_levels_and_losses_of_blocks_are_those_of_the_objective():
    loss = objective(2, min_level=0.9)  # its own range makes no difference
    every = dataclasses.replace(loss, min_level=0.0)
    keys_B = keys(11, B)
    estimate = BlockDraws(objective=every, draws=2)
    pairs = np.asarray(
        jax.jit(estimate, static_argnums=1)(denoiser(2), None, keys_B, X0_BL, SOME_BL)
    )
    assert pairs.shape == (B, 2, 2, 2)
    unscored_BN = ~np.asarray(SOME_BL).reshape(B, 2, 2).any(-1)
    np.testing.assert_array_equal(np.isnan(pairs[:, 0, :, 1]), unscored_BN)
    draw_keys_B = jax.vmap(jax.random.fold_in, (0, None))(keys_B, 1)
    u_B = (jax.vmap(jax.random.uniform)(keys_B) + 1) / 2
    corrupted = drawn(every, draw_keys_B, u_B, X0_BL, SOME_BL)
    nats_BL = jax.jit(every.nats, static_argnums=0)(NETWORK, params(), corrupted, X0_BL)
    np.testing.assert_allclose(
        np.nan_to_num(pairs[:, 1, :, 1]), nats_BL.reshape(B, 2, 2).sum(-1), rtol=1e-5
    )
    weight_BN = np.asarray(corrupted.weight_BL).reshape(B, 2, 2).max(-1)
    hit = weight_BN > 0
    assert hit.any()
    np.testing.assert_allclose(pairs[:, 1, :, 0][hit], 1 / weight_BN[hit], rtol=1e-6)
    batches = [(np.asarray(X0_BL), np.asarray(SOME_BL))]
    found = least_variance(denoiser(2), loss, jax.random.key(0), batches, draws=4)
    assert 0.5 <= found.high - found.low <= 1
    assert found.variance_ratio <= 1


# ---------------------------------------------------------------- the bound


@functools.partial(jax.jit, static_argnames=("draws", "estimator"), compiler_options=oracle.QUICKLY)
def bound(model, keys_B, x0_BL, scored_BL, draws=4, estimator="auto"):
    nats = sequence_nats(
        model, LogLinear(), keys_B, x0_BL, scored_BL, draws=draws, estimator=estimator
    )
    return nats.diffusion_BR


@pytest.mark.parametrize(("block", "scored_BL"), [(2, ALL_BL), (2, SOME_BL), (3, ALL_BL)])
def test_the_bound_is_the_mean_over_orders_within_blocks(block, scored_BL):
    repeats = 64
    tiled = [jnp.tile(array, (repeats, 1)) for array in (X0_BL, scored_BL)]
    draws = bound(denoiser(block), keys(3, repeats * B), *tiled, draws=8)
    each = np.asarray(draws, np.float64).reshape(repeats, B, -1).mean(-1)
    mean_B, error_B = each.mean(0), each.std(0, ddof=1) / repeats**0.5
    exact_B = enumerated(block, X0_BL, scored_BL, np.mean)
    assert (np.abs(mean_B - exact_B) <= 4.5 * error_B + 1e-5).all()
    assert error_B.max() < 0.05
    likelihood_B = enumerated(
        block, X0_BL, scored_BL, lambda nats: math.log(len(nats)) - special.logsumexp(-nats)
    )
    assert (exact_B >= likelihood_B - 1e-9).all()
    assert (exact_B > likelihood_B + 1e-5).sum() >= B / 2


def test_blocks_of_one_position_have_the_exact_likelihood():
    model = denoiser(1)
    assert resolve("auto", model) == "exact"
    got_BR = np.asarray(bound(model, keys(0, B), X0_BL, ALL_BL))
    assert (np.ptp(got_BR, axis=1) == 0).all()
    np.testing.assert_allclose(got_BR[:, 0], enumerated(1, X0_BL, ALL_BL, np.mean), atol=1e-5)
    forward_BL = jnp.broadcast_to(jnp.arange(L), (B, L))
    np.testing.assert_allclose(
        got_BR[:, 0], jax.jit(ordered_nats)(model, forward_BL, X0_BL, ALL_BL), atol=1e-5
    )


def test_one_block_has_the_bound_of_the_plain_model():
    """The same draws, and the same terms."""
    one, plain = (bound(denoiser(b), keys(4, B), X0_BL, SOME_BL, draws=12) for b in (L, None))
    np.testing.assert_allclose(one, plain, rtol=1e-6, atol=1e-6)


def test_what_a_block_model_has_no_estimator_for():
    with pytest.raises(ValueError, match="score_entropy does not know blocks"):
        resolve("score_entropy", denoiser(2))
    with pytest.raises(ValueError, match="or blocks of one position"):
        resolve("exact", denoiser(2))
    assert resolve("auto", denoiser(2)) == "k_dce"
    with pytest.raises(FieldError, match="order random: a block model draws its blocks from left"):
        choose_estimate(Protocol(), denoiser(2), "random")
    assert choose_estimate(Protocol(), denoiser(1)).draws == 0


# ---------------------------------------------------------------- mistakes


def config(block, **fields):
    tiny = options("networks", "ddit", hidden_dim=16, num_layers=1, num_heads=2)
    base = Config(
        data=DataOptions(corpus="stdlib", length=12),
        process=options("processes", "absorbing"),
        parameterization=options("parameterizations", "block", block=block),
        network=tiny,
        objective=options("objectives", "block"),
        sampler=options("samplers", "semi_autoregressive"),
    )
    return dataclasses.replace(base, **fields)


def test_a_block_must_divide_the_length():
    build_parts(config(4), 7)
    with pytest.raises(FieldError) as error:
        build_parts(config(5), 7)
    assert error.value.field == "parameterization.block"
    assert str(error.value).endswith("block must divide the length of a row, 12, got 5")


def test_other_objectives_do_not_train_blocks():
    with pytest.raises(FieldError, match="does not train the blocks of the parameterization block"):
        build_parts(config(4, objective=options("objectives", "lambda_dce")), 7)
    with pytest.raises(ValueError, match="trains the parameterization block only"):
        Objective(schedule=LogLinear(), parameterization=Conditional(process=PROCESS))
    LambdaDCE(schedule=LogLinear(), parameterization=reading(2))  # the loss alone may be computed


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: reading(0), "block must be at least 1, got 0"),
        (lambda: objective(2, max_level=0.0), r"max_level must be in \(0, 1\], got 0.0"),
        (lambda: objective(2, min_level=-0.1), r"min_level must be in \[0, max_level 1.0\], got"),
        (
            lambda: objective(2, min_level=0.8, max_level=0.5),
            r"min_level must be in \[0, max_level 0.5\], got 0.8",
        ),
    ],
)
def test_wrong_options_are_named(make, message):
    with pytest.raises(FieldError, match=f"^{message}"):
        make()


def test_a_model_of_a_uniform_process_has_no_blocks():
    with pytest.raises(UserError, match="absorbing"):
        build_parts(config(4, process=options("processes", "uniform")), 7)

"""The price of parallelism against enumeration: 3 tokens, 4 positions, all orders and groups."""

import dataclasses
import functools
import itertools
import json
import math

import jax
import numpy as np
import oracle
import pytest
from oracle import L, N
from scipy import special

from sedd.errors import FieldError, UserError
from sedd.evaluation.bound import evaluate_bound
from sedd.evaluation.price import Price
from sedd.evaluation.price_draws import LEVELS, levels, measure_price
from sedd.parameterizations.conditional import Conditional
from sedd.processes.absorbing import Absorbing
from sedd.samplers.planned import group_sizes, next_known
from sedd.schedules import Cosine, LogLinear

COMPOSITIONS = [
    groups
    for size in range(1, L + 1)
    for groups in itertools.product(range(1, L + 1), repeat=size)
    if sum(groups) == L
]
SCHEDULE = LogLinear()
JOINT = oracle.Oracle("absorbing", seed=3).joint
CLEAN = oracle.all_states(N)


def tables():
    """Consistent conditionals, and a random table whose conditionals are those of no joint."""
    table = np.log(np.maximum(oracle.Oracle("absorbing", seed=3).conditional(), 1e-30))
    padded = np.concatenate([table, np.zeros((*table.shape[:2], 1))], -1)
    return {"consistent": padded, "random": oracle.random_table(seed=5, scale=1.5)}


TABLES = tables()
both = pytest.mark.parametrize("name", TABLES)


@functools.cache
def nats_of(name):
    """[N^L, 2^L, L]: -log c of each token of each clean sequence, given each set of known ones."""
    logits = TABLES[name][..., :N]
    log_c = logits - special.logsumexp(logits, axis=-1, keepdims=True)
    known = np.array(list(itertools.product([False, True], repeat=L)))
    x_XSL = np.where(known[None], CLEAN[:, None], N)
    index_XS = oracle.state_index(x_XSL.reshape(-1, L), N + 1).reshape(x_XSL.shape[:2])
    rows_XSLN = log_c[index_XS]
    token_XSL1 = np.broadcast_to(CLEAN[:, None, :, None], (*x_XSL.shape, 1))
    return -np.take_along_axis(rows_XSLN, token_XSL1, -1)[..., 0]


def set_index(positions):
    return sum(1 << (L - 1 - i) for i in positions)


def expected(nats_XSL, parts):
    """Mean over the joint of the nats of positions that are revealed part by part."""
    known, total_X = [], np.zeros(len(CLEAN))
    for part in parts:
        total_X = total_X + nats_XSL[:, set_index(known)][:, list(part)].sum(1)
        known += part
    return JOINT.ravel() @ total_X


@functools.cache
def exact_sum(name, groups):
    """E_σ[-log ν_σ] over all orders of the positions, in nats of a sequence."""
    ends = np.cumsum((0, *groups))
    return np.mean(
        [
            expected(nats_of(name), [order[a:b] for a, b in itertools.pairwise(ends)])
            for order in itertools.permutations(range(L))
        ]
    )


@functools.cache
def exact_profile(name):
    """h(j): over all sets of j known positions and all others."""
    sets = [[s for s in itertools.product([0, 1], repeat=L) if sum(s) == j] for j in range(L)]
    nats_SL = np.einsum("x,xsl->sl", JOINT.ravel(), nats_of(name))
    return np.array(
        [
            np.mean(
                [
                    nats_SL[set_index(np.flatnonzero(s))][i]
                    for s in of_j
                    for i in range(L)
                    if not s[i]
                ]
            )
            for of_j in sets
        ]
    )


def price_with(nats_L, **fields):
    """A price whose h is known exactly."""
    size = len(nats_L)
    given = {
        "model": "m",
        "length": size,
        "known_J": np.arange(size),
        "nats_FJ": np.asarray(nats_L, float)[None],
        "covariance_JJ": np.zeros((size, size)),
        "num_sequences": 2,
        "draws": size,
    }
    return Price(**{**given, **fields})


def denoiser_of(name):
    return oracle.table_denoiser(TABLES[name], N)


def drawn(count, seed=0):
    """Sequences from the joint."""
    rng = np.random.default_rng(seed)
    return CLEAN[rng.choice(len(CLEAN), count, p=JOINT.ravel())].astype(np.int32)


def measured(name, x0_SL, *, seed=0, size=500):
    batches = ((rows, np.ones(rows.shape, bool)) for rows in np.split(x0_SL, len(x0_SL) // size))
    return measure_price(
        *(denoiser_of(name), SCHEDULE, jax.random.key(seed), batches),
        **{"model": "m", "length": L, "draws": 8},
    )


@functools.cache
def measured_once(name):
    return measured(name, drawn(2000))


# ---------------------------------------------------------------- the identity and its estimate


@both
@pytest.mark.parametrize("groups", COMPOSITIONS, ids=str)
def test_the_nats_of_groups_are_a_sum_over_the_profile(name, groups):
    """Exactly by enumeration; and as measured, within 4 of the reported standard errors."""
    exact = exact_sum(name, groups) / L
    value, error = price_with(exact_profile(name)).nats_per_token(groups)
    assert value == pytest.approx(exact, abs=1e-9)
    assert error == 0
    value, error = measured_once(name).nats_per_token(groups)
    assert error is not None
    assert abs(value - exact) < 4 * error
    assert error < 0.02


@both
def test_the_profile_is_measured(name):
    price = measured_once(name)
    assert (price.num_sequences, price.draws) == (2000, 8)
    assert (abs(price.nats_by_known - exact_profile(name)) < 4 * price.errors).all()
    assert (price.errors < 0.04).all()


def test_errors_of_sums_contain_the_covariances():
    """The spread of 150 measurements of 40 sequences is that which each of them reports."""
    prices = [
        measured("consistent", rows, seed=seed, size=40)
        for seed, rows in enumerate(np.split(drawn(6000, seed=1), 150))
    ]
    groups = [1, 1, 1, 1]
    spread = np.std([price.nats_per_token(groups).value for price in prices], ddof=1)
    reported = mean_error(price.nats_per_token(groups) for price in prices)
    # The relative error of a standard deviation of 150 values is 6 %.
    assert 0.76 < reported / spread < 1.24
    independent = np.mean([np.sqrt((price.errors**2).sum()) / L for price in prices])
    assert independent < 0.7 * spread
    excess = np.std([price.excess([2, 2]).value for price in prices], ddof=1)
    assert 0.76 < mean_error(price.excess([2, 2]) for price in prices) / excess < 1.24


def mean_error(figures):
    return np.mean([math.nan if error is None else error for _, error in figures])


def test_the_ends_are_the_bound_and_independent_positions():
    name = "random"
    x0_SL, price = drawn(2000), measured_once(name)
    bound = evaluate_bound(
        *(denoiser_of(name), SCHEDULE, jax.random.key(1)),
        [(rows, np.ones(rows.shape, bool)) for rows in np.split(x0_SL, 4)],
        draws=8,
    )
    value, error = price.nats_per_token([1] * L)
    # The same sequences, so that only the draws differ.
    assert abs(value - bound.nats_per_token) < 4 * math.sqrt(2) * bound.standard_error_draws
    assert error == pytest.approx(bound.standard_error, rel=0.1)
    index_S = oracle.state_index(x0_SL, N)
    independent = nats_of(name)[index_S, 0].mean()
    assert price.nats_per_token([L]).value == pytest.approx(independent, rel=1e-5)
    assert price.excess([1] * L) == (0, 0)


@pytest.mark.parametrize("schedule", [SCHEDULE, Cosine()], ids=["log_linear", "cosine"])
@pytest.mark.parametrize("intervals", [1, 2, 3])
def test_event_jump_over_all_assignments_to_intervals(schedule, intervals):
    name, price = "random", price_with(exact_profile("random"))
    alpha = np.exp(-np.asarray(schedule.sigma(1 - np.arange(intervals + 1) / intervals), float))
    share = np.diff((alpha - alpha[0]) / (alpha[-1] - alpha[0]))
    total = calls = 0.0
    for assignment in itertools.product(range(intervals), repeat=L):
        chance = np.prod(share[list(assignment)])
        parts = [[i for i in range(L) if assignment[i] == b] for b in range(intervals)]
        total += chance * expected(nats_of(name), parts)
        calls += chance * len(set(assignment))
    assert price.event_jump(schedule, intervals).value == pytest.approx(total / L, rel=1e-5)
    assert price.event_jump_calls(schedule, intervals) == pytest.approx(calls, rel=1e-5)


def test_no_more_than_some_levels_are_measured_and_the_others_lie_between():
    assert levels(9, 9).tolist() == list(range(9))
    assert levels(LEVELS, 4 * LEVELS).tolist() == list(range(LEVELS))
    for length, draws in ((100, 64), (1024, 16), (1024, 4096)):
        known = levels(length, draws)
        assert (known[0], known[-1]) == (0, length - 1)
        assert (np.diff(known) > 0).all()
        assert draws // 2 <= len(known) <= draws or len(known) >= LEVELS // 2
    known = levels(300, 16)
    covariance = np.diag(np.arange(1.0, len(known) + 1))
    line = price_with(
        np.zeros(300), known_J=known, nats_FJ=5 - known[None] / 100, covariance_JJ=covariance
    )
    np.testing.assert_allclose(line.nats_by_known, 5 - np.arange(300) / 100)
    np.testing.assert_allclose(line.errors[known] ** 2, np.diag(covariance))
    middle = (known[-2] + known[-1]) // 2
    right = (middle - known[-2]) / (known[-1] - known[-2])
    last = len(known)
    between = (1 - right) ** 2 * (last - 1) + right**2 * last
    assert line.errors[middle] ** 2 == pytest.approx(between)


# ---------------------------------------------------------------- plans


def cost(nats, sizes, start=0):
    known = start + np.cumsum([0, *sizes[:-1]])
    return float(np.dot(sizes, np.asarray(nats)[known]))


def best_cost(nats, calls, start=0):
    """By brute force over all groups of the positions from ``start`` on."""
    size = len(nats)
    cuts = itertools.combinations(range(start + 1, size), calls - 1)
    return min(cost(nats, np.diff([start, *cut, size]), start) for cut in cuts)


@pytest.mark.parametrize("length", [1, 2, 5, 9])
@pytest.mark.parametrize("decimals", [12, 0], ids=["distinct", "ties"])
def test_a_plan_is_the_best_of_all_groups(length, decimals):
    rng = np.random.default_rng(length)
    nats = tuple(np.sort(rng.exponential(2.0, length).round(decimals))[::-1].tolist())
    for calls in range(1, length + 1):
        sizes = group_sizes(nats, calls)
        assert (len(sizes), sum(sizes), min(sizes) > 0) == (calls, length, True)
        assert cost(nats, sizes) == pytest.approx(best_cost(nats, calls), abs=1e-9)
        for start in range(length):  # some are given
            known = [start]
            for next_N in next_known(nats, calls)[::-1]:
                known.append(int(next_N[known[-1]]))
            assert known[-1] == length
            sizes = [size for size in np.diff(known) if size]
            assert len(sizes) == min(calls, length - start)
            best = best_cost(nats, len(sizes), start)
            assert cost(nats, sizes, start) == pytest.approx(best, abs=1e-9)


def test_a_plan_is_that_of_the_closest_falling_curve():
    nats = np.array([3.0, 2.0, 2.6, 1.0, 1.2, 0.3])
    price = price_with(nats)
    fit = np.array(price.profile.nats_L)
    assert (np.diff(fit) <= 0).all()
    # Pools of neighbours take their mean, weighted by the number of unknown tokens.
    np.testing.assert_allclose(fit[1:3], (5 * 2.0 + 4 * 2.6) / 9)
    np.testing.assert_allclose(fit[3:5], (3 * 1.0 + 2 * 1.2) / 5)
    np.testing.assert_allclose(fit[[0, 5]], nats[[0, 5]])
    for calls in range(1, 7):
        assert cost(fit, price.plan(calls)) == pytest.approx(best_cost(fit, calls))


def test_a_plan_is_not_priced_on_the_sequences_that_chose_it():
    """All plans cost the same if h is flat; the best of noisy ones seems to cost less."""
    rng = np.random.default_rng(0)
    size, folds, calls = 12, 8, 4
    crossed, own = [], []
    for _ in range(300):
        nats_FJ = 2 + 0.1 * rng.standard_normal((folds, size))
        noise = {"covariance_JJ": 0.01 / folds * np.eye(size), "num_sequences": 8 * folds}
        price = price_with(np.zeros(size), nats_FJ=nats_FJ, **noise)
        crossed.append(price.plan_nats(calls))
        own.append(price.nats_per_token(price.plan(calls)).value)
    values = np.array([value for value, _ in crossed])
    spread = values.std(ddof=1)
    assert abs(values.mean() - 2) < 4 * spread / math.sqrt(300)
    assert 0.8 < np.mean([error for _, error in crossed]) / spread < 1.2
    assert np.mean(own) < 2 - 10 * np.std(own) / math.sqrt(300)


@pytest.mark.parametrize("count", [1, 5, 8, 19])
def test_folds_together_are_all_sequences(count):
    price = measured("random", drawn(count), size=count)
    assert len(price.nats_FJ) == min(count, 8)
    np.testing.assert_allclose(price.plan_nats(L).value, price.nats_per_token([1] * L).value)
    np.testing.assert_allclose(price.plan_nats(1).value, price.nats_per_token([L]).value)
    np.testing.assert_allclose(price.plan_excess(1).value, price.excess([L]).value)
    assert (price.plan_nats(2).error is None) == (count == 1)
    crossed, own = price.plan_nats(1).error, price.nats_per_token([L]).error
    if crossed is None or own is None:
        assert crossed is own
    else:
        np.testing.assert_allclose(crossed, own)


def test_equal_groups():
    price = price_with(np.zeros(10))
    assert price.equal_groups(4) == [2, 2, 3, 3]
    assert price.equal_groups(10) == [1] * 10


# ---------------------------------------------------------------- files and mistakes


def test_a_file_holds_the_price(tmp_path):
    price = measured_once("random")
    price.save(tmp_path / "price.json")
    loaded = Price.load(str(tmp_path / "price.json"))
    for field in dataclasses.fields(Price):
        np.testing.assert_array_equal(getattr(loaded, field.name), getattr(price, field.name))
    assert loaded.profile == price.profile
    single = measured("random", drawn(1), size=1)
    single.save(tmp_path / "price.json")
    loaded = Price.load(tmp_path / "price.json")
    assert loaded.nats_per_token([2, 2]) == (single.nats_per_token([2, 2]).value, None)
    assert np.isnan(loaded.errors).all()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        ("{", "not readable as JSON"),
        ("[]", "holds no price profile; evaluate.py --price 1 4 16 --json p.json writes one"),
        ("{}", "holds no price profile"),
        ({"known": []}, "holds no price profile"),
        ({"known": [0, 2, 1, 3]}, "holds no price profile"),
        ({"known": [0, 1, 2]}, "holds no price profile"),
        ({"nats": [1, 2, 1, 2]}, "holds no price profile"),
        ({"nats": [[1, 2]]}, "holds no price profile"),
        ({"nats": []}, "holds no price profile"),
        ({"num_sequences": 0}, "holds no price profile"),
        ({"nats": [[1, 2, math.nan, 0]]}, "holds no price profile"),
        ({"covariance": [1]}, "holds no price profile"),
        ({"length": 5}, "holds no price profile"),
    ],
    ids=str,
)
def test_a_file_that_is_no_profile(tmp_path, content, message):
    path = tmp_path / "p.json"
    if isinstance(content, dict):
        content = json.dumps({"price": {**measured_once("random").to_json(), **content}})
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=f"p.json: {message}"):
        Price.load(path)


def test_mistakes():
    price = price_with(np.ones(4))
    for groups in ([2, 1], [0, 4], [], [-1, 5]):
        with pytest.raises(FieldError, match="groups must be sizes of at least 1 with the sum 4"):
            price.nats_per_token(groups)
    for call in (price.plan, price.equal_groups):
        for calls in (0, 5):
            with pytest.raises(FieldError, match=f"calls must be from 1 to 4, .* got {calls}"):
                call(calls)
    with pytest.raises(FieldError, match="intervals must be from 1 to 4"):
        price.event_jump(SCHEDULE, 0)
    x0_SL = drawn(1)
    scored_SL = np.ones(x0_SL.shape, bool)
    key = jax.random.key(0)
    known = {"model": "m", "length": L}
    with pytest.raises(FieldError, match="draws must be at least 2, got 1"):
        measure_price(denoiser_of("random"), SCHEDULE, key, [], draws=1, **known)
    with pytest.raises(ValueError, match="no sequence"):
        measure_price(denoiser_of("random"), SCHEDULE, key, [], draws=8, **known)
    scored_SL[0, 1] = False
    batches = [(x0_SL, scored_SL)]
    with pytest.raises(UserError, match="some rows have padding or given tokens"):
        measure_price(denoiser_of("random"), SCHEDULE, key, batches, draws=8, **known)


def test_models_without_a_price():
    world = oracle.Oracle("absorbing", seed=3)
    timed = Conditional(process=Absorbing(num_tokens=N), time_independent=False)
    for denoiser, message in (
        (world.autoregressive_denoiser(), "an autoregressive model has no price of parallelism"),
        (world.score_denoiser(), "needs a time-independent absorbing model"),
        (oracle.Oracle("uniform").score_denoiser(), "needs a time-independent absorbing model"),
        (
            dataclasses.replace(denoiser_of("random"), parameterization=timed),
            "needs a time-independent absorbing model",
        ),
    ):
        with pytest.raises(UserError, match=message):
            measure_price(
                *(denoiser, SCHEDULE, jax.random.key(0), []),
                **{"model": "m", "length": L, "draws": 8},
            )

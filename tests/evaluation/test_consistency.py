"""Joints of a pair from its conditionals: all one joint where there is one, and known where not."""

import json
import math

import jax
import numpy as np
import oracle
import pytest
from oracle import L, N

from sedd.evaluation.consistency import consistency
from sedd.evaluation.consistency_report import ORDER_MEASURES
from sedd.evaluation.joints import arnold_gokhale, arnold_gokhale_step, besag, pair_joints

RIGHT = ("chain_ab", "chain_ba", "hcb", "arnold_gokhale")  # for the conditionals of one joint


def normalised(weights, axis=None):
    return weights / weights.sum(axis, keepdims=True)


def conditionals(joint):
    """log p(a | b), log p(b | a), log p(a), log p(b)"""
    return tuple(
        np.log(x) for x in (normalised(joint, 0), normalised(joint, 1), joint.sum(1), joint.sum(0))
    )


def entropy(p):
    return -(p * np.log(p)).sum()


def kl(p, q):
    return (p * np.log(p / q)).sum()


def variation(log_p, log_q):
    return oracle.total_variation(np.exp(log_p), np.exp(log_q))


def random_joint(seed, shape=(5, 7), spread=2.0):
    return normalised(np.exp(spread * np.random.default_rng(seed).standard_normal(shape)))


def disagreeing(seed, shape=(5, 7)):
    """Conditionals of two joints."""
    given_b, _, log_a, _ = conditionals(random_joint(seed, shape))
    _, given_a, _, log_b = conditionals(random_joint(seed + 100, shape))
    return given_b, given_a, log_a, log_b


# ---------------------------------------------------------------- constructions


@pytest.mark.parametrize("seed", range(4))
def test_conditionals_of_one_joint_give_it_back(seed):
    joint = random_joint(seed)
    joints = pair_joints(*conditionals(joint))
    for name in RIGHT:
        np.testing.assert_allclose(joints[name], np.log(joint), atol=1e-9, err_msg=name)
    # A product is another joint even then.
    product = normalised(joint**2 / joint.sum(1, keepdims=True) / joint.sum(0))
    np.testing.assert_allclose(joints["mrf"], np.log(product), atol=1e-9)
    assert variation(joints["mrf"], np.log(joint)) > 0.05
    independent = joint.sum(1, keepdims=True) * joint.sum(0)
    np.testing.assert_allclose(joints["independent"], np.log(independent), atol=1e-9)


def test_a_grid_is_a_part_of_all_tokens():
    """Every joint but Arnold–Gokhale's, whose objective is of the grid, is the larger one's."""
    given_b, given_a, log_a, log_b = disagreeing(0, (6, 6))
    whole = pair_joints(given_b, given_a, log_a, log_b)
    a, b = [0, 2, int(log_a.argmax())], [1, 3, 4]
    cut = np.ix_(a, b)
    part = pair_joints(given_b[cut], given_a[cut], log_a[a], log_b[b])
    for name in set(whole) - {"arnold_gokhale"}:
        expected = normalised(np.exp(whole[name][cut]))
        np.testing.assert_allclose(np.exp(part[name]), expected, atol=1e-12, err_msg=name)


def test_two_by_two_by_hand():
    """p(a | b) does not depend on b, p(b | a) prefers b = a."""
    given_b = np.log(np.full((2, 2), 0.5))
    given_a = np.log([[0.8, 0.2], [0.2, 0.8]])
    even = np.log([0.5, 0.5])
    logits = given_b + np.array([1.0, 0.0]), given_a  # a constant for each b: p(a | b) as it was
    joints = pair_joints(given_b, given_a, even, even, logits=logits)
    e = math.e
    expected = {
        "independent": [[0.25, 0.25], [0.25, 0.25]],
        "chain_ab": [[0.4, 0.1], [0.1, 0.4]],
        "chain_ba": [[0.25, 0.25], [0.25, 0.25]],
        "mrf": [[0.4, 0.1], [0.1, 0.4]],
        "mrf_logit": normalised(np.array([[0.8 * e, 0.2], [0.2 * e, 0.8]])),
        "hcb": [[0.4, 0.1], [0.4, 0.1]],
        "arnold_gokhale": [[0.325, 0.175], [0.175, 0.325]],
    }
    assert joints.keys() == expected.keys()
    for name, joint in joints.items():
        np.testing.assert_allclose(np.exp(joint), expected[name], atol=1e-12, err_msg=name)
    np.testing.assert_allclose(np.exp(besag(given_b, given_a, 1)), [[0.1, 0.4], [0.1, 0.4]])


@pytest.mark.parametrize("seed", range(4))
def test_besag_does_not_depend_on_its_pivot_where_conditionals_agree_and_only_there(seed):
    agree = [besag(*conditionals(random_joint(seed))[:2], pivot) for pivot in range(5)]
    differ = [besag(*disagreeing(seed)[:2], pivot) for pivot in range(5)]
    assert max(variation(agree[0], joint) for joint in agree) < 1e-12
    assert min(variation(differ[0], joint) for joint in differ[1:]) > 0.01


# ---------------------------------------------------------------- Arnold–Gokhale


def divergence(given_b, given_a, joint):
    """Σ KL(given conditional ‖ joint's) over all contexts."""
    by_b, by_a = np.exp(given_b), np.exp(given_a)
    return (by_b * (given_b - np.log(normalised(joint, 0)))).sum() + (
        by_a * (given_a - np.log(normalised(joint, 1)))
    ).sum()


@pytest.mark.parametrize("seed", range(4))
def test_the_published_iteration_descends_to_what_newton_finds(seed):
    given_b, given_a, _, _ = disagreeing(seed)
    found = np.exp(arnold_gokhale(given_b, given_a))
    least = divergence(given_b, given_a, found)
    assert least > 0.1
    weight = np.exp(given_b) + np.exp(given_a)
    joint, values = np.full(weight.shape, 1 / weight.size), []
    for _ in range(3000):
        values.append(divergence(given_b, given_a, joint))
        joint = arnold_gokhale_step(weight, joint)
    assert (np.diff(values) < 1e-12).all()
    assert values[0] > values[10] + 0.1
    assert (np.array(values) > least - 1e-12).all()
    # It comes as close as 1 over the square of its steps, or faster.
    assert values[-1] - least < 1e-6
    assert oracle.total_variation(joint, found) < 1e-3
    # No joint nearby is closer.
    rng = np.random.default_rng(seed)
    for scale in (1e-3, 1e-1, 1.0):
        other = normalised(found * np.exp(scale * rng.standard_normal(found.shape)))
        assert divergence(given_b, given_a, other) > least


def test_tokens_that_hardly_occur_do_not_stop_it():
    """Probabilities down to e^-400, as a peaked model gives them."""
    given_b, given_a, _, _ = disagreeing(7, (40, 40))
    rng = np.random.default_rng(0)
    given_b = given_b - 400 * rng.random(40)[:, None] ** 4
    given_b -= np.log(np.exp(given_b).sum(0))
    given_a = given_a - 400 * rng.random(40) ** 4
    given_a -= np.log(np.exp(given_a).sum(1, keepdims=True))
    joint = np.exp(arnold_gokhale(given_b, given_a))
    moved = arnold_gokhale_step(np.exp(given_b) + np.exp(given_a), joint)
    assert oracle.total_variation(moved, joint) < 1e-12


# ---------------------------------------------------------------- of a model

X0 = np.random.default_rng(0).integers(0, N, (9, L))
SCORED = np.ones(X0.shape, bool)
HERE = oracle.Oracle("absorbing", seed=3)


def measure(denoiser, **options):
    options = {"pairs": 20, "distance": None, "batch_size": 16} | options
    return consistency(denoiser, X0, SCORED, jax.random.key(0), **options)


def true_pair_nats(row, a, b):
    """-log p(true pair | the rest), by the oracle's joint."""
    x = X0[row]
    index = tuple(slice(None) if i in (a, b) else x[i] for i in range(L))
    return -np.log(normalised(HERE.joint[index])[x[a], x[b]])


@pytest.mark.parametrize(
    ("denoiser", "precision"),
    [(HERE.conditional_denoiser(), 1e-6), (HERE.score_denoiser(), 1e-4)],
    ids=["conditional", "score"],
)
def test_an_exact_model_is_consistent(denoiser, precision):
    """The network computes in float32; a score is a difference of two logs of larger sums."""
    result = measure(denoiser)
    assert len({tuple(p) for p in result.positions}) == 20
    exact = np.array([true_pair_nats(*position) for position in result.positions])
    for j, name in enumerate(result.joints):
        if name in RIGHT:
            assert result.kl_all[:, j].max() < precision, name
            np.testing.assert_allclose(result.pairwise_nats[:, j], exact, atol=10 * precision)
            assert result.distances[:, 0, j].max() > 0.05  # from the independent one
    places = [result.joints.index(name) for name in RIGHT]
    assert result.distances[:, places][:, :, places].max() < precision
    assert result.orders.keys() == ORDER_MEASURES.keys()
    for name in set(ORDER_MEASURES) - {"max_log_ratio", "true_pair"}:
        assert result.orders[name].max() < precision, name
    np.testing.assert_allclose(result.coverage, 1, atol=precision)
    assert result.exact
    # What is not one of them is found out.
    assert result.kl_all[:, result.joints.index("mrf")].mean() > 0.01
    assert (result.sigma is None) == denoiser.time_independent


def test_a_model_that_is_not():
    """Against the table itself: the right rows are read, for the right positions and tokens."""
    table = oracle.random_table(seed=5, scale=1.5)
    result = measure(oracle.table_denoiser(table, N), distance=1)
    assert (np.diff(result.positions[:, 1:]) == 1).all()

    def log_c(x, position):
        logits = table[oracle.state_index(x, N + 1), position, :N]
        return logits - np.log(np.exp(logits).sum()), logits

    def put(x, **tokens):
        x = x.copy()
        for position, token in tokens.values():
            x[position] = token
        return x

    for p, (row, a, b) in enumerate(result.positions):
        x = X0[row]
        both = put(x, a=(a, N), b=(b, N))
        by_b = [log_c(put(x, a=(a, N), b=(b, token)), a) for token in range(N)]
        by_a = [log_c(put(x, a=(a, token), b=(b, N)), b) for token in range(N)]
        joints = pair_joints(
            np.stack([c for c, _ in by_b], 1),
            np.stack([c for c, _ in by_a], 0),
            log_c(both, a)[0],
            log_c(both, b)[0],
            logits=(np.stack([c for _, c in by_b], 1), np.stack([c for _, c in by_a], 0)),
        )
        nats = [-joint[x[a], x[b]] for joint in joints.values()]
        np.testing.assert_allclose(result.pairwise_nats[p], nats, atol=1e-5)
        own = -(by_b[x[b]][0][x[a]] + by_a[x[a]][0][x[b]]) / 2
        np.testing.assert_allclose(result.model_unary_nats[p], own, atol=1e-5)
        expected = variation(joints["chain_ab"], joints["chain_ba"])
        np.testing.assert_allclose(result.orders["total_variation"][p], expected, atol=1e-6)
        ab, ba = np.exp(joints["chain_ab"]), np.exp(joints["chain_ba"])
        spread = entropy((ab + ba) / 2) - (entropy(ab) + entropy(ba)) / 2
        np.testing.assert_allclose(result.orders["jensen_shannon"][p], spread, atol=1e-6)
        for j, joint in enumerate(map(np.exp, joints.values())):
            kl_b = [kl(np.exp(by_b[t][0]), normalised(joint[:, t])) for t in range(N)]
            kl_a = [kl(np.exp(by_a[t][0]), normalised(joint[t])) for t in range(N)]
            at_true = (kl_b[x[b]] + kl_a[x[a]]) / 2
            np.testing.assert_allclose(result.kl_true[p, j], at_true, atol=1e-5)
            np.testing.assert_allclose(result.kl_all[p, j], np.mean([*kl_b, *kl_a]), atol=1e-5)
            given = normalised(joint[:, x[b]])[x[a]], normalised(joint[x[a]])[x[b]]
            np.testing.assert_allclose(result.unary_nats[p, j], -np.log(given).mean(), atol=1e-5)
    assert result.orders["total_variation"].min() > 0.01
    assert result.orders["jensen_shannon"].min() > 1e-4
    assert result.kl_all.min() > 1e-4
    assert (result.kl_true.mean(0) > 0.01).all()
    # Arnold and Gokhale's is the closest to all conditionals.
    best = result.joints.index("arnold_gokhale")
    assert (result.kl_all[:, best, None] <= result.kl_all + 1e-12).all()


def test_figures_of_two_by_two_by_hand():
    """The conditionals of `test_two_by_two_by_hand` as a model's, whose joints are known there.

    p(a | b) is (½, ½) and p(b | a) (0.8, 0.2) or its reverse; the true pair is a = 0, b = 1.
    """
    mask, table = 2, np.zeros((9, 2, 3))
    table[oracle.state_index([[0, mask], [1, mask]], 3), 1, :2] = np.log([[0.8, 0.2], [0.2, 0.8]])
    result = consistency(
        oracle.table_denoiser(table, 2),
        np.array([[0, 1]]),
        np.ones((1, 2), bool),
        jax.random.key(0),
        pairs=1,
    )
    log = math.log
    uneven_even = 0.8 * log(0.8 / 0.5) + 0.2 * log(0.2 / 0.5)  # KL((0.8, 0.2) ‖ (½, ½))
    even_uneven = 0.5 * log(0.5 / 0.8) + 0.5 * log(0.5 / 0.2)
    reversed_ = 0.8 * log(0.8 / 0.2) + 0.2 * log(0.2 / 0.8)
    fitted = (
        0.5 * log(0.5 / 0.65)
        + 0.5 * log(0.5 / 0.35)
        + 0.8 * log(0.8 / 0.65)
        + 0.2 * log(0.2 / 0.35)
    )
    # Of each joint: KL at the true token, KL over all four, -log of its conditionals, of the pair.
    independent = uneven_even / 2, 2 * uneven_even / 4, log(2), log(4)
    chain_ab = even_uneven / 2, 2 * even_uneven / 4, -log(0.2), -log(0.1)
    expected = {
        "independent": independent,
        "chain_ab": chain_ab,
        "chain_ba": independent,
        "mrf": chain_ab,
        "mrf_logit": chain_ab,
        "hcb": (0.0, reversed_ / 4, -(log(0.5) + log(0.2)) / 2, -log(0.1)),  # wrong at a = 1 alone
        "arnold_gokhale": (fitted / 2, fitted / 2, -log(0.35), -log(0.175)),
    }
    found = result.to_json()
    assert found["joints"].keys() == expected.keys()
    for name, (kl_true, kl_all, unary, pair) in expected.items():
        of = found["joints"][name]
        assert of["unary_kl_true"] == pytest.approx(kl_true, abs=1e-6), name
        assert of["unary_kl_all"] == pytest.approx(kl_all, abs=1e-6), name
        assert of["unary_perplexity"] == pytest.approx(math.exp(unary), rel=1e-6), name
        assert of["pairwise_perplexity"] == pytest.approx(math.exp(pair / 2), rel=1e-6), name
    assert found["model_unary_perplexity"] == pytest.approx((0.5 * 0.2) ** -0.5, rel=1e-6)
    # Between [[0.4, 0.1], [0.1, 0.4]] and 0.25 four times; their mean is 0.325 and 0.175.
    to_middle = 0.8 * log(0.4 / 0.325) + 0.2 * log(0.1 / 0.175)
    even_to_middle = 0.5 * log(0.25 / 0.325) + 0.5 * log(0.25 / 0.175)
    orders = {
        "total_variation": 0.3,
        "jensen_shannon": (to_middle + even_to_middle) / 2,
        "kl_ab_ba": uneven_even,
        "kl_ba_ab": even_uneven,
        "true_pair": log(2.5),
        "max_log_ratio": log(2.5),
    }
    assert found["orders"].keys() == orders.keys()
    for name, value in orders.items():
        assert found["orders"][name]["mean"] == pytest.approx(value, abs=1e-6), name


def test_the_likeliest_tokens():
    denoiser = HERE.conditional_denoiser()
    whole, all_three, two = (measure(denoiser, top=top) for top in (None, 3, 2))
    assert whole.to_json() == all_three.to_json()
    assert not two.exact
    assert two.num_tokens == 2
    assert two.coverage.max() < 1
    # Of one joint, a part is that of the joint: all agree, and the true pair is always in it.
    places = [two.joints.index(name) for name in RIGHT]
    assert two.distances[:, places][:, :, places].max() < 1e-6
    assert np.isfinite(two.pairwise_nats).all()
    assert (two.pairwise_nats[:, places] < whole.pairwise_nats[:, places]).all()
    assert "Approximate" in two.section().text
    assert "Approximate" not in whole.section().text


def test_what_is_not_scored_is_not_asked_for():
    scored = np.zeros_like(SCORED)
    scored[1, [0, 2]] = scored[2, 3] = True
    denoiser = HERE.conditional_denoiser()
    result = consistency(
        denoiser, X0, scored, jax.random.key(0), pairs=2, distance=None, batch_size=16
    )
    assert [tuple(p) for p in result.positions] == [(1, 0, 2), (1, 0, 2)]
    with pytest.raises(ValueError, match=r"pairs must be in \[1, 1\] .* got 2"):
        consistency(denoiser, X0, scored, jax.random.key(0), pairs=2, distance=2)


def test_mistakes():
    with pytest.raises(ValueError, match="mask"):
        measure(oracle.Oracle("uniform").score_denoiser())
    for wrong, message in (({"distance": 0}, "distance"), ({"top": 1}, "top must be in")):
        with pytest.raises(ValueError, match=message):
            measure(HERE.conditional_denoiser(), **wrong)


def test_the_report():
    result = measure(HERE.score_denoiser(), sigma=0.7)
    section = result.section()
    assert "20 pairs" in section.text
    assert "σ = 0.7" in section.text
    assert [len(table.rows) for table in section.tables] == [8, len(ORDER_MEASURES)]
    assert json.loads(json.dumps(result.to_json()))["joints"].keys() == set(result.joints)
    one = measure(HERE.score_denoiser(), sigma=0.7, pairs=1)
    assert json.loads(json.dumps(one.to_json(), allow_nan=False))["num_pairs"] == 1
    assert "–" in one.section().tables[1].markdown()  # one pair has no error

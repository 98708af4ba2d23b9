"""Control against enumeration: λ, the law of each way to draw, the figures and their errors."""

import functools
import itertools

import numpy as np
import oracle
import pytest
from oracle import L, N
from scipy.optimize import fsolve
from scipy.special import logit, logsumexp, rel_entr
from tiers import nightly

import sedd
from sedd.control.draws import PENALTY, Drawing, Proposals, score_of
from sedd.control.features import Features
from sedd.control.law import solve
from sedd.errors import UserError
from sedd.samplers.event_jump import EventJump
from sedd.samplers.particle import Particle
from sedd.samplers.tweedie import Tweedie
from sedd.schedules import LogLinear

NOISE = LogLinear()
TOTAL = 10_000  # of the counts that stand for a law


@functools.cache
def world():
    return oracle.Oracle("absorbing", seed=3)


CLEAN = oracle.all_states(N)
FEATURES = {  # of all texts: two properties, and a number between 0 and 1
    "first": (CLEAN[:, 0] == 0).astype(float),
    "equal": (CLEAN[:, 1] == CLEAN[:, 2]).astype(float),
    "twos": (CLEAN == 2).mean(1),
}
F_ALL = np.stack(list(FEATURES.values()), 1)


@functools.cache
def joint():
    """[N^L]"""
    return world().joint.ravel()


def counted(law):
    """Whole numbers of draws of each text in proportion to a law, and the law that they are."""
    counts = np.maximum(np.round(law * TOTAL), 0).astype(int)
    return counts, counts / counts.sum()


def exactly(features, moments, law):
    """λ by another solver, from the enumerated equations."""

    def gap(weights):
        tilted = law * np.exp(features @ weights)
        return tilted @ features / tilted.sum() - moments

    found, _, converged, _ = fsolve(gap, np.zeros(len(moments)), full_output=True, xtol=1e-13)
    assert converged == 1
    return found


def tilted(weights, law, features=F_ALL):
    p = law * np.exp(features @ weights)
    return p / p.sum()


# ---------------------------------------------------------------- λ


@pytest.mark.parametrize("columns", [[0], [1, 2], [0, 1, 2]])
@pytest.mark.parametrize("shift", [-0.15, 0.2])
def test_weights_are_those_of_the_enumerated_law(columns, shift):
    counts, law = counted(joint())
    features = F_ALL[:, columns]
    moments = np.clip(law @ features + shift, 0.05, 0.95)
    control = sedd.control.solve(np.repeat(features, counts, 0), moments)
    np.testing.assert_allclose(control.weights, exactly(features, moments, law), atol=1e-6)
    p = tilted(control.weights, law, features)
    np.testing.assert_allclose(p @ features, moments, atol=1e-8)
    assert control.kl == pytest.approx(rel_entr(p, law).sum(), abs=1e-8)
    assert control.log_partition == pytest.approx(
        logsumexp(features @ control.weights, b=law), abs=1e-10
    )
    assert control.ess == pytest.approx(counts.sum() / (p**2 / np.maximum(law, 1e-99)).sum())


def test_the_weight_of_one_property_is_known():
    counts, law = counted(joint())
    feature = FEATURES["first"][:, None]
    m, wanted = float(law @ feature[:, 0]), 0.7
    control = solve(np.repeat(feature, counts, 0), [wanted])
    assert control.weights[0] == pytest.approx(logit(wanted) - logit(m), abs=1e-9)
    kl = wanted * np.log(wanted / m) + (1 - wanted) * np.log((1 - wanted) / (1 - m))
    assert control.kl == pytest.approx(kl, abs=1e-9)


@pytest.mark.parametrize("value", [1, 0])
def test_a_condition_restricts_the_law(value):
    counts, law = counted(joint())
    kept = FEATURES["first"] == value
    within = np.where(kept, law, 0) / law[kept].sum()
    wanted = float(within @ FEATURES["twos"]) + 0.1
    features = F_ALL[:, [0, 2]]
    control = solve(np.repeat(features, counts, 0), [value, wanted])
    assert control.weights[0] == (np.inf if value else -np.inf)
    np.testing.assert_array_equal(control.conditions, [True, False])
    inside = exactly(features[:, 1:], [wanted], within)
    np.testing.assert_allclose(control.weights[1:], inside, atol=1e-6)
    p = within * np.exp(features[:, 1] * inside)
    assert control.kl == pytest.approx(rel_entr(p / p.sum(), law).sum(), abs=1e-8)
    assert np.isneginf(control.log_weights(features)[~kept]).all()


def test_features_that_depend_on_each_other_share_their_weight():
    """A feature, its opposite and a constant: only one direction has an effect."""
    counts, law = counted(joint())
    first = FEATURES["first"]
    features = np.stack([first, 1 - first, np.full_like(first, 0.5)], 1)
    control = solve(np.repeat(features, counts, 0), [0.7, 0.3, 0.5])
    p = tilted(control.weights, law, features)
    assert p @ first == pytest.approx(0.7, abs=1e-9)
    assert control.weights[2] == 0
    alone = solve(np.repeat(features[:, :1], counts, 0), [0.7])
    assert control.kl == pytest.approx(alone.kl)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_the_scale_of_a_feature_does_not_matter(scale):
    counts, law = counted(joint())
    feature = scale * (3 + FEATURES["twos"])[:, None]
    wanted = float(law @ feature[:, 0] + 0.2 * scale)
    control = solve(np.repeat(feature, counts, 0), [wanted])
    assert tilted(control.weights, law, feature) @ feature[:, 0] == pytest.approx(wanted, rel=1e-9)


def test_draws_of_another_law_determine_the_same_control():
    """λ, the figures and the picks are those of a, though the draws are of q."""
    _, law = counted(joint())
    proposed = tilted(np.array([1.0, -0.5, 2.0]), np.full_like(law, 1 / len(law)))
    counts, proposed = counted(np.where(law > 0, proposed, 0))
    seen = counts > 0
    a = np.where(seen, law, 0)
    a /= a.sum()
    moments = np.clip(a @ F_ALL + 0.1, 0.05, 0.95)
    ratio_K = np.repeat(np.log(a[seen] / proposed[seen]), counts[seen])
    features_KF = np.repeat(F_ALL, counts, 0)
    control = solve(features_KF, moments, log_ratio_K=ratio_K)
    np.testing.assert_allclose(control.weights, exactly(F_ALL, moments, a), atol=1e-6)
    p = tilted(control.weights, a)
    assert control.kl == pytest.approx(rel_entr(p, a).sum(), abs=1e-8)
    np.testing.assert_allclose(control.base, a @ F_ALL, atol=1e-9)
    found = sedd.control.estimate(control, features_KF, log_ratio_K=ratio_K)
    np.testing.assert_allclose(found.moments, moments, atol=1e-8)
    np.testing.assert_allclose(found.base, a @ F_ALL, atol=1e-9)
    assert found.kl == pytest.approx(rel_entr(p, a).sum(), abs=1e-8)
    assert found.proposal_kl == pytest.approx(rel_entr(p, proposed).sum(), abs=1e-8)
    # The control: without the ratio, λ would be that of another law.
    assert abs(solve(features_KF, moments).weights - control.weights).max() > 0.1
    rng = np.random.default_rng(0)
    picked = sedd.control.resample(control, features_KF, 20_000, rng, ratio_K)
    state_K = np.repeat(np.arange(len(law)), counts)
    assert oracle.chi_square_p(np.bincount(state_K[picked], minlength=len(law)), p) > 1e-4


# ---------------------------------------------------------------- mistakes

A = np.array([0, 0, 1, 1, 0, 1.0])
B = np.array([1, 1, 0, 0, 1, 0.0])
LENGTH = np.array([3, 4, 5, 6, 7, 8.0])


@pytest.mark.parametrize(
    ("columns", "moments", "message"),
    [
        ({"a": A}, [0.5, 0.5], "there are 1 features (a) and 2 moments"),
        ({"a": A}, [np.nan], "the moment of feature a must be finite, got nan"),
        ({"a": A, "b": np.where(A, np.inf, 0)}, [0.5, 0.5], "feature b must be finite, got inf"),
        ({"a": A, "b": 0 * A}, [0.5, 0.5], "feature b is 0 in all 6 texts: its mean cannot become"),
        ({"a": 0 * A}, [1], "feature a is 0 in all 6 texts: its mean cannot become 1"),
        ({"a": A}, [1.2], "feature a is between 0 and 1 in all 6 texts: its mean cannot become"),
        ({"long": LENGTH}, [8], "feature long is between 3 and 8 in all 6 texts: its mean cannot"),
        ({"a": A, "b": B}, [1, 1], "none of the 6 texts has a = 1 and b = 1"),
        ({"a": A, "b": B}, [1, 0.5], "feature b is 0 in all 3 texts that meet the conditions"),
        (
            {"a": A, "b": B},
            [0.5, 0.6],
            "the means a = 0.5, b = 0.6 cannot be met together by weights",
        ),
        ({"a": A, "b": B, "long": LENGTH}, [0.5, 0.6, 5], "the means a = 0.5, b = 0.6 cannot"),
        ({"a": A, "long": LENGTH}, [0.5, 7.8], "the means a = 0.5, long = 7.8 cannot be met"),
    ],
)
def test_moments_that_cannot_be_met_are_named(columns, moments, message):
    with pytest.raises(UserError) as error:
        solve(np.stack(list(columns.values()), 1), moments, list(columns))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_control_moments_beside_those_can_be_met():
    for columns, moments in [((A, B), [0.4, 0.6]), ((A, LENGTH), [0.5, 7.0])]:
        features = np.stack(columns, 1)
        control = solve(features, moments)
        w = np.exp(control.log_weights(features))
        np.testing.assert_allclose(w @ features / w.sum(), moments, atol=1e-8)


def test_a_feature_that_fails():
    def length(texts):
        return [len(text) for text in texts]

    good = Features({"length": length})
    np.testing.assert_array_equal(good(["a", "bcd"]), [[1], [3]])
    for function, message in [
        (lambda texts: 1 / 0, "feature bad raised ZeroDivisionError: division by zero"),
        (
            lambda texts: [np.nan] * len(texts),
            "feature bad: a value must be finite, got nan for 'a'",
        ),
        (lambda texts: [1.0], "feature bad must return one value a text, 2 in all"),
    ]:
        with pytest.raises(UserError, match=message):
            Features({"length": length, "bad": function})(["a", "bcd"])


# ---------------------------------------------------------------- laws of draws


@functools.cache
def exact_control(columns=(0, 2), moments=(0.75, 0.45)):
    counts, _ = counted(joint() * 20)  # fine enough that λ is that of the joint itself
    return solve(np.repeat(F_ALL[:, columns], counts, 0), moments)


@functools.cache
def proposals(count, sampler=None, seed=5):
    """Indices into CLEAN of draws of a sampler."""
    sampler = sampler or EventJump(schedule=NOISE)
    denoiser = world().conditional_denoiser()
    samples = oracle.draw(sampler, denoiser, count, seed=seed, trace=False)
    return oracle.state_index(np.asarray(samples.tokens_BL), N)


def rejected(control, drawn, columns=(0, 2), log_beta=None, seed=0):
    uniform = np.random.default_rng(seed).random(len(drawn))
    return drawn[sedd.control.reject(control, F_ALL[drawn][:, columns], uniform, log_beta)]


def histogram(drawn):
    return np.bincount(drawn, minlength=N**L)


def test_rejection_draws_from_the_tilted_joint():
    control = exact_control()
    kept = rejected(control, proposals(30_000))
    law = tilted(control.weights, joint(), F_ALL[:, [0, 2]])
    assert oracle.chi_square_p(histogram(kept), law) > 1e-4
    assert oracle.chi_square_p(histogram(kept), joint()) < 1e-4  # negative control


@pytest.mark.nightly
def test_rejection_at_full_size():
    """Within .01 total variation of the tilted joint at 1e5 draws."""
    control = exact_control((1,), (0.8,))
    rounds = (rejected(control, proposals(30_000, seed=s), [1], seed=s) for s in range(14))
    kept = np.concatenate(list(rounds))[:100_000]
    assert len(kept) == 100_000
    law = tilted(control.weights, joint(), F_ALL[:, [1]])
    distance = oracle.total_variation(histogram(kept) / 100_000, law)
    print(f"\ntotal variation at 100,000 draws: {distance:.4f}")
    assert distance < 0.01


def test_acceptance_is_the_share_over_the_wanted_share():
    """m/μ for one property, within 3σ of a binomial."""
    counts, _ = counted(joint())
    m, wanted = float(joint() @ FEATURES["equal"]), 0.8
    control = solve(np.repeat(F_ALL[:, [1]], counts, 0), [wanted])
    drawn = proposals(30_000)
    share = len(rejected(control, drawn, [1])) / len(drawn)
    expected = m / wanted
    assert abs(share - expected) < 3 * np.sqrt(expected * (1 - expected) / len(drawn))
    found = sedd.control.estimate(control, F_ALL[drawn][:, [1]])
    assert found.acceptance is not None
    assert abs(found.acceptance - expected) < 3 * found.acceptance_error


@pytest.mark.nightly
def test_any_sampler_may_propose():
    """The density of an approximate sampler cancels: here two leaps of Tweedie."""
    steps = oracle.tau_leaping_law(world(), oracle.SCHEDULES["log_linear"], 2, "tweedie")
    law = steps[(world().states < N).all(1)]
    assert oracle.total_variation(law, joint()) > 0.02
    counts, _ = counted(law * 20)
    control = solve(np.repeat(F_ALL[:, [1]], counts, 0), [0.7])
    drawn = oracle.draw(
        Tweedie(schedule=NOISE, steps=2), world().score_denoiser(), 20_000, seed=2, trace=False
    )
    kept = rejected(control, oracle.state_index(np.asarray(drawn.tokens_BL), N), [1])
    p = tilted(control.weights, law, F_ALL[:, [1]])
    assert oracle.chi_square_p(histogram(kept), p) > 1e-4
    wrong = tilted(control.weights, joint(), F_ALL[:, [1]])
    assert oracle.chi_square_p(histogram(kept), wrong) < 1e-4


@pytest.mark.parametrize("share", [0.3, 0.7])
def test_quasi_rejection_draws_from_the_clipped_law(share):
    """Proportional to min(exp(λ·φ), β) of the sampler's law."""
    control = exact_control()
    exponent = control.log_weights(F_ALL[:, [0, 2]])
    log_beta = exponent.min() + share * np.ptp(exponent)
    kept = rejected(control, proposals(30_000), log_beta=log_beta)
    clipped = joint() * np.exp(np.minimum(exponent, log_beta))
    assert oracle.chi_square_p(histogram(kept), clipped) > 1e-4
    assert oracle.chi_square_p(histogram(kept), joint() * np.exp(exponent)) < 1e-4


def test_resampling_draws_from_the_weighted_pool():
    control = exact_control()
    pool = proposals(30_000)[:500]
    picked = sedd.control.resample(
        control, F_ALL[pool][:, [0, 2]], 20_000, np.random.default_rng(0)
    )
    weight = np.exp(control.log_weights(F_ALL[pool][:, [0, 2]]))
    assert oracle.chi_square_p(np.bincount(picked, minlength=500), weight) > 1e-4
    assert oracle.chi_square_p(np.bincount(picked, minlength=500), np.ones(500)) < 1e-4


@pytest.mark.nightly
def test_particles_tend_to_the_law():
    """Nearer with 16 particles than with 2 by more than 3σ, for a rare pair of properties."""
    control = exact_control((0, 1), (0.9, 0.9))
    functions = {
        "first": lambda texts: [FEATURES["first"][int(text)] for text in texts],
        "equal": lambda texts: [FEATURES["equal"][int(text)] for text in texts],
    }
    score = score_of(control, Features(functions))

    def verifier(tokens_RL, real_RL):
        return score([str(i) for i in oracle.state_index(tokens_RL, N)]).astype(np.float32)

    law, distance = tilted(control.weights, joint(), F_ALL[:, :2]), []
    for particles in (2, 16):
        sampler = Particle(
            schedule=NOISE,
            inner=EventJump(schedule=NOISE),
            verifier=verifier,
            particles=particles,
            resample_every=1,
        )
        drawn = oracle.draw(sampler, world().conditional_denoiser(), 4000, seed=1, trace=False)
        share = histogram(oracle.state_index(np.asarray(drawn.tokens_BL), N)) / 4000
        distance.append(oracle.total_variation(share, law))
    assert distance[0] - distance[1] > 3 * 2**0.5 / (2 * 4000**0.5)


def test_a_missed_condition_costs_a_finite_penalty():
    counts, _ = counted(joint())
    control = solve(np.repeat(F_ALL[:, [0, 2]], counts, 0), [1, 0.4])
    features = Features(
        {"first": lambda t: [float(x) for x in t], "twos": lambda t: [0.5] * len(t)}
    )
    score = score_of(control, features)(["1", "0"])
    assert score[0] - score[1] == PENALTY
    assert np.isfinite(score).all()


# ---------------------------------------------------------------- figures


def test_the_curve_is_the_enumerated_one():
    """On counts that are a law, all three figures are exact."""
    counts, law = counted(joint())
    features = F_ALL[:, [0, 2]]
    control = solve(np.repeat(features, counts, 0), [0.75, 0.45])
    found = sedd.control.curve(control, np.repeat(features, counts, 0), points=9)
    exponent, p = features @ control.weights, tilted(control.weights, law, features)
    for at, log_beta in enumerate(found.log_beta):
        clipped = np.exp(np.minimum(exponent - log_beta, 0))
        q = law * clipped / (law @ clipped)
        assert found.acceptance[at] == pytest.approx(law @ clipped)
        assert found.total_variation[at] == pytest.approx(oracle.total_variation(p, q), abs=1e-10)
        assert found.kl[at] == pytest.approx(rel_entr(p, q).sum(), abs=1e-10)
    assert found.acceptance[0] == pytest.approx(1)
    assert found.total_variation[-1] == pytest.approx(0, abs=1e-12)
    assert (np.diff(found.acceptance) < 0).all()
    assert (np.diff(found.total_variation) < 0).all()
    allowed = found.total_variation[4]
    assert found.at_most(allowed) == found.log_beta[4]


def of_text(column):
    """A feature as a function on texts, which are numbers of enumerated texts here."""
    return lambda texts: [F_ALL[int(text), column] for text in texts]


def drawing(method, seed, *, columns=(0, 2), moments=(0.7, 0.4), num=150, pool=300):
    """The whole procedure, with numbers of enumerated texts in the place of texts."""
    rng = np.random.default_rng(seed)
    features = Features({str(column): of_text(column) for column in columns})
    batches = (rng.choice(N**L, size=100, p=joint()).tolist() for _ in itertools.count())
    uniforms = np.random.default_rng([seed, 1])
    run = Drawing(
        proposals=Proposals(batches, str, features),
        features=features,
        moments=np.array(moments),
        method=method,
        num=num,
        pool=pool,
        uniform=lambda one: uniforms.random(),
        rng=np.random.default_rng([seed, 2]),
    )
    return run, [one for batch in run.texts() for one in batch]


def calibrated(z_RF):
    """Of R runs 9 in 10 within 2 standard errors, and squares that average 1 as χ² does (4σ)."""
    within = (np.abs(z_RF) <= 2).mean(0)
    spread = 4 * np.sqrt(2 / len(z_RF))
    print(f"\nwithin 2 s.e.: {within}, mean square {(z_RF**2).mean(0)}")
    assert (within >= 0.9).all()
    assert (np.abs((z_RF**2).mean(0) - 1) < spread).all()


@pytest.mark.parametrize("method", ["reject", "resample"])
@pytest.mark.parametrize("runs", [100, nightly(1000)])
def test_moments_are_reached_within_their_errors(method, runs):
    """Of the texts, and of the law as the second pool shows it, in fresh runs."""
    texts, laws = [], []
    for seed in range(runs):
        run, _ = drawing(method, seed)
        texts.append((run.achieved - run.moments) / run.achieved_errors)
        laws.append((run.estimate.moments - run.moments) / run.estimate.errors)
    calibrated(np.array(texts))
    calibrated(np.array(laws))


def test_the_error_of_the_weights_is_a_part_of_the_stated_one():
    """Without it the errors of many texts of a small pool would be far too small."""
    z, without = [], []
    for seed in range(100):
        run, _ = drawing("reject", seed, pool=100, num=500)
        gap = run.achieved - run.moments
        z.append(gap / run.achieved_errors)
        without.append(gap / np.sqrt(run.estimate.variances / run.num))
    calibrated(np.array(z))
    assert (np.array(without) ** 2).mean() > 3


def test_errors_of_the_figures():
    """log Z, KL, and the moments of the model, against the enumerated ones of each run's law."""
    z = []
    for seed in range(100):
        run, _ = drawing("reject", seed, pool=400, num=1)
        p = tilted(run.control.weights, joint(), F_ALL[:, [0, 2]])
        log_z = logsumexp(F_ALL[:, [0, 2]] @ run.control.weights, b=joint())
        found = run.estimate
        base = (found.base - joint() @ F_ALL[:, [0, 2]]) / found.base_errors
        z.append(
            [
                (found.log_partition - log_z) / found.log_partition_error,
                (found.kl - rel_entr(p, joint()).sum()) / found.kl_error,
                *base,
            ]
        )
    calibrated(np.array(z))


def test_one_pool_flatters_and_two_do_not():
    """The draws that gave λ have the wanted moments always, which the law has not."""
    truth, of_one, of_two = [], [], []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        first, second = (F_ALL[rng.choice(N**L, size=60, p=joint())] for _ in range(2))
        control = solve(first, law_moments())
        p = tilted(control.weights, joint())
        truth.append(p @ F_ALL)
        of_one.append(sedd.control.estimate(control, first).moments)
        of_two.append(sedd.control.estimate(control, second).moments)
    truth, of_one, of_two = map(np.array, (truth, of_one, of_two))
    np.testing.assert_allclose(of_one, np.broadcast_to(law_moments(), of_one.shape), atol=1e-7)
    off = (truth - law_moments()).std(0)
    assert (off > 0.03).all()  # what one pool claims to be 0
    share = [np.corrcoef(truth[:, f], of_two[:, f])[0, 1] for f in range(3)]
    assert (
        min(share) > 0.2
    )  # the second pool sees a part of it; of one pool there is nothing to see


def law_moments():
    return joint() @ F_ALL + np.array([0.1, 0.1, -0.05])


# ---------------------------------------------------------------- the procedure


def test_the_first_pool_is_never_returned():
    run, texts = drawing("reject", 0, num=5)
    assert len(texts) == run.distinct == 5
    rng = np.random.default_rng(0)
    stream = np.concatenate([rng.choice(N**L, size=100, p=joint()) for _ in range(6)])
    uniform = np.random.default_rng([0, 1]).random(300)
    weight = run.control.log_weights(F_ALL[stream[300:]][:, [0, 2]]) - run.control.log_bound
    assert [one for one, _ in texts] == stream[300:][np.log(uniform) < weight][:5].tolist()


def test_more_proposals_are_drawn_when_the_pool_is_used_up():
    run, texts = drawing("reject", 0, num=400, pool=50)
    assert len(texts) == 400
    assert run.proposals.count > 400
    assert run.estimate.num == 50


def test_resampling_says_what_it_repeats():
    run, texts = drawing("resample", 0, num=400, pool=50)
    assert len(texts) == 400
    assert run.distinct <= 50
    assert run.proposals.count == 100


def test_quasi_rejection_keeps_its_total_variation():
    run, _ = drawing("qrs", 0, num=5)
    exponent = F_ALL[:, [0, 2]] @ run.control.weights
    q = joint() * np.exp(np.minimum(exponent, run.log_beta))
    p = tilted(run.control.weights, joint(), F_ALL[:, [0, 2]])
    assert run.log_beta < run.control.log_bound
    assert 0.02 < oracle.total_variation(q / q.sum(), p) < 0.08  # .05 as the pool estimates it
    assert run.estimate.acceptance > np.exp(run.estimate.log_partition - run.control.log_bound)


def test_rejection_refuses_features_beyond_1():
    for values in ([0.5, 1.5, 0.2], [-0.5, 0.5, 1.0]):
        control = solve(np.array(values)[:, None], [np.mean(values) + 0.1], ["long"])
        with pytest.raises(UserError, match=r"feature long is (1.5|-0.5) in a text, and exact"):
            sedd.control.reject(control, np.array(values)[:, None], np.zeros(3))
        assert len(sedd.control.reject(control, np.array(values)[:, None], np.zeros(3), 5.0)) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"method": "rejct"},
            "method must be one of reject, resample, qrs, particle, weigh, got 'rejct'",
        ),
        ({"pool": 1}, "pool must be at least 2, got 1"),
        ({"num": 0}, "num must be at least 1, got 0"),
        ({"moments": (0.5,)}, "moments must be one for each feature: there are 2 features"),
    ],
)
def test_arguments_out_of_range(changes, message):
    with pytest.raises(UserError, match=message):
        drawing(**{"method": "reject", "seed": 0, **changes})
